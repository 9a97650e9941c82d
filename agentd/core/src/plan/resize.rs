//! The plan of a resize: relative values made absolute, each field checked against its instance, its bounds and the caps,
//! then the steps from the surest to undo to the least sure: saved, quota, balloon, vCPUs last.

use std::fmt::Display;

use super::settle::{cpus_rule, same_cpu_time};
use super::{Action, Aim, Inputs, Plan, Scope, Settle, Step, Targets, UndoClass, Values, Verb, admission, describe};
use crate::api::{Apply, ResizeRequest, Restart};
use crate::config::{Bound, Config, Shrink};
use crate::error::{Code, Numbers, Problem};
use crate::instance::{Ability, Field, Kind, Observed, Reading, Saved, State, Usage};
use crate::ledger::Charge;
use crate::units::{Amount, ByteCount, Cpus, Limit};

/// Plans a resize, or refuses it with the numbers.
pub fn resize(inputs: &Inputs<'_>, request: &ResizeRequest) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let wanted = wanted(inputs, request)?;
    not_built_yet(request)?;
    inputs.refuse_if_blocked()?;
    let mut plan = inputs.empty_plan(Verb::Resize);
    let place = place(observed, request.apply, &mut plan.notes)?;

    let targets = Targets {
        cpus: aim(inputs, Field::Cpus, &observed.cpus, wanted.cpus, place, &mut plan.notes)?,
        cpu_limit: aim(inputs, Field::CpuLimit, &observed.cpu_limit, wanted.cpu_limit, place, &mut plan.notes)?,
        memory: aim(inputs, Field::Memory, &observed.memory, wanted.memory, place, &mut plan.notes)?,
    };
    plan.targets = targets;
    let needed = Needed::of(&targets, observed, place);
    if needed.is_empty() {
        return Ok(plan);
    }

    check_switches(inputs, &needed)?;
    check_bounds(inputs, &targets)?;
    if let Some(aim) = &targets.memory
        && needed.live.memory.is_some()
    {
        check_shrink(inputs, aim)?;
    }
    plan.charge = admit(inputs, &needed)?;
    check_ceilings(inputs, &targets, &needed)?;
    plan.steps = steps(inputs, &needed, place);
    if place.together {
        make_one_way(observed, &needed.saved, &mut plan);
    }
    Ok(plan)
}

/// What of the request's words has no code behind it in this version.
fn not_built_yet(request: &ResizeRequest) -> Result<(), Problem> {
    let (what, hint) = if request.restart == Restart::IfNeeded {
        ("a resize by restart", "leave --restart out; --next-boot saves the change for the next start")
    } else if request.for_.is_some() {
        ("a resize for a limited time", "leave --for out")
    } else if request.force {
        ("--force on a resize", "it belongs to --restart if-needed")
    } else {
        return Ok(());
    };
    Err(Problem::new(Code::Unsupported, format!("{what} is not supported by this version")).hint(hint))
}

/// The request with a size expanded into its fields.
struct Wanted {
    cpus: Option<Limit<Amount<Cpus>>>,
    cpu_limit: Option<Limit<Amount<Cpus>>>,
    memory: Option<Limit<Amount<ByteCount>>>,
}

