//! The plan of a prepare: headroom in a VM's saved definition, for growth without a restart after the next one. What the
//! definition becomes is worked out by the backend, whose format it is; how far it may go is decided here.

use super::{Action, Headroom, Inputs, Plan, Redefinition, Settle, Step, UndoClass, Verb, describe};
use crate::api::PrepareRequest;
use crate::error::{Code, Problem};
use crate::instance::{Kind, Ref, Saved};
use crate::units::{ByteCount, Cpus};

/// What a backend made of a definition.
#[derive(Debug, Clone, PartialEq)]
pub struct Preparation {
    /// What was asked for.
    pub of: Redefinition,
    /// What the definition says before and after.
    pub before: Headroom,
    /// After.
    pub after: Headroom,
    /// What changes, in words; nothing where it has that headroom already.
    pub changes: Vec<String>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The backend's own definition of before.
    pub old: serde_json::Value,
    /// And of after.
    pub new: serde_json::Value,
}

impl Preparation {
    /// The step that replaces the definition, with its way back.
    pub(super) fn step(&self, reference: &Ref) -> Step {
        let (old, new) = (self.old.clone(), self.new.clone());
        let action = Action::Define { headroom: self.after, definition: new.clone(), before: old.clone() };
        let undo = Action::Define { headroom: self.before, definition: old, before: new };
        Step {
            what: describe(reference, &action),
            undo_what: Some(describe(reference, &undo)),
            action,
            undo: Some(undo),
            class: UndoClass::Exact,
            settle: Settle::AtOnce,
        }
    }
}

/// How much headroom is asked for: what the request names, else what `[scaling]` lets every VM grow to; never beyond that.
pub fn headroom(inputs: &Inputs<'_>, request: &PrepareRequest) -> Result<(Headroom, Vec<String>), Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    inputs.refuse_if_blocked()?;
    let unsupported = |detail: String| Problem::new(Code::Unsupported, detail);
    if reference.kind() != Kind::Vm {
        return Err(unsupported(format!(
            "{reference} needs no headroom: its limits can be set to anything at any time"
        )));
    }
    if observed.saved == Saved::Nowhere {
        return Err(unsupported(format!("{reference} is transient: it has no saved definition and no next boot"))
            .hint("define it first"));
    }
    if request.max_cpus.is_some_and(|cpus| !cpus.is_whole() || cpus == Cpus::ZERO) {
        return Err(Problem::new(Code::InvalidRequest, "max_cpus is a whole number of vCPUs, 1 or more"));
    }
    let mut notes = Vec::new();
    let (scaling, host, rules) = (&inputs.config.scaling, inputs.host, inputs.rules);
    let bound = rules.max_cpus.map_or(Cpus::MAX, |bound| bound.value);
    let most_cpus = scaling.max_cpus.or_host(host.cpus).min(bound);
    // Whole vCPUs: an odd bound lets less.
    let most_cpus = Cpus::from_millis(most_cpus.millis() / 1000 * 1000);
    let bound = rules.max_memory.map_or(ByteCount::MAX, |bound| bound.value);
    let most_memory = scaling.max_memory.or_host(host.memory).min(bound);
    let cpus = request.max_cpus.unwrap_or(most_cpus).min(most_cpus);
    let memory = request.max_memory.unwrap_or(most_memory).min(most_memory);
    let clamped = |name: &str, asked: String, most: String| {
        format!(
            "{name} {asked} is more than it may ever have: {most} ([scaling] {name}, [[limit]] {name}, the host's own)"
        )
    };
    if let Some(asked) = request.max_cpus.filter(|asked| *asked > cpus) {
        notes.push(clamped("max_cpus", asked.to_string(), cpus.to_string()));
    }
    if let Some(asked) = request.max_memory.filter(|asked| *asked > memory) {
        notes.push(clamped("max_memory", asked.to_string(), memory.to_string()));
    }
    // One that is named alone leaves the other as it is.
    let one = request.max_cpus.is_some() != request.max_memory.is_some();
    Ok((
        Headroom {
            cpus: Some(cpus).filter(|_| !one || request.max_cpus.is_some()),
            memory: Some(memory).filter(|_| !one || request.max_memory.is_some()),
            boots_with: None,
        },
        notes,
    ))
}

