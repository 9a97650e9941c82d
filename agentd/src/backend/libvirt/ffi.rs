//! The part of libvirt's C interface that agentd needs, made safe: connections, domains, errors with their code and words.
//!
//! Written on `virt-sys` instead of the `virt` crate, whose 0.4 leaves connections open when dropped, panics on a NUL in a
//! name and answers `Ok(false)` to a vCPU change that worked, and whose 0.5 drops the errors of `set_memory`. Knows nothing
//! of deadlines: every call here may block, and its caller gives it a thread of its own.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, Once, PoisonError};

use agentd_core::units::ByteCount;
use virt_sys as sys;

mod eventloop;
pub(super) mod events;

/// An error in libvirt's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Error {
    /// `virErrorNumber`.
    pub(super) code: c_uint,
    /// libvirt's sentence.
    pub(super) message: String,
}

impl Error {
    /// The last error of this thread: libvirt keeps one a thread, so this follows the failed call at once.
    fn last() -> Error {
        // SAFETY: returns null or a pointer to this thread's error, valid until this thread's next libvirt call.
        let error = unsafe { sys::virGetLastError().as_ref() };
        let Some(error) = error else {
            return Error { code: sys::VIR_ERR_INTERNAL_ERROR, message: "libvirt failed and gave no reason".into() };
        };
        let message = if error.message.is_null() {
            "libvirt failed and gave no reason".into()
        } else {
            // SAFETY: not null, and libvirt's messages end in NUL.
            unsafe { CStr::from_ptr(error.message) }.to_string_lossy().into_owned()
        };
        Error { code: c_uint::try_from(error.code).unwrap_or(sys::VIR_ERR_INTERNAL_ERROR), message }
    }

    /// Our own refusal of a text that C can't carry.
    fn nul() -> Error {
        Error { code: sys::VIR_ERR_NO_DOMAIN, message: "a name with a NUL byte fits no domain".into() }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// −1 is libvirt's failure, anything above is an answer.
fn check(answer: c_int) -> Result<c_int> {
    if answer < 0 { Err(Error::last()) } else { Ok(answer) }
}

/// A flag of libvirt as its functions take it.
pub(super) type Flags = c_uint;
/// What runs.
pub(super) const LIVE: Flags = sys::VIR_DOMAIN_AFFECT_LIVE;
/// What the next start will have.
pub(super) const CONFIG: Flags = sys::VIR_DOMAIN_AFFECT_CONFIG;
/// The most scheduler parameters that libvirt's protocol carries (REMOTE_DOMAIN_SCHEDULER_PARAMETERS_MAX); QEMU's driver has 9.
const SCHEDULER_PARAMETERS: c_int = 16;
/// vCPUs that are added can be taken away again while the guest runs.
pub(super) const HOTPLUGGABLE: Flags = sys::VIR_DOMAIN_VCPU_HOTPLUGGABLE;

extern "C" fn silent(_: *mut c_void, _: sys::virErrorPtr) {}

/// Once a process: errors are returned, not printed; and the event loop that events and keepalive need runs before any
/// connection is opened (libvirt binds a connection to the loop that it finds at that moment).
fn initialize() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `silent` has the signature that libvirt wants, lives as long as the program and uses no data.
        unsafe { sys::virSetErrorFunc(ptr::null_mut(), Some(silent)) };
        eventloop::register();
        let turn = || {
            loop {
                eventloop::turn();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("libvirt-events".into()).spawn(turn) {
            tracing::warn!("libvirt's event loop has no thread: {error}");
        }
    });
}

/// One connection to libvirt, closed when dropped.
#[derive(Debug)]
pub(super) struct Connect {
    raw: NonNull<sys::virConnect>,
    /// The domain that was found here last, with its UUID. It holds the connection until it is dropped, after `raw` was given up.
    last: Mutex<Option<(String, Arc<Domain>)>>,
}

// SAFETY: libvirt's connections are reference-counted and locked inside; any thread may use one at any time.
unsafe impl Send for Connect {}
// SAFETY: as above.
unsafe impl Sync for Connect {}

impl Connect {
    /// Opens a connection that hears events, with keepalive where the driver has it.
    pub(super) fn open(uri: &str) -> Result<Connect> {
        initialize();
        Self::open_anywhere(uri)
    }

    /// Opens a connection for calls alone, outside of the event loop, where the driver can do without it.
    pub(super) fn open_for_calls(uri: &str) -> Result<Connect> {
        initialize();
        eventloop::aside(|| Self::open_anywhere(uri))
    }

