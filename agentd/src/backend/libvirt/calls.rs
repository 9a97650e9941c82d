//! How calls reach libvirt: each job on a thread of its own, under a deadline of ours, on a connection of its class.
//!
//! ```text
//!   job ─► line (one connection, one job at a time) ─► ends in time ─► answer; the line serves on
//!                        │                         └─► overdue ──────► the line is retired; its thread closes it, some day
//!                        └─ connection found dead ─► opened anew, and the job run once more if it had sent nothing
//! ```
//!
//! No two jobs share a connection, so that one which hangs holds up no other. libvirt's daemon answers 5 calls of a connection
//! at once at most (`max_client_requests`). Worse, its client library loses wake-ups: the thread that calls first polls for
//! all, and where the second one wants its call sent in the moment before that poll begins (`g_main_loop_quit` before
//! `g_main_loop_run`), it waits until the first one's answer arrives. Seen with 9.0 on a busy host: the call of the second
//! thread was never written to the socket. Knows nothing of what the jobs do.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use virt_sys as sys;

use super::ffi::{self, Connect};
use super::process;
use crate::backend::BackendError;

/// How long a look may take.
pub(super) const READ_DEADLINE: Duration = Duration::from_secs(10);
/// How long a change may take: an unplug alone is given 5 s by libvirt.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(20);
/// How long a start may take: libvirt comes back once the guest's memory is set aside, which with huge pages or a slow disk
/// is not soon.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// Overdue calls in all: libvirtd has 20 workers, and some must be left for others.
const MOST_OVERDUE: usize = 12;
/// Connections of one class that are kept open when idle: as many as a listing uses.
const IDLE_LINES: usize = super::LOOKS_AT_ONCE;

/// What a job does, which decides the connection that it gets and what a deadline means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Looks at what libvirt knows by itself.
    Look,
    /// Makes libvirt ask QEMU: hangs where QEMU hangs.
    Ask,
    /// Changes something.
    Change,
    /// Brings a domain up: a change, too.
    Start,
    /// Registers for events, which then come on this connection.
    Listen,
}

impl Class {
    const fn changes(self) -> bool {
        matches!(self, Class::Change | Class::Start)
    }

    const fn deadline(self) -> Duration {
        match self {
            Class::Change => CALL_DEADLINE,
            Class::Start => START_DEADLINE,
            Class::Look | Class::Ask | Class::Listen => READ_DEADLINE,
        }
    }
}

/// Why a job gave nothing.
#[derive(Debug)]
pub(super) enum Fail {
    /// libvirt said so.
    Virt(ffi::Error),
    /// We say so.
    Told(BackendError),
}

impl From<ffi::Error> for Fail {
    fn from(error: ffi::Error) -> Self {
        Fail::Virt(error)
    }
}

impl From<BackendError> for Fail {
    fn from(error: BackendError) -> Self {
        Fail::Told(error)
    }
}

/// What a job is given: a connection, and where it says that it is about to change something.
pub(super) struct Job<'a> {
    /// The connection.
    pub(super) connect: &'a Arc<Connect>,
    /// Where its pid files are.
    pub(super) pid_dirs: &'a [PathBuf],
    sent: Cell<bool>,
    domain: &'a OnceLock<String>,
}

impl Job<'_> {
    /// From here on a broken connection leaves the outcome unknown.
    pub(super) fn about_to_change(&self) {
        self.sent.set(true);
    }

    /// From here on it is this domain's QEMU that hangs, where anything does. Of a job that has named one, that one.
    pub(super) fn concerns(&self, uuid: &str) {
        self.domain.get_or_init(|| uuid.to_owned());
    }

    /// Whether the fault lies with the connection, so that another one may serve.
    pub(super) fn is_cut_off(&self, error: &ffi::Error) -> bool {
        !self.connect.is_alive() || is_about_connection(error.code)
    }
}

/// One connection, opened at its first job.
#[derive(Debug, Default)]
struct Line {
    connect: Mutex<Option<Arc<Connect>>>,
    /// Whether it is to hear events.
    hears: bool,
}

impl Line {
    fn open(&self, uri: &str) -> Result<Arc<Connect>, ffi::Error> {
        let mut connect = lock(&self.connect);
        match connect.as_ref().filter(|connect| connect.is_alive()) {
            Some(connect) => Ok(Arc::clone(connect)),
            None => {
                *connect = None;
                let opened = if self.hears { Connect::open(uri)? } else { Connect::open_for_calls(uri)? };
                let opened = Arc::new(opened);
                *connect = Some(Arc::clone(&opened));
                Ok(opened)
            }
        }
    }
}

