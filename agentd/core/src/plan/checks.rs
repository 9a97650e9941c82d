//! What stands between a wish and its plan: switches of the config and of the instance, bounds, what is in use, the caps,
//! ceilings. Each either passes or refuses with its code, its numbers and what would pass.

use super::resize::Needed;
use super::scalar::Scalar;
use super::{Aim, Inputs, Targets, Values, admission};
use crate::config::{Bound, Config, Shrink};
use crate::error::{Code, Numbers, Problem};
use crate::instance::{Ability, Field, Kind, Observed, Reading, Saved, Usage};
use crate::ledger::Charge;
use crate::units::{ByteCount, Cpus, Limit};

/// What the instance or the config does not allow at all.
pub(super) fn check_switches(inputs: &Inputs<'_>, needed: &Needed) -> Result<(), Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    if !inputs.rules.live && needed.live != Values::default() {
        let (code, hint) = match observed.saved {
            Saved::Apart => (Code::RestartRequired, "`ctl resize --next-boot` saves a change for its next start"),
            _ => (Code::Unsupported, "the config's `live = false` binds everybody"),
        };
        return Err(Problem::new(
            code,
            format!("the config forbids live changes of {reference} ([[limit]] live = false)"),
        )
        .hint(hint)
        .numbers(Numbers { config_key: Some("limit.live".into()), ..Numbers::default() }));
    }
    able(inputs, Field::Cpus, &observed.cpus, needed.live.cpus, needed.saved.cpus)?;
    able(inputs, Field::CpuLimit, &observed.cpu_limit, needed.live.cpu_limit, needed.saved.cpu_limit)?;
    able(inputs, Field::Memory, &observed.memory, needed.live.memory, needed.saved.memory)
}

pub(super) fn able<T: Copy + PartialEq>(
    inputs: &Inputs<'_>,
    field: Field,
    reading: &Reading<T>,
    live: Option<Limit<T>>,
    saved: Option<Limit<T>>,
) -> Result<(), Problem> {
    let (reference, name) = (&inputs.observed.reference, field.as_str());
    if live.is_some()
        && let Ability::No(code, why) = &reading.live
    {
        return Err(Problem::new(*code, format!("{name} of {reference} can't be changed while it is up: {why}")));
    }
    // Where one call changes both sides, what can't be done live can't be done at all; a field that isn't there has no side.
    let absent = reading.persistent.is_none() && reading.accepted.is_none();
    if saved.is_some()
        && (absent || matches!(inputs.observed.saved, Saved::Together | Saved::OnRequest))
        && let Ability::No(code, why) = &reading.live
    {
        return Err(Problem::new(*code, format!("{name} of {reference} can't be changed: {why}")));
    }
    let unlimited = Some(Limit::Unlimited);
    if live == unlimited || saved == unlimited {
        if let Ability::No(code, why) = &reading.unlimit {
            return Err(Problem::new(*code, format!("{name} of {reference} can't be without a limit: {why}")));
        }
        // A VM's cpu_limit isn't what the caps count: its vCPUs are.
        if inputs.observed.reference.kind() != Kind::Vm && !inputs.rules.unlimited {
            return Err(Problem::new(
                Code::LimitExceeded,
                format!("taking the {name} limit of {reference} away would let it use the whole host"),
            )
            .hint("a [[limit]] that matches it with `unlimited = true` allows that")
            .numbers(Numbers { config_key: Some("limit.unlimited".into()), ..Numbers::default() }));
        }
    }
    Ok(())
}

/// The bounds of `[[limit]]`: they stop a value from moving further out, not from moving back in.
pub(super) fn check_bounds(inputs: &Inputs<'_>, targets: &Targets) -> Result<(), Problem> {
    let rules = inputs.rules;
    if let Some(aim) = &targets.cpus {
        bound(inputs, "cpus", aim, rules.max_cpus, "max_cpus")?;
    }
    if let Some(aim) = &targets.memory {
        bound(inputs, "memory", aim, rules.max_memory, "max_memory")?;
        let shrinks = |value, before: Option<Limit<ByteCount>>| {
            before.is_none_or(|before| before.at().is_none_or(|before| value < before))
        };
        if let Some(Bound { value: least, rule }) = rules.min_memory
            && let Some(value) = out_of_bounds(aim, |value, before| value < least && shrinks(value, before))
        {
            let numbers = Numbers {
                resource: Some("memory".into()),
                requested: value.number(),
                smallest_feasible: least.number(),
                config_key: Some(Config::limit_key(rule, "min_memory")),
                ..Numbers::default()
            };
            return Err(Problem::new(
                Code::BelowMinimum,
                format!(
                    "memory {value} is below what the config lets {} have, {least} ([[limit]] min_memory)",
                    inputs.observed.reference
                ),
            )
            .hint(format!("ask for {least} or more"))
            .numbers(numbers));
        }
    }
    Ok(())
}