/// Plans a prepare with what the backend made of the definition.
pub fn prepare(inputs: &Inputs<'_>, request: &PrepareRequest, made: &Preparation) -> Result<Plan, Problem> {
    let (_, notes) = headroom(inputs, request)?;
    let observed = inputs.observed;
    let mut plan = inputs.empty_plan(Verb::Prepare);
    plan.notes = notes.into_iter().chain(made.notes.iter().cloned()).collect();
    if made.changes.is_empty() {
        plan.notes.push(format!("{} has that headroom already", observed.reference));
        return Ok(plan);
    }
    plan.notes.extend(made.changes.iter().cloned());
    if observed.state.is_up() {
        plan.notes.push("it is there after the next boot".into());
    }
    plan.steps.push(made.step(&observed.reference));
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Observed;
    use crate::plan::tests::{MIB, container, vm, with};
    use crate::plan::{Reached, reached};

    fn asked(observed: &Observed, config: &str, body: serde_json::Value) -> Result<(Headroom, Vec<String>), Problem> {
        let request: PrepareRequest = serde_json::from_value(body).unwrap();
        with(observed, config, |inputs| headroom(inputs, &request))
    }

    #[test]
    fn headroom_goes_as_far_as_the_config_lets_it() {
        let config = "[scaling]\nmax_cpus = 16\nmax_memory = \"8GiB\"\n[[limit]]\nmatch = \"vm/web\"\nmax_cpus = 6.5\n";
        let (all, notes) = asked(&vm(), config, serde_json::json!({})).unwrap();
        assert_eq!((all.cpus, all.memory, notes.len()), (Some(Cpus::whole(6)), Some(MIB(8192)), 0));
        let (one, notes) = asked(&vm(), config, serde_json::json!({"max_cpus": 4})).unwrap();
        assert_eq!((one, notes.len()), (Headroom { cpus: Some(Cpus::whole(4)), ..Headroom::default() }, 0));
        let (less, notes) = asked(&vm(), config, serde_json::json!({"max_memory": "9GiB"})).unwrap();
        assert_eq!((less.memory, notes.len()), (Some(MIB(8192)), 1));
        let code = |observed: Observed, body| asked(&observed, config, body).unwrap_err().code;
        assert_eq!(code(container(), serde_json::json!({})), Code::Unsupported);
        assert_eq!(code(Observed { saved: Saved::Nowhere, ..vm() }, serde_json::json!({})), Code::Unsupported);
        assert_eq!(code(vm(), serde_json::json!({"max_cpus": 1.5})), Code::InvalidRequest);
    }

    #[test]
    fn what_is_seen_of_it_is_the_ceiling_of_what_is_saved() {
        let now = Headroom { cpus: Some(Cpus::whole(4)), memory: Some(MIB(2048)), boots_with: None };
        let after = Headroom { cpus: Some(Cpus::whole(8)), memory: Some(MIB(4096)), boots_with: None };
        let made = Preparation {
            of: Redefinition::Headroom(after),
            before: now,
            after,
            changes: vec!["<vcpu>: 8".into()],
            notes: Vec::new(),
            old: "old".into(),
            new: "new".into(),
        };
        let plan =
            |made: &Preparation| with(&vm(), "", |inputs| prepare(inputs, &PrepareRequest::default(), made)).unwrap();
        let planned = plan(&made);
        assert_eq!(planned.steps[0].what, "libvirt defineXML up to 8 vCPUs and 4 GiB");
        let (action, undo) = (&planned.steps[0].action, planned.steps[0].undo.as_ref().unwrap());
        assert!(matches!(reached(action, &vm()), Reached::No(_)) && reached(undo, &vm()) == Reached::Yes);
        let mut seen = vm();
        (seen.cpus.saved_ceiling, seen.memory.saved_ceiling) = (Some(Cpus::whole(8)), Some(MIB(4096)));
        assert_eq!(reached(action, &seen), Reached::Yes);
        assert!(plan(&Preparation { changes: Vec::new(), ..made }).steps.is_empty());
    }
}
