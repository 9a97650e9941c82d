//! `ctl undo`: which operation is meant, and that it is taken back. What an undo does is the server's to plan.

use std::collections::HashSet;

use agentd_core::api::{OperationList, OperationView, UndoRequest};
use agentd_core::error::{Code, Problem};
use agentd_core::instance::Ref;
use agentd_core::operation::{Outcome, REPAIR};

use super::{Context, duration, version};
use crate::args::Undo;
use crate::client::encode;
use crate::error::Failure;
use crate::render::Report;

/// How many operations of an instance are looked through for its last change.
const LOOKED_THROUGH: usize = 200;

/// Takes a change back.
pub(super) fn undo(context: &Context, args: &Undo) -> Result<Report, Failure> {
    let body = UndoRequest { dry_run: args.plan.dry_run, wait: duration("--wait", args.wait.as_ref())? };
    let if_version = args.plan.if_version.as_deref().map(version).transpose()?;
    let (id, reference) = if is_operation(&args.what) {
        let operation: OperationView = context.get(&format!("/v1/operations/{}", args.what))?.read()?;
        (args.what.clone(), context.client.resolve(&operation.reference)?)
    } else {
        let reference = context.client.resolve(&args.what)?;
        let path = format!("/v1/operations?ref={}&limit={LOOKED_THROUGH}", encode(reference.as_str()));
        let operations: OperationList = context.get(&path)?.read()?;
        (last_change(&reference, &operations.items)?, reference)
    };
    context.report(format!("/v1/operations/{}/undo", encode(&id)), reference, &body, if_version, args.plan.dry_run)
}

/// Whether a text is an operation's id, a ULID, and not a name: upper case, as they are told, because the beginning of a
/// container's id is lower case.
fn is_operation(text: &str) -> bool {
    let crockford = |byte: u8| matches!(byte, b'0'..=b'9' | b'A'..=b'Z') && !matches!(byte, b'I' | b'L' | b'O' | b'U');
    text.len() == 26 && text.as_bytes()[0] <= b'7' && text.bytes().all(crockford)
}

/// The newest change of size that is in effect, of operations newest first. Not an undo, and nothing that an undo took
/// back, so that saying it again goes further back and never does again what was taken back; an undo that was taken back
/// itself takes nothing back any more.
fn last_change(reference: &Ref, operations: &[OperationView]) -> Result<String, Failure> {
    let mut taken_back = HashSet::new();
    for operation in operations {
        let Some(id) = operation.operation.as_deref() else { continue };
        if !matches!(operation.verb.as_str(), "resize" | "undo") || taken_back.contains(id) {
            continue;
        }
        match (operation.outcome, operation.undoes.as_deref()) {
            // It would be the last change by the time the undo has its turn.
            (Outcome::Running, _) => {
                let detail = format!("{reference} is being changed (operation {id})");
                return Err(Problem::new(Code::Busy, detail).hint("try again when that has ended").into());
            }
            (Outcome::Changed | Outcome::Pending, Some(undone)) => {
                taken_back.insert(undone);
            }
            // What agentd put back by itself was nobody's change: taken back it would be somebody's drift again.
            (Outcome::Changed | Outcome::Pending, None) if by_repair(operation) => {}
            (Outcome::Changed | Outcome::Pending, None) if operation.verb == "resize" => return Ok(id.to_owned()),
            _ => {}
        }
    }
    let detail = format!("there is no change of {reference} on record that could be taken back");
    let hint = format!("`ctl history {reference}` shows what was done; an undo is taken back by its operation's id");
    Err(Problem::new(Code::NotFound, detail).hint(hint).into())
}

fn by_repair(operation: &OperationView) -> bool {
    operation.who.as_ref().is_some_and(|who| who.command == REPAIR)
}

#[cfg(test)]
mod tests;