/// Who is where. One short lock, never held over a call.
#[derive(Debug, Default)]
struct Tally {
    lines: Vec<Place>,
    /// The domain of each overdue call; empty for a call that concerns none.
    overdue: Vec<String>,
    /// Domains with a change under way.
    changing: Vec<String>,
}

/// A line in service.
#[derive(Debug)]
struct Place {
    /// Whom it serves; `None` where one line serves all.
    class: Option<Class>,
    line: Arc<Line>,
    jobs: usize,
}

/// All calls to one libvirt.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    uri: Arc<str>,
    pid_dirs: Arc<[PathBuf]>,
    /// libvirt's test driver lives inside the library and `test:///FILE` gives every connection a host of its own: a change
    /// made on one is never seen on another. So there one connection serves all, and is never retired.
    single: bool,
    tally: Arc<Mutex<Tally>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it guards is whole after each statement, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const RUNNING: u8 = 0;
const ENDED: u8 = 1;
const OVERDUE: u8 = 2;

/// One job under way, seen by the one who waits for it. Dropped before the job has ended, it counts the job as overdue.
struct Wait {
    tally: Arc<Mutex<Tally>>,
    phase: Arc<AtomicU8>,
    line: Arc<Line>,
    domain: Arc<OnceLock<String>>,
    single: bool,
}

impl Drop for Wait {
    fn drop(&mut self) {
        let mut tally = lock(&self.tally);
        if self.phase.compare_exchange(RUNNING, OVERDUE, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            tally.overdue.push(self.domain.get().cloned().unwrap_or_default());
            if !self.single {
                tally.lines.retain(|place| !Arc::ptr_eq(&place.line, &self.line));
            }
        }
    }
}

/// The end of one job, on its own thread, also where it panics or never started: its place is free, and it is overdue
/// no more.
struct End {
    calls: Calls,
    class: Class,
    domain: Arc<OnceLock<String>>,
    line: Arc<Line>,
    phase: Arc<AtomicU8>,
}

impl Drop for End {
    fn drop(&mut self) {
        let idle = {
            let mut tally = lock(&self.calls.tally);
            let domain = self.domain.get().map_or("", String::as_str);
            if self.phase.swap(ENDED, Ordering::AcqRel) == OVERDUE
                && let Some(at) = tally.overdue.iter().position(|stuck| stuck == domain)
            {
                tally.overdue.swap_remove(at);
            }
            tally.release(self.class, domain, &self.line)
        };
        // Closing may block, so it is done here: after the lock.
        drop(idle);
    }
}

impl Calls {
    /// Nothing is opened yet.
    pub(super) fn new(uri: &str) -> Self {
        Calls {
            uri: uri.into(),
            pid_dirs: process::pid_dirs(uri).into(),
            single: uri.starts_with("test:"),
            tally: Arc::default(),
        }
    }

    /// Whether one connection serves all.
    pub(super) fn are_single(&self) -> bool {
        self.single
    }

    /// Where pid files are.
    pub(super) fn pid_dirs(&self) -> Arc<[PathBuf]> {
        Arc::clone(&self.pid_dirs)
    }

    /// Whether a change of this domain is under way, one that ran into its deadline included.
    pub(super) fn is_changing(&self, domain: &str) -> bool {
        lock(&self.tally).changing.iter().any(|changing| changing == domain)
    }

    /// Whether a call that concerns this domain is overdue: its QEMU hangs, so it isn't asked again meanwhile.
    pub(super) fn is_stuck(&self, domain: &str) -> bool {
        lock(&self.tally).overdue.iter().any(|stuck| stuck == domain)
    }

