//! The daemon's parts: the outside world around agentd-core. `main.rs` wires them together.
//!
//! ```text
//!   socket ─► http ─► engine ─► executor ─► backend (libvirt, docker)
//!                       │           │
//!                   inventory    store
//! ```

pub mod backend;
pub mod clock;
pub mod engine;
pub mod executor;
pub mod failpoint;
pub mod http;
pub mod inventory;
pub mod log;
pub mod memory;
mod metrics;
pub mod settings;
pub mod socket;
pub mod store;
pub mod systemd;