    fn open_anywhere(uri: &str) -> Result<Connect> {
        let uri = CString::new(uri).map_err(|_| Error::nul())?;
        // SAFETY: a NUL-terminated text that outlives the call.
        let raw = unsafe { sys::virConnectOpen(uri.as_ptr()) };
        let connect = Connect { raw: NonNull::new(raw).ok_or_else(Error::last)?, last: Mutex::default() };
        // SAFETY: a live connection. Drivers inside the library have no keepalive and answer 1 or −1: no harm.
        unsafe { sys::virConnectSetKeepAlive(connect.raw(), 5, 3) };
        Ok(connect)
    }

    fn raw(&self) -> sys::virConnectPtr {
        self.raw.as_ptr()
    }

    /// Whether the other end is there, as far as is known without asking it.
    pub(super) fn is_alive(&self) -> bool {
        // SAFETY: a live connection.
        unsafe { sys::virConnectIsAlive(self.raw()) == 1 }
    }

    /// The daemon's version and the hypervisor's: `libvirt 9.0.0, QEMU 7.2.22`.
    pub(super) fn versions(&self) -> Result<String> {
        let (mut library, mut hypervisor) = (0, 0);
        // SAFETY: a live connection and a place for the answer.
        check(unsafe { sys::virConnectGetLibVersion(self.raw(), &raw mut library) })?;
        // SAFETY: as above.
        check(unsafe { sys::virConnectGetVersion(self.raw(), &raw mut hypervisor) })?;
        // SAFETY: returns null or a text that lives as long as the connection.
        let kind = unsafe { sys::virConnectGetType(self.raw()) };
        let kind = if kind.is_null() {
            "hypervisor".into()
        } else {
            // SAFETY: not null, NUL-terminated.
            unsafe { CStr::from_ptr(kind) }.to_string_lossy()
        };
        let dotted = |v: u64| format!("{}.{}.{}", v / 1_000_000, v / 1_000 % 1_000, v % 1_000);
        Ok(format!("libvirt {}, {kind} {}", dotted(library), dotted(hypervisor)))
    }

    /// Replaces the saved definition of the domain whose UUID it has.
    pub(super) fn define(&self, xml: &str) -> Result<Domain> {
        let xml = CString::new(xml).map_err(|_| Error::nul())?;
        // SAFETY: a live connection and a NUL-terminated text.
        let raw = unsafe { sys::virDomainDefineXMLFlags(self.raw(), xml.as_ptr(), 0) };
        NonNull::new(raw).map(Domain).ok_or_else(Error::last)
    }

    /// What the hypervisor offers a domain of this architecture, machine and type, as XML (formatdomaincaps).
    pub(super) fn capabilities(&self, architecture: &str, machine: &str, kind: &str) -> Result<String> {
        let text = |text: &str| CString::new(text).map_err(|_| Error::nul());
        let (architecture, machine, kind) = (text(architecture)?, text(machine)?, text(kind)?);
        let (architecture, machine, kind) = (architecture.as_ptr(), machine.as_ptr(), kind.as_ptr());
        // SAFETY: a live connection and NUL-terminated texts, null for the emulator of libvirt's choice.
        take_text(unsafe {
            sys::virConnectGetDomainCapabilities(self.raw(), ptr::null(), architecture, machine, kind, 0)
        })
    }

    /// Every domain, running or not.
    pub(super) fn domains(&self) -> Result<Vec<Domain>> {
        let mut list: *mut sys::virDomainPtr = ptr::null_mut();
        // SAFETY: a live connection and a place for the array that libvirt allocates.
        let count = check(unsafe { sys::virConnectListAllDomains(self.raw(), &raw mut list, 0) })?;
        let count = usize::try_from(count).unwrap_or(0);
        // SAFETY: libvirt filled `count` entries, each a reference that is ours now.
        let domains = (0..count).filter_map(|i| NonNull::new(unsafe { *list.add(i) }).map(Domain)).collect();
        // SAFETY: allocated by libvirt with malloc; its entries were moved out.
        unsafe { free(list.cast()) };
        Ok(domains)
    }

    /// The domain of this name.
    pub(super) fn by_name(&self, name: &str) -> Result<Arc<Domain>> {
        let name = CString::new(name).map_err(|_| Error::nul())?;
        // SAFETY: a live connection and a NUL-terminated text.
        self.found(unsafe { sys::virDomainLookupByName(self.raw(), name.as_ptr()) })
    }

