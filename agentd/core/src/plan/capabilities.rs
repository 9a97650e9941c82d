//! What can be done about each field of an instance: live, from its next start on, not at all, and why. The answers are those
//! that a resize would give; what only its caps or its use of memory forbid now is left to the resize.

use super::Inputs;
use super::scalar::Scalar;
use crate::api::{Capabilities, Capability, Possible};
use crate::config::Bound;
use crate::instance::{Ability, Field, Kind, Reading, Saved};
use crate::units::{ByteCount, Cpus, Limit};

/// Of every field.
pub fn capabilities(inputs: &Inputs<'_>) -> Capabilities {
    let (observed, rules, scaling) = (inputs.observed, inputs.rules, &inputs.config.scaling);
    let cpus = Bounds {
        least: observed.cpus.least,
        most: rules.max_cpus,
        most_live: scaling.max_cpus.or_host(inputs.host.cpus),
        keys: ["[[limit]] max_cpus", "[scaling] max_cpus, or the host's own"],
    };
    let cpu_limit = Bounds { least: observed.cpu_limit.least, most: None, most_live: Cpus::MAX, keys: [""; 2] };
    let least = rules.min_memory.map_or(observed.memory.least, |bound| bound.value.max(observed.memory.least));
    let memory = Bounds {
        least,
        most: rules.max_memory,
        most_live: scaling.max_memory.or_host(inputs.host.memory),
        keys: ["[[limit]] max_memory", "[scaling] max_memory, or the host's own"],
    };
    Capabilities {
        cpus: capability(inputs, Field::Cpus, &observed.cpus, &cpus),
        cpu_limit: capability(inputs, Field::CpuLimit, &observed.cpu_limit, &cpu_limit),
        memory: capability::<ByteCount>(inputs, Field::Memory, &observed.memory, &memory),
    }
}

