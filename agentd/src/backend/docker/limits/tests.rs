use proptest::prelude::*;

use super::*;

const MIB: i64 = 1024 * 1024;

fn cpus(millis: u64) -> Values {
    Values { cpus: Some(Limit::At(Cpus::from_millis(millis))), ..Values::default() }
}

fn no_cpu_limit() -> Values {
    Values { cpus: Some(Limit::Unlimited), ..Values::default() }
}

fn memory(mib: u32) -> Values {
    Values { memory: Some(Limit::At(ByteCount::mib(mib))), ..Values::default() }
}

fn sent(result: Result<Option<ContainerUpdateBody>, Impossible>) -> ContainerUpdateBody {
    result.unwrap().expect("an update")
}

/// Docker's own merge of an update: 0 is unchanged.
fn after(now: Native, body: &ContainerUpdateBody) -> Native {
    let put = |new: Option<i64>, old: i64| new.filter(|new| *new != 0).unwrap_or(old);
    Native {
        nano_cpus: put(body.nano_cpus, now.nano_cpus),
        cpu_quota: put(body.cpu_quota, now.cpu_quota),
        cpu_period: put(body.cpu_period, now.cpu_period),
        memory: put(body.memory, now.memory),
        memory_swap: put(body.memory_swap, now.memory_swap),
    }
}

/// Docker's own refusals of an update.
fn conflicts(now: Native, body: &ContainerUpdateBody) -> bool {
    let above = |value: Option<i64>| value.is_some_and(|value| value > 0);
    let quota_form = above(body.cpu_quota) || above(body.cpu_period);
    (above(body.nano_cpus) && (now.cpu_period > 0 || now.cpu_quota > 0 || quota_form))
        || (quota_form && now.nano_cpus > 0)
}

#[test]
fn the_form_in_use_is_kept() {
    let nano = Native { nano_cpus: 500_000_000, ..Native::default() };
    let body = sent(nano.set(&cpus(1500)));
    assert_eq!((body.nano_cpus, body.cpu_quota, body.cpu_period), (Some(1_500_000_000), None, None));

    let quota = Native { cpu_quota: 33_333, cpu_period: 50_000, ..Native::default() };
    let body = sent(quota.set(&cpus(1500)));
    assert_eq!((body.nano_cpus, body.cpu_quota, body.cpu_period), (None, Some(75_000), Some(50_000)));

    let default_period = Native { cpu_quota: 50_000, ..Native::default() };
    let body = sent(default_period.set(&cpus(1500)));
    assert_eq!((body.nano_cpus, body.cpu_quota, body.cpu_period), (None, Some(150_000), None));
}

#[test]
fn a_first_limit_can_be_taken_away_and_given_again() {
    let free = Native::default();
    let limited = after(free, &sent(free.set(&cpus(500))));
    assert_eq!(limited.saved_cpus(), Limit::At(Cpus::from_millis(500)));
    let lifted = after(limited, &sent(limited.restore(&free, &no_cpu_limit())));
    assert_eq!(lifted.saved_cpus(), Limit::Unlimited);
    let again = sent(lifted.set(&cpus(700)));
    assert!(!conflicts(lifted, &again));
    assert_eq!(after(lifted, &again).saved_cpus(), Limit::At(Cpus::from_millis(700)));
}

#[test]
fn taking_away_what_is_not_there_sends_nothing() {
    for native in [Native::default(), Native { cpu_quota: -1, cpu_period: 50_000, ..Native::default() }] {
        assert_eq!(native.set(&no_cpu_limit()), Ok(None));
    }
    assert_eq!(Native::default().set(&Values { memory: Some(Limit::Unlimited), ..Values::default() }), Ok(None));
}

#[test]
fn a_nano_limit_that_a_quota_lifted_reads_as_none_and_takes_no_other() {
    let stuck = Native { nano_cpus: 500_000_000, cpu_quota: -1, ..Native::default() };
    assert_eq!(stuck.saved_cpus(), Limit::Unlimited);
    assert!(matches!(stuck.set(&cpus(500)), Err(Impossible::Unsupported(_))));
    let half = Limit::At(Cpus::from_millis(500));
    assert_eq!(stuck.live_cpus(Some(half)), half, "set again after it was lifted");
    assert_eq!(stuck.live_cpus(Some(Limit::Unlimited)), Limit::Unlimited);
    assert_eq!(stuck.live_cpus(None), Limit::Unlimited);
}

#[test]
fn cpu_and_memory_travel_in_one_update() {
    let now = Native { nano_cpus: 500_000_000, memory: 64 * MIB, memory_swap: 128 * MIB, ..Native::default() };
    let body = sent(now.set(&Values { memory: memory(128).memory, ..cpus(1500) }));
    assert_eq!(body.nano_cpus, Some(1_500_000_000));
    assert_eq!((body.memory, body.memory_swap), (Some(128 * MIB), Some(256 * MIB)));
}