    /// The domain of this UUID.
    pub(super) fn by_uuid(&self, uuid: &str) -> Result<Arc<Domain>> {
        let uuid = CString::new(uuid).map_err(|_| Error::nul())?;
        // SAFETY: a live connection and a NUL-terminated text.
        self.found(unsafe { sys::virDomainLookupByUUIDString(self.raw(), uuid.as_ptr()) })
    }

    /// The domain of this UUID as it was when it was looked up, where it is the one that was looked up here last. Its name and
    /// its id may be others by now.
    pub(super) fn known(&self, uuid: &str) -> Option<Arc<Domain>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|(of, _)| of == uuid).map(|(_, domain)| Arc::clone(domain))
    }

    /// Keeps what a look-up has found.
    fn found(&self, raw: sys::virDomainPtr) -> Result<Arc<Domain>> {
        let domain = Arc::new(NonNull::new(raw).map(Domain).ok_or_else(Error::last)?);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((domain.uuid()?, Arc::clone(&domain)));
        Ok(domain)
    }
}

impl Drop for Connect {
    fn drop(&mut self) {
        // SAFETY: gives up the one reference that `open` took.
        unsafe { sys::virConnectClose(self.raw()) };
    }
}

/// A UUID as libvirt writes it. Its own function for that takes longer than all else that is asked of one among many.
fn uuid_text(bytes: [u8; 16]) -> String {
    let digit = |half: u8| char::from(b"0123456789abcdef"[usize::from(half)]);
    let mut text = String::with_capacity(36);
    for (place, byte) in bytes.into_iter().enumerate() {
        if matches!(place, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.extend([digit(byte >> 4), digit(byte & 15)]);
    }
    text
}

unsafe extern "C" {
    fn free(pointer: *mut c_void);
}

/// libvirt's own text, freed after copying.
fn take_text(raw: *mut c_char) -> Result<String> {
    if raw.is_null() {
        return Err(Error::last());
    }
    // SAFETY: not null, NUL-terminated.
    let text = unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned();
    // SAFETY: allocated by libvirt with malloc, not used after.
    unsafe { free(raw.cast()) };
    Ok(text)
}

/// What a guest's balloon says; KiB, and seconds since the Unix epoch. `None` where it was not said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct MemoryStats {
    /// What the balloon leaves the guest now.
    pub(super) actual: Option<u64>,
    /// What the guest could give away without swapping.
    pub(super) usable: Option<u64>,
    /// When the driver last reported; 0 where it never spoke.
    pub(super) last_update: Option<u64>,
}

impl MemoryStats {
    /// What was told, without amounts that no host has: a guest says what it likes, and the kernel in it −1 for what it can't tell.
    pub(super) fn told(actual: Option<u64>, usable: Option<u64>, last_update: Option<u64>) -> Self {
        let possible = |kib: &u64| *kib <= ByteCount::MAX.bytes() >> 10;
        MemoryStats { actual: actual.filter(possible), usable: usable.filter(possible), last_update }
    }
}

/// What libvirt counts of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    /// `virDomainState`.
    pub(super) state: c_uint,
    /// vCPUs.
    pub(super) vcpus: c_uint,
    /// Memory in KiB, as of the last that QEMU said of its balloon.
    pub(super) memory: c_ulong,
}

/// CPU bandwidth as libvirt keeps it: microseconds, 0 where unset, a quota below 0 for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Bandwidth {
    /// `global_quota`.
    pub(super) quota: i64,
    /// `global_period`.
    pub(super) period: u64,
}

/// One domain. Holds a reference on its connection.
#[derive(Debug)]
pub(super) struct Domain(NonNull<sys::virDomain>);

// SAFETY: libvirt's domains belong to no thread, and their references are counted under a lock.
unsafe impl Send for Domain {}
// SAFETY: name and UUID of one never change. Its id does when it is started by this very handle (`create`), as one aligned int that
// is read as a whole: at worst another thread reads the one of before, which no caller takes for that of now.
unsafe impl Sync for Domain {}

impl Domain {
    fn raw(&self) -> sys::virDomainPtr {
        self.0.as_ptr()
    }

    /// Its name.
    pub(super) fn name(&self) -> Result<String> {
        // SAFETY: a live domain; the text lives as long as it.
        let name = unsafe { sys::virDomainGetName(self.raw()) };
        if name.is_null() {
            return Err(Error::last());
        }
        // SAFETY: not null, NUL-terminated.
        Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }

