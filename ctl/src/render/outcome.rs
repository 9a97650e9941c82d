//! What became of a change, in a line: the fields before and after, then only what the reply says was observed. Knows the
//! reply to a change and nothing of how it was asked for.

use std::fmt::Display;

use agentd_core::api::{Change, ChangeOf, OperationView};
use agentd_core::operation::Outcome;

use super::text::{clean, paragraph, plan};

/// One field of a change in words.
struct Told {
    name: &'static str,
    before: Option<String>,
    requested: String,
    /// What the next start was to have, where that is another value.
    to_save: Option<String>,
    observed: Option<String>,
    confirmed: Option<String>,
    live: bool,
    saved: bool,
    /// Whether a guest has a say in it.
    of_guest: bool,
}

impl Told {
    fn new(change: &Change) -> Self {
        fn one<T: Display>(name: &'static str, of_guest: bool, change: &ChangeOf<T>) -> Told {
            Told {
                name,
                before: change.before.as_ref().map(ToString::to_string),
                requested: change.requested.to_string(),
                to_save: change.saved_requested.as_ref().map(ToString::to_string),
                observed: change.observed.as_ref().map(ToString::to_string),
                confirmed: change.confirmed.as_ref().map(ToString::to_string),
                live: change.live,
                saved: change.persistent,
                of_guest,
            }
        }
        match change {
            Change::Cpus(change) => one("cpus", true, change),
            Change::CpuLimit(change) => one("cpu_limit", false, change),
            Change::Memory(change) => one("memory", true, change),
        }
    }

    /// `cpus 2 → 4`, `cpus 4 → 2 (saved: 3)`
    fn arrow(&self) -> String {
        let saved = self.to_save.as_ref().map(|value| format!(" (saved: {value})")).unwrap_or_default();
        format!("{} {} → {}{saved}", self.name, self.before.as_deref().unwrap_or("unknown"), self.requested)
    }

    /// Whether nothing was to become of it, and nothing has.
    fn stays(&self) -> bool {
        self.to_save.is_none()
            && self.before.as_ref() == Some(&self.requested)
            && self.observed.as_ref().is_none_or(|now| *now == self.requested)
    }

    /// Where the value is now.
    const fn place(&self) -> &'static str {
        match (self.live, self.saved) {
            (true, true) => "live and saved",
            (true, false) => "live only",
            (false, true) => "saved for the next start",
            (false, false) => "not seen live nor saved",
        }
    }
}