    /// Runs a job. `domain` is its UUID, or empty; `what` names the job in messages.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        class: Class,
        domain: &str,
        what: &str,
        job: impl Fn(&Job<'_>) -> Result<T, Fail> + Send + 'static,
    ) -> Result<T, BackendError> {
        let deadline = class.deadline();
        let line = self.admit(class, domain)?;
        let phase = Arc::new(AtomicU8::new(RUNNING));
        let concerned = Arc::new(OnceLock::new());
        if !domain.is_empty() {
            concerned.get_or_init(|| domain.to_owned());
        }
        let wait = Wait {
            tally: Arc::clone(&self.tally),
            phase: Arc::clone(&phase),
            line: Arc::clone(&line),
            domain: Arc::clone(&concerned),
            single: self.single,
        };
        let (tell, told) = oneshot::channel();
        let end = End { calls: self.clone(), class, domain: concerned, line, phase };
        let called = what.to_owned();
        let work = move || {
            let answer = end.calls.attempt(&end.line, &called, &end.domain, &job);
            drop(end);
            // Nobody listens after the deadline.
            let _ = tell.send(answer);
        };
        if let Err(error) = std::thread::Builder::new().name("libvirt-call".into()).spawn(work) {
            return Err(BackendError::Overloaded(format!("no thread can be started for a call to libvirt: {error}")));
        }
        match tokio::time::timeout(deadline, told).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(BackendError::Timeout(format!("{what}: the call was lost; what came of it is unknown"))),
            Err(_) => {
                drop(wait);
                let seconds = deadline.as_secs();
                Err(BackendError::Timeout(match class {
                    Class::Change | Class::Start => format!(
                        "{what}: libvirt has not come back from it within {seconds} s; what came of it is unknown until \
                         it is observed"
                    ),
                    Class::Look | Class::Ask | Class::Listen => {
                        format!("{what}: libvirt did not answer within {seconds} s")
                    }
                }))
            }
        }
    }

    /// Finds a connection with room, unless too much hangs already.
    fn admit(&self, class: Class, domain: &str) -> Result<Arc<Line>, BackendError> {
        let mut tally = lock(&self.tally);
        if tally.overdue.len() >= MOST_OVERDUE {
            return Err(BackendError::Overloaded(format!(
                "{MOST_OVERDUE} calls to libvirt are overdue; look for hung QEMU processes and at libvirtd"
            )));
        }
        if class.changes() {
            if tally.changing.iter().any(|changing| changing == domain) {
                return Err(BackendError::InvalidState(
                    "an earlier change of it has not come back from libvirt yet; nothing was done".into(),
                ));
            }
            tally.changing.push(domain.to_owned());
        }
        let wanted = if self.single { None } else { Some(class) };
        let room = |place: &&mut Place| place.class == wanted && (self.single || place.jobs == 0);
        if let Some(place) = tally.lines.iter_mut().find(room) {
            place.jobs += 1;
            return Ok(Arc::clone(&place.line));
        }
        let line = Arc::new(Line { hears: self.single || class == Class::Listen, ..Line::default() });
        tally.lines.push(Place { class: wanted, line: Arc::clone(&line), jobs: 1 });
        Ok(line)
    }

    /// Runs the job, once more where the connection was dead and nothing had been sent to change anything.
    fn attempt<T>(
        &self,
        line: &Line,
        what: &str,
        domain: &OnceLock<String>,
        job: &impl Fn(&Job<'_>) -> Result<T, Fail>,
    ) -> Result<T, BackendError> {
        let mut again = true;
        loop {
            let connect = line.open(&self.uri).map_err(|error| self.unavailable(&error.message))?;
            let job_on = Job { connect: &connect, pid_dirs: &self.pid_dirs, sent: Cell::new(false), domain };
            let error = match job(&job_on) {
                Ok(answer) => return Ok(answer),
                Err(Fail::Told(error)) => return Err(error),
                Err(Fail::Virt(error)) => error,
            };
            if !job_on.is_cut_off(&error) {
                return Err(translate(what, &error));
            }
            if job_on.sent.get() {
                return Err(BackendError::Timeout(format!(
                    "{what}: the connection to libvirt broke meanwhile ({}); what came of it is unknown until it is observed",
                    error.message
                )));
            }
            lock(&line.connect).take();
            if !again {
                return Err(self.unavailable(&error.message));
            }
            again = false;
        }
    }

    fn unavailable(&self, why: &str) -> BackendError {
        let service = if self.uri.starts_with("qemu:") { "libvirtd (or virtqemud)" } else { "libvirtd" };
        BackendError::Unavailable(format!(
            "libvirt at {} does not answer: {why}; look at the service {service}",
            self.uri
        ))
    }
}

impl Tally {
    /// Gives the job's place back; answers a line that is idle and more than are kept.
    fn release(&mut self, class: Class, domain: &str, line: &Arc<Line>) -> Option<Arc<Line>> {
        if class.changes() {
            self.changing.retain(|changing| changing != domain);
        }
        let at = self.lines.iter().position(|place| Arc::ptr_eq(&place.line, line))?;
        self.lines[at].jobs -= 1;
        let many = self.lines.iter().filter(|place| place.class == self.lines[at].class).count() > IDLE_LINES;
        (self.lines[at].jobs == 0 && many).then(|| self.lines.swap_remove(at).line)
    }
}

/// Errors that libvirt's client gives when the other end is away, whatever it thinks of its socket.
fn is_about_connection(code: u32) -> bool {
    [sys::VIR_ERR_NO_CONNECT, sys::VIR_ERR_INVALID_CONN].contains(&code)
}

