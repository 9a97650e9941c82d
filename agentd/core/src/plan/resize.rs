//! The plan of a resize: relative values made absolute, each field checked against its instance, its bounds and the caps,
//! then the steps from the surest to undo to the least sure: saved, quota, balloon, vCPUs last.

use std::fmt::Display;
use std::time::Duration;

use super::checks::{admit, check_bounds, check_ceilings, check_shrink, check_switches};
use super::restart::{self, ByRestart};
use super::scalar::Scalar;
use super::settle::{cpus_rule, same_cpu_time};
use super::states::goes;
use super::steps::{make_one_way, steps};
use super::{Action, Aim, Inputs, Plan, Preparation, Redefinition, Scope, Targets, Values, Verb};
use crate::api::{Apply, ResizeRequest, Restart};
use crate::config::{display_duration, parse_duration};
use crate::error::{Code, Numbers, Problem};
use crate::instance::{Ability, Field, Kind, Observed, Parts, Reading, Saved};
use crate::units::{Amount, ByteCount, Cpus, Limit};

/// Plans a resize, or refuses it with the numbers. `made` is what the backend made of the definition, where the resize needs
/// another one, as [`redefinition`] told.
pub fn resize(inputs: &Inputs<'_>, request: &ResizeRequest, made: Option<&Preparation>) -> Result<Plan, Problem> {
    match way(inputs, request)? {
        Way::Live(plan) => Ok(*plan),
        Way::Restart(restart) => restart.plan(inputs, made),
    }
}

/// What the definition has to be changed to first, where a resize needs that and may have it.
pub fn redefinition(inputs: &Inputs<'_>, request: &ResizeRequest) -> Option<Redefinition> {
    if request.restart == Restart::Never {
        return None;
    }
    match way(inputs, request) {
        Ok(Way::Restart(restart)) => restart.redefinition,
        Ok(Way::Live(_)) | Err(_) => None,
    }
}

/// How a resize goes.
enum Way {
    Live(Box<Plan>),
    Restart(Box<ByRestart>),
}

fn way(inputs: &Inputs<'_>, request: &ResizeRequest) -> Result<Way, Problem> {
    let observed = inputs.observed;
    let wanted = wanted(inputs, request)?;
    refuse_contradictions(request)?;
    inputs.refuse_if_blocked()?;
    let mut plan = inputs.empty_plan(Verb::Resize);
    let lent = request.for_.as_deref().map(|text| lent(observed, request.apply, text)).transpose()?;
    let apply = lent.map_or(request.apply, |lent| lent.apply);
    let place = place(observed, apply, &mut plan.notes)?;

    let targets = Targets {
        cpus: aim(inputs, Field::Cpus, &observed.cpus, wanted.cpus, place, &mut plan.notes)?,
        cpu_limit: aim(inputs, Field::CpuLimit, &observed.cpu_limit, wanted.cpu_limit, place, &mut plan.notes)?,
        memory: aim(inputs, Field::Memory, &observed.memory, wanted.memory, place, &mut plan.notes)?,
    };
    plan.targets = targets;
    let unplanned = plan.clone();
    if let Some(aim) = &mut plan.targets.memory {
        in_blocks(observed.parts, observed.saved_parts, aim, &mut plan.notes);
    }
    if lent.is_some() {
        only_growth(observed, &plan.targets)?;
    }
    let mut plan = match complete(inputs, plan, place, |scope, values| Action::Set { scope, values }) {
        Err(refused)
            if request.restart == Restart::IfNeeded
                && restart::may_help(inputs, &refused)
                && !suffices_live(inputs, &unplanned) =>
        {
            return Ok(Way::Restart(Box::new(ByRestart::new(inputs, request, unplanned, refused)?)));
        }
        planned => planned?,
    };
    if let Some(lent) = lent.filter(|_| !plan.steps.is_empty()) {
        plan.lent_ms = Some(lent.lasts_ms);
        plan.notes
            .push(format!("it goes back by itself after {}", display_duration(Duration::from_millis(lent.lasts_ms))));
    }
    Ok(Way::Live(Box::new(plan)))
}

/// Whether all of it is possible for what runs: then only what is saved is in the way, and that takes no restart.
fn suffices_live(inputs: &Inputs<'_>, plan: &Plan) -> bool {
    fn live<T>(aim: Option<Aim<T>>) -> Option<Aim<T>> {
        aim.map(|aim| Aim { saved: false, ..aim })
    }
    let Targets { cpus, cpu_limit, memory } = plan.targets;
    let mut plan = plan.clone();
    plan.targets = Targets { cpus: live(cpus), cpu_limit: live(cpu_limit), memory: live(memory) };
    if let Some(aim) = &mut plan.targets.memory {
        in_blocks(inputs.observed.parts, None, aim, &mut plan.notes);
    }
    let place = Place { live: true, saved: false, together: false };
    inputs.observed.state.is_up()
        && complete(inputs, plan, place, |scope, values| Action::Set { scope, values }).is_ok()
}

