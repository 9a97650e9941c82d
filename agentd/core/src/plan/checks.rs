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