/// The value that is asked for any of the sides that change and is `out`, judged from the value of before.
fn out_of_bounds<T: Scalar>(aim: &Aim<T>, out: impl Fn(T, Option<Limit<T>>) -> bool) -> Option<T> {
    aim.sides().find_map(|(want, before)| want.at().filter(|value| out(*value, before)))
}

fn bound<T: Scalar>(
    inputs: &Inputs<'_>,
    field: &str,
    aim: &Aim<T>,
    most: Option<Bound<T>>,
    key: &str,
) -> Result<(), Problem> {
    let Some(most) = most else { return Ok(()) };
    at_most(inputs, field, aim, most.value, &format!("[[limit]] {key}"), Config::limit_key(most.rule, key))
}

fn at_most<T: Scalar>(
    inputs: &Inputs<'_>,
    field: &str,
    aim: &Aim<T>,
    most: T,
    key: &str,
    config_key: String,
) -> Result<(), Problem> {
    let grows = |value: T, before: Option<Limit<T>>| {
        before.is_none_or(|before| before.at().is_some_and(|before| value > before))
    };
    let Some(value) = out_of_bounds(aim, |value, before| value > most && grows(value, before)) else { return Ok(()) };
    let numbers = Numbers {
        resource: Some(field.to_owned()),
        allowed: most.number(),
        requested: value.number(),
        largest_feasible: most.number(),
        config_key: Some(config_key),
        ..Numbers::default()
    };
    Err(Problem::new(
        Code::LimitExceeded,
        format!("{field} {value} is more than the config lets {} have, {most} ({key})", inputs.observed.reference),
    )
    .hint(format!("the most it can have is {most}"))
    .numbers(numbers))
}

/// The rules of a live shrink of memory: never what is in use and a margin.
pub(super) fn check_shrink(inputs: &Inputs<'_>, aim: &Aim<ByteCount>) -> Result<(), Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    let Limit::At(value) = aim.requested else { return Ok(()) };
    let now = observed.memory.observed.or(aim.before);
    if now.is_some_and(|now| now.at().is_some_and(|now| value >= now)) {
        return Ok(());
    }
    let rules = inputs.rules;
    match (rules.shrink, observed.used) {
        (Shrink::Always, _) => Ok(()),
        (Shrink::Never, _) => Err(Problem::new(
            Code::BelowMinimum,
            format!("the config forbids to shrink the memory of {reference} live ([[limit]] shrink = \"never\")"),
        )
        .numbers(Numbers { config_key: Some("limit.shrink".into()), ..Numbers::default() })),
        (Shrink::IfUnused, Usage::Known(used)) => {
            // What had no limit is judged by the first one that it gets.
            let margin = rules.margin(now.and_then(Limit::at).or(Some(value)));
            let floor = used.saturating_add(margin);
            if value >= floor {
                return Ok(());
            }
            let floor = floor.round_up_to(observed.memory.grain).unwrap_or(floor);
            let numbers = Numbers {
                resource: Some("memory".into()),
                requested: value.number(),
                used: used.number(),
                smallest_feasible: floor.number(),
                config_key: Some("limit.shrink_margin".into()),
                ..Numbers::default()
            };
            Err(Problem::new(
                Code::BelowMinimum,
                format!("{reference} uses {used}; with a margin of {margin} it can't shrink to {value}"),
            )
            .hint(format!("the least it can have now is {floor} ([[limit]] shrink, shrink_margin)"))
            .numbers(numbers))
        }
        (Shrink::IfUnused, Usage::Silent) => Err(Problem::new(
            Code::GuestSilent,
            format!("the balloon driver of {reference} was asked what is in use and has never spoken"),
        )
        .hint("nothing was changed; check that the guest has the virtio balloon driver loaded")),
        (Shrink::IfUnused, Usage::Unknown) => Err(Problem::new(
            Code::BelowMinimum,
            format!("how much memory {reference} uses is unknown, so it is not shrunk"),
        )
        .hint("a [[limit]] with shrink = \"always\" lets it shrink all the same")
        .numbers(Numbers { config_key: Some("limit.shrink".into()), ..Numbers::default() })),
    }
}