/// For how long, and to where, something is lent.
#[derive(Debug, Clone, Copy)]
struct Lent {
    lasts_ms: u64,
    apply: Option<Apply>,
}

/// What is lent is not saved, so that a start of the instance ends it, too; but for what keeps one set of limits.
fn lent(observed: &Observed, apply: Option<Apply>, text: &str) -> Result<Lent, Problem> {
    let invalid = |detail: String| Problem::new(Code::InvalidRequest, detail);
    let lasts = parse_duration(text).map_err(|error| invalid(format!("for: {error}")))?;
    let lasts_ms = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX);
    if lasts_ms == 0 {
        return Err(invalid("for: growth for no time at all is none".into()).hint("leave it out, or say how long"));
    }
    match (observed.saved, apply) {
        (Saved::Together, apply) => Ok(Lent { lasts_ms, apply }),
        (_, None | Some(Apply::Live)) => Ok(Lent { lasts_ms, apply: Some(Apply::Live) }),
        (_, Some(Apply::Both | Apply::NextBoot)) => {
            Err(invalid("what is lent for a time is not saved".into()).hint("leave --next-boot out"))
        }
    }
}

/// Only growth is lent: its way back always fits.
fn only_growth(observed: &Observed, targets: &Targets) -> Result<(), Problem> {
    fn shrinks<T: Scalar>(aim: Option<Aim<T>>) -> bool {
        let Some(aim) = aim else { return false };
        match (aim.requested, aim.before) {
            (Limit::At(want), Some(Limit::At(now))) => want < now,
            (Limit::At(_), _) => true,
            (Limit::Unlimited, _) => false,
        }
    }
    if shrinks(targets.cpus) || shrinks(targets.cpu_limit) || shrinks(targets.memory) {
        let detail = format!("only growth goes back by itself, and this takes something from {}", observed.reference);
        return Err(Problem::new(Code::InvalidRequest, detail).hint("leave --for out; ctl undo takes it back"));
    }
    Ok(())
}

/// Beyond what its balloon can give back, a VM's memory comes in blocks.
pub(super) fn in_blocks(live: Option<Parts>, saved: Option<Parts>, aim: &mut Aim<ByteCount>, notes: &mut Vec<String>) {
    let Limit::At(wanted) = aim.requested else { return };
    let fit = |parts: Option<Parts>| parts.and_then(|parts| parts.fit(wanted)).unwrap_or(wanted);
    let of = live.or(saved);
    let (live, saved) = (fit(live), fit(saved));
    let requested = if aim.live { live } else { saved };
    if let Some(parts) = of.filter(|_| requested != wanted) {
        notes.push(format!("memory {wanted} is rounded up to {requested}: it is plugged in blocks of {}", parts.block));
    }
    aim.requested = Limit::At(requested);
    aim.saved_requested = (aim.saved && saved != requested).then_some(Limit::At(saved));
}

/// The way from targets to a plan that every change of CPUs and memory goes: what of them is needed, whether it is
/// allowed, what it is charged, and the steps. `action` makes the call that sets some values.
pub(super) fn complete(
    inputs: &Inputs<'_>,
    mut plan: Plan,
    place: Place,
    action: impl Fn(Scope, Values) -> Action,
) -> Result<Plan, Problem> {
    let (observed, targets) = (inputs.observed, plan.targets);
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
    plan.steps = steps(inputs, &needed, place, action);
    if place.together {
        make_one_way(observed, &needed.saved, &mut plan);
    }
    Ok(plan)
}