fn wanted(inputs: &Inputs<'_>, request: &ResizeRequest) -> Result<Wanted, Problem> {
    let fields = request.cpus.is_some() || request.cpu_limit.is_some() || request.memory.is_some();
    let Some(name) = &request.size else {
        if !fields {
            return Err(Problem::new(Code::InvalidRequest, "the resize names nothing to change")
                .hint("give at least one of cpus, memory, cpu_limit or size"));
        }
        return Ok(Wanted { cpus: request.cpus, cpu_limit: request.cpu_limit, memory: request.memory });
    };
    if fields {
        return Err(Problem::new(
            Code::InvalidRequest,
            "a size sets every field, so it excludes cpus, memory and cpu_limit",
        )
        .hint("give either the size or the fields"));
    }
    let Some(size) = inputs.config.sizes.get(name) else {
        return Err(Problem::new(Code::NotFound, format!("there is no size {name:?} in the config"))
            .hint("`ctl sizes` shows those that there are"));
    };
    let vm = inputs.observed.reference.kind() == Kind::Vm;
    // A size without cpu_limit means none; an instance that can't have one is not asked for it.
    let cpu_limit = size.cpu_limit;
    let has_none = matches!(inputs.observed.cpu_limit.live, Ability::No(Code::Unsupported, _));
    let cpu_limit =
        if vm && !(cpu_limit == Limit::Unlimited && has_none) { Some(cpu_limit.map(Amount::To)) } else { None };
    Ok(Wanted {
        cpus: size.cpus.map(|cpus| Limit::At(Amount::To(cpus))),
        cpu_limit,
        memory: size.memory.map(|memory| Limit::At(Amount::To(memory))),
    })
}

/// To where the change goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    live: bool,
    saved: bool,
    /// One call does both.
    together: bool,
}

fn place(observed: &Observed, apply: Option<Apply>, notes: &mut Vec<String>) -> Result<Place, Problem> {
    let reference = &observed.reference;
    let up = match observed.state {
        State::Running | State::Paused => true,
        State::Stopped | State::Crashed => false,
        State::Starting | State::Stopping | State::Unknown => {
            return Err(Problem::new(Code::InvalidState, format!("{reference} is {}", observed.state))
                .hint("try again when it is running or stopped"));
        }
    };
    let place = |live, saved| Ok(Place { live, saved, together: false });
    match (observed.saved, apply.unwrap_or_default()) {
        (Saved::Together, Apply::Both) => Ok(Place { live: up, saved: true, together: true }),
        (Saved::Together, Apply::Live | Apply::NextBoot) => Err(Problem::new(
            Code::Unsupported,
            format!("{reference} keeps one set of limits: what runs and what is saved can't differ"),
        )
        .hint("leave --live-only and --next-boot out")),
        (_, Apply::Live) if !up => Err(Problem::new(
            Code::InvalidState,
            format!("{reference} is {}: there is nothing live to change", observed.state),
        )
        .hint("leave --live-only out to change what its next start will have")),
        (Saved::Nowhere, Apply::NextBoot) => Err(Problem::new(
            Code::Unsupported,
            format!("{reference} is transient: it has no saved form and no next boot"),
        )
        .hint("leave --next-boot out")),
        (Saved::Nowhere, Apply::Both) => {
            notes.push(format!("{reference} is transient: the change lasts until it stops"));
            place(true, false)
        }
        (_, Apply::Live) => place(true, false),
        (Saved::Apart, Apply::NextBoot) => place(false, true),
        (Saved::Apart, Apply::Both) => place(up, true),
    }
}

/// What the units share that this module needs.
trait Quantity: Copy + Ord + Display {
    const ZERO: Self;
    fn plus(self, other: Self) -> Option<Self>;
    fn minus(self, other: Self) -> Option<Self>;
    fn round_up(self, grain: Self) -> Option<Self>;
    fn is_whole(self) -> bool;
    fn number(self) -> Option<serde_json::Number>;
}

impl Quantity for Cpus {
    const ZERO: Self = Cpus::ZERO;
    fn plus(self, other: Self) -> Option<Self> {
        self.checked_add(other)
    }
    fn minus(self, other: Self) -> Option<Self> {
        self.checked_sub(other)
    }
    /// CPUs are never rounded: asking for 1.5 vCPUs is a mistake, not a wish for 2.
    fn round_up(self, _grain: Self) -> Option<Self> {
        Some(self)
    }
    fn is_whole(self) -> bool {
        Cpus::is_whole(self)
    }
    fn number(self) -> Option<serde_json::Number> {
        admission::cpus_number(self)
    }
}

