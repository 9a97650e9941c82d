//! What the planner needs of CPUs and bytes alike. Knows nothing of fields or instances.

use super::admission;
use crate::units::{ByteCount, Cpus, Magnitude};

/// CPUs or bytes.
pub(super) trait Scalar: Magnitude + Ord {
    /// Nothing.
    const ZERO: Self;
    /// Up to the next multiple of a backend's grain; `None` where there is none.
    fn round_up(self, grain: Self) -> Option<Self>;
    /// Whether it is a whole number of what people count.
    fn is_whole(self) -> bool;
    /// As a number of the wire.
    fn number(self) -> Option<serde_json::Number>;
}

impl Scalar for Cpus {
    const ZERO: Self = Cpus::ZERO;
    /// vCPUs have been asked by now whether they are whole: 1.5 of them is a mistake, not a wish for 2.
    fn round_up(self, grain: Self) -> Option<Self> {
        let grain = grain.millis().max(1);
        self.millis().checked_next_multiple_of(grain).map(Cpus::from_millis)
    }
    fn is_whole(self) -> bool {
        Cpus::is_whole(self)
    }
    fn number(self) -> Option<serde_json::Number> {
        admission::cpus_number(self)
    }
}

impl Scalar for ByteCount {
    const ZERO: Self = ByteCount::ZERO;
    fn round_up(self, grain: Self) -> Option<Self> {
        self.round_up_to(grain)
    }
    fn is_whole(self) -> bool {
        true
    }
    fn number(self) -> Option<serde_json::Number> {
        admission::bytes_number(self)
    }
}
