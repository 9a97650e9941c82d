//! Kills the daemon at every place that it reaches, in its recoveries too, and looks at what is left: nothing that was
//! acknowledged is lost, nothing is half-done, the ledger is what is there.
//!
//! ```text
//!   life 1, killed at place n ─► life 2, killed in its recovery ─► … ─► last life: settled, and looked at
//! ```

mod life;
mod run;
mod scenario;
mod verify;

pub use life::{Home, Kill, Life};
pub use run::{Random, Tally, random_case, sweep};
pub use scenario::{Scenario, all};