/// What the config lets a field have.
struct Bounds<T> {
    least: T,
    most: Option<Bound<T>>,
    most_live: T,
    /// The names of the two.
    keys: [&'static str; 2],
}

impl<T: Copy> Bounds<T> {
    fn scaling(&self) -> Option<(T, &'static str)> {
        (!self.keys[1].is_empty()).then_some((self.most_live, self.keys[1]))
    }
}

fn capability<T: Scalar>(inputs: &Inputs<'_>, field: Field, reading: &Reading<T>, bounds: &Bounds<T>) -> Capability {
    Capability {
        live: live(inputs, reading, bounds).unwrap_or_else(Possible::no),
        restart: restart(inputs, reading, bounds).unwrap_or_else(Possible::no),
        unlimited: unlimited(inputs, field, reading).unwrap_or_else(Possible::no),
    }
}

fn live<T: Scalar>(inputs: &Inputs<'_>, reading: &Reading<T>, bounds: &Bounds<T>) -> Result<Possible, String> {
    let observed = inputs.observed;
    inputs.refuse_if_blocked().map_err(|problem| problem.detail)?;
    if !observed.state.is_up() {
        return Err(format!("it is {}", observed.state));
    }
    able(reading)?;
    if !inputs.rules.live {
        return Err("[[limit]] live = false".into());
    }
    let ceiling = reading.ceiling.map(|most| {
        (most, if observed.reference.kind() == Kind::Vm { "its ceiling since it started" } else { "the host" })
    });
    let possible = within(bounds, [ceiling, bounds.scaling()]);
    let floor = reading.floor.filter(|floor| *floor > bounds.least).and_then(|floor| floor.number());
    Ok(Possible { least: floor.or(possible.least.clone()), ..possible })
}

fn restart<T: Scalar>(inputs: &Inputs<'_>, reading: &Reading<T>, bounds: &Bounds<T>) -> Result<Possible, String> {
    let observed = inputs.observed;
    inputs.refuse_if_blocked().map_err(|problem| problem.detail)?;
    match observed.saved {
        Saved::Nowhere => return Err("it has no saved form: what it has ends with it".into()),
        // What can't be changed in one of its two sides can't be changed in the other.
        Saved::Together | Saved::OnRequest => able(reading)?,
        Saved::Apart if reading.persistent.is_none() => able(reading)?,
        // A resize by restart raises the maximum of its definition as far as a prepare would.
        Saved::Apart => return Ok(within(bounds, [bounds.scaling(), None])),
    }
    Ok(within(bounds, [reading.saved_ceiling.map(|most| (most, "the host")), None]))
}

fn unlimited<T: PartialEq>(inputs: &Inputs<'_>, field: Field, reading: &Reading<T>) -> Result<Possible, String> {
    let vm = inputs.observed.reference.kind() == Kind::Vm;
    match &reading.unlimit {
        Ability::No(_, why) => Err(why.clone()),
        _ if vm && field != Field::CpuLimit => Err("a VM always has a number of them".into()),
        _ if !vm && !inputs.rules.unlimited && reading.accepted != Some(Limit::Unlimited) => {
            Err("it takes a [[limit]] with unlimited = true".into())
        }
        Ability::OneWay(why) => Ok(Possible { why: Some(why.clone()), ..Possible::yes() }),
        Ability::Yes => Ok(Possible::yes()),
    }
}

fn able<T>(reading: &Reading<T>) -> Result<(), String> {
    match &reading.live {
        Ability::No(_, why) => Err(why.clone()),
        Ability::Yes | Ability::OneWay(_) => Ok(()),
    }
}

/// From the least to the lowest of all that bounds it, which is named.
fn within<T: Scalar>(bounds: &Bounds<T>, more: [Option<(T, &str)>; 2]) -> Possible {
    let of_rule = bounds.most.map(|bound| (bound.value, bounds.keys[0]));
    let most = more.into_iter().flatten().chain(of_rule).min_by(|a, b| a.0.cmp(&b.0));
    Possible {
        least: bounds.least.number(),
        most: most.and_then(|(most, _)| most.number()),
        why: most.map(|(_, why)| why.to_owned()),
        ..Possible::yes()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Number;

    use super::*;
    use crate::error::Code;
    use crate::instance::{Observed, State};
    use crate::plan::tests::{MIB, container, unit, vm, with};

    fn of(observed: &Observed, config: &str) -> Capabilities {
        with(observed, config, capabilities)
    }

    fn range(possible: &Possible) -> (u64, u64) {
        let number = |number: &Option<Number>| number.as_ref().and_then(Number::as_u64).unwrap_or(0);
        (number(&possible.least), number(&possible.most))
    }

    #[test]
    fn a_vm_reaches_its_ceiling_live_and_what_the_config_lets_it_by_a_restart() {
        let mut web = vm();
        web.cpus.saved_ceiling = Some(Cpus::whole(8));
        let can = of(&web, "[scaling]\nmax_cpus = 12\n");
        assert_eq!((range(&can.cpus.live), range(&can.cpus.restart)), ((1, 4), (1, 12)));
        assert!(can.cpus.live.why.unwrap().contains("ceiling") && can.cpus.restart.why.unwrap().contains("[scaling]"));
        web.cpus.floor = Some(Cpus::whole(2));
        assert_eq!(range(&of(&web, "").cpus.live), (2, 4));
        let can = of(&web, "");
        assert_eq!(range(&can.memory.live), (1 << 20, 2 << 30));
        assert!(!can.cpus.unlimited.possible && can.cpu_limit.unlimited.possible);
        // The lowest bound is the one that is named.
        let bounded =
            "[scaling]\nmax_cpus = 3\n[[limit]]\nmatch = \"*\"\nmax_memory = \"1536M\"\nmin_memory = \"512M\"\n";
        let can = of(&web, bounded);
        assert_eq!(
            (range(&can.cpus.live).1, can.cpus.live.why.as_deref()),
            (3, Some("[scaling] max_cpus, or the host's own"))
        );
        assert_eq!(range(&can.memory.live), (MIB(512).bytes(), MIB(1536).bytes()));
        assert_eq!(can.memory.restart.why.as_deref(), Some("[[limit]] max_memory"));
    }

    #[test]
    fn what_is_not_possible_says_why() {
        let off = of(&vm(), "[[limit]]\nmatch = \"*\"\nlive = false\n");
        assert_eq!((off.cpus.live.possible, off.cpus.live.why.as_deref()), (false, Some("[[limit]] live = false")));
        assert!(off.cpus.restart.possible);
        let down = of(&Observed { state: State::Stopped, boot: None, ..vm() }, "");
        assert_eq!(down.memory.live.why.as_deref(), Some("it is stopped"));
        let mut silent = vm();
        silent.memory.live = Ability::No(Code::Unsupported, "it has no balloon device".into());
        assert_eq!(of(&silent, "").memory.live.why.as_deref(), Some("it has no balloon device"));
        assert!(of(&silent, "").memory.restart.possible);
        assert!(!of(&container(), "").cpu_limit.live.possible);
        assert!(of(&container(), "").cpus.unlimited.why.unwrap().contains("unlimited = true"));
        let raw = Observed { saved: Saved::Nowhere, ..unit() };
        assert!(of(&raw, "").cpus.live.possible && !of(&raw, "").cpus.restart.possible);
        let swarm = Observed { unchangeable: Some("swarm manages it".into()), ..container() };
        assert!(of(&swarm, "").memory.live.why.unwrap().contains("swarm"));
    }
    #[test]
    fn what_bounds_it_is_named_by_who_sets_it() {
        let why = |possible: &Possible| possible.why.clone().unwrap_or_default();
        let mut db = container();
        db.cpus.ceiling = Some(Cpus::whole(6));
        db.cpus.saved_ceiling = Some(Cpus::whole(7));
        let can = of(&db, "");
        assert_eq!((range(&can.cpus.live).1, why(&can.cpus.live)), (6, "the host".to_owned()));
        assert_eq!((range(&can.cpus.restart).1, why(&can.cpus.restart)), (7, "the host".to_owned()));
        // A floor below what is the least anyway is none.
        let mut web = vm();
        (web.cpus.least, web.cpus.floor) = (Cpus::whole(2), Some(Cpus::whole(1)));
        assert_eq!(range(&of(&web, "").cpus.live), (2, 4));
        (web.cpus.least, web.cpus.floor) = (Cpus::whole(1), Some(Cpus::whole(2)));
        assert_eq!(range(&of(&web, "").cpus.live), (2, 4));
    }

    #[test]
    fn what_one_call_sets_on_both_sides_can_be_changed_on_neither_or_on_both() {
        let cant = || Ability::No(Code::InvalidState, "somebody holds it".into());
        for saved in [Saved::Together, Saved::OnRequest] {
            let mut db = Observed { saved, ..container() };
            assert!(of(&db, "").memory.restart.possible, "{saved:?}");
            db.memory.live = cant();
            assert_eq!(of(&db, "").memory.restart.why.as_deref(), Some("somebody holds it"), "{saved:?}");
        }
        let mut web = vm();
        web.memory.live = cant();
        assert!(of(&web, "").memory.restart.possible);
        web.memory.persistent = None;
        assert_eq!(of(&web, "").memory.restart.why.as_deref(), Some("somebody holds it"));
    }

    #[test]
    fn a_limit_can_be_taken_away_where_there_is_none_or_the_config_says_so() {
        let allowed = "[[limit]]\nmatch = \"*\"\nunlimited = true\n";
        let mut db = container();
        assert!(!of(&db, "").cpus.unlimited.possible && of(&db, allowed).cpus.unlimited.possible);
        db.cpus.accepted = Some(Limit::Unlimited);
        assert!(of(&db, "").cpus.unlimited.possible);
        db.cpus.unlimit = Ability::OneWay("Docker drops later limits".into());
        assert_eq!(of(&db, "").cpus.unlimited.why.as_deref(), Some("Docker drops later limits"));
        db.cpus.unlimit = Ability::No(Code::Unsupported, "Docker keeps it".into());
        assert_eq!(of(&db, allowed).cpus.unlimited.why.as_deref(), Some("Docker keeps it"));
        // What a VM may have of CPU time is no number of vCPUs.
        let mut web = vm();
        web.cpu_limit.accepted = Some(Limit::At(Cpus::whole(1)));
        assert!(of(&web, "").cpu_limit.unlimited.possible && !of(&web, allowed).cpus.unlimited.possible);
    }
}
