//! A VM's memory as one number, and how it moves: what its balloon leaves it and what a virtio-mem device gives it on top. It
//! grows by its balloon first, which costs the guest nothing, and gives back what was plugged first, which only that can give
//! back to the host whole.

use crate::instance::Parts;
use crate::units::ByteCount;

/// One part moved, the other staying where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stop {
    /// The memory in all when it is there.
    pub(super) memory: ByteCount,
    /// What the device is to give, where it is the part that moves; else it is the balloon.
    pub(super) plugged: Option<ByteCount>,
}

impl Parts {
    /// What the guest is to have in all.
    pub fn sum(&self) -> ByteCount {
        self.balloon.saturating_add(self.plugged)
    }

    /// The next amount that can be had exactly: beyond the balloon's range memory comes in blocks.
    pub(super) fn fit(&self, want: ByteCount) -> Option<ByteCount> {
        let balloon = self.base.saturating_add(self.plugged);
        match want.checked_sub(balloon) {
            Some(more) if more > ByteCount::ZERO => balloon.checked_add(more.round_up_to(self.block)?),
            _ => Some(want),
        }
    }

    /// The way from here to `want`, which fits.
    pub(super) fn way_to(&self, want: ByteCount) -> Vec<Stop> {
        let mut stops = Vec::new();
        let sum = self.sum();
        if want > sum {
            let balloon = want.saturating_sub(self.plugged).min(self.base).max(self.balloon);
            let memory = balloon.saturating_add(self.plugged);
            if balloon > self.balloon {
                stops.push(Stop { memory, plugged: None });
            }
            if want > memory {
                stops.push(Stop { memory: want, plugged: Some(want.saturating_sub(balloon)) });
            }
        } else if want < sum {
            let gives = sum.saturating_sub(want).round_down_to(self.block).min(self.plugged);
            let memory = sum.saturating_sub(gives);
            if gives > ByteCount::ZERO {
                stops.push(Stop { memory, plugged: Some(self.plugged.saturating_sub(gives)) });
            }
            if want < memory {
                stops.push(Stop { memory: want, plugged: None });
            }
        }
        stops
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mib(mib: u32) -> ByteCount {
        ByteCount::mib(mib)
    }

    fn parts(balloon: u32, plugged: u32) -> Parts {
        Parts { base: mib(512), balloon: mib(balloon), plugged: mib(plugged), size: mib(1024), block: mib(2) }
    }

    fn stops(from: Parts, want: u32) -> Vec<(u64, Option<u64>)> {
        let told = |bytes: ByteCount| bytes.bytes() >> 20;
        from.way_to(mib(want)).into_iter().map(|stop| (told(stop.memory), stop.plugged.map(told))).collect()
    }

    #[test]
    fn the_balloon_gives_back_first_and_the_device_is_unplugged_first() {
        assert_eq!(stops(parts(300, 0), 400), [(400, None)]);
        assert_eq!(stops(parts(300, 0), 640), [(512, None), (640, Some(128))]);
        assert_eq!(stops(parts(512, 128), 768), [(768, Some(256))]);
        assert_eq!(stops(parts(512, 128), 400), [(512, Some(0)), (400, None)]);
        assert_eq!(stops(parts(512, 128), 576), [(576, Some(64))]);
        // A balloon that somebody has filled while the device gives something.
        assert_eq!(stops(parts(300, 128), 600), [(600, None)]);
        assert_eq!(stops(parts(300, 128), 700), [(640, None), (700, Some(188))]);
        // Less than a block can't be unplugged: the balloon takes the rest.
        assert_eq!(stops(parts(512, 128), 511), [(512, Some(0)), (511, None)]);
        assert_eq!(stops(parts(512, 128), 639), [(639, None)]);
        assert!(stops(parts(512, 128), 640).is_empty());
    }

    #[test]
    fn beyond_the_balloons_range_memory_comes_in_blocks() {
        assert_eq!(parts(300, 0).fit(mib(511)), Some(mib(511)));
        assert_eq!(parts(300, 0).fit(mib(513)), Some(mib(514)));
        assert_eq!(parts(300, 128).fit(mib(641)), Some(mib(642)));
    }

    proptest! {
        #[test]
        fn each_stop_moves_one_part_within_its_range_and_the_last_is_what_was_asked_for(
            balloon in 1_u32..512, plugged in 0_u32..512, want in 1_u32..1536,
        ) {
            let mut now = parts(balloon, plugged * 2);
            let want = now.fit(mib(want)).unwrap();
            for stop in now.way_to(want) {
                match stop.plugged {
                    Some(plugged) => {
                        prop_assert_eq!(now.balloon.saturating_add(plugged), stop.memory);
                        prop_assert_eq!(plugged.round_down_to(now.block), plugged);
                        now.plugged = plugged;
                    }
                    None => {
                        now.balloon = stop.memory.checked_sub(now.plugged).unwrap();
                        prop_assert!(now.balloon <= now.base);
                    }
                }
            }
            prop_assert_eq!(now.sum(), want);
        }
    }
}