#[test]
fn swap_keeps_its_proportion_to_memory() {
    for (memory_before, swap_before, swap_after) in [
        (64 * MIB, 128 * MIB, 256 * MIB),
        (64 * MIB, 64 * MIB, 128 * MIB),
        (64 * MIB, -1, -1),
        (64 * MIB, 0, 256 * MIB),
        (0, 0, 256 * MIB),
        (0, -1, -1),
        (64 * MIB, 96 * MIB, 192 * MIB),
    ] {
        let now = Native { memory: memory_before, memory_swap: swap_before, ..Native::default() };
        let body = sent(now.set(&memory(128)));
        assert_eq!(body.memory, Some(128 * MIB));
        assert_eq!(body.memory_swap, Some(swap_after), "from {memory_before} and {swap_before}");
    }
}

#[test]
fn a_memory_limit_is_never_taken_away() {
    let now = Native { memory: 64 * MIB, memory_swap: -1, ..Native::default() };
    let none = Values { memory: Some(Limit::Unlimited), ..Values::default() };
    assert!(matches!(now.set(&none), Err(Impossible::Unsupported(_))));
    assert!(matches!(now.restore(&Native::default(), &none), Err(Impossible::NoWayBack(_))));
}

#[test]
fn the_kernels_greatest_memory_limit_is_none() {
    let now = Native { memory: 9_223_372_036_854_771_712, memory_swap: 9_223_372_036_854_771_712, ..Native::default() };
    assert_eq!(now.memory_limit(), Limit::Unlimited);
    assert_eq!(memory_of_bytes(64 * 1024 * 1024), Limit::At(ByteCount::mib(64)));
}

#[test]
fn an_undo_brings_back_the_very_numbers() {
    let before =
        Native { cpu_quota: 33_333, cpu_period: 50_000, memory: 100_000_001, memory_swap: -1, ..Native::default() };
    let both = Values { memory: memory(128).memory, ..cpus(1500) };
    let changed = after(before, &sent(before.set(&both)));
    let old =
        Values { cpus: Some(before.saved_cpus()), memory: Some(before.memory_limit()), cpu_limit: None, plugged: None };
    assert_eq!(after(changed, &sent(changed.restore(&before, &old))), before);
}

#[test]
fn an_undo_touches_only_its_fields() {
    let before = Native { nano_cpus: 500_000_000, memory: 64 * MIB, memory_swap: 128 * MIB, ..Native::default() };
    let now = Native { nano_cpus: 700_000_000, memory: 128 * MIB, memory_swap: 256 * MIB, ..Native::default() };
    let body = sent(now.restore(&before, &cpus(500)));
    assert_eq!((body.nano_cpus, body.memory, body.memory_swap), (Some(500_000_000), None, None));
}

#[test]
fn the_least_limit_is_a_millisecond_of_the_period() {
    let with_period = |cpu_period| Native { cpu_period, ..Native::default() };
    assert_eq!(with_period(0).least_cpus(), Cpus::from_millis(10));
    assert_eq!(with_period(50_000).least_cpus(), Cpus::from_millis(20));
    assert_eq!(with_period(1_000_000).least_cpus(), Cpus::from_millis(1));
    assert_eq!(sent(Native::default().set(&cpus(10))).cpu_quota, Some(1000));
}

#[test]
fn a_limit_seen_may_be_a_little_over_the_one_that_was_set_and_never_under() {
    let at = |millis| Limit::At(Cpus::from_millis(millis));
    assert!(same_cpus(at(333), at(340)));
    assert!(!same_cpus(at(1500), at(1510)));
    assert!(!same_cpus(at(1500), at(1490)));
    assert!(!same_cpus(at(1500), Limit::Unlimited));
    assert!(same_cpus(Limit::Unlimited, Limit::Unlimited));
}

proptest! {
    #[test]
    fn every_value_reads_back_as_it_was_set(millis in 1_u64..1_000_000, period in 1_000_i64..=1_000_000, form in 0..3) {
        let now = match form {
            0 => Native::default(),
            1 => Native { nano_cpus: 1, ..Native::default() },
            _ => Native { cpu_quota: 5_000, cpu_period: period, ..Native::default() },
        };
        let cpus_wanted = Cpus::from_millis(millis).max(now.least_cpus());
        let body = sent(now.set(&cpus(cpus_wanted.millis())));
        prop_assert!(!conflicts(now, &body));
        prop_assert_eq!(after(now, &body).saved_cpus(), Limit::At(cpus_wanted));
    }

    #[test]
    fn memory_with_swap_is_never_less_than_memory(before in 1_i64..1 << 50, extra in 0_i64..1 << 50, mib in 6_u32..1 << 24) {
        let now = Native { memory: before, memory_swap: before + extra, ..Native::default() };
        let body = sent(now.set(&memory(mib)));
        prop_assert!(body.memory_swap >= body.memory);
    }
}