/// libvirt's error as the trait's.
pub(super) fn translate(what: &str, error: &ffi::Error) -> BackendError {
    let words = format!("{what}: {}", error.message);
    match error.code {
        sys::VIR_ERR_NO_DOMAIN => BackendError::NotFound(words),
        sys::VIR_ERR_OPERATION_INVALID => BackendError::InvalidState(words),
        sys::VIR_ERR_NO_SUPPORT | sys::VIR_ERR_OPERATION_UNSUPPORTED | sys::VIR_ERR_CONFIG_UNSUPPORTED => {
            BackendError::Unsupported(words)
        }
        sys::VIR_ERR_AUTH_FAILED | sys::VIR_ERR_AUTH_CANCELLED | sys::VIR_ERR_AUTH_UNAVAILABLE => {
            BackendError::Unavailable(words)
        }
        _ => BackendError::Failed(words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls() -> Calls {
        Calls::new("test:///default")
    }

    /// A job that hangs until it is told to end.
    fn hang(
        calls: &Calls,
        domain: &str,
    ) -> (tokio::task::JoinHandle<Result<(), BackendError>>, std::sync::mpsc::Sender<()>) {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (calls, domain, ended) = (calls.clone(), domain.to_owned(), Mutex::new(ended));
        let task = tokio::spawn(async move {
            let job = move |_: &Job<'_>| {
                let _ = lock(&ended).recv();
                Ok(())
            };
            calls.run(Class::Change, &domain, "hang", job).await
        });
        (task, end)
    }

    async fn until(holds: impl Fn() -> bool) {
        while !holds() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_overdue_change_blocks_only_its_own_domain_until_it_ends() {
        let calls = calls();
        let (task, end) = hang(&calls, "a");
        assert!(matches!(task.await.unwrap(), Err(BackendError::Timeout(_))));
        assert!(calls.is_stuck("a") && !calls.is_stuck("b"));
        let again = calls.run(Class::Change, "a", "set", |_| Ok(())).await;
        assert!(matches!(again, Err(BackendError::InvalidState(_))), "{again:?}");
        drop(end);
        until(|| !calls.is_stuck("a") && lock(&calls.tally).changing.is_empty()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_thirteenth_call_is_refused_while_twelve_are_overdue() {
        let calls = calls();
        let mut ends = Vec::new();
        for n in 0..MOST_OVERDUE {
            let (task, end) = hang(&calls, &n.to_string());
            assert!(matches!(task.await.unwrap(), Err(BackendError::Timeout(_))));
            ends.push(end);
        }
        let refused = calls.run(Class::Look, "", "look", |_| Ok(())).await;
        assert!(matches!(refused, Err(BackendError::Overloaded(_))), "{refused:?}");
        ends.pop();
        until(|| lock(&calls.tally).overdue.len() < MOST_OVERDUE).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_with_an_overdue_call_is_never_used_again() {
        let mut calls = calls();
        calls.single = false;
        let (task, _end) = hang(&calls, "a");
        until(|| !lock(&calls.tally).lines.is_empty()).await;
        assert!(task.await.unwrap().is_err());
        assert!(lock(&calls.tally).lines.is_empty());
    }

    #[test]
    fn no_two_jobs_share_a_line_at_once_and_classes_share_none() {
        let mut calls = calls();
        calls.single = false;
        let lines: Vec<_> = (0..=IDLE_LINES).map(|n| calls.admit(Class::Change, &n.to_string()).unwrap()).collect();
        let shared = lines.iter().enumerate().any(|(n, line)| lines[..n].iter().any(|other| Arc::ptr_eq(line, other)));
        assert!(!shared);
        let end = |n: usize| lock(&calls.tally).release(Class::Change, &n.to_string(), &lines[n]);
        assert!(end(0).is_some_and(|closed| Arc::ptr_eq(&closed, &lines[0])), "there is one more than is kept");
        assert!(end(1).is_none());
        assert!(Arc::ptr_eq(&calls.admit(Class::Change, "x").unwrap(), &lines[1]), "the idle one serves on");
        assert!(!lines.iter().any(|line| Arc::ptr_eq(line, &calls.admit(Class::Look, "").unwrap())));
    }

    #[tokio::test]
    async fn a_libvirt_that_is_away_is_unavailable_with_the_service_to_look_at() {
        let calls = Calls::new("qemu+unix:///system?socket=/nonexistent/libvirt-sock");
        let answer = calls.run(Class::Look, "", "look", |_| Ok(())).await;
        assert!(matches!(&answer, Err(BackendError::Unavailable(why)) if why.contains("libvirtd")), "{answer:?}");
    }
}
