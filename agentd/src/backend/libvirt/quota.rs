//! CPU bandwidth between libvirt's microseconds and thousandths of a CPU. Pure.

use agentd_core::units::{Cpus, Limit};

use super::ffi::Bandwidth;

/// The period that libvirt and the kernel use where none is set.
const DEFAULT_PERIOD: u64 = 100_000;
/// The longest period that libvirt takes.
const LONGEST_PERIOD: u64 = 1_000_000;
/// The smallest quota that libvirt takes.
const LEAST_QUOTA: u64 = 1_000;
/// What libvirt takes for "no quota" where it refuses −1: `VIR_CGROUP_CPU_QUOTA_MAX`.
pub(super) const NO_QUOTA: i64 = 17_592_186_044_415;

/// A bandwidth as a limit, rounded half up to thousandths. An unset or negative quota is none.
pub(super) fn limit(bandwidth: Bandwidth) -> Limit<Cpus> {
    let period = if bandwidth.period == 0 { DEFAULT_PERIOD } else { bandwidth.period };
    match u64::try_from(bandwidth.quota) {
        Err(_) | Ok(0) => Limit::Unlimited,
        Ok(_) if bandwidth.quota >= NO_QUOTA => Limit::Unlimited,
        Ok(quota) => {
            let millis = (u128::from(quota) * 2_000 + u128::from(period)) / (2 * u128::from(period));
            Limit::At(u64::try_from(millis).map_or(Cpus::MAX, Cpus::from_millis))
        }
    }
}

/// The quota for a limit, and the period where the present one must change because the quota would be too small for it.
pub(super) fn bandwidth(cpus: Cpus, present_period: u64) -> (i64, Option<u64>) {
    let present = if present_period == 0 { DEFAULT_PERIOD } else { present_period };
    let quota = |period: u64| {
        let quota = (u128::from(cpus.millis()) * u128::from(period) + 500) / 1_000;
        u64::try_from(quota).unwrap_or(u64::MAX)
    };
    let period = [present, DEFAULT_PERIOD, LONGEST_PERIOD]
        .into_iter()
        .find(|period| *period >= present && quota(*period) >= LEAST_QUOTA)
        .unwrap_or(LONGEST_PERIOD);
    let quota = i64::try_from(quota(period)).unwrap_or(NO_QUOTA - 1).clamp(1_000, NO_QUOTA - 1);
    (quota, (period != present).then_some(period))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Limit<Cpus> {
        Limit::At(Cpus::from_millis(millis))
    }

    #[test]
    fn a_bandwidth_reads_in_thousandths_rounded_half_up() {
        for (quota, period, expected) in [
            (150_000, 100_000, at(1_500)),
            (33_333, 100_000, at(333)),
            (33_350, 100_000, at(334)),
            (33_349, 100_000, at(333)),
            (50_000, 0, at(500)),
            (1_000, 1_000_000, at(1)),
            (0, 100_000, Limit::Unlimited),
            (-1, 100_000, Limit::Unlimited),
            (NO_QUOTA, 100_000, Limit::Unlimited),
        ] {
            assert_eq!(limit(Bandwidth { quota, period }), expected, "{quota}/{period}");
        }
    }

    #[test]
    fn the_present_period_is_kept_unless_the_quota_would_be_too_small() {
        for (millis, present, expected) in [
            (1_500, 100_000, (150_000, None)),
            (1_500, 0, (150_000, None)),
            (10, 100_000, (1_000, None)),
            (10, 10_000, (1_000, Some(100_000))),
            (500, 1_000, (50_000, Some(100_000))),
            (2_000, 1_000, (2_000, None)),
            (5, 250_000, (1_250, None)),
            (1, 100_000, (1_000, Some(1_000_000))),
        ] {
            assert_eq!(bandwidth(Cpus::from_millis(millis), present), expected, "{millis} of {present}");
        }
    }

    #[test]
    fn what_is_set_reads_back_the_same() {
        for millis in (10..5_000).step_by(7) {
            for present in [0, 1_000, 10_000, 100_000, 1_000_000] {
                let (quota, period) = bandwidth(Cpus::from_millis(millis), present);
                let period = period.unwrap_or(present);
                assert_eq!(limit(Bandwidth { quota, period }), at(millis), "{millis} of {present}");
            }
        }
    }
}