/// Holds what the change will be charged against the caps.
pub(super) fn admit(inputs: &Inputs<'_>, needed: &Needed) -> Result<Charge, Problem> {
    let instance = inputs.observed.instance_id();
    let now = inputs.ledger.charge(&instance);
    let mut wanted = now;
    let mut checked = now;
    // What an outer instance is charged for is admitted with that one.
    let covered = inputs.observed.covered;
    if let Some(cpus) = needed.live.cpus.filter(|_| !covered.cpus) {
        wanted.cpus = cpus.at().unwrap_or(Cpus::ZERO);
        // Giving a limit to what had none is always admitted: the host is better off.
        checked.cpus = if inputs.observed.cpus.accepted == Some(Limit::Unlimited) { now.cpus } else { wanted.cpus };
    }
    if let Some(memory) = needed.live.memory.filter(|_| !covered.memory) {
        let value = memory.at().unwrap_or(ByteCount::ZERO);
        wanted.memory = admission::charged_memory(inputs.observed, value, inputs.config);
        checked.memory =
            if inputs.observed.memory.accepted == Some(Limit::Unlimited) { now.memory } else { wanted.memory };
    }
    inputs.ledger.check(&instance, checked).map_err(|refused| admission::refusal(inputs, &refused, checked))?;
    Ok(wanted.max(now))
}

/// Admits a restart with these targets. A start takes all that a balloon gives back only later, unless it `boots_anew`, with
/// just what is asked for. What does not grow is always admitted.
pub(super) fn admit_restart(inputs: &Inputs<'_>, targets: &Targets, boots_anew: bool) -> Result<Charge, Problem> {
    let (observed, instance) = (inputs.observed, inputs.observed.instance_id());
    let now = inputs.ledger.charge(&instance);
    let (mut wanted, mut checked) = (admission::start_charge(observed, inputs.config), now);
    // What is not asked for starts with what is saved, which nobody has admitted yet.
    if more_is_saved(&observed.cpus) {
        checked.cpus = wanted.cpus;
    }
    if more_is_saved(&observed.memory) {
        checked.memory = wanted.memory;
    }
    if let Some(cpus) = targets.cpus.and_then(|aim| aim.requested.at()) {
        (wanted.cpus, checked.cpus) = (cpus, cpus);
    }
    if let Some(Limit::At(memory)) = targets.memory.map(|aim| aim.requested) {
        let boots_with = observed.demand.memory.and_then(Limit::at).filter(|_| !boots_anew);
        wanted.memory = admission::charged_memory(observed, boots_with.unwrap_or(memory).max(memory), inputs.config);
        let grows = observed.memory.accepted.and_then(Limit::at).is_none_or(|now| memory > now);
        checked.memory = if grows { wanted.memory } else { now.memory };
    }
    inputs.ledger.check(&instance, checked).map_err(|refused| admission::refusal(inputs, &refused, checked))?;
    Ok(wanted.max(now))
}

fn more_is_saved<T: Copy + Ord>(reading: &Reading<T>) -> bool {
    let (saved, now) = (reading.persistent.and_then(Limit::at), reading.accepted.and_then(Limit::at));
    saved.zip(now).is_some_and(|(saved, now)| saved > now)
}

/// `[scaling]` and the host's own size.
pub(super) fn check_scaling(inputs: &Inputs<'_>, targets: &Targets) -> Result<(), Problem> {
    let scaling = &inputs.config.scaling;
    if let Some(aim) = &targets.cpus {
        let most = scaling.max_cpus.or_host(inputs.host.cpus);
        at_most(inputs, "cpus", aim, most, "[scaling] max_cpus", "scaling.max_cpus".into())?;
    }
    if let Some(aim) = &targets.memory {
        let most = scaling.max_memory.or_host(inputs.host.memory);
        at_most(inputs, "memory", aim, most, "[scaling] max_memory", "scaling.max_memory".into())?;
    }
    Ok(())
}