    /// Its UUID.
    pub(super) fn uuid(&self) -> Result<String> {
        let mut bytes = [0_u8; 16]; // VIR_UUID_BUFLEN
        // SAFETY: a live domain and a buffer of the length that libvirt documents.
        check(unsafe { sys::virDomainGetUUID(self.raw(), bytes.as_mut_ptr()) })?;
        Ok(uuid_text(bytes))
    }

    /// Its id of this boot, as of the look-up; `None` where it was down.
    pub(super) fn id(&self) -> Option<u32> {
        // SAFETY: a live domain. (unsigned) −1 is libvirt's "inactive".
        let id = unsafe { sys::virDomainGetID(self.raw()) };
        (id != c_uint::MAX).then_some(id)
    }

    /// Whether it has a saved definition.
    pub(super) fn is_persistent(&self) -> Result<bool> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainIsPersistent(self.raw()) }).map(|answer| answer == 1)
    }

    /// `virDomainState` and the reason that belongs to it.
    pub(super) fn state(&self) -> Result<(c_uint, c_uint)> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: a live domain and places for the answers.
        check(unsafe { sys::virDomainGetState(self.raw(), &raw mut state, &raw mut reason, 0) })?;
        Ok((c_uint::try_from(state).unwrap_or(0), c_uint::try_from(reason).unwrap_or(0)))
    }

    /// What libvirt counts of it without asking QEMU.
    pub(super) fn info(&self) -> Result<Info> {
        self.raw_info().map(|info| Info { state: info.state.into(), vcpus: info.nrVirtCpu.into(), memory: info.memory })
    }

    /// CPU time since its start, in nanoseconds.
    pub(super) fn cpu_time(&self) -> Result<u64> {
        self.raw_info().map(|info| info.cpuTime)
    }

    fn raw_info(&self) -> Result<sys::virDomainInfo> {
        let mut info = std::mem::MaybeUninit::<sys::virDomainInfo>::uninit();
        // SAFETY: a live domain and a place for the answer.
        check(unsafe { sys::virDomainGetInfo(self.raw(), info.as_mut_ptr()) })?;
        // SAFETY: filled by libvirt, which told so.
        Ok(unsafe { info.assume_init() })
    }

    /// The definition of what runs, or of the next start.
    pub(super) fn xml(&self, saved: bool) -> Result<String> {
        let flags = if saved { sys::VIR_DOMAIN_XML_INACTIVE } else { 0 };
        // SAFETY: a live domain.
        take_text(unsafe { sys::virDomainGetXMLDesc(self.raw(), flags) })
    }

    /// The definition of the next start with all that is in it, passwords of displays too: for another definition, not for
    /// eyes.
    pub(super) fn whole_xml(&self) -> Result<String> {
        let flags = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;
        // SAFETY: a live domain.
        take_text(unsafe { sys::virDomainGetXMLDesc(self.raw(), flags) })
    }

    /// The whole VM's CPU bandwidth.
    pub(super) fn bandwidth(&self, flags: Flags) -> Result<Bandwidth> {
        // Room for all that a driver has: one question in place of two.
        self.bandwidth_of(SCHEDULER_PARAMETERS, flags).or_else(|_| {
            let count = self.scheduler_parameters(flags)?;
            self.bandwidth_of(count, flags)
        })
    }

    /// How many scheduler parameters there are.
    fn scheduler_parameters(&self, flags: Flags) -> Result<c_int> {
        let mut count: c_int = 0;
        // SAFETY: a live domain; with no array libvirt tells how many parameters there are.
        check(unsafe { sys::virDomainGetSchedulerParametersFlags(self.raw(), ptr::null_mut(), &raw mut count, flags) })
            .or_else(|error| {
                // Some drivers tell the number by virDomainGetSchedulerType only.
                // SAFETY: a live domain and a place for the number; the type's text is ours to free.
                let kind = unsafe { sys::virDomainGetSchedulerType(self.raw(), &raw mut count) };
                if kind.is_null() || count == 0 { Err(error) } else { take_text(kind).map(|_| 0) }
            })?;
        if count == 0 {
            // SAFETY: as above.
            take_text(unsafe { sys::virDomainGetSchedulerType(self.raw(), &raw mut count) })?;
        }
        Ok(count)
    }

    fn bandwidth_of(&self, count: c_int, flags: Flags) -> Result<Bandwidth> {
        let mut params = Params::with_room_for(count);
        let mut filled = c_int::try_from(params.0.len()).unwrap_or(0);
        // SAFETY: the array has room for `filled` parameters; libvirt sets `filled` to those it wrote.
        check(unsafe {
            sys::virDomainGetSchedulerParametersFlags(self.raw(), params.0.as_mut_ptr(), &raw mut filled, flags)
        })?;
        let mut bandwidth = Bandwidth::default();
        let mut found = false;
        // SAFETY: an array of `filled` valid parameters, constant names, places of the right types.
        unsafe {
            let (list, quota, period) = (params.0.as_mut_ptr(), c"global_quota".as_ptr(), c"global_period".as_ptr());
            found |= sys::virTypedParamsGetLLong(list, filled, quota, &raw mut bandwidth.quota) == 1;
            found |= sys::virTypedParamsGetULLong(list, filled, period, &raw mut bandwidth.period) == 1;
        }
        if found {
            Ok(bandwidth)
        } else {
            let message = "its driver has no CPU bandwidth for the whole VM (global_quota)".into();
            Err(Error { code: sys::VIR_ERR_NO_SUPPORT, message })
        }
    }

    /// Sets the whole VM's CPU bandwidth; a `None` stays.
    pub(super) fn set_bandwidth(&self, quota: Option<i64>, period: Option<u64>, flags: Flags) -> Result<()> {
        let mut list: sys::virTypedParameterPtr = ptr::null_mut();
        let (mut count, mut room): (c_int, c_int) = (0, 0);
        let (count_at, room_at) = (&raw mut count, &raw mut room);
        let mut answer = 0;
        if let Some(period) = period {
            let name = c"global_period".as_ptr();
            // SAFETY: libvirt grows the list, which is null or its own.
            answer |= unsafe { sys::virTypedParamsAddULLong(&raw mut list, count_at, room_at, name, period) };
        }
        if let Some(quota) = quota {
            let name = c"global_quota".as_ptr();
            // SAFETY: as above.
            answer |= unsafe { sys::virTypedParamsAddLLong(&raw mut list, count_at, room_at, name, quota) };
        }
        if answer == 0 {
            // SAFETY: a live domain and a list of `count` valid parameters.
            answer = unsafe { sys::virDomainSetSchedulerParametersFlags(self.raw(), list, count, flags) };
        }
        let outcome = check(answer).map(|_| ());
        // SAFETY: the list is libvirt's own (or null), and not used after.
        unsafe { sys::virTypedParamsFree(list, count) };
        outcome
    }

    /// Sets the number of vCPUs.
    pub(super) fn set_vcpus(&self, count: u32, flags: Flags) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainSetVcpusFlags(self.raw(), count, flags) }).map(|_| ())
    }

    /// Sets the balloon's target, or what the next start gives.
    pub(super) fn set_memory(&self, kib: u64, flags: Flags) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainSetMemoryFlags(self.raw(), kib, flags) }).map(|_| ())
    }

    /// Changes a device to what this element says of it.
    pub(super) fn update_device(&self, xml: &str, flags: Flags) -> Result<()> {
        let xml = CString::new(xml).map_err(|_| Error::nul())?;
        // SAFETY: a live domain and a NUL-terminated text.
        check(unsafe { sys::virDomainUpdateDeviceFlags(self.raw(), xml.as_ptr(), flags) }).map(|_| ())
    }

    /// What the balloon says. Asks QEMU, so it hangs where QEMU hangs.
    pub(super) fn memory_stats(&self) -> Result<MemoryStats> {
        const ROOM: c_uint = sys::VIR_DOMAIN_MEMORY_STAT_NR;
        let mut list = [sys::virDomainMemoryStatStruct { tag: 0, val: 0 }; ROOM as usize];
        // SAFETY: a live domain and an array of `ROOM` entries.
        let filled = check(unsafe { sys::virDomainMemoryStats(self.raw(), list.as_mut_ptr(), ROOM, 0) })?;
        let find = |tag: c_uint| {
            let filled = usize::try_from(filled).unwrap_or(0);
            list.iter().take(filled).find(|stat| c_uint::try_from(stat.tag) == Ok(tag)).map(|stat| stat.val)
        };
        Ok(MemoryStats::told(
            find(sys::VIR_DOMAIN_MEMORY_STAT_ACTUAL_BALLOON),
            find(sys::VIR_DOMAIN_MEMORY_STAT_USABLE),
            find(sys::VIR_DOMAIN_MEMORY_STAT_LAST_UPDATE),
        ))
    }

    /// How often, in seconds, the running guest's balloon driver reports; 0 is never.
    pub(super) fn set_stats_period(&self, seconds: u32) -> Result<()> {
        let seconds = c_int::try_from(seconds).unwrap_or(c_int::MAX);
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainSetMemoryStatsPeriod(self.raw(), seconds, LIVE) }).map(|_| ())
    }

    /// The vCPUs that are online inside, as the guest agent tells: `0-2,5`. Asks the guest, so it hangs where that hangs.
    pub(super) fn guest_vcpus(&self) -> Result<String> {
        let mut list: sys::virTypedParameterPtr = ptr::null_mut();
        let mut count: c_uint = 0;
        // SAFETY: a live domain and places for a list, which is ours to free then, and its length.
        check(unsafe { sys::virDomainGetGuestVcpus(self.raw(), &raw mut list, &raw mut count, 0) })?;
        let filled = c_int::try_from(count).unwrap_or(0);
        let mut online: *const c_char = ptr::null();
        // SAFETY: a list of `filled` valid parameters, a constant name, a place for a text that the list keeps.
        let found = unsafe { sys::virTypedParamsGetString(list, filled, c"online".as_ptr(), &raw mut online) } == 1;
        let text = if found && !online.is_null() {
            // SAFETY: a NUL-terminated text, alive as long as the list is.
            unsafe { CStr::from_ptr(online) }.to_string_lossy().into_owned()
        } else {
            String::new()
        };
        // SAFETY: the list is libvirt's own (or null), and not used after.
        unsafe { sys::virTypedParamsFree(list, filled) };
        Ok(text)
    }

    /// Whether libvirt is at work on it: a job, or a command that its QEMU has not answered.
    pub(super) fn is_occupied(&self) -> Result<bool> {
        let mut info = sys::virDomainControlInfo { state: 0, details: 0, stateTime: 0 };
        // SAFETY: a live domain and a place for the answer.
        check(unsafe { sys::virDomainGetControlInfo(self.raw(), &raw mut info, 0) })?;
        Ok([sys::VIR_DOMAIN_CONTROL_JOB, sys::VIR_DOMAIN_CONTROL_OCCUPIED].contains(&info.state))
    }

    /// Brings it up.
    pub(super) fn create(&self) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainCreate(self.raw()) }).map(|_| ())
    }

    /// Presses its power button; drivers that know no ACPI shut it down their own way.
    pub(super) fn shutdown(&self) -> Result<()> {
        // SAFETY: a live domain.
        match check(unsafe { sys::virDomainShutdownFlags(self.raw(), sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) }) {
            Err(error) if [sys::VIR_ERR_NO_SUPPORT, sys::VIR_ERR_INVALID_ARG].contains(&error.code) => {
                // SAFETY: a live domain.
                check(unsafe { sys::virDomainShutdown(self.raw()) }).map(|_| ())
            }
            other => other.map(|_| ()),
        }
    }

    /// Switches it off hard.
    pub(super) fn destroy(&self) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainDestroyFlags(self.raw(), 0) }).map(|_| ())
    }

    /// Freezes its vCPUs.
    pub(super) fn suspend(&self) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainSuspend(self.raw()) }).map(|_| ())
    }

    /// Lets its vCPUs run on.
    pub(super) fn resume(&self) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainResume(self.raw()) }).map(|_| ())
    }

    /// Wakes a guest that has put itself to sleep (ACPI S3), which a resume doesn't.
    pub(super) fn wake(&self) -> Result<()> {
        // SAFETY: a live domain.
        check(unsafe { sys::virDomainPMWakeup(self.raw(), 0) }).map(|_| ())
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: gives up the one reference that the look-up took.
        unsafe { sys::virDomainFree(self.raw()) };
    }
}

/// Typed parameters that libvirt fills, cleared when dropped (a parameter may own a text).
struct Params(Vec<sys::virTypedParameter>);

impl Params {
    fn with_room_for(count: c_int) -> Params {
        // SAFETY: plain old data: an array of chars, an integer and a union of numbers and a pointer; all zeroes is valid.
        let zero: sys::virTypedParameter = unsafe { std::mem::zeroed() };
        Params(vec![zero; usize::try_from(count).unwrap_or(0)])
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        let count = c_int::try_from(self.0.len()).unwrap_or(0);
        // SAFETY: `count` parameters, each filled by libvirt or all zeroes.
        unsafe { sys::virTypedParamsClear(self.0.as_mut_ptr(), count) };
    }
}
