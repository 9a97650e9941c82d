//! SQLite's side of the disk: `sqlite3_vfs` and `sqlite3_io_methods`, each function a translation into a call of the
//! model. All that is unsafe about the disk is here.
//!
//! What SQLite promises, and the safety comments rest on: a file is the memory that `open` was given and filled, is used
//! by one thread at a time, and not after `close`; buffers have the length that is told; out-pointers can be written;
//! names end with a NUL; a VFS isn't called after its last connection is closed.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::size_of;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::ffi;

use super::Outcome;
use super::lock::{Held, Shm};
use super::model::{Model, Number};

/// The disk as the handles and the registration share it.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Model>>);

impl Shared {
    pub(super) fn new(model: Model) -> Self {
        Self(Arc::new(Mutex::new(model)))
    }

    /// A panic elsewhere leaves the model whole: no call panics half-way by design.
    pub(super) fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A VFS that SQLite knows by name. Dropping it takes it back.
pub(super) struct Registration(*mut Entry);

struct Entry {
    vfs: ffi::sqlite3_vfs,
    name: CString,
    disk: Shared,
}

// SAFETY: the entry isn't changed by us after its registration, and SQLite guards its own list; what it shares is behind
// a lock.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Registration {
    pub(super) fn new(name: CString, disk: Shared) -> Self {
        let vfs = ffi::sqlite3_vfs {
            iVersion: 2,
            szOsFile: c_int::try_from(size_of::<Handle>()).unwrap_or(c_int::MAX), // cannot fail: some hundred bytes
            mxPathname: 512,
            pNext: std::ptr::null_mut(),
            zName: name.as_ptr(),
            pAppData: std::ptr::null_mut(),
            xOpen: Some(open),
            xDelete: Some(delete),
            xAccess: Some(access),
            xFullPathname: Some(full_pathname),
            xDlOpen: None,
            xDlError: None,
            xDlSym: None,
            xDlClose: None,
            xRandomness: Some(randomness),
            xSleep: Some(sleep),
            xCurrentTime: Some(current_time),
            xGetLastError: None,
            xCurrentTimeInt64: Some(current_time_ms),
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
        };
        let entry = Box::into_raw(Box::new(Entry { vfs, name, disk }));
        // SAFETY: the entry is ours and stays where it is until `drop`; SQLite keeps the pointer to its `vfs`.
        let code = unsafe {
            (*entry).vfs.pAppData = (&raw mut (*entry).disk).cast();
            ffi::sqlite3_vfs_register(&raw mut (*entry).vfs, 0)
        };
        assert_eq!(code, ffi::SQLITE_OK, "SQLite takes the VFS");
        Self(entry)
    }

