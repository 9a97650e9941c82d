//! The locks of a file and the memory that the connections of a WAL database share, as SQLite's documentation of
//! `sqlite3_io_methods` asks for them.

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use rusqlite::ffi;

use super::Outcome;

/// The locks on one file: any number of readers, and at most one handle that is on its way to write.
#[derive(Default)]
pub(super) struct FileLock {
    /// Handles that hold SHARED or more.
    shared: usize,
    /// What the one above SHARED holds; NONE if there is none.
    writer: c_int,
}

impl FileLock {
    /// Raises what a handle holds from `held` to `wanted`. A refusal can still have raised it, to PENDING.
    pub(super) fn raise(&mut self, held: &mut c_int, wanted: c_int) -> Outcome {
        if *held >= wanted {
            return Ok(());
        }
        if wanted == ffi::SQLITE_LOCK_SHARED {
            if self.writer >= ffi::SQLITE_LOCK_PENDING {
                return Err(ffi::SQLITE_BUSY);
            }
            self.shared += 1;
            *held = ffi::SQLITE_LOCK_SHARED;
            return Ok(());
        }
        let mine = *held > ffi::SQLITE_LOCK_SHARED;
        if !mine && self.writer != ffi::SQLITE_LOCK_NONE {
            return Err(ffi::SQLITE_BUSY);
        }
        let others_read = self.shared > 1;
        let granted = if wanted == ffi::SQLITE_LOCK_EXCLUSIVE && others_read {
            // Keeps new readers out until the old ones are gone.
            ffi::SQLITE_LOCK_PENDING
        } else {
            wanted
        };
        (*held, self.writer) = (granted, granted);
        if granted == wanted { Ok(()) } else { Err(ffi::SQLITE_BUSY) }
    }

    /// Lowers what a handle holds to SHARED or NONE.
    pub(super) fn lower(&mut self, held: &mut c_int, wanted: c_int) {
        if *held <= wanted {
            return;
        }
        if *held > ffi::SQLITE_LOCK_SHARED {
            self.writer = ffi::SQLITE_LOCK_NONE;
        }
        if wanted == ffi::SQLITE_LOCK_NONE {
            self.shared -= 1;
        }
        *held = wanted;
    }

    pub(super) fn reserved(&self) -> bool {
        self.writer >= ffi::SQLITE_LOCK_RESERVED
    }
}

const SLOTS: usize = ffi::SQLITE_SHM_NLOCK as usize;

/// The shared memory of one WAL database, with its lock slots. It outlives a crash for as long as a dead handle has it
/// mapped, for SQLite holds pointers into it.
#[derive(Default)]
pub(super) struct Shm(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// Atomics for their interior mutability: SQLite writes here through plain pointers, from any thread, and orders
    /// that itself by slots and barriers.
    regions: Vec<Box<[AtomicU64]>>,
    shared: [usize; SLOTS],
    exclusive: [bool; SLOTS],
}

/// The slots that one handle holds.
#[derive(Default)]
pub(super) struct Held {
    shared: [bool; SLOTS],
    exclusive: [bool; SLOTS],
}

impl Shm {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a region begins; null if it isn't there and isn't to be made. Regions start as zeros and never move.
    pub(super) fn map(&self, region: usize, size: usize, extend: bool) -> *mut c_void {
        let mut inner = self.inner();
        while extend && inner.regions.len() <= region {
            inner.regions.push((0..size.div_ceil(8)).map(|_| AtomicU64::new(0)).collect());
        }
        inner.regions.get(region).map_or(std::ptr::null_mut(), |words| words.as_ptr().cast_mut().cast())
    }

    /// Takes slots, all or none.
    pub(super) fn lock(&self, held: &mut Held, slots: Range<usize>, exclusive: bool) -> Outcome {
        let mut inner = self.inner();
        for slot in slots.clone() {
            let others = inner.shared[slot] - usize::from(held.shared[slot]);
            if inner.exclusive[slot] && !held.exclusive[slot] || exclusive && others > 0 {
                return Err(ffi::SQLITE_BUSY);
            }
        }
        for slot in slots {
            if exclusive {
                (inner.exclusive[slot], held.exclusive[slot]) = (true, true);
            } else if !held.shared[slot] {
                inner.shared[slot] += 1;
                held.shared[slot] = true;
            }
        }
        Ok(())
    }

    /// Gives slots back, as far as the handle has them.
    pub(super) fn unlock(&self, held: &mut Held, slots: Range<usize>) {
        let mut inner = self.inner();
        for slot in slots {
            inner.shared[slot] -= usize::from(std::mem::take(&mut held.shared[slot]));
            if std::mem::take(&mut held.exclusive[slot]) {
                inner.exclusive[slot] = false;
            }
        }
    }

    /// Gives back whatever the handle has.
    pub(super) fn release(&self, held: &mut Held) {
        self.unlock(held, 0..SLOTS);
    }

    /// Orders the memory accesses of this thread before and after. The mutex is SQLite's own belt and braces.
    pub(super) fn barrier(&self) {
        fence(Ordering::SeqCst);
        drop(self.inner());
    }
}
