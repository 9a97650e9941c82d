//! libvirt's announcements, made safe: what it calls back with, on the thread of its event loop, until a [`Subscription`] is
//! dropped. A callback must not block: it holds up all events and the keepalive of every connection.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Weak};

use virt_sys as sys;

use super::{Connect, Domain, Result, check};

/// What libvirt announces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Event {
    /// The domain of this UUID was defined, undefined, started, stopped, paused or resumed.
    Lifecycle(String),
    /// Something else changed about the domain of this UUID.
    Domain(String),
    /// The connection is gone, with why. The last event of it.
    Closed(&'static str),
}

/// What is told of events; called on libvirt's thread.
pub(in super::super) type Tell = Arc<dyn Fn(Event) + Send + Sync>;

/// The announcements of one connection. Dropping it calls libvirtd and may block.
pub(in super::super) struct Subscription {
    connect: Arc<Connect>,
    tell: Tell,
    ids: Vec<c_int>,
    closes: bool,
}

impl Subscription {
    /// From now on `tell` is told.
    pub(in super::super) fn open(connect: &Arc<Connect>, tell: Tell) -> Result<Subscription> {
        let mut subscription = Subscription { connect: Arc::clone(connect), tell, ids: Vec::new(), closes: false };
        match lend(&subscription.tell, |opaque| {
            // SAFETY: a live connection; `closed` has the signature that libvirt wants and gets `opaque`, which `release` frees.
            check(unsafe { sys::virConnectRegisterCloseCallback(connect.raw(), Some(closed), opaque, Some(release)) })
        }) {
            Ok(_) => subscription.closes = true,
            // A driver inside the library can't be lost.
            Err(error) if error.code == sys::VIR_ERR_NO_SUPPORT => {}
            Err(error) => return Err(error),
        }
        for (event, callback) in callbacks() {
            let id = lend(&subscription.tell, |opaque| {
                // SAFETY: a live connection, any domain; the callback has the signature that belongs to this event (the
                // table says so) and gets `opaque`, which `release` frees.
                check(unsafe {
                    let callback = mem::transmute::<*const (), sys::virConnectDomainEventGenericCallback>(callback);
                    let (any, id) = (ptr::null_mut(), c_int::try_from(event).unwrap_or(-1));
                    sys::virConnectDomainEventRegisterAny(connect.raw(), any, id, callback, opaque, Some(release))
                })
            });
            match id {
                Ok(id) => subscription.ids.push(id),
                Err(error) if event == sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE => return Err(error),
                // An older libvirt knows fewer events.
                Err(error) => tracing::debug!("libvirt announces no event {event}: {}", error.message),
            }
        }
        Ok(subscription)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for id in &self.ids {
            // SAFETY: a live connection and an id that it gave. A failure means that the connection is gone, and frees too.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connect.raw(), *id) };
        }
        if self.closes {
            // SAFETY: a live connection and the callback that was registered on it.
            unsafe { sys::virConnectUnregisterCloseCallback(self.connect.raw(), Some(closed)) };
        }
    }
}

/// What libvirt holds of a [`Tell`]. A weak reference, because drivers inside the library take a close callback and never
/// free it (libvirt 9.0); and with a subscription its events end.
type Lent = Weak<dyn Fn(Event) + Send + Sync>;

/// Gives a registration a reference on `tell`: libvirt's own once it has succeeded, taken back where it failed.
fn lend(tell: &Tell, register: impl FnOnce(*mut c_void) -> Result<c_int>) -> Result<c_int> {
    // Boxed, because a pointer to a `dyn` is two words and C carries one.
    let opaque: *mut c_void = Box::into_raw(Box::new(Arc::downgrade(tell))).cast();
    register(opaque).inspect_err(|_| release(opaque))
}

extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: made by `lend`, and released once: by libvirt when it forgets the callback, or by `lend` itself.
    drop(unsafe { Box::from_raw(opaque.cast::<Lent>()) });
}

/// What an event is told to, while its subscription lasts.
fn lent(opaque: *mut c_void) -> Option<Tell> {
    // SAFETY: made by `lend`, and not released while a callback runs.
    unsafe { &*opaque.cast::<Lent>() }.upgrade()
}

extern "C" fn closed(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    let Some(tell) = lent(opaque) else { return };
    tell(Event::Closed(match c_uint::try_from(reason) {
        Ok(sys::VIR_CONNECT_CLOSE_REASON_EOF) => "libvirt hung up",
        Ok(sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE) => "libvirt gives no sign of life",
        Ok(sys::VIR_CONNECT_CLOSE_REASON_CLIENT) => "the connection was closed",
        _ => "the connection broke",
    }));
}

/// Tells of `domain`, which libvirt keeps alive during the callback.
fn announce(domain: sys::virDomainPtr, opaque: *mut c_void, event: fn(String) -> Event) {
    let (Some(tell), Some(domain)) = (lent(opaque), NonNull::new(domain)) else { return };
    // Borrowed: its reference is libvirt's.
    if let Ok(uuid) = mem::ManuallyDrop::new(Domain(domain)).uuid() {
        tell(event(uuid));
    }
}

extern "C" fn lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _: c_int,
    _: c_int,
    opaque: *mut c_void,
) -> c_int {
    announce(domain, opaque, Event::Lifecycle);
    0
}

/// A callback that tells only which domain it is about, whatever else it is given.
macro_rules! about {
    ($name:ident($($more:ty),*)) => {
        extern "C" fn $name(_: sys::virConnectPtr, domain: sys::virDomainPtr, $(_: $more,)* opaque: *mut c_void) {
            announce(domain, opaque, Event::Domain);
        }
    };
}

about!(plain());
about!(balloon(c_ulonglong));
about!(tunable(sys::virTypedParameterPtr, c_int));
about!(device(*const c_char));
about!(device_size(*const c_char, c_ulonglong));
about!(vcpu(c_uint));

/// The events that can tell of a change of CPU, memory or state, each with a callback of its signature (libvirt-domain.h,
/// `virConnectDomainEvent…Callback`).
fn callbacks() -> [(sys::virDomainEventID, *const ()); 9] {
    [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_REBOOT, plain as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, balloon as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_TUNABLE, tunable as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, device as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, device as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_MEMORY_DEVICE_SIZE_CHANGE, device_size as *const ()),
        (sys::VIR_DOMAIN_EVENT_ID_VCPU_REMOVED, vcpu as *const ()),
    ]
}
