//! A disk for SQLite that loses, reorders and tears what wasn't synced, and breaks where it is told to. It lives in
//! memory under a VFS of its own, so that any number can be used at once, each in microseconds.
//!
//! It promises what POSIX does and no more: what a successful sync covered is there after a power cut. Of the changes
//! since, each sector of each write, each change of a length and each name may or may not be. Knows nothing about what
//! is stored on it.

mod inode;
mod lock;
mod model;
#[cfg(test)]
mod tests;
mod vfs;

use std::collections::BTreeSet;
use std::ffi::{CString, c_int};
use std::sync::atomic::{AtomicU64, Ordering};

use self::model::Model;
use self::vfs::{Registration, Shared};
use super::rng::Rng;

/// What a call of SQLite's comes to: done, or a result code of SQLite's.
type Outcome = Result<(), c_int>;

/// A disk, fresh and empty. Connections find it by [`vfs_name`](Self::vfs_name) and are closed before it is dropped; a
/// dead connection too. (One to `:memory:` would hold the VFS without the disk's knowledge: open none.)
///
/// Connections of one disk may live on several threads. What a thread's scheduling decides isn't the seed's, of course.
pub struct Disk {
    // Before what it shares, to be dropped first.
    registration: Registration,
    shared: Shared,
}

/// Faults that are switched on until they are switched off; a crash or a kill changes nothing about them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// So many of the coming reads fail; `u32::MAX` is all.
    pub reads: u32,
    /// So many of the coming writes, truncations and deletions fail, and change nothing; `u32::MAX` is all.
    pub writes: u32,
    /// So many of the coming syncs fail; `u32::MAX` is all. As with Linux, what a failed sync didn't bring to the disk
    /// counts as clean afterwards: it can be read until a power cut, and no later sync will save it.
    pub syncs: u32,
    /// Nothing can be changed or made, and what is opened is opened to read.
    pub read_only: bool,
    /// A sync answers that all is well and does nothing: a defect to be found by whoever tests with this disk.
    pub ignore_sync: bool,
}

/// How many calls there were since the disk was new, failed ones too, but for those without power.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Writes of any length.
    pub writes: u64,
    /// Changes of a file's length that aren't writes.
    pub truncates: u64,
    /// Syncs of a file.
    pub syncs: u64,
    /// Files deleted.
    pub deletes: u64,
}

impl Counters {
    /// All calls that change the disk: the measure of [`Disk::crash_at`].
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.writes + self.truncates + self.syncs + self.deletes
    }
}

