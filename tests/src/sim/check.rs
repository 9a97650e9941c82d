//! The promises, checked once everything is calm: nothing that was told is lost, no step is unaccounted for, the ledger is
//! what is observed, every instance is as the record says, or held.

use std::collections::BTreeMap;

use agentd::backend::fake::Fake;
use agentd::engine::Engine;
use agentd::store::Page;
use agentd_core::api::{Happening, HoldKind};
use agentd_core::error::Code;
use agentd_core::instance::{Kind, Observed, Ref, Target};
use agentd_core::operation::{Operation, Outcome, StepState};
use agentd_core::plan::{Action, Aim, charge_of};
use agentd_core::units::{ByteCount, Cpus, Limit};

use super::world::{Said, Stats, World, peer};

/// What runs and has more CPUs than the caps allow, in words.
pub(super) fn over_cap(fake: &Fake, most: Cpus) -> Option<String> {
    let up = fake.all().into_iter().filter(|observed| observed.state.is_up());
    let cpus: u64 = up.filter_map(|observed| observed.cpus.observed.and_then(Limit::at)).map(Cpus::millis).sum();
    (cpus > most.millis()).then(|| format!("{cpus} thousandths of a CPU run where {most} are allowed"))
}

async fn operations(engine: &Engine) -> Result<Vec<Operation>, String> {
    engine
        .store()
        .newest(None, None, None, usize::MAX)
        .await
        .map_err(|error| format!("the record can't be read: {error}"))
}

/// Whether every operation has its end and no instance waits for one.
pub(super) async fn is_quiet(engine: &Engine, instances: &[String]) -> bool {
    let Ok(operations) = operations(engine).await else { return false };
    if operations.iter().any(Operation::is_open) || engine.store().trouble().is_some() {
        return false;
    }
    for name in instances {
        let holds = holds(engine, name).await;
        if holds.contains(&HoldKind::Recovering) {
            return false;
        }
    }
    true
}

/// What is still open, in words.
pub(super) async fn unsettled(engine: &Engine) -> String {
    let open: Vec<_> = operations(engine).await.unwrap_or_default();
    let open = open.iter().filter(|operation| operation.is_open());
    let open: Vec<String> = open.map(|o| format!("{} {} {:?} {:?}", o.id, o.verb, o.outcome, states(o))).collect();
    format!("{open:?} {:?}", engine.store().trouble())
}

fn states(operation: &Operation) -> Vec<StepState> {
    operation.steps.iter().map(|record| record.state).collect()
}

async fn holds(engine: &Engine, name: &str) -> Vec<HoldKind> {
    let Ok(reference) = Ref::new(Kind::Vm, name) else { return Vec::new() };
    match engine.show(&peer(), &Target::Full(reference)).await {
        Ok(instance) => instance.holds.iter().map(|hold| hold.hold).collect(),
        Err(_) => Vec::new(),
    }
}

pub(super) async fn promises(world: &World, engine: &Engine) -> Result<Stats, String> {
    let operations = operations(engine).await?;
    for operation in &operations {
        let errors: Vec<_> = operation.steps.iter().filter_map(|record| record.error.as_ref()).collect();
        let (id, reference, verb) = (&operation.id, &operation.reference, operation.verb);
        world.tell(|| {
            format!("{id} {verb} of {reference} ended as {:?} {:?} {errors:?}", operation.outcome, states(operation))
        });
    }
    let by_id: BTreeMap<&str, &Operation> = operations.iter().map(|o| (o.id.as_str(), o)).collect();
    told_is_recorded(&world.said.borrow(), &by_id)?;
    one_effect_a_key(&world.said.borrow(), &by_id)?;
    for operation in &operations {
        let going = |state| matches!(state, StepState::Doing | StepState::Undoing);
        if operation.outcome != Outcome::Partial && states(operation).into_iter().any(going) {
            return Err(format!("{} ended as {:?} with {:?}", operation.id, operation.outcome, states(operation)));
        }
    }
    verbs_are_done_once(world, &operations)?;
    let order = history_is_whole(engine, &operations).await?;
    ledger_is_observed(world, engine).await?;
    for name in &world.schedule.instances {
        as_recorded(world, engine, name, &order, &by_id).await?;
    }
    let count = |outcomes: &[Outcome]| operations.iter().filter(|o| outcomes.contains(&o.outcome)).count() as u64;
    Ok(Stats {
        crashes: 0,
        operations: operations.len() as u64,
        changed: count(&[Outcome::Changed, Outcome::Pending]),
        ended_badly: count(&[Outcome::RolledBack, Outcome::Abandoned, Outcome::Partial]),
    })
}

