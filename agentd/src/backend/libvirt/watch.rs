//! What libvirt and the kernel announce of domains, brought together.
//!
//! ```text
//!   libvirt's thread ─► a callback, which never waits ─► queue ─┐
//!            vcpuN in a cgroup, a definition in its folder ─────┴─► notices
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::mpsc;

use super::calls::{Calls, Class, Job};
use super::ffi::events::{Event, Subscription, Tell};
use super::hotplug::{self, Hotplug};
use crate::backend::{BackendError, Notice};

/// Events that wait for us. Beyond them it is enough to know that there were more.
const QUEUE: usize = 256;

/// A subscription that is given up on a thread of its own, because that calls libvirtd.
struct Listening(Option<Subscription>);

impl Drop for Listening {
    fn drop(&mut self) {
        let subscription = self.0.take();
        // Without a thread it is dropped here and now, which is the lesser evil.
        let _ = std::thread::Builder::new().name("libvirt-unlisten".into()).spawn(move || drop(subscription));
    }
}

/// Sends what is announced until the connection is lost. Begins with [`Notice::All`] once it listens: what happened before
/// was not heard.
pub(super) async fn watch(calls: &Calls, uri: &str, notices: &mpsc::Sender<Notice>) -> BackendError {
    let (queue, mut events) = mpsc::channel(QUEUE);
    let (close, mut closed) = mpsc::channel(1);
    let missed = Arc::new(AtomicBool::new(false));
    let tell: Tell = {
        let missed = Arc::clone(&missed);
        Arc::new(move |event| match event {
            // Full means that one is there already.
            Event::Closed(why) => drop(close.try_send(why)),
            event => {
                if queue.try_send(event).is_err() {
                    missed.store(true, Ordering::Release);
                }
            }
        })
    };
    let job = move |job: &Job<'_>| Ok(Listening(Some(Subscription::open(job.connect, Arc::clone(&tell))?)));
    let _listening = match calls.run(Class::Listen, "", "listen to events", job).await {
        Ok(listening) => listening,
        Err(error) => return error,
    };
    let mut hotplug = Hotplug::new(hotplug::definitions(uri).as_deref());
    if let Err(error) = &hotplug {
        tracing::warn!("neither vCPUs that come and go nor definitions that change are announced: {error}");
    }
    send(notices, Notice::All).await;
    let mut stirred = true;
    loop {
        // Once for all that start together.
        if stirred && events.is_empty() {
            follow(calls, &mut hotplug).await;
            stirred = false;
        }
        tokio::select! {
            Some(why) = closed.recv() => {
                return BackendError::Unavailable(format!("libvirt at {uri} announces nothing any more: {why}"));
            }
            Some(event) = events.recv() => {
                // Set while the queue was full, so an event follows that lets us see it.
                if missed.swap(false, Ordering::AcqRel) {
                    send(notices, Notice::All).await;
                }
                match event {
                    Event::Lifecycle(uuid) => {
                        send(notices, Notice::Instance(uuid)).await;
                        stirred = true;
                    }
                    Event::Domain(uuid) => send(notices, Notice::Instance(uuid)).await,
                    Event::Closed(_) => {}
                }
            }
            notice = next(&mut hotplug) => send(notices, notice).await,
        }
    }
}

/// Waits where the engine is busy: meanwhile the queue fills, which is fine.
async fn send(notices: &mpsc::Sender<Notice>, notice: Notice) {
    // Nobody listens any more when the daemon ends.
    let _ = notices.send(notice).await;
}

async fn next(hotplug: &mut io::Result<Hotplug>) -> Notice {
    match hotplug {
        Ok(hotplug) => hotplug.next().await,
        Err(_) => std::future::pending().await,
    }
}

/// Watches the vCPUs of what runs now.
async fn follow(calls: &Calls, hotplug: &mut io::Result<Hotplug>) {
    let Ok(hotplug) = hotplug else { return };
    let known = hotplug.known();
    let job = move |job: &Job<'_>| Ok(hotplug::running(job, &known)?);
    match calls.run(Class::Look, "", "list what runs", job).await {
        Ok(running) => hotplug.follow(running),
        Err(error) => tracing::debug!("whose vCPUs to watch is unknown until the next event: {error}"),
    }
}