impl Quantity for ByteCount {
    const ZERO: Self = ByteCount::ZERO;
    fn plus(self, other: Self) -> Option<Self> {
        self.checked_add(other)
    }
    fn minus(self, other: Self) -> Option<Self> {
        self.checked_sub(other)
    }
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

/// One field's value before and asked for: absolute, whole where it must be, in the backend's grain, not below its least.
fn aim<T: Quantity>(
    inputs: &Inputs<'_>,
    field: Field,
    reading: &Reading<T>,
    wanted: Option<Limit<Amount<T>>>,
    place: Place,
    notes: &mut Vec<String>,
) -> Result<Option<Aim<T>>, Problem> {
    let Some(wanted) = wanted else { return Ok(None) };
    let (reference, name) = (&inputs.observed.reference, field.as_str());
    let invalid = |detail: String| Problem::new(Code::InvalidRequest, detail);
    let before = if place.live { reading.accepted } else { reading.persistent };
    let base = || match before {
        Some(Limit::At(value)) => Ok(value),
        Some(Limit::Unlimited) => {
            Err(invalid(format!("{reference} has no {name} limit that a relative value could add to"))
                .hint("give an absolute value"))
        }
        None => {
            Err(invalid(format!("the present {name} of {reference} is unknown, so a relative value can't be used"))
                .hint("give an absolute value"))
        }
    };
    let requested = match wanted {
        Limit::Unlimited => Limit::Unlimited,
        Limit::At(Amount::To(value)) => Limit::At(value),
        Limit::At(Amount::Plus(more)) => Limit::At(
            base()?
                .plus(more)
                .ok_or_else(|| invalid(format!("{name} {} + {more} is more than any host has", base_text(before))))?,
        ),
        Limit::At(Amount::Minus(less)) => Limit::At(
            base()?
                .minus(less)
                .ok_or_else(|| invalid(format!("{name} {} − {less} is below nothing", base_text(before))))?,
        ),
    };
    let vm = inputs.observed.reference.kind() == Kind::Vm;
    let requested = match requested {
        Limit::Unlimited => {
            if vm && field != Field::CpuLimit {
                return Err(invalid(format!("{reference} is a VM: its {name} can't be without a limit"))
                    .hint("only cpu_limit of a VM takes `none`"));
            }
            Limit::Unlimited
        }
        Limit::At(value) if value == T::ZERO => {
            return Err(invalid(format!("{name} of {reference} can't be 0"))
                .hint(format!("the least is {}; `none` takes a limit away where there is one", reading.least)));
        }
        Limit::At(value) => {
            if vm && field == Field::Cpus && !value.is_whole() {
                return Err(invalid(format!("{reference} is a VM: its cpus are whole vCPUs, not {value}"))
                    .hint("cap its CPU time in fractions with cpu_limit"));
            }
            let rounded = value
                .round_up(reading.grain)
                .ok_or_else(|| invalid(format!("{name} {value} is more than any host has")))?;
            if rounded != value {
                notes.push(format!("{name} {value} is rounded up to {rounded}, a multiple of {}", reading.grain));
            }
            if rounded < reading.least {
                let numbers = Numbers { smallest_feasible: reading.least.number(), ..Numbers::default() };
                return Err(Problem::new(
                    Code::BelowMinimum,
                    format!("{name} {value} is below the least that {reference} can have, {}", reading.least),
                )
                .hint(format!("ask for {} or more", reading.least))
                .numbers(numbers));
            }
            Limit::At(rounded)
        }
    };
    Ok(Some(Aim { before, saved_before: reading.persistent, requested, live: place.live, saved: place.saved }))
}

fn base_text<T: Display>(before: Option<Limit<T>>) -> String {
    before.map_or_else(|| "unknown".into(), |value| value.to_string())
}

/// The values that have to be set, live and saved.
#[derive(Debug, Default)]
struct Needed {
    live: Values,
    saved: Values,
}

impl Needed {
    fn of(targets: &Targets, observed: &Observed, place: Place) -> Self {
        fn live<T: Copy + PartialEq>(
            aim: Option<Aim<T>>,
            r: &Reading<T>,
            same: fn(Limit<T>, Limit<T>) -> bool,
        ) -> Option<Limit<T>> {
            let there =
                |a: &Aim<T>| r.accepted == Some(a.requested) && r.observed.is_some_and(|seen| same(a.requested, seen));
            aim.filter(|a| a.live && !there(a)).map(|a| a.requested)
        }
        fn saved<T: Copy + PartialEq>(aim: Option<Aim<T>>, r: &Reading<T>) -> Option<Limit<T>> {
            aim.filter(|a| a.saved && r.persistent != Some(a.requested)).map(|a| a.requested)
        }
        let mut needed = Needed {
            live: Values {
                cpus: live(targets.cpus, &observed.cpus, cpus_rule(observed)),
                cpu_limit: live(targets.cpu_limit, &observed.cpu_limit, same_cpu_time),
                memory: live(targets.memory, &observed.memory, |a, b| a == b),
            },
            saved: Values {
                cpus: saved(targets.cpus, &observed.cpus),
                cpu_limit: saved(targets.cpu_limit, &observed.cpu_limit),
                memory: saved(targets.memory, &observed.memory),
            },
        };
        if place.together && place.live {
            // One call carries both: a field that either side needs is set on both.
            let merged = Values {
                cpus: needed.live.cpus.or(needed.saved.cpus),
                cpu_limit: needed.live.cpu_limit.or(needed.saved.cpu_limit),
                memory: needed.live.memory.or(needed.saved.memory),
            };
            needed = Needed { live: merged, saved: merged };
        }
        needed
    }