/// What a caller was told of an operation is what is on record of it.
fn told_is_recorded(said: &[Said], by_id: &BTreeMap<&str, &Operation>) -> Result<(), String> {
    for said in said {
        let recorded = by_id.get(said.id.as_str()).map(|operation| operation.outcome);
        if said.acknowledged && recorded.is_none() {
            return Err(format!("{} was acknowledged and is not on record", said.id));
        }
        let told = match &said.reply {
            None => continue,
            Some(Ok(view)) => view.outcome,
            // It was told that it is not on record yet, or that the record can't be read.
            Some(Err(failure))
                if failure.problem.detail.contains("could not be recorded yet")
                    || failure.problem.detail.contains("can't be told now") =>
            {
                continue;
            }
            Some(Err(failure)) => match &failure.operation {
                Some(view) => view.outcome,
                // It was refused; where the disk failed just then, it may be on record, and have come to nothing.
                None => match recorded {
                    None | Some(Outcome::Refused) => continue,
                    // It was acknowledged, refused before it had a plan, and a crash came before that was on record.
                    Some(Outcome::RolledBack)
                        if by_id.get(said.id.as_str()).is_some_and(|operation| operation.steps.is_empty()) =>
                    {
                        continue;
                    }
                    Some(Outcome::RolledBack | Outcome::Abandoned | Outcome::Unchanged)
                        if failure.problem.code == Code::StoreUnavailable =>
                    {
                        continue;
                    }
                    Some(outcome) => {
                        return Err(format!("{} was refused ({}) and is {outcome:?}", said.id, failure.problem));
                    }
                },
            },
        };
        // What nobody knew then somebody knows now.
        if told != Outcome::Unknown && recorded != Some(told) {
            return Err(format!("{} was told to be {told:?} and is recorded as {recorded:?}", said.id));
        }
    }
    Ok(())
}

/// All that was asked under one key came to one effect at most, and to one answer.
fn one_effect_a_key(said: &[Said], by_id: &BTreeMap<&str, &Operation>) -> Result<(), String> {
    let mut effects: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for said in said {
        let Some(key) = &said.key else { continue };
        let effect = by_id.get(said.id.as_str()).is_some_and(|operation| {
            matches!(operation.outcome, Outcome::Changed | Outcome::Pending | Outcome::Partial)
        });
        let ids = effects.entry(key).or_default();
        if effect && !ids.contains(&said.id.as_str()) {
            ids.push(&said.id);
        }
    }
    match effects.iter().find(|(_, ids)| ids.len() > 1) {
        Some((key, ids)) => Err(format!("{key} had the effects {ids:?}")),
        None => Ok(()),
    }
}

/// Every start, shutdown and hard stop that an engine was asked for is a step on record that was begun, and was asked for
/// once.
fn verbs_are_done_once(world: &World, operations: &[Operation]) -> Result<(), String> {
    for name in &world.schedule.instances {
        let reference = format!("vm/{name}");
        let of_it = operations.iter().filter(|operation| operation.reference.as_str() == reference);
        let is_verb = |action: &Action| action.starts() || matches!(action, Action::Shutdown | Action::Kill);
        let steps = of_it.flat_map(|operation| &operation.steps).filter(|record| is_verb(&record.step.action));
        let begun = steps.map(|record| match record.state {
            StepState::Planned | StepState::Skipped => 0,
            // Taking it back is a verb of its own, and is gone on with in the next life.
            StepState::Undoing | StepState::Undone | StepState::UndoFailed => 2 + world.schedule.ends.len(),
            _ => 1,
        });
        let begun: usize = begun.sum();
        let asked = world.fake.verbs(name);
        if asked > begun {
            return Err(format!("{reference} was started or stopped {asked} times, and {begun} are on record"));
        }
    }
    Ok(())
}