impl Disk {
    /// A fresh disk with sectors of 512 bytes. All that chance decides about it follows from the seed.
    ///
    /// # Panics
    /// SQLite is out of memory.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("sim-disk-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let shared = Shared::new(Model::new(seed));
        let name = CString::new(name).unwrap_or_default(); // cannot fail: there is no NUL in it
        Self { registration: Registration::new(name, shared.clone()), shared }
    }

    /// The name for [`rusqlite::Connection::open_with_flags_and_vfs`], unlike that of any other disk of the process.
    #[must_use]
    pub fn vfs_name(&self) -> &str {
        self.registration.name().to_str().unwrap_or_default() // cannot fail: it was made from a str
    }

    /// Sets the unit in which writes are kept, lost and torn, in bytes; SQLite takes a power of two. For an empty disk:
    /// open connections don't ask again.
    ///
    /// # Panics
    /// The size is 0.
    pub fn set_sector_size(&self, bytes: usize) {
        assert!(bytes > 0, "a sector has bytes");
        self.shared.model().sector = bytes;
    }

    /// Whether the disk promises SQLite that a torn write leaves the bytes around it alone. It always does; SQLite's own
    /// VFS promises it too, and without the promise each commit is padded to whole sectors. At first it isn't promised.
    pub fn set_powersafe_overwrite(&self, promised: bool) {
        self.shared.model().powersafe = promised;
    }

    /// Sets what `CURRENT_TIMESTAMP` and its like tell, in milliseconds of Unix time. The clock stands but for SQLite's
    /// sleeps, which move it and don't take time.
    pub fn set_clock(&self, unix_ms: i64) {
        self.shared.model().clock_ms = unix_ms;
    }

    /// Cuts the power and brings it back: what was synced is left, and of the rest what chance leaves. All handles are
    /// dead: every call through them fails with `SQLITE_IOERR`, and their connections can only be closed.
    pub fn crash(&self) {
        self.shared.model().crash();
    }

    /// Kills the process, as SIGKILL does: the handles are dead, all writes are there. They aren't durable for that: a
    /// crash may still lose what wasn't synced. After a [`crash_at`](Self::crash_at) that has come about, the process
    /// is killed within that call, and the power never went.
    pub fn kill(&self) {
        self.shared.model().die();
    }

    /// Cuts the power within a call that changes the disk: the `call`th one of the disk, counting from 1 as
    /// [`counters`](Self::counters) does, or the next one where there have been more already. Of a write some leading
    /// part is done. From there on everything fails until [`restart`](Self::restart).
    pub fn crash_at(&self, call: u64) {
        self.shared.model().crash_at = Some(call);
    }

    /// Whether the power went as [`crash_at`](Self::crash_at) had asked for.
    #[must_use]
    pub fn is_down(&self) -> bool {
        !self.has_power()()
    }

    /// Asks whether there is power, also of who doesn't have the disk at hand.
    pub fn has_power(&self) -> impl Fn() -> bool + use<> {
        let shared = self.shared.clone();
        move || shared.model().powered
    }

    /// Brings the power back after [`crash_at`](Self::crash_at). A crash like any other: where the power hasn't gone
    /// yet, it goes now.
    pub fn restart(&self) {
        self.crash();
    }

    /// A full disk holds no more bytes than it does now: of a write that would grow a file, what fits is done, and the
    /// answer is `SQLITE_FULL`. `false` makes it boundless.
    pub fn set_full(&self, full: bool) {
        let mut model = self.shared.model();
        model.capacity = full.then(|| model.used());
    }

    /// Bounds the sum of all files' lengths, in bytes; `None` is boundless. Less than there is takes nothing away.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.shared.model().capacity = bytes;
    }

    /// Switches faults on and off.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.model().faults = faults;
    }

    /// The faults as they are now: counts go down with each call that failed.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.shared.model().faults
    }

    /// How much there was to do.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.model().counters
    }

    /// A digest of all calls that changed the disk, in their order and with their outcomes, but not of the bytes:
    /// SQLite salts its WAL from a generator that the whole process shares.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.shared.model().trace
    }

    /// The files by name, with their lengths in bytes.
    #[must_use]
    pub fn files(&self) -> Vec<(String, usize)> {
        self.shared.model().sizes()
    }

    /// A file's bytes as a process would read them; `None` if there is no such file.
    #[must_use]
    pub fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        self.shared.model().named(path).map(|file| file.bytes().to_vec())
    }

    /// Turns up to eight bits of a file for good, in places that follow from the seed. Does nothing where there is
    /// no such file or nothing in it.
    pub fn corrupt(&self, path: &str, seed: u64) {
        let mut rng = Rng::new(seed);
        if let Some(file) = self.shared.model().named(path) {
            // A set: a bit that is turned twice is as before.
            let bits: BTreeSet<_> = (0..=rng.below(8)).map(|_| (rng.index(file.len()), rng.below(8))).collect();
            file.damage(|bytes| {
                for (place, bit) in &bits {
                    bytes.get_mut(*place).into_iter().for_each(|byte| *byte ^= 1 << bit);
                }
            });
        }
    }

    /// Cuts a file off for good, behind everyone's back. Does nothing where there is no such file or it is shorter.
    pub fn truncate(&self, path: &str, len: usize) {
        if let Some(file) = self.shared.model().named(path) {
            file.damage(|bytes| bytes.truncate(len));
        }
    }
}
