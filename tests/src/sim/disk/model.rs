//! The disk as the calls of SQLite's VFS change it: names, power, faults, counters. Plain data under one lock, without a
//! pointer in it; `vfs.rs` translates.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_int;
use std::sync::Weak;

use rusqlite::ffi;

use super::inode::{Inode, Luck};
use super::{Counters, Faults, Outcome};
use crate::sim::rng::{Rng, mix};

/// A file's number, never used twice on a disk.
pub(super) type Number = u64;

pub(super) struct Model {
    /// What goes wrong, and how.
    chance: Rng,
    /// What SQLite asks for; apart, so that a question more doesn't change what a crash leaves.
    pub(super) noise: Rng,
    pub(super) sector: usize,
    pub(super) powersafe: bool,
    files: BTreeMap<Number, Inode>,
    last: Number,
    names: BTreeMap<String, Number>,
    durable_names: BTreeMap<String, Number>,
    /// Handles of an earlier epoch are dead.
    pub(super) epoch: u64,
    /// Handles that SQLite hasn't closed yet, dead or alive.
    pub(super) handles: usize,
    pub(super) powered: bool,
    pub(super) crash_at: Option<u64>,
    pub(super) faults: Faults,
    pub(super) capacity: Option<u64>,
    pub(super) counters: Counters,
    /// Milliseconds of Unix time.
    pub(super) clock_ms: i64,
    pub(super) trace: u64,
}

/// Counts a fault down; whether this call is one of those that fail.
fn strikes(left: &mut u32) -> bool {
    let strikes = *left > 0;
    *left = left.saturating_sub(u32::from(*left != u32::MAX));
    strikes
}