    pub(super) fn name(&self) -> &CStr {
        // SAFETY: the entry lives as long as we do.
        unsafe { &(*self.0).name }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: the entry is ours, and registered.
        let used = unsafe {
            ffi::sqlite3_vfs_unregister(&raw mut (*self.0).vfs);
            (*self.0).disk.model().handles > 0
        };
        if used {
            // Freed, it would be read by the connections that are still open. Better a leak.
            assert!(std::thread::panicking(), "a disk is dropped before its connections");
            return;
        }
        // SAFETY: it came from a box, SQLite doesn't know it any more, and no connection is left that does.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// What SQLite calls a file: its own header, and then what is ours.
#[repr(C)]
struct Handle {
    header: ffi::sqlite3_file,
    disk: Shared,
    number: Number,
    epoch: u64,
    read_only: bool,
    lock: c_int,
    shm: Option<Arc<Shm>>,
    slots: Held,
}

impl Handle {
    /// Runs `work` unless the handle died with its process or the power is off.
    fn run<T>(&mut self, work: impl FnOnce(&mut Model, &mut Self) -> Result<T, c_int>) -> Result<T, c_int> {
        let disk = self.disk.clone();
        let mut model = disk.model();
        if model.powered && model.epoch == self.epoch { work(&mut model, self) } else { Err(ffi::SQLITE_IOERR) }
    }

    /// As `run`, for what a handle that was opened to read must not do.
    fn change(&mut self, work: impl FnOnce(&mut Model, Number) -> Outcome) -> Outcome {
        if self.read_only {
            return Err(ffi::SQLITE_READONLY);
        }
        self.run(|model, handle| work(model, handle.number))
    }
}

/// # Safety
/// The file is one that `open` filled, and nobody else uses it meanwhile.
unsafe fn handle<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Handle {
    // SAFETY: the caller's promise; the header is the handle's first field.
    unsafe { &mut *file.cast::<Handle>() }
}

/// # Safety
/// The VFS is one of ours and registered.
unsafe fn disk<'a>(vfs: *mut ffi::sqlite3_vfs) -> &'a Shared {
    // SAFETY: the caller's promise; the pointer was set before the registration.
    unsafe { &*(*vfs).pAppData.cast::<Shared>() }
}

/// # Safety
/// The name is null or ends with a NUL, and lives as long as what is returned.
unsafe fn text<'a>(name: *const c_char) -> Option<&'a str> {
    // SAFETY: the caller's promise.
    let name = (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })?;
    name.to_str().ok()
}

fn code(done: Outcome) -> c_int {
    done.err().unwrap_or(ffi::SQLITE_OK)
}

/// Offsets and lengths of SQLite are signed and never negative.
fn size(number: impl TryInto<usize>) -> usize {
    number.try_into().unwrap_or(usize::MAX)
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: SQLite's promises. Without methods the file counts as not open.
    let (disk, name) = unsafe {
        (*file).pMethods = std::ptr::null();
        (disk(vfs), text(name))
    };
    let mut model = disk.model();
    let create = flags & ffi::SQLITE_OPEN_CREATE != 0;
    let number = match model.open(name, create, flags & ffi::SQLITE_OPEN_EXCLUSIVE != 0) {
        Ok(number) => number,
        Err(code) => return code,
    };
    model.handles += 1;
    // As SQLite's own VFS does where a file cannot be opened to write.
    let read_only = flags & ffi::SQLITE_OPEN_READONLY != 0 || model.faults.read_only;
    let handle = Handle {
        header: ffi::sqlite3_file { pMethods: &raw const METHODS },
        disk: disk.clone(),
        number,
        epoch: model.epoch,
        read_only,
        lock: ffi::SQLITE_LOCK_NONE,
        shm: None,
        slots: Held::default(),
    };
    // SAFETY: SQLite gives szOsFile bytes, aligned for any type; they hold nothing that would want a drop.
    unsafe { file.cast::<Handle>().write(handle) };
    if !out.is_null() {
        let access = if read_only { ffi::SQLITE_OPEN_READONLY } else { ffi::SQLITE_OPEN_READWRITE };
        // SAFETY: SQLite's promises.
        unsafe { *out = flags & !(ffi::SQLITE_OPEN_READONLY | ffi::SQLITE_OPEN_READWRITE) | access };
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite's promises: it was open, and won't be used again.
    let mut handle = unsafe { file.cast::<Handle>().read() };
    if let Some(shm) = handle.shm.take() {
        shm.release(&mut handle.slots);
    }
    let mut model = handle.disk.model();
    model.handles -= 1;
    if model.epoch == handle.epoch {
        if let Ok(file) = model.file(handle.number) {
            file.lock.lower(&mut handle.lock, ffi::SQLITE_LOCK_NONE);
        }
        model.close(handle.number);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(file: *mut ffi::sqlite3_file, into: *mut c_void, len: c_int, offset: i64) -> c_int {
    // SAFETY: SQLite's promises. Any bytes are valid bytes, so that it doesn't matter what was there.
    let (handle, into) = unsafe { (handle(file), std::slice::from_raw_parts_mut(into.cast::<u8>(), size(len))) };
    code(handle.run(|model, handle| model.read(handle.number, size(offset), into)))
}

unsafe extern "C" fn write(file: *mut ffi::sqlite3_file, from: *const c_void, len: c_int, offset: i64) -> c_int {
    // SAFETY: SQLite's promises.
    let (handle, bytes) = unsafe { (handle(file), std::slice::from_raw_parts(from.cast::<u8>(), size(len))) };
    code(handle.change(|model, number| model.write(number, size(offset), bytes)))
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, len: i64) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    code(handle.change(|model, number| model.truncate(number, size(len))))
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    code(handle.run(|model, handle| model.sync(handle.number)))
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, out: *mut i64) -> c_int {
    // SAFETY: SQLite's promises.
    let (handle, out) = unsafe { (handle(file), &mut *out) };
    code(handle.run(|model, handle| {
        *out = i64::try_from(model.file(handle.number)?.len()).unwrap_or(i64::MAX);
        Ok(())
    }))
}

unsafe extern "C" fn lock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    code(handle.run(|model, handle| model.file(handle.number)?.lock.raise(&mut handle.lock, level)))
}

unsafe extern "C" fn unlock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    code(handle.run(|model, handle| {
        model.file(handle.number)?.lock.lower(&mut handle.lock, level);
        Ok(())
    }))
}

unsafe extern "C" fn check_reserved_lock(file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let (handle, out) = unsafe { (handle(file), &mut *out) };
    code(handle.run(|model, handle| {
        *out = c_int::from(model.file(handle.number)?.lock.reserved());
        Ok(())
    }))
}

unsafe extern "C" fn file_control(_file: *mut ffi::sqlite3_file, _op: c_int, _arg: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND // what a VFS answers to a question that it doesn't know
}

unsafe extern "C" fn sector_size(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    c_int::try_from(handle.disk.model().sector).unwrap_or(c_int::MAX)
}

/// No atomic write, no safe append: nothing else is ever promised.
unsafe extern "C" fn device_characteristics(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    if handle.disk.model().powersafe { ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE } else { 0 }
}

unsafe extern "C" fn shm_map(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    len: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: SQLite's promises.
    let (handle, out) = unsafe { (handle(file), &mut *out) };
    *out = std::ptr::null_mut();
    code(handle.run(|model, handle| {
        let file = model.file(handle.number)?;
        let shm = handle.shm.get_or_insert_with(|| {
            file.shm.upgrade().unwrap_or_else(|| {
                let fresh = Arc::new(Shm::default());
                file.shm = Arc::downgrade(&fresh);
                fresh
            })
        });
        *out = shm.map(size(region), size(len), extend != 0);
        Ok(())
    }))
}

unsafe extern "C" fn shm_lock(file: *mut ffi::sqlite3_file, first: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    let slots = Range { start: size(first), end: size(first) + size(count) };
    code(handle.run(|_, handle| {
        let shm = handle.shm.as_ref().ok_or(ffi::SQLITE_IOERR_SHMLOCK)?;
        if flags & ffi::SQLITE_SHM_UNLOCK != 0 {
            shm.unlock(&mut handle.slots, slots);
            return Ok(());
        }
        shm.lock(&mut handle.slots, slots, flags & ffi::SQLITE_SHM_EXCLUSIVE != 0)
    }))
}

unsafe extern "C" fn shm_barrier(file: *mut ffi::sqlite3_file) {
    // SAFETY: SQLite's promises.
    let handle = unsafe { handle(file) };
    if let Some(shm) = &handle.shm {
        shm.barrier();
    }
}

unsafe extern "C" fn shm_unmap(file: *mut ffi::sqlite3_file, _delete: c_int) -> c_int {
    // SAFETY: SQLite's promises, among them that it has no pointer into the memory any more.
    let handle = unsafe { handle(file) };
    if let Some(shm) = handle.shm.take() {
        shm.release(&mut handle.slots);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, sync_names: c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let (disk, name) = unsafe { (disk(vfs), text(name)) };
    code(disk.model().delete(name.unwrap_or_default(), sync_names != 0))
}

unsafe extern "C" fn access(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, flags: c_int, out: *mut c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let (disk, name, out) = unsafe { (disk(vfs), text(name), &mut *out) };
    let mut model = disk.model();
    if !model.powered {
        return ffi::SQLITE_IOERR_ACCESS;
    }
    let read_only = model.faults.read_only;
    let found = name.and_then(|name| model.named(name));
    *out = c_int::from(match flags {
        // SQLite's own VFS takes an empty file for none here.
        ffi::SQLITE_ACCESS_EXISTS => found.is_some_and(|file| file.len() > 0),
        ffi::SQLITE_ACCESS_READWRITE => found.is_some() && !read_only,
        _ => found.is_some(),
    });
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_pathname(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    len: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite's promises.
    let name = unsafe { CStr::from_ptr(name) }.to_bytes_with_nul();
    if name.len() > size(len) {
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: SQLite's promises, and it fits; the two don't overlap.
    unsafe { std::ptr::copy_nonoverlapping(name.as_ptr(), out.cast::<u8>(), name.len()) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn randomness(vfs: *mut ffi::sqlite3_vfs, len: c_int, out: *mut c_char) -> c_int {
    // SAFETY: SQLite's promises.
    let (disk, out) = unsafe { (disk(vfs), std::slice::from_raw_parts_mut(out.cast::<u8>(), size(len))) };
    let mut model = disk.model();
    for part in out.chunks_mut(8) {
        let bytes = model.noise.bits().to_le_bytes();
        part.copy_from_slice(&bytes[..part.len()]);
    }
    len
}

/// Moves the disk's clock and doesn't wait: another thread's lock isn't waited out, and a busy timeout is over at once.
unsafe extern "C" fn sleep(vfs: *mut ffi::sqlite3_vfs, microseconds: c_int) -> c_int {
    // SAFETY: SQLite's promises.
    let disk = unsafe { disk(vfs) };
    disk.model().clock_ms += i64::from(microseconds) / 1000;
    std::thread::yield_now();
    microseconds
}

/// Unix time began this many milliseconds after noon of the day from which SQLite counts.
const UNIX_EPOCH_MS: i64 = 210_866_760_000_000;

unsafe extern "C" fn current_time_ms(vfs: *mut ffi::sqlite3_vfs, out: *mut i64) -> c_int {
    // SAFETY: SQLite's promises.
    unsafe { *out = UNIX_EPOCH_MS + disk(vfs).model().clock_ms };
    ffi::SQLITE_OK
}

unsafe extern "C" fn current_time(vfs: *mut ffi::sqlite3_vfs, out: *mut f64) -> c_int {
    let mut ms = 0;
    // SAFETY: SQLite's promises.
    unsafe {
        current_time_ms(vfs, &raw mut ms);
        *out = ms as f64 / 86_400_000.0;
    }
    ffi::SQLITE_OK
}