/// A restart ends what is not saved, and what is only saved needs none.
fn refuse_contradictions(request: &ResizeRequest) -> Result<(), Problem> {
    let invalid = |detail: &str, hint: &str| Err(Problem::new(Code::InvalidRequest, detail).hint(hint));
    if request.restart == Restart::Never {
        return match request.force {
            true => invalid(
                "force is about a restart, and none is allowed",
                "add --restart if-needed, or leave --force out",
            ),
            false => Ok(()),
        };
    }
    match request.apply {
        Some(Apply::Live) => {
            invalid("what is changed only live does not outlive a restart", "leave --live-only or --restart out")
        }
        Some(Apply::NextBoot) => {
            invalid("what is changed only for the next boot needs no restart", "leave --next-boot or --restart out")
        }
        Some(Apply::Both) | None if request.for_.is_some() => {
            invalid("what is lent for a time does not outlive a restart", "leave --for or --restart out")
        }
        Some(Apply::Both) | None => Ok(()),
    }
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
pub(super) struct Place {
    pub(super) live: bool,
    pub(super) saved: bool,
    /// One call does both.
    pub(super) together: bool,
}

pub(super) fn place(observed: &Observed, apply: Option<Apply>, notes: &mut Vec<String>) -> Result<Place, Problem> {
    let reference = &observed.reference;
    goes(observed, Verb::Resize, false)?;
    let up = observed.state.is_up();
    let place = |live, saved| Ok(Place { live, saved, together: false });
    match (observed.saved, apply.unwrap_or_default()) {
        (Saved::Together, Apply::Both) => Ok(Place { live: up, saved: true, together: true }),
        (Saved::Together, Apply::Live | Apply::NextBoot) => Err(Problem::new(
            Code::Unsupported,
            format!("{reference} keeps one set of limits: what runs and what is saved can't differ"),
        )
        .hint("leave --live-only and --next-boot out")),
        (Saved::OnRequest, Apply::Both) => Ok(Place { live: up, saved: true, together: true }),
        (Saved::OnRequest, Apply::NextBoot) if !up => Ok(Place { live: false, saved: true, together: true }),
        (Saved::OnRequest, Apply::NextBoot) => Err(Problem::new(
            Code::Unsupported,
            format!(
                "what systemd keeps of {reference} it sets at once on what runs: it can't be for the next start only"
            ),
        )
        .hint("leave --next-boot out, or stop it first")),
        (_, Apply::Live) if !up => Err(Problem::new(
            Code::InvalidState,
            format!("{reference} is {}: there is nothing live to change", observed.state),
        )
        .hint("leave --live-only out to change what its next start will have")),
        (Saved::Nowhere, Apply::NextBoot) => {
            Err(Problem::new(Code::Unsupported, format!("{reference} has no saved form and no next boot"))
                .hint("leave --next-boot out"))
        }
        (Saved::Nowhere, Apply::Both) => {
            let until = if observed.reference.kind() == Kind::Unit { "until it is gone" } else { "until it stops" };
            notes.push(format!("{reference} has no saved form: the change lasts {until}"));
            place(true, false)
        }
        (_, Apply::Live) => place(true, false),
        (Saved::Apart, Apply::NextBoot) => place(false, true),
        (Saved::Apart, Apply::Both) => place(up, true),
    }
}

/// One field's value before and asked for: absolute, whole where it must be, in the backend's grain, not below its least.
fn aim<T: Scalar>(
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
    Ok(Some(Aim {
        before,
        saved_before: reading.persistent,
        requested,
        saved_requested: None,
        live: place.live,
        saved: place.saved,
    }))
}

fn base_text<T: Display>(before: Option<Limit<T>>) -> String {
    before.map_or_else(|| "unknown".into(), |value| value.to_string())
}

/// The values that have to be set, live and saved.
#[derive(Debug, Default)]
pub(super) struct Needed {
    pub(super) live: Values,
    pub(super) saved: Values,
}

impl Needed {
    pub(super) fn of(targets: &Targets, observed: &Observed, place: Place) -> Self {
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
            aim.filter(|a| a.saved && r.persistent != Some(a.to_save())).map(|a| a.to_save())
        }
        let mut needed = Needed {
            live: Values {
                cpus: live(targets.cpus, &observed.cpus, cpus_rule(observed)),
                cpu_limit: live(targets.cpu_limit, &observed.cpu_limit, same_cpu_time),
                memory: live(targets.memory, &observed.memory, |a, b| a == b),
                plugged: None,
            },
            saved: Values {
                cpus: saved(targets.cpus, &observed.cpus),
                cpu_limit: saved(targets.cpu_limit, &observed.cpu_limit),
                memory: saved(targets.memory, &observed.memory),
                plugged: None,
            },
        };
        if place.together && place.live {
            // One call carries both: a field that either side needs is set on each side that is aimed at.
            fn both<T: Copy + PartialEq>(
                aim: Option<Aim<T>>,
                live: &mut Option<Limit<T>>,
                saved: &mut Option<Limit<T>>,
            ) {
                let Some(aim) = aim.filter(|aim| aim.saved && (live.is_some() || saved.is_some())) else { return };
                (*live, *saved) = (aim.live.then_some(aim.requested), Some(aim.to_save()));
            }
            both(targets.cpus, &mut needed.live.cpus, &mut needed.saved.cpus);
            both(targets.cpu_limit, &mut needed.live.cpu_limit, &mut needed.saved.cpu_limit);
            both(targets.memory, &mut needed.live.memory, &mut needed.saved.memory);
        }
        needed
    }

    fn is_empty(&self) -> bool {
        self.live == Values::default() && self.saved == Values::default()
    }
}
