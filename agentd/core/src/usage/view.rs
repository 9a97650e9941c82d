//! What an instance uses, as it is told: of what was seen of it, what was counted, and what two looks say. Pure.

use super::{Counters, Rate};
use crate::api::{BalloonUse, CpuUse, MemoryUse, UsageView};
use crate::instance::{Kind, Observed, Usage};
use crate::units::Limit;

/// What an instance uses. `counted` is what was counted of it by now, or why nothing could be.
pub fn view(observed: &Observed, counted: Result<&Counters, &str>, rate: Option<Rate>, at: String) -> UsageView {
    let mut notes = Vec::new();
    let none = Counters::default();
    let up = observed.state.is_up();
    let counted = match counted {
        _ if !up => {
            notes.push(format!("it is {} and uses nothing", observed.state));
            &none
        }
        Ok(counted) => counted,
        Err(why) => {
            notes.push(format!("nothing is counted of it: {why}"));
            &none
        }
    };
    let rate = rate.filter(|_| up);
    UsageView {
        reference: observed.reference.to_string(),
        kind: observed.reference.kind(),
        at,
        cpu: CpuUse {
            rate: rate.and_then(|rate| rate.cpus),
            window_ms: rate.map(|rate| rate.window_ms),
            total_ms: counted.cpu_usec.map(|usec| usec / 1000),
            throttled: rate.and_then(|rate| rate.throttled),
            throttled_ms: counted.bandwidth.map(|bandwidth| bandwidth.throttled_usec / 1000),
        },
        memory: if up { memory(observed, counted, &mut notes) } else { MemoryUse::default() },
        pressure: counted.pressure,
        notes,
    }
}

fn memory(observed: &Observed, counted: &Counters, notes: &mut Vec<String>) -> MemoryUse {
    let is_vm = observed.reference.kind() == Kind::Vm;
    let limit = observed.memory.observed;
    let used = match observed.used {
        Usage::Known(used) => Some(used),
        Usage::Silent => {
            notes.push("its balloon driver has never spoken: what is in use inside isn't known".into());
            None
        }
        Usage::Unknown => {
            notes.extend(is_vm.then(|| {
                "there is no fresh report of its balloon driver, so what is in use inside isn't known; \
                 <stats period='5'/> in its <memballoon> makes it report every 5 s"
                    .to_owned()
            }));
            None
        }
    };
    MemoryUse {
        used,
        available: limit.and_then(Limit::at).zip(used).map(|(has, used)| has.saturating_sub(used)),
        host: counted.host_memory,
        limit,
        oom_kills: counted.oom_kills,
        balloon: if is_vm { balloon(observed) } else { None },
    }
}

/// What a VM's guest is asked to have and has; nothing of one that has never shown that it obeys.
fn balloon(observed: &Observed) -> Option<BalloonUse> {
    let at = |limit: Option<Limit<_>>| limit.and_then(Limit::at);
    let actual = at(observed.memory.confirmed)?;
    let target = at(observed.memory.accepted);
    let lag = target.map(|target| target.saturating_sub(actual).max(actual.saturating_sub(target)));
    Some(BalloonUse { target, actual, lag })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::State;
    use crate::plan::tests::{container, vm};
    use crate::units::ByteCount;
    use crate::usage::Bandwidth;

    const MIB: fn(u32) -> ByteCount = ByteCount::mib;

    fn counted() -> Counters {
        Counters {
            cpu_usec: Some(1_500_000),
            bandwidth: Some(Bandwidth { periods: 10, throttled: 5, throttled_usec: 2000 }),
            host_memory: Some(MIB(700)),
            oom_kills: Some(0),
            ..Counters::default()
        }
    }

    fn look(observed: &Observed) -> UsageView {
        let rate = Rate { window_ms: 1000, cpus: Some(0.5), throttled: Some(0.25) };
        view(observed, Ok(&counted()), Some(rate), "now".into())
    }

    #[test]
    fn a_containers_limit_leaves_what_is_not_in_use() {
        let db = look(&container());
        assert_eq!((db.cpu.rate, db.cpu.window_ms, db.cpu.throttled), (Some(0.5), Some(1000), Some(0.25)));
        assert_eq!((db.cpu.total_ms, db.cpu.throttled_ms), (Some(1500), Some(2)));
        assert_eq!((db.memory.used, db.memory.available), (Some(MIB(10)), Some(MIB(54))));
        assert_eq!((db.memory.balloon, db.memory.oom_kills, db.notes.len()), (None, Some(0), 0));
        let mut free = container();
        free.memory.observed = Some(Limit::Unlimited);
        assert_eq!(look(&free).memory.available, None, "without a limit nobody knows");
    }

    #[test]
    fn a_guest_that_has_not_spoken_is_unknown_and_says_why() {
        for (used, word) in [(Usage::Silent, "never spoken"), (Usage::Unknown, "no fresh report")] {
            let web = look(&Observed { used, ..vm() });
            assert_eq!((web.memory.used, web.memory.available, web.memory.balloon), (None, None, None));
            assert!(web.notes.len() == 1 && web.notes[0].contains(word), "{:?}", web.notes);
            assert_eq!((web.memory.host, web.memory.limit), (Some(MIB(700)), Some(Limit::At(MIB(1024)))));
        }
    }

    #[test]
    fn a_balloon_lags_in_either_direction_by_what_is_missing() {
        for (target, actual) in [(512, 700), (700, 512)] {
            let mut web = vm();
            web.memory.accepted = Some(Limit::At(MIB(target)));
            (web.memory.observed, web.memory.confirmed) = (Some(Limit::At(MIB(actual))), Some(Limit::At(MIB(actual))));
            let balloon = look(&web).memory.balloon.unwrap();
            assert_eq!((balloon.target, balloon.actual, balloon.lag), (Some(MIB(target)), MIB(actual), Some(MIB(188))));
        }
    }

    #[test]
    fn what_is_down_or_can_not_be_read_is_null_and_not_0() {
        let down = look(&Observed { state: State::Stopped, ..container() });
        assert_eq!((down.cpu, down.memory), (CpuUse::default(), MemoryUse::default()));
        assert!(down.notes[0].contains("stopped"), "{:?}", down.notes);
        let unread = view(&container(), Err("its cgroup is gone"), None, String::new());
        assert_eq!(unread.cpu, CpuUse::default());
        assert!(unread.notes[0].contains("its cgroup is gone"));
    }
}