impl Model {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            chance: Rng::new(mix(seed)),
            noise: Rng::new(mix(!seed)),
            sector: 512,
            powersafe: false,
            files: BTreeMap::new(),
            last: 0,
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            epoch: 0,
            handles: 0,
            powered: true,
            crash_at: None,
            faults: Faults::default(),
            capacity: None,
            counters: Counters::default(),
            clock_ms: 1_700_000_000_000,
            trace: 0,
        }
    }

    /// Opens a file; one without a name is nobody else's and is gone with its handle.
    pub(super) fn open(&mut self, name: Option<&str>, create: bool, exclusive: bool) -> Result<Number, c_int> {
        if !self.powered {
            return Err(ffi::SQLITE_IOERR);
        }
        let found = name.and_then(|name| self.names.get(name).copied());
        let number = match found {
            Some(_) if create && exclusive => return Err(ffi::SQLITE_CANTOPEN),
            Some(number) => number,
            None if !create || self.faults.read_only => return Err(ffi::SQLITE_CANTOPEN),
            None => self.make(name),
        };
        self.file(number)?.handles += 1;
        Ok(number)
    }

    fn make(&mut self, name: Option<&str>) -> Number {
        self.last += 1;
        self.files.insert(self.last, Inode::default());
        if let Some(name) = name {
            self.names.insert(name.to_owned(), self.last);
        }
        self.last
    }

    pub(super) fn close(&mut self, number: Number) {
        if let Some(file) = self.files.get_mut(&number) {
            file.handles -= 1;
        }
        self.sweep();
    }

    pub(super) fn file(&mut self, number: Number) -> Result<&mut Inode, c_int> {
        self.files.get_mut(&number).ok_or(ffi::SQLITE_IOERR)
    }

    pub(super) fn named(&mut self, name: &str) -> Option<&mut Inode> {
        self.files.get_mut(self.names.get(name)?)
    }

    pub(super) fn sizes(&self) -> Vec<(String, usize)> {
        let len = |number| self.files.get(number).map_or(0, Inode::len);
        self.names.iter().map(|(name, number)| (name.clone(), len(number))).collect()
    }

    pub(super) fn read(&mut self, number: Number, offset: usize, into: &mut [u8]) -> Outcome {
        if strikes(&mut self.faults.reads) {
            return Err(ffi::SQLITE_IOERR_READ);
        }
        let bytes = self.file(number)?.bytes();
        let rest = bytes.get(offset..).unwrap_or_default();
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
        into[len..].fill(0); // SQLite requires it of a short read
        if len < into.len() { Err(ffi::SQLITE_IOERR_SHORT_READ) } else { Ok(()) }
    }

    pub(super) fn write(&mut self, number: Number, offset: usize, bytes: &[u8]) -> Outcome {
        self.counters.writes += 1;
        let done = self.write_now(number, offset, bytes);
        self.note(b'w', number, offset, bytes.len(), done)
    }

    fn write_now(&mut self, number: Number, offset: usize, bytes: &[u8]) -> Outcome {
        if self.power_goes() {
            // Eight bytes: see `sync_partly`.
            let done = self.chance.index(bytes.len() / 8 + 1) * 8;
            self.file(number)?.write(offset, &bytes[..done]);
            return Err(ffi::SQLITE_IOERR_WRITE);
        }
        if strikes(&mut self.faults.writes) || self.faults.read_only {
            return Err(ffi::SQLITE_IOERR_WRITE);
        }
        let room = self.room();
        let file = self.file(number)?;
        let fits = file.len().saturating_add(room).saturating_sub(offset).min(bytes.len());
        file.write(offset, &bytes[..fits]);
        if fits < bytes.len() { Err(ffi::SQLITE_FULL) } else { Ok(()) }
    }

    /// By how many bytes the files may still grow.
    fn room(&self) -> usize {
        let Some(capacity) = self.capacity else { return usize::MAX };
        let room = capacity.saturating_sub(self.used());
        usize::try_from(room).unwrap_or(usize::MAX)
    }

    pub(super) fn used(&self) -> u64 {
        self.files.values().map(|file| file.len() as u64).sum()
    }

    pub(super) fn truncate(&mut self, number: Number, len: usize) -> Outcome {
        self.counters.truncates += 1;
        let done = self.truncate_now(number, len);
        self.note(b't', number, len, 0, done)
    }

    fn truncate_now(&mut self, number: Number, len: usize) -> Outcome {
        let gone = self.power_goes();
        if gone && self.chance.chance(1, 2) {
            return Err(ffi::SQLITE_IOERR_TRUNCATE);
        }
        if strikes(&mut self.faults.writes) || self.faults.read_only {
            return Err(ffi::SQLITE_IOERR_TRUNCATE);
        }
        let room = self.room();
        let file = self.file(number)?;
        if len.saturating_sub(file.len()) > room {
            return Err(ffi::SQLITE_FULL);
        }
        file.truncate(len);
        if gone { Err(ffi::SQLITE_IOERR_TRUNCATE) } else { Ok(()) }
    }

    pub(super) fn sync(&mut self, number: Number) -> Outcome {
        self.counters.syncs += 1;
        let done = self.sync_now(number);
        self.note(b's', number, 0, 0, done)
    }

    fn sync_now(&mut self, number: Number) -> Outcome {
        if self.power_goes() {
            return Err(ffi::SQLITE_IOERR_FSYNC); // what of it came about is drawn with the crash
        }
        if self.faults.ignore_sync {
            return Ok(());
        }
        if strikes(&mut self.faults.syncs) {
            let luck = Luck::draw(&mut self.chance);
            if let Some(file) = self.files.get_mut(&number) {
                file.sync_partly(self.sector, luck, &mut self.chance);
            }
            return Err(ffi::SQLITE_IOERR_FSYNC);
        }
        self.file(number)?.sync();
        // SQLite's own VFS syncs the directory with the first sync of a new file.
        if !self.durable_names.values().any(|durable| *durable == number) {
            self.sync_names();
        }
        Ok(())
    }

    fn sync_names(&mut self) {
        self.durable_names.clone_from(&self.names);
        self.sweep();
    }

    pub(super) fn delete(&mut self, name: &str, sync_names: bool) -> Outcome {
        if !self.powered {
            return Err(ffi::SQLITE_IOERR);
        }
        self.counters.deletes += 1;
        let number = self.names.get(name).copied().unwrap_or(0);
        let done = self.delete_now(name, sync_names);
        self.note(b'd', number, usize::from(sync_names), 0, done)
    }

    fn delete_now(&mut self, name: &str, sync_names: bool) -> Outcome {
        let gone = self.power_goes();
        if gone && self.chance.chance(1, 2) || self.faults.read_only || strikes(&mut self.faults.writes) {
            return Err(ffi::SQLITE_IOERR_DELETE);
        }
        self.names.remove(name).ok_or(ffi::SQLITE_IOERR_DELETE_NOENT)?;
        if gone {
            return Err(ffi::SQLITE_IOERR_DELETE);
        }
        if sync_names && !self.faults.ignore_sync {
            self.sync_names();
        }
        self.sweep();
        Ok(())
    }

    /// Counts a call that changes the disk; whether it is the one in which the power goes.
    fn power_goes(&mut self) -> bool {
        let goes = self.crash_at.is_some_and(|call| self.counters.calls() >= call);
        if goes {
            self.powered = false;
        }
        goes
    }

    /// The power is cut and comes back: what was synced is there, of the rest what chance leaves.
    pub(super) fn crash(&mut self) {
        let luck = Luck::draw(&mut self.chance);
        let all: BTreeSet<String> = self.names.keys().chain(self.durable_names.keys()).cloned().collect();
        let mut left = BTreeMap::new();
        for name in all {
            let (old, new) = (self.durable_names.get(&name), self.names.get(&name));
            // An old name goes before a new one takes its place, so that there may be neither.
            let number = if old.is_some() && (old == new || !luck.keeps(&mut self.chance)) {
                old
            } else {
                new.filter(|_| luck.keeps(&mut self.chance))
            };
            left.extend(number.map(|number| (name, *number)));
        }
        self.durable_names.clone_from(&left);
        self.names = left;
        self.die();
        for file in self.files.values_mut() {
            file.sync_partly(self.sector, luck, &mut self.chance);
            file.forget_cache();
        }
    }

    /// The process is killed: its handles, locks and shared memory go, every write stays.
    pub(super) fn die(&mut self) {
        self.epoch += 1;
        self.powered = true;
        self.crash_at = None;
        for file in self.files.values_mut() {
            file.handles = 0;
            file.lock = super::lock::FileLock::default();
            file.shm = Weak::new();
        }
        self.sweep();
    }

    /// Frees files that neither a name nor a handle leads to.
    fn sweep(&mut self) {
        let named: BTreeSet<Number> = self.names.values().chain(self.durable_names.values()).copied().collect();
        self.files.retain(|number, file| file.handles > 0 || named.contains(number));
    }

    /// Works a call into the trace, and passes its outcome on.
    fn note(&mut self, call: u8, number: Number, offset: usize, len: usize, done: Outcome) -> Outcome {
        let code = done.err().unwrap_or(ffi::SQLITE_OK).unsigned_abs();
        for part in [u64::from(call), number, offset as u64, len as u64, u64::from(code)] {
            self.trace = mix(self.trace ^ part).wrapping_add(part);
        }
        done
    }
}
