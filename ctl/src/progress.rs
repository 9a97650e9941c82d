//! The line on a terminal that says what a slow request waits for. It is drawn on standard error after half a second,
//! redrawn in place, and gone before the result is printed. Decides nothing: the request is on its way whatever is seen.

use std::io::Write as _;
use std::panic::resume_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use agentd_core::api::{Change, Instance, OperationList, OperationView};
use agentd_core::instance::Ref;
use agentd_core::operation::{Outcome, StepState};

use crate::client::{Client, GLANCE_TIME, encode, instance_path};
use crate::render::{self, text::clean};

/// What is quicker is not worth a line.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often the line is drawn.
const FRAME: Duration = Duration::from_millis(250);
/// How often the daemon is asked.
const GLANCE_EVERY: Duration = Duration::from_millis(700);

/// Runs a request while a line says what it waits for: `waiting` at first, then whatever `glance` sees.
pub(crate) fn watch<T: Send + 'static>(
    waiting: String,
    glance: Option<Box<dyn Fn() -> Option<String> + Send>>,
    request: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (done, result) = mpsc::sync_channel(1);
    let begun = Instant::now();
    let worker = thread::spawn(move || {
        // The receiver lives until this has arrived.
        let _ = done.send(request());
    });
    let seen = Arc::new(Mutex::new(waiting));
    let mut glance = glance;
    // A window may change its size meanwhile; a line a little too long or too short does no harm.
    let width = render::err_width().unwrap_or(80);
    let mut drawn = false;
    let mut pause = PATIENCE;
    loop {
        match result.recv_timeout(pause) {
            Ok(value) => {
                if drawn {
                    draw("\r\u{1b}[K");
                }
                return value;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => match worker.join() {
                Err(panic) => resume_unwind(panic),
                // It ends only after it has sent.
                Ok(()) => unreachable!("the request ended without a result"),
            },
        }
        if let Some(glance) = glance.take() {
            look(glance, Arc::clone(&seen));
        }
        let what = seen.lock().map_or_else(|poisoned| poisoned.into_inner().clone(), |what| what.clone());
        draw(&line(&what, begun.elapsed(), width));
        drawn = true;
        pause = FRAME;
    }
}

/// Keeps looking on a thread of its own, so that a slow look holds nothing up. It ends with the process.
fn look(glance: Box<dyn Fn() -> Option<String> + Send>, seen: Arc<Mutex<String>>) {
    thread::spawn(move || {
        loop {
            if let (Some(what), Ok(mut seen)) = (glance(), seen.lock()) {
                *seen = what;
            }
            thread::sleep(GLANCE_EVERY);
        }
    });
}

fn draw(text: &str) {
    let mut stderr = std::io::stderr().lock();
    // A terminal that went away is no reason to give the change up.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// One line, cut to the width, that replaces the one before.
fn line(what: &str, waited: Duration, width: usize) -> String {
    let time = format!("  {} s", waited.as_secs());
    let room = width.saturating_sub(time.len() + 1);
    let clean = clean(what);
    let cut: String = if clean.chars().count() <= room {
        clean
    } else {
        clean.chars().take(room.saturating_sub(1)).chain(['…']).collect()
    };
    format!("\r{cut}{time}\u{1b}[K")
}

/// Which step of an instance's change is under way, and how far its memory has come.
pub(crate) fn glance_at(client: &Client, reference: &Ref) -> Option<String> {
    let path = format!("/v1/operations?ref={}&limit=5", encode(reference.as_str()));
    let operations: OperationList = client.get_within(&path, GLANCE_TIME).ok()?.read().ok()?;
    let operation = operations.items.iter().find(|operation| operation.outcome == Outcome::Running)?;
    let instance = memory_target(operation)
        .and_then(|_| client.get_within(&instance_path(reference), GLANCE_TIME).ok()?.read::<Instance>().ok());
    describe(operation, instance.as_ref())
}

/// `vm/web: step 2 of 3, libvirt setMemory live 400 MiB; memory is 512 MiB, asked for 400 MiB`
fn describe(operation: &OperationView, instance: Option<&Instance>) -> Option<String> {
    let at = |states: &[StepState]| operation.steps.iter().position(|step| states.contains(&step.state));
    let undoing = at(&[StepState::Undoing]);
    let index =
        undoing.or_else(|| at(&[StepState::Doing, StepState::Pending])).or_else(|| at(&[StepState::Planned]))?;
    let step = operation.steps.get(index)?;
    let verb = if undoing.is_some() { "taking back " } else { "" };
    let mut text =
        format!("{}: {verb}step {} of {}, {}", operation.reference, index + 1, operation.steps.len(), step.what);
    let observed = instance.and_then(|instance| instance.memory.observed).map(|observed| observed.to_string());
    if let (Some(wanted), Some(observed)) = (memory_target(operation), observed)
        && wanted != observed
    {
        text += &format!("; memory is {observed}, asked for {wanted}");
    }
    Some(text)
}

fn memory_target(operation: &OperationView) -> Option<String> {
    operation.changes.iter().find_map(|change| match change {
        Change::Memory(change) => Some(change.requested.to_string()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_its_width_and_replaces_the_one_before() {
        let text = line("vm/web: libvirt\u{1b} setMemory live 400 MiB", Duration::from_secs(12), 30);
        assert_eq!(text, "\rvm/web: libvirt\\u{1b} …  12 s\u{1b}[K");
        assert!(text.trim_start_matches('\r').trim_end_matches("\u{1b}[K").chars().count() < 30);
    }

    #[test]
    fn the_step_under_way_and_the_balloon_are_told() {
        let operation = r#"{"operation":"01J","verb":"resize","outcome":"running","ref":"vm/web","dry_run":false,
            "elapsed_ms":0,"notes":[],"instance":null,"changes":[{"field":"memory","before":536870912,
            "requested":419430400,"accepted":null,"observed":null,"confirmed":null,"live":false,"persistent":false}],
            "steps":[{"what":"a","undo":null,"state":"done"},{"what":"libvirt setMemory live 400 MiB","undo":null,
            "state":"doing"},{"what":"c","undo":null,"state":"planned"}]}"#;
        let operation: OperationView = serde_json::from_str(operation).unwrap();
        let seen = describe(&operation, None).unwrap();
        assert_eq!(seen, "vm/web: step 2 of 3, libvirt setMemory live 400 MiB");
    }

    #[test]
    fn a_request_gives_its_result_through() {
        assert_eq!(watch("waiting".into(), None, || 42), 42);
    }
}