/// What a live change may reach.
pub(super) fn check_ceilings(inputs: &Inputs<'_>, targets: &Targets, needed: &Needed) -> Result<(), Problem> {
    let observed = inputs.observed;
    let live = Targets {
        cpus: targets.cpus.filter(|_| needed.live.cpus.is_some()),
        memory: targets.memory.filter(|_| needed.live.memory.is_some()),
        cpu_limit: None,
    };
    check_scaling(inputs, &live)?;
    ceiling(observed, "cpus", &observed.cpus, needed.live.cpus, needed.saved.cpus)?;
    ceiling(observed, "cpu_limit", &observed.cpu_limit, needed.live.cpu_limit, needed.saved.cpu_limit)?;
    ceiling(observed, "memory", &observed.memory, needed.live.memory, needed.saved.memory)
}

fn ceiling<T: Scalar>(
    observed: &Observed,
    field: &str,
    reading: &Reading<T>,
    live: Option<Limit<T>>,
    saved: Option<Limit<T>>,
) -> Result<(), Problem> {
    let reference = &observed.reference;
    let numbers = |value: T, most: T| Numbers {
        resource: Some(field.to_owned()),
        requested: value.number(),
        largest_feasible: most.number(),
        ..Numbers::default()
    };
    let vm = reference.kind() == Kind::Vm;
    if let (Some(Limit::At(value)), Some(most)) = (live, reading.ceiling)
        && value > most
    {
        let problem = if vm {
            Problem::new(
                Code::RestartRequired,
                format!(
                    "{reference} can reach {most} {field} live, its ceiling since it started; {value} needs a restart"
                ),
            )
            .hint(format!("the most it can have without one is {most}; more needs a definition with a higher maximum"))
        } else {
            Problem::new(Code::Unsupported, format!("the host has {most}, so {reference} can't have {value} {field}"))
                .hint(format!("the most it can have is {most}"))
        };
        return Err(problem.numbers(numbers(value, most)));
    }
    let now = reading.accepted.and_then(Limit::at);
    if let (Some(Limit::At(value)), Some(least)) = (live, reading.floor)
        && value < least
        && now.is_none_or(|now| value < now)
    {
        return Err(Problem::new(
            Code::RestartRequired,
            format!(
                "{reference} has {least} {field} that can't be taken from it since it started; {value} needs a restart"
            ),
        )
        .hint(format!("the least it can have without one is {least}"))
        .numbers(Numbers {
            resource: Some(field.to_owned()),
            requested: value.number(),
            smallest_feasible: least.number(),
            ..Numbers::default()
        }));
    }
    if let (Some(Limit::At(value)), Some(most)) = (saved, reading.saved_ceiling)
        && value > most
    {
        return Err(Problem::new(
            Code::Unsupported,
            format!("the saved definition of {reference} allows {most} {field} at most, not {value}"),
        )
        .hint(if live.is_some() {
            "raise the maximum in its definition first, or change only what runs: ctl resize --live-only".to_owned()
        } else {
            "raise the maximum in its definition first".to_owned()
        })
        .numbers(numbers(value, most)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::error::Code;
    use crate::instance::{Ability, Observed, Saved, State, Usage};
    use crate::plan::tests::{MIB, container, plan, vm};
    use crate::units::{Cpus, Limit};

    fn cant() -> Ability {
        Ability::No(Code::InvalidState, "somebody holds it".into())
    }

    #[test]
    fn what_cant_be_changed_is_refused_on_the_side_that_is_asked_for() {
        let told = |observed: &Observed, body| plan(observed, "", body).map_err(|problem| problem.detail);
        let mut web = vm();
        (web.memory.live, web.cpu_limit.live) = (cant(), cant());
        for body in [json!({"memory": "1536M"}), json!({"cpu_limit": 1})] {
            let why = told(&web, body).unwrap_err();
            assert!(why.ends_with("can't be changed while it is up: somebody holds it"), "{why}");
        }
        // Its saved definition is another thing; where there is none of it, there is nothing to change.
        let next = || json!({"memory": "1536M", "apply": "next-boot"});
        assert!(told(&web, next()).is_ok() && told(&web, json!({"cpus": 3})).is_ok());
        (web.memory.persistent, web.memory.accepted) = (None, None);
        assert!(told(&web, next()).unwrap_err().ends_with("can't be changed: somebody holds it"));
        // One call changes both sides of these, also of one that is down.
        for saved in [Saved::Together, Saved::OnRequest] {
            let mut db = Observed { state: State::Stopped, boot: None, saved, ..container() };
            let more = || json!({"memory": "128M"});
            assert!(told(&db, more()).is_ok(), "{saved:?}");
            db.memory.live = cant();
            assert!(told(&db, more()).unwrap_err().ends_with("can't be changed: somebody holds it"), "{saved:?}");
        }
    }

    #[test]
    fn a_limit_that_cant_be_taken_away_stays_on_either_side() {
        let unlimited = "[[limit]]\nmatch = \"*\"\nunlimited = true\n";
        let mut web = vm();
        web.cpu_limit.accepted = Some(Limit::At(Cpus::whole(1)));
        web.cpu_limit.persistent = web.cpu_limit.accepted;
        for apply in ["live", "next-boot"] {
            let none = || json!({"cpu_limit": "none", "apply": apply});
            assert!(plan(&web, "", none()).is_ok(), "{apply}");
            let mut kept = web.clone();
            kept.cpu_limit.unlimit = cant();
            let refused = plan(&kept, unlimited, none()).unwrap_err();
            assert_eq!(refused.detail, "cpu_limit of vm/web can't be without a limit: somebody holds it");
        }
    }

    /// A VM that has the first of each now, and the second saved for its next start.
    fn restarted(cpus: (u32, u32), memory: (u32, u32)) -> Observed {
        let mut web = vm();
        web.used = Usage::Known(MIB(100));
        (web.cpus.accepted, web.cpus.persistent) = (Some(whole(cpus.0)), Some(whole(cpus.1)));
        (web.memory.accepted, web.memory.persistent) = (Some(Limit::At(MIB(memory.0))), Some(Limit::At(MIB(memory.1))));
        (web.cpus.observed, web.memory.observed) = (web.cpus.accepted, web.memory.accepted);
        (web.demand.cpus, web.demand.memory) = (web.cpus.persistent, web.memory.persistent);
        web
    }

    /// One that has 1 GiB, now and saved, and boots with this.
    fn ballooned(boots_with: u32) -> Observed {
        let mut web = restarted((2, 2), (1024, 1024));
        web.demand.memory = Some(Limit::At(MIB(boots_with)));
        web
    }

    fn whole(cpus: u32) -> Limit<Cpus> {
        Limit::At(Cpus::whole(cpus))
    }

    #[test]
    fn a_restart_is_admitted_with_all_that_it_starts_with_and_grows_by() {
        // Each by `live = false`, so that it takes a restart; the caps leave 3 CPUs, and 1536 MiB beside the overhead.
        let full = "[capacity]\ncpus = 3\nmemory = \"1736MiB\"\nreserved_memory = 0\n[scaling]\nmax_cpus = 8\nmax_memory = \"8GiB\"\n\
            [[limit]]\nmatch = \"*\"\nlive = false\n";
        let (cpus, memory) = (|n: u32| json!({"cpus": n}), |mib: u32| json!({"memory": u64::from(mib) << 20}));
        for (observed, body, fits) in [
            (restarted((2, 2), (1024, 1024)), cpus(3), true),
            (restarted((2, 2), (1024, 1024)), cpus(4), false),
            (restarted((2, 2), (1024, 1024)), memory(1536), true),
            (restarted((2, 2), (1024, 1024)), memory(1537), false),
            // What nobody asks for now and is saved already comes with it.
            (restarted((2, 3), (1024, 1024)), memory(1100), true),
            (restarted((2, 4), (1024, 1024)), memory(1100), false),
            (restarted((2, 2), (1024, 1536)), cpus(1), true),
            (restarted((2, 2), (1024, 1537)), cpus(1), false),
            // What was past the caps already and does not grow.
            (restarted((4, 4), (1024, 1024)), memory(1100), true),
            (restarted((2, 2), (1800, 1800)), cpus(1), true),
            (restarted((2, 2), (1800, 1800)), memory(1700), true),
            (restarted((4, 3), (1024, 1024)), memory(1100), true),
            // At its present size, or less, it is always admitted, whatever a balloon gives back only later; at more it is not.
            (ballooned(1537), cpus(1), true),
            (ballooned(1537), memory(1000), true),
            (ballooned(1537), memory(1100), false),
        ] {
            let mut body = body;
            body["restart"] = "if-needed".into();
            let planned = plan(&observed, full, body.clone());
            let code = planned.as_ref().err().map(|problem| problem.code);
            assert_eq!(code, (!fits).then_some(Code::CapacityExceeded), "{body} {observed:?}: {planned:?}");
        }
    }
}
