//! The event loop that libvirt's client library is given: file descriptors and timers that it asks to be called about, on one
//! thread. Not the library's own loop, because that can't be left out of a connection: a connection in it wakes the loop's thread
//! four times for each call, which on a small host takes longer than the call. Here a connection that is opened [`aside`] is in no
//! loop. It hears no events and sends no keepalive; its calls have deadlines of ours.
//!
//! The rules are libvirt's (libvirt-event.h): functions may be called from any thread, callbacks run on the loop's thread with no
//! lock held, and what belongs to a callback is freed on the loop's thread after it was removed, never within the removal.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virt_sys as sys;

/// What a callback is called with, and freed by.
#[derive(Clone, Copy)]
struct Owner {
    data: *mut c_void,
    free: sys::virFreeCallback,
}

// SAFETY: the pointer is libvirt's, and only ever handed back to libvirt's functions, which may be called on any thread.
unsafe impl Send for Owner {}

struct Handle {
    watch: c_int,
    fd: c_int,
    events: c_int,
    call: sys::virEventHandleCallback,
    owner: Owner,
    removed: bool,
}

struct Timer {
    timer: c_int,
    /// In milliseconds; below 0 it is off, 0 is at each turn.
    every: c_int,
    due: Option<Instant>,
    call: sys::virEventTimeoutCallback,
    owner: Owner,
    removed: bool,
}

/// What the loop looks after.
#[derive(Default)]
struct Table {
    numbers: c_int,
    handles: Vec<Handle>,
    timers: Vec<Timer>,
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);
/// Ends the loop's wait. `None` where the kernel has no descriptor left: then the loop looks by itself now and then.
static WAKE: LazyLock<Option<EventFd>> =
    LazyLock::new(|| EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok());
/// How long the loop waits at most where nothing can wake it.
const UNWOKEN: Duration = Duration::from_millis(100);

thread_local! {
    /// Whether what this thread opens stays out of the loop.
    static ASIDE: Cell<bool> = const { Cell::new(false) };
}

/// Opens something that stays out of the loop.
pub(super) fn aside<T>(open: impl FnOnce() -> T) -> T {
    ASIDE.set(true);
    let opened = open();
    ASIDE.set(false);
    opened
}

/// Gives libvirt this loop. Once a process, before anything is opened; then [`turn`] has to be called for ever.
pub(super) fn register() {
    let (add, update, remove) = (Some(add_handle as _), Some(update_handle as _), Some(remove_handle as _));
    let (add_timer, update_timer, remove_timer) =
        (Some(add_timer as _), Some(update_timer as _), Some(remove_timer as _));
    // SAFETY: functions of the signatures that libvirt wants, which live as long as the program.
    unsafe { sys::virEventRegisterImpl(add, update, remove, add_timer, update_timer, remove_timer) };
}

fn table() -> MutexGuard<'static, Table> {
    // Each change of it is whole after its statement, and no callback runs under the lock.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake() {
    if let Some(wake) = &*WAKE {
        // Full means that it is awake already.
        let _ = wake.write(1);
    }
}

impl Table {
    fn number(&mut self) -> c_int {
        // Nobody lives to see it wrap, and then it begins anew above 0.
        self.numbers = self.numbers.checked_add(1).unwrap_or(1);
        self.numbers
    }

    fn handle(&mut self, watch: c_int) -> Option<&mut Handle> {
        self.handles.iter_mut().find(|handle| handle.watch == watch && !handle.removed)
    }

    fn timer(&mut self, timer: c_int) -> Option<&mut Timer> {
        self.timers.iter_mut().find(|known| known.timer == timer && !known.removed)
    }
}

fn due(every: c_int) -> Option<Instant> {
    u64::try_from(every).ok().map(|every| Instant::now() + Duration::from_millis(every))
}

unsafe extern "C" fn add_handle(
    fd: c_int,
    events: c_int,
    call: sys::virEventHandleCallback,
    data: *mut c_void,
    free: sys::virFreeCallback,
) -> c_int {
    if ASIDE.get() {
        return -1;
    }
    let mut table = table();
    let watch = table.number();
    table.handles.push(Handle { watch, fd, events, call, owner: Owner { data, free }, removed: false });
    drop(table);
    wake();
    watch
}

unsafe extern "C" fn update_handle(watch: c_int, events: c_int) {
    if let Some(handle) = table().handle(watch) {
        handle.events = events;
    }
    wake();
}

unsafe extern "C" fn remove_handle(watch: c_int) -> c_int {
    let removed = table().handle(watch).map(|handle| handle.removed = true);
    wake();
    if removed.is_some() { 0 } else { -1 }
}

unsafe extern "C" fn add_timer(
    every: c_int,
    call: sys::virEventTimeoutCallback,
    data: *mut c_void,
    free: sys::virFreeCallback,
) -> c_int {
    let mut table = table();
    let timer = table.number();
    table.timers.push(Timer { timer, every, due: due(every), call, owner: Owner { data, free }, removed: false });
    drop(table);
    wake();
    timer
}

