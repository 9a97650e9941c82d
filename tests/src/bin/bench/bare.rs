//! libvirt's calls by themselves, on a connection that is kept: below that nobody gets.

use std::{
    ffi::{CStr, CString},
    ptr::{self, NonNull},
};

use anyhow::{Context, Result, bail};
use virt_sys as sys;

/// A running domain, with the connection that it was found on.
pub(crate) struct Bare {
    connect: NonNull<sys::virConnect>,
    domain: NonNull<sys::virDomain>,
}

impl Bare {
    /// Connects, and finds the domain of that name.
    pub(crate) fn open(uri: &str, name: &str) -> Result<Self> {
        let (uri, name) = (CString::new(uri)?, CString::new(name)?);
        // SAFETY: a text that ends in NUL and outlives the call.
        let connect = NonNull::new(unsafe { sys::virConnectOpen(uri.as_ptr()) }).with_context(why)?;
        // SAFETY: an open connection, and a text as above.
        let domain = NonNull::new(unsafe { sys::virDomainLookupByName(connect.as_ptr(), name.as_ptr()) });
        Ok(Bare { connect, domain: domain.with_context(why)? })
    }

    /// Its balloon's target, in KiB.
    pub(crate) fn set_memory(&self, kib: u64) -> Result<()> {
        // SAFETY: a domain that is held.
        told(unsafe { sys::virDomainSetMemoryFlags(self.domain.as_ptr(), kib, sys::VIR_DOMAIN_AFFECT_LIVE) })
    }

    /// Its CPU time in each period of the length that it has, in microseconds.
    pub(crate) fn set_quota(&self, quota: i64) -> Result<()> {
        let (mut parameters, mut count, mut room) = (ptr::null_mut(), 0, 0);
        let field = c"global_quota".as_ptr();
        // SAFETY: places for an array that libvirt allocates, and a field's name that ends in NUL.
        told(unsafe { sys::virTypedParamsAddLLong(&raw mut parameters, &raw mut count, &raw mut room, field, quota) })?;
        let (domain, live) = (self.domain.as_ptr(), sys::VIR_DOMAIN_AFFECT_LIVE);
        // SAFETY: a domain that is held, and that array.
        let set = told(unsafe { sys::virDomainSetSchedulerParametersFlags(domain, parameters, count, live) });
        // SAFETY: that array, not used after.
        unsafe { sys::virTypedParamsFree(parameters, count) };
        set
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // SAFETY: both are held, and not used after; the domain goes before what it was found on.
        unsafe {
            sys::virDomainFree(self.domain.as_ptr());
            sys::virConnectClose(self.connect.as_ptr());
        }
    }
}

fn told(answer: i32) -> Result<()> {
    if answer < 0 {
        bail!(why());
    }
    Ok(())
}

/// libvirt's last word.
fn why() -> String {
    // SAFETY: a text of this thread's, or null where nothing has failed.
    let said = unsafe { sys::virGetLastErrorMessage() };
    if said.is_null() {
        return "libvirt gave no reason".to_owned();
    }
    // SAFETY: not null, and it ends in NUL.
    unsafe { CStr::from_ptr(said) }.to_string_lossy().into_owned()
}