    fn is_empty(&self) -> bool {
        self.live == Values::default() && self.saved == Values::default()
    }
}

/// What the instance or the config does not allow at all.
fn check_switches(inputs: &Inputs<'_>, needed: &Needed) -> Result<(), Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    if !inputs.rules.live && needed.live != Values::default() {
        let (code, hint) = match observed.saved {
            Saved::Apart => (Code::RestartRequired, "--next-boot saves the change for its next start"),
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

fn able<T: Copy + PartialEq>(
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
        && (absent || inputs.observed.saved == Saved::Together)
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
fn check_bounds(inputs: &Inputs<'_>, targets: &Targets) -> Result<(), Problem> {
    let rules = inputs.rules;
    if let Some(aim) = &targets.cpus {
        bound(inputs, "cpus", aim, rules.max_cpus, "max_cpus")?;
    }
    if let Some(aim) = &targets.memory {
        bound(inputs, "memory", aim, rules.max_memory, "max_memory")?;
        if let (Some(Bound { value: least, rule }), Limit::At(value)) = (rules.min_memory, aim.requested)
            && value < least
            && aim.before.is_none_or(|before| before.at().is_none_or(|before| value < before))
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

fn bound<T: Quantity>(
    inputs: &Inputs<'_>,
    field: &str,
    aim: &Aim<T>,
    most: Option<Bound<T>>,
    key: &str,
) -> Result<(), Problem> {
    let Some(most) = most else { return Ok(()) };
    at_most(inputs, field, aim, most.value, &format!("[[limit]] {key}"), Config::limit_key(most.rule, key))
}

fn at_most<T: Quantity>(
    inputs: &Inputs<'_>,
    field: &str,
    aim: &Aim<T>,
    most: T,
    key: &str,
    config_key: String,
) -> Result<(), Problem> {
    let Limit::At(value) = aim.requested else { return Ok(()) };
    let grows = aim.before.is_none_or(|before| before.at().is_some_and(|before| value > before));
    if value <= most || !grows {
        return Ok(());
    }
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
fn check_shrink(inputs: &Inputs<'_>, aim: &Aim<ByteCount>) -> Result<(), Problem> {
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
            let floor = used.saturating_add(rules.shrink_margin);
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
                format!("{reference} uses {used}; with a margin of {} it can't shrink to {value}", rules.shrink_margin),
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
fn admit(inputs: &Inputs<'_>, needed: &Needed) -> Result<Charge, Problem> {
    let reference = &inputs.observed.reference;
    let now = inputs.ledger.charge(reference);
    let mut wanted = now;
    let mut checked = now;
    if let Some(cpus) = needed.live.cpus {
        wanted.cpus = cpus.at().unwrap_or(Cpus::ZERO);
        // Giving a limit to what had none is always admitted: the host is better off.
        checked.cpus = if inputs.observed.cpus.accepted == Some(Limit::Unlimited) { now.cpus } else { wanted.cpus };
    }
    if let Some(memory) = needed.live.memory {
        let value = memory.at().unwrap_or(ByteCount::ZERO);
        wanted.memory = admission::charged_memory(inputs.observed, value, inputs.config);
        checked.memory =
            if inputs.observed.memory.accepted == Some(Limit::Unlimited) { now.memory } else { wanted.memory };
    }
    inputs.ledger.check(reference, checked).map_err(|refused| admission::refusal(inputs, &refused, checked))?;
    Ok(wanted.max(now))
}

/// `[scaling]`, the host's own size, and what the instance can reach.
fn check_ceilings(inputs: &Inputs<'_>, targets: &Targets, needed: &Needed) -> Result<(), Problem> {
    let observed = inputs.observed;
    let scaling = &inputs.config.scaling;
    if let Some(aim) = &targets.cpus
        && needed.live.cpus.is_some()
    {
        let most = scaling.max_cpus.or_host(inputs.host.cpus);
        at_most(inputs, "cpus", aim, most, "[scaling] max_cpus", "scaling.max_cpus".into())?;
    }
    if let Some(aim) = &targets.memory
        && needed.live.memory.is_some()
    {
        let most = scaling.max_memory.or_host(inputs.host.memory);
        at_most(inputs, "memory", aim, most, "[scaling] max_memory", "scaling.max_memory".into())?;
    }
    ceiling(observed, "cpus", &observed.cpus, needed.live.cpus, needed.saved.cpus)?;
    ceiling(observed, "cpu_limit", &observed.cpu_limit, needed.live.cpu_limit, needed.saved.cpu_limit)?;
    ceiling(observed, "memory", &observed.memory, needed.live.memory, needed.saved.memory)
}

fn ceiling<T: Quantity>(
    observed: &Observed,
    field: &str,
    reading: &Reading<T>,
    live: Option<Limit<T>>,
    saved: Option<Limit<T>>,
) -> Result<(), Problem> {
    let reference = &observed.reference;
    let vm = reference.kind() == Kind::Vm;
    if let (Some(Limit::At(value)), Some(most)) = (live, reading.ceiling)
        && value > most
    {
        let numbers = Numbers {
            resource: Some(field.to_owned()),
            requested: value.number(),
            largest_feasible: most.number(),
            ..Numbers::default()
        };
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
        return Err(problem.numbers(numbers));
    }
    if let (Some(Limit::At(value)), Some(most)) = (saved, reading.saved_ceiling)
        && value > most
    {
        let numbers = Numbers {
            resource: Some(field.to_owned()),
            requested: value.number(),
            largest_feasible: most.number(),
            ..Numbers::default()
        };
        return Err(Problem::new(
            Code::Unsupported,
            format!("the saved definition of {reference} allows {most} {field} at most, not {value}"),
        )
        .hint(if live.is_some() {
            "raise the maximum in its definition first, or add --live-only".to_owned()
        } else {
            "raise the maximum in its definition first".to_owned()
        })
        .numbers(numbers));
    }
    Ok(())
}

/// The steps, from the surest to undo to the least sure.
fn steps(inputs: &Inputs<'_>, needed: &Needed, place: Place) -> Vec<Step> {
    let observed = inputs.observed;
    let kind = observed.reference.kind();
    if place.together {
        return vec![step(observed, Scope::Both, needed.saved, UndoClass::Exact, Settle::AtOnce)];
    }
    if kind != Kind::Vm {
        let live = (needed.live != Values::default())
            .then(|| step(observed, Scope::Live, needed.live, UndoClass::Exact, Settle::AtOnce));
        return live.into_iter().collect();
    }
    let only = |field: Field, values: &Values| match field {
        Field::Cpus => values.cpus.map(|cpus| Values { cpus: Some(cpus), ..Values::default() }),
        Field::CpuLimit => values.cpu_limit.map(|limit| Values { cpu_limit: Some(limit), ..Values::default() }),
        Field::Memory => values.memory.map(|memory| Values { memory: Some(memory), ..Values::default() }),
    };
    let order = [
        (Scope::Saved, Field::Cpus, UndoClass::Exact, Settle::AtOnce),
        (Scope::Saved, Field::CpuLimit, UndoClass::Exact, Settle::AtOnce),
        (Scope::Saved, Field::Memory, UndoClass::Exact, Settle::AtOnce),
        (Scope::Live, Field::CpuLimit, UndoClass::Exact, Settle::AtOnce),
        (Scope::Live, Field::Memory, UndoClass::Exact, Settle::Guest),
        (Scope::Live, Field::Cpus, UndoClass::Attempt, Settle::Guest),
    ];
    order
        .into_iter()
        .filter_map(|(scope, field, class, settle)| {
            let values = if scope == Scope::Live { &needed.live } else { &needed.saved };
            only(field, values).map(|values| step(observed, scope, values, class, settle))
        })
        .collect()
}

/// What can't be taken back is told before it is done: a limit that nothing can take away again, or that nothing can put
/// back.
fn make_one_way(observed: &Observed, values: &Values, plan: &mut Plan) {
    fn caution<T: Copy + PartialEq>(value: Option<Limit<T>>, reading: &Reading<T>) -> Option<String> {
        match (value?, reading.persistent, &reading.unlimit) {
            (Limit::Unlimited, Some(Limit::At(_)), Ability::OneWay(why)) => Some(why.clone()),
            (Limit::At(_), Some(Limit::Unlimited), Ability::No(_, why)) => Some(why.clone()),
            _ => None,
        }
    }
    let cautions = [caution(values.cpus, &observed.cpus), caution(values.memory, &observed.memory)];
    for caution in cautions.into_iter().flatten() {
        plan.notes.push(format!("this can't be taken back: {caution}"));
        for step in &mut plan.steps {
            (step.undo, step.undo_what, step.class) = (None, None, UndoClass::None);
        }
    }
}

/// One step with its way back: the values of before, from the backend's own.
fn step(observed: &Observed, scope: Scope, values: Values, class: UndoClass, settle: Settle) -> Step {
    let kind = observed.reference.kind();
    let old = |saved: bool| Values {
        cpus: values.cpus.and(if saved { observed.cpus.persistent } else { observed.cpus.accepted }),
        cpu_limit: values.cpu_limit.and(if saved {
            observed.cpu_limit.persistent
        } else {
            observed.cpu_limit.accepted
        }),
        memory: values.memory.and(if saved { observed.memory.persistent } else { observed.memory.accepted }),
    };
    let saved = scope == Scope::Saved || !observed.state.is_up();
    let undo = Action::Restore { scope, values: old(saved), native: observed.native.clone() };
    let action = Action::Set { scope, values };
    Step {
        what: describe(kind, &action),
        undo_what: Some(describe(kind, &undo)),
        action,
        undo: Some(undo),
        class,
        settle,
    }
}