unsafe extern "C" fn update_timer(timer: c_int, every: c_int) {
    if let Some(timer) = table().timer(timer) {
        (timer.every, timer.due) = (every, due(every));
    }
    wake();
}

unsafe extern "C" fn remove_timer(timer: c_int) -> c_int {
    let removed = table().timer(timer).map(|timer| timer.removed = true);
    wake();
    if removed.is_some() { 0 } else { -1 }
}

/// libvirt's bits and poll's (VIR_EVENT_HANDLE_*).
const BITS: [(u32, PollFlags); 4] = [
    (sys::VIR_EVENT_HANDLE_READABLE, PollFlags::POLLIN),
    (sys::VIR_EVENT_HANDLE_WRITABLE, PollFlags::POLLOUT),
    (sys::VIR_EVENT_HANDLE_ERROR, PollFlags::POLLERR),
    (sys::VIR_EVENT_HANDLE_HANGUP, PollFlags::POLLHUP),
];

/// What poll tells whether or not it was asked for.
const TOLD_ANYHOW: u32 = sys::VIR_EVENT_HANDLE_ERROR | sys::VIR_EVENT_HANDLE_HANGUP;

fn to_poll(events: c_int) -> PollFlags {
    let events = events.cast_unsigned();
    BITS.iter().filter(|(bit, _)| events & bit != 0).fold(PollFlags::empty(), |all, (_, flag)| all | *flag)
}

fn from_poll(flags: PollFlags) -> c_int {
    let bits = BITS.iter().filter(|(_, flag)| flags.contains(*flag)).fold(0, |all, (bit, _)| all | bit);
    // A descriptor that isn't one any more.
    let bits = if flags.contains(PollFlags::POLLNVAL) { bits | sys::VIR_EVENT_HANDLE_ERROR } else { bits };
    bits.cast_signed()
}

/// Waits for what happens next, and calls whom it concerns.
pub(super) fn turn() {
    let (watched, until) = {
        let table = table();
        let watched: Vec<(c_int, c_int, PollFlags)> = table
            .handles
            .iter()
            .filter(|handle| !handle.removed && handle.events != 0)
            .map(|handle| (handle.watch, handle.fd, to_poll(handle.events)))
            .collect();
        let until = table.timers.iter().filter(|timer| !timer.removed).filter_map(|timer| timer.due).min();
        (watched, until)
    };
    let ready = wait(&watched, until);
    call_timers();
    for (watch, fd, events) in ready {
        // It may have been removed meanwhile, or be wanted for something else.
        let found = table().handle(watch).map(|handle| (handle.events, handle.call, handle.owner));
        if let Some((wanted @ 1.., Some(call), owner)) = found {
            let events = events & (wanted | TOLD_ANYHOW.cast_signed());
            if events == 0 {
                continue;
            }
            // SAFETY: libvirt's own function with the data that it gave for it, which is freed only below.
            unsafe { call(watch, fd, events, owner.data) };
        }
    }
    free_removed();
}

/// Which of these are ready, by `until` at the latest.
fn wait(watched: &[(c_int, c_int, PollFlags)], until: Option<Instant>) -> Vec<(c_int, c_int, c_int)> {
    let wake = WAKE.as_ref();
    // SAFETY: libvirt closes a descriptor only after it has removed its handle; one that was closed all the same is told by poll
    // as none (POLLNVAL), and another's in its place at worst wakes a callback that finds nothing to read.
    let mut polled: Vec<PollFd<'_>> = watched
        .iter()
        .map(|(_, fd, flags)| PollFd::new(unsafe { BorrowedFd::borrow_raw(*fd) }, *flags))
        .chain(wake.map(|wake| PollFd::new(wake.as_fd(), PollFlags::POLLIN)))
        .collect();
    let mut left = until.map(|until| until.saturating_duration_since(Instant::now()));
    if wake.is_none() {
        left = Some(left.map_or(UNWOKEN, |left| left.min(UNWOKEN)));
    }
    // Rounded up, so that a timer is due when the wait for it has ended.
    let timeout = left.map_or(PollTimeout::NONE, |left| {
        PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut polled, timeout) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Vec::new(),
        Err(_) => {
            // No memory for it: the next turn tries again.
            std::thread::sleep(UNWOKEN);
            return Vec::new();
        }
    }
    if let Some(wake) = wake {
        // Empty where something else has ended the wait.
        let _ = wake.read();
    }
    let events = polled.iter().map(|polled| polled.revents().map_or(0, from_poll));
    watched
        .iter()
        .zip(events)
        .filter(|(_, events)| *events != 0)
        .map(|((watch, fd, _), events)| (*watch, *fd, events))
        .collect()
}

