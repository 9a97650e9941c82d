//! Doors to what the words of engines, kernel and systemd go through, for the fuzz targets (`fuzz/`): each takes any bytes and
//! panics where a promise about them is broken. Compiled for tests only.

pub use super::cgroup::fuzzing::cgroup;
pub use super::docker::fuzzing::container;
pub use super::libvirt::fuzzing::{definition, domain};
pub use super::units::fuzzing::unit_files;

/// Bytes, taken as numbers from the front; zeros where there are no more.
#[derive(Debug)]
pub(super) struct Numbers<'a>(pub(super) &'a [u8]);

impl<'a> Numbers<'a> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (now, rest) = self.0.split_at(N.min(self.0.len()));
        self.0 = rest;
        let mut bytes = [0; N];
        bytes[..now.len()].copy_from_slice(now);
        bytes
    }

    /// One byte.
    pub(super) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    /// Whether, by one bit.
    pub(super) fn flag(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// Four bytes.
    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    /// Eight bytes.
    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// Eight bytes, signed.
    pub(super) fn i64(&mut self) -> i64 {
        i64::from_le_bytes(self.bytes())
    }

    /// An amount of memory in KiB that a host may have.
    pub(super) fn kib(&mut self) -> u64 {
        self.u64() >> 11
    }

    /// Something or nothing.
    pub(super) fn maybe<T>(&mut self, some: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.flag().then(|| some(self))
    }

    /// What is left, where that is text.
    pub(super) fn text(self) -> Option<&'a str> {
        std::str::from_utf8(self.0).ok()
    }
}
