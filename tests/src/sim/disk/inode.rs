//! One file as a page cache and a platter see it: what the processes read, what a power cut leaves, and the changes that
//! are in between. Knows nothing about names, handles or SQLite.

use std::sync::Weak;

use super::lock::{FileLock, Shm};
use crate::sim::rng::Rng;

/// What remains of changes that weren't synced: so many eighths of them. Drawn once a power cut, so that nearly
/// everything lost and nearly everything kept are as usual as half and half.
#[derive(Clone, Copy)]
pub(super) struct Luck(u64);

impl Luck {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        Self(rng.below(9))
    }

    pub(super) fn keeps(self, rng: &mut Rng) -> bool {
        rng.chance(self.0, 8)
    }

    /// Sectors are torn where some are kept and some are lost, not in the two extremes.
    fn tears(self, rng: &mut Rng) -> bool {
        (1..8).contains(&self.0) && rng.chance(1, 16)
    }
}

enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    Truncate(usize),
}

#[derive(Default)]
pub(super) struct Inode {
    cached: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    /// Handles of living processes. Without one and without a name the file is gone.
    pub(super) handles: usize,
    pub(super) lock: FileLock,
    /// Lives as long as a handle has it mapped.
    pub(super) shm: Weak<Shm>,
}

impl Inode {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.cached
    }

    pub(super) fn len(&self) -> usize {
        self.cached.len()
    }

    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let end = offset + bytes.len();
        if end > self.cached.len() {
            self.cached.resize(end, 0);
        }
        self.cached[offset..end].copy_from_slice(bytes);
        self.pending.push(Change::Write { offset, bytes: bytes.to_vec() });
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.cached.resize(len, 0);
        self.pending.push(Change::Truncate(len));
    }

    /// The pending changes reach the platter. They are replayed and not copied from the cache: what a failed sync has
    /// dropped stays missing.
    pub(super) fn sync(&mut self) {
        for change in self.pending.drain(..) {
            match change {
                Change::Write { offset, bytes } => {
                    let end = offset + bytes.len();
                    if end > self.durable.len() {
                        self.durable.resize(end, 0);
                    }
                    self.durable[offset..end].copy_from_slice(&bytes);
                }
                Change::Truncate(len) => self.durable.resize(len, 0),
            }
        }
    }

    /// Some of the pending changes reach the platter, the rest never will. Readers don't notice: the cache keeps all,
    /// as a kernel's does after a failed fsync.
    pub(super) fn sync_partly(&mut self, sector: usize, luck: Luck, rng: &mut Rng) {
        for change in self.pending.drain(..) {
            match change {
                Change::Write { offset, bytes } => {
                    let end = offset + bytes.len();
                    // The length is metadata, and goes its own way: a file can be longer with zeros for data, and data
                    // beyond the end isn't there.
                    if end > self.durable.len() && luck.keeps(rng) {
                        self.durable.resize(end, 0);
                    }
                    let mut from = offset;
                    while from < end {
                        let to = end.min((from / sector + 1) * sector);
                        let kept = if luck.keeps(rng) {
                            to
                        } else if luck.tears(rng) {
                            // In steps of eight bytes, the stride of SQLite's WAL: SQLite salts its frames from a
                            // generator of the whole process, and a single byte of old and new salt would be equal
                            // often enough to make the outcome depend on it.
                            from + rng.index((to - from) / 8 + 1) * 8
                        } else {
                            from
                        };
                        let kept = kept.min(self.durable.len());
                        if kept > from {
                            self.durable[from..kept].copy_from_slice(&bytes[from - offset..kept - offset]);
                        }
                        from = to;
                    }
                }
                Change::Truncate(len) => {
                    if luck.keeps(rng) {
                        self.durable.resize(len, 0);
                    }
                }
            }
        }
    }

    /// After a power cut the platter is all there is.
    pub(super) fn forget_cache(&mut self) {
        self.cached.clone_from(&self.durable);
    }

    /// Changes bytes behind everyone's back, in the cache and on the platter. What is pending goes first, or it would
    /// undo the damage.
    pub(super) fn damage(&mut self, change: impl Fn(&mut Vec<u8>)) {
        self.sync();
        change(&mut self.cached);
        change(&mut self.durable);
    }
}