/// Each operation's end is in the history once; its order is the order in which they ended.
async fn history_is_whole(engine: &Engine, operations: &[Operation]) -> Result<Vec<String>, String> {
    let page = Page { limit: usize::MAX, ..Page::default() };
    let mut history = engine.store().history(page).await.map_err(|error| error.to_string())?;
    history.reverse();
    for operation in operations {
        let ends = history.iter().filter(|entry| {
            entry.operation.as_deref() == Some(&operation.id) && entry.outcome == Some(operation.outcome)
        });
        let ends = ends.count();
        if ends != 1 {
            return Err(format!(
                "{} ended as {:?} and is {ends} times in the history",
                operation.id, operation.outcome
            ));
        }
    }
    let changes = history.into_iter().filter(|entry| entry.happening == Happening::Change);
    Ok(changes.filter_map(|entry| entry.operation).collect())
}

async fn ledger_is_observed(world: &World, engine: &Engine) -> Result<(), String> {
    let capacity = engine.capacity(&peer()).await;
    let mut cpus = Cpus::ZERO;
    let mut memory = ByteCount::ZERO;
    for observed in world.fake.all() {
        let charge = charge_of(&observed, &world.config);
        cpus = cpus.saturating_add(charge.cpus);
        memory = memory.saturating_add(charge.memory);
    }
    let committed = (capacity.cpus.committed, capacity.memory.committed);
    if committed == (cpus, memory) {
        return Ok(());
    }
    Err(format!("{committed:?} is committed and {:?} observed", (cpus, memory)))
}

/// The values of an instance that are saved.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Saved {
    cpus: Option<Limit<Cpus>>,
    cpu_limit: Option<Limit<Cpus>>,
    memory: Option<Limit<ByteCount>>,
}

/// The changes that are told to have been made, made one after the other, give what is there.
async fn as_recorded(
    world: &World,
    engine: &Engine,
    name: &str,
    order: &[String],
    by_id: &BTreeMap<&str, &Operation>,
) -> Result<(), String> {
    let reference = format!("vm/{name}");
    let of_it = order.iter().filter_map(|id| by_id.get(id.as_str())).filter(|o| o.reference.as_str() == reference);
    let mut wanted = Saved {
        cpus: Some(Limit::At(Cpus::whole(2))),
        cpu_limit: Some(Limit::Unlimited),
        memory: Some(Limit::At(ByteCount::mib(1024))),
    };
    let mut partial = false;
    let mut last = None;
    for operation in of_it {
        partial |= operation.outcome == Outcome::Partial;
        if !operation.verb.resizes() || !matches!(operation.outcome, Outcome::Changed | Outcome::Pending) {
            continue;
        }
        // The history may tell of it twice: that nobody knew, and how it came out.
        if last == Some(&operation.id) {
            continue;
        }
        last = Some(&operation.id);
        let targets = &operation.targets;
        set(&mut wanted.cpus, targets.cpus);
        set(&mut wanted.cpu_limit, targets.cpu_limit);
        set(&mut wanted.memory, targets.memory);
    }
    if partial {
        return match holds(engine, name).await.contains(&HoldKind::NeedsAttention) {
            true => Ok(()),
            false => Err(format!("{reference} is neither before nor after, and not held")),
        };
    }
    let Some(observed) = world.fake.all().into_iter().find(|o| o.reference.as_str() == reference) else {
        return Err(format!("{reference} is gone"));
    };
    let there = saved(&observed);
    if there != wanted {
        return Err(format!("{reference} has {there:?} saved where the record tells of {wanted:?}"));
    }
    let undisturbed = !world.schedule.meddling && !world.schedule.restarting && world.schedule.ends.is_empty();
    let running = Saved {
        cpus: observed.cpus.accepted,
        cpu_limit: observed.cpu_limit.accepted,
        memory: observed.memory.accepted,
    };
    let only_saved = by_id.values().any(|o| o.targets.memory.is_some_and(|aim| aim.saved && !aim.live));
    if undisturbed && observed.state.is_up() && !only_saved && running != wanted {
        return Err(format!("{reference} runs with {running:?} where the record tells of {wanted:?}"));
    }
    Ok(())
}

fn set<T: Copy + PartialEq>(wanted: &mut Option<Limit<T>>, aim: Option<Aim<T>>) {
    if let Some(aim) = aim.filter(|aim| aim.saved) {
        *wanted = Some(aim.to_save());
    }
}

fn saved(observed: &Observed) -> Saved {
    Saved {
        cpus: observed.cpus.persistent,
        cpu_limit: observed.cpu_limit.persistent,
        memory: observed.memory.persistent,
    }
}