/// The whole answer to a change.
pub(crate) fn operation(view: &OperationView, width: Option<usize>) -> String {
    let fields: Vec<Told> = view.changes.iter().map(Told::new).collect();
    let reference = clean(&view.reference);
    // A size names every field; those that stay as they are would only hide the others.
    let moved = fields.iter().filter(|field| !field.stays()).map(Told::arrow);
    let mut arrows: Vec<String> = moved.collect();
    if arrows.is_empty() {
        arrows = fields.iter().map(Told::arrow).collect();
    }
    let arrows = if arrows.is_empty() { String::new() } else { format!("{}   ", arrows.join("  ")) };
    let mut notes = view.notes.as_slice();
    let seconds = format!("{}.{:02} s", view.elapsed_ms / 1000, view.elapsed_ms % 1000 / 10);
    let state = view.instance.as_ref().map(|instance| instance.state);
    let line = match view.outcome {
        _ if view.dry_run || view.outcome == Outcome::Planned => match view.steps.as_slice() {
            [] if view.outcome == Outcome::Planned => format!("{reference}  planned: only its hold changes"),
            [] => format!("{reference}  {arrows}planned: there is nothing to do"),
            _ if view.restart => format!("{reference}  {arrows}planned with a restart, nothing is changed"),
            _ => format!("{reference}  {arrows}planned, nothing is changed"),
        },
        Outcome::Changed if fields.is_empty() => match (view.verb.as_str(), state) {
            ("restart", Some(state)) => format!("{reference}  restarted, {state}, {seconds}"),
            ("suspend", Some(state)) => format!("{reference}  suspended: {state} and held, {seconds}"),
            ("resume", Some(state)) => format!("{reference}  resumed, {state}, {seconds}"),
            (_, Some(state)) => format!("{reference}  {state}, {seconds}"),
            (verb, None) => format!("{reference}  {} done, {seconds}", clean(verb)),
        },
        Outcome::Changed => {
            let restarted = if view.restart { ", by a restart" } else { "" };
            format!("{reference}  {arrows}{}{restarted}, {seconds}", success(&view.reference, &fields))
        }
        Outcome::Unchanged => {
            let why = match (fields.as_slice(), notes) {
                ([], [first, rest @ ..]) => {
                    notes = rest;
                    clean(first)
                }
                ([], []) => state.map_or_else(|| "it was already so".into(), |state| format!("it is {state}")),
                (fields, _) => {
                    let values: Vec<_> = fields.iter().map(|f| format!("{} is {}", f.name, f.requested)).collect();
                    values.join(", ")
                }
            };
            format!("{reference}  unchanged: {why}")
        }
        Outcome::Pending => format!("{reference}  {arrows}{}, {seconds}", pending(view, &fields)),
        Outcome::Running => {
            let id = view.operation.as_deref().map(|id| format!(" (operation {})", clean(id))).unwrap_or_default();
            format!("{reference}  {arrows}still under way{id}; ctl show {reference} tells where it is")
        }
        // Not replies of a success today.
        outcome => {
            let detail = view.detail.as_deref().map(|detail| format!(": {}", clean(detail))).unwrap_or_default();
            format!("{reference}  {arrows}{}{detail}", outcome.as_str())
        }
    };
    let mut out = paragraph(&line, 4, width);
    if view.dry_run {
        out += &plan(&view.steps, width);
    }
    for note in notes {
        out += &paragraph(&format!("  note: {}", clean(note)), 8, width);
    }
    if let ("undo", Outcome::Changed | Outcome::Pending, Some(id)) = (view.verb.as_str(), view.outcome, &view.operation)
    {
        out += &format!("to put it back again: ctl undo {}\n", clean(id));
    }
    if let (true, false, Some(instance)) = (view.dry_run, view.steps.is_empty(), &view.instance) {
        out += &format!("to run exactly this: --if-version {}\n", clean(&instance.version));
    }
    out
}

/// `live and saved, confirmed by the guest`, where that is what the fields say.
fn success(reference: &str, fields: &[Told]) -> String {
    let mut parts = Vec::new();
    match fields {
        [first, rest @ ..] if rest.iter().all(|field| field.place() == first.place()) => {
            parts.push(first.place().into())
        }
        _ => parts.extend(fields.iter().map(|field| format!("{} {}", field.name, field.place()))),
    }
    let asked =
        || fields.iter().filter(|field| reference.starts_with("vm/") && field.of_guest && field.live && !field.stays());
    let has = |field: &Told| field.confirmed.as_ref() == Some(&field.requested);
    match (asked().count(), asked().filter(|field| has(field)).count()) {
        (0, _) => {}
        (all, confirmed) if all == confirmed => parts.push("confirmed by the guest".into()),
        (_, 0) if asked().all(|field| field.confirmed.is_none()) => parts.push("not confirmed by the guest".into()),
        _ => parts.extend(asked().map(|field| match &field.confirmed {
            Some(_) if has(field) => format!("{} confirmed by the guest", field.name),
            Some(value) => format!("{} not confirmed: the guest has {value}", field.name),
            None => format!("{} not confirmed", field.name),
        })),
    }
    parts.join(", ")
}

/// What the guest has not done yet.
fn pending(view: &OperationView, fields: &[Told]) -> String {
    if fields.is_empty() {
        let state =
            view.instance.as_ref().map(|instance| format!(": it is still {}", instance.state)).unwrap_or_default();
        return format!("{} accepted, not done yet{state}", clean(&view.verb));
    }
    let late: Vec<String> = fields
        .iter()
        .filter_map(|field| {
            let observed = field.observed.as_ref().filter(|value| **value != field.requested)?;
            Some(format!("{} is {observed}, asked for {}", field.name, field.requested))
        })
        .collect();
    let late = if late.is_empty() { String::new() } else { format!(": {}", late.join("; ")) };
    format!("accepted, the guest has not obeyed yet{late}")
}

#[cfg(test)]
mod tests;