fn call_timers() {
    let now = Instant::now();
    let ripe: Vec<c_int> = {
        let mut table = table();
        let ripe = table.timers.iter_mut().filter(|timer| !timer.removed && timer.due.is_some_and(|due| due <= now));
        ripe.map(|timer| {
            timer.due = due(timer.every);
            timer.timer
        })
        .collect()
    };
    for number in ripe {
        let found = table().timer(number).map(|timer| (timer.call, timer.owner));
        if let Some((Some(call), owner)) = found {
            // SAFETY: libvirt's own function with the data that it gave for it, which is freed only below.
            unsafe { call(number, owner.data) };
        }
    }
}

fn free_removed() {
    let owners: Vec<Owner> = {
        let mut table = table();
        let handles = table.handles.extract_if(.., |handle| handle.removed).map(|handle| handle.owner);
        let mut owners: Vec<Owner> = handles.collect();
        owners.extend(table.timers.extract_if(.., |timer| timer.removed).map(|timer| timer.owner));
        owners
    };
    for Owner { data, free } in owners {
        if let Some(free) = free {
            // SAFETY: libvirt's own function with the data that belongs to it; nothing calls it again, since it is in no list.
            unsafe { free(data) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// How often each was called, and freed.
    #[derive(Default)]
    struct Seen {
        called: AtomicUsize,
        freed: AtomicUsize,
    }

    impl Seen {
        fn data(&'static self) -> *mut c_void {
            std::ptr::from_ref(self).cast_mut().cast()
        }

        /// Waits for the loop, which another thread turns.
        fn until(&self, holds: impl Fn(usize, usize) -> bool) {
            let end = Instant::now() + Duration::from_secs(20);
            while !holds(self.called.load(Ordering::SeqCst), self.freed.load(Ordering::SeqCst)) {
                assert!(Instant::now() < end, "called {:?}, freed {:?}", self.called, self.freed);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn seen() -> &'static Seen {
        // As libvirt's, it lives as long as anything may call it.
        Box::leak(Box::default())
    }

    unsafe extern "C" fn on_handle(_: c_int, fd: c_int, events: c_int, data: *mut c_void) {
        // SAFETY: what `seen` leaked.
        let seen = unsafe { &*data.cast::<Seen>() };
        assert_eq!(events, sys::VIR_EVENT_HANDLE_READABLE.cast_signed());
        // SAFETY: the test's descriptor, open for as long as it is watched.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        nix::unistd::read(fd, &mut [0; 8]).unwrap();
        seen.called.fetch_add(1, Ordering::SeqCst);
    }

    unsafe extern "C" fn on_timer(timer: c_int, data: *mut c_void) {
        // SAFETY: what `seen` leaked.
        let seen = unsafe { &*data.cast::<Seen>() };
        if seen.called.fetch_add(1, Ordering::SeqCst) == 2 {
            // SAFETY: takes a number. From within a callback, as libvirt does it.
            assert_eq!(unsafe { remove_timer(timer) }, 0);
            assert_eq!(seen.freed.load(Ordering::SeqCst), 0, "not within the removal");
        }
    }

    unsafe extern "C" fn on_free(data: *mut c_void) {
        // SAFETY: what `seen` leaked.
        unsafe { &*data.cast::<Seen>() }.freed.fetch_add(1, Ordering::SeqCst);
    }

    #[test]
    fn a_descriptor_is_called_about_until_it_is_removed_and_freed_once() {
        super::super::initialize();
        let (seen, pipe) = (seen(), EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
        let readable = sys::VIR_EVENT_HANDLE_READABLE.cast_signed();
        // SAFETY: functions and data that live for ever, a descriptor that is open until it is removed.
        let watch = unsafe { add_handle(pipe.as_raw_fd(), readable, Some(on_handle), seen.data(), Some(on_free)) };
        pipe.write(1).unwrap();
        seen.until(|called, _| called == 1);
        // SAFETY: takes numbers.
        unsafe { update_handle(watch, 0) };
        pipe.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(seen.called.load(Ordering::SeqCst), 1, "nobody wants to hear of it");
        // SAFETY: as above.
        unsafe { update_handle(watch, readable) };
        seen.until(|called, _| called == 2);
        // SAFETY: as above.
        assert_eq!(unsafe { (remove_handle(watch), remove_handle(watch)) }, (0, -1));
        seen.until(|_, freed| freed == 1);
    }

    #[test]
    fn a_timer_goes_on_until_it_removes_itself() {
        super::super::initialize();
        let seen = seen();
        // SAFETY: functions and data that live for ever.
        let off = unsafe { add_timer(-1, Some(on_timer), seen.data(), Some(on_free)) };
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(seen.called.load(Ordering::SeqCst), 0);
        // SAFETY: takes numbers.
        unsafe { update_timer(off, 1) };
        seen.until(|called, freed| called == 3 && freed == 1);
    }

    #[test]
    fn what_is_opened_aside_is_in_no_loop() {
        // SAFETY: refused before anything is kept of it.
        let watch = aside(|| unsafe { add_handle(0, 1, Some(on_handle), std::ptr::null_mut(), None) });
        assert_eq!(watch, -1);
    }
}
