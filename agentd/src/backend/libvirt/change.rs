//! Carries out one step on a domain: blocking, on a thread of `calls.rs`. Checks that it is the very domain and boot that
//! was meant before it touches anything.

use std::sync::Arc;
use std::time::Instant;

use agentd_core::operation::{Identity, same_boot};
use agentd_core::plan::{Action, Headroom, Preparation, Redefinition, Scope, Values};
use agentd_core::units::{ByteCount, Cpus, Limit};
use serde::{Deserialize, Serialize};
use serde_json::json;
use virt_sys as sys;

use super::calls::{Fail, Job};
use super::ffi::{self, CONFIG, Domain, Flags, LIVE};
use super::prepare::{Wish, boot_with, prepare};
use super::recent::Kept;
use super::xml::Definition;
use super::xml::tree::parse;
use super::{cgroup, look, process, quota, reading, xml};
use crate::backend::BackendError;

/// What the backend must remember of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Done {
    /// Nothing.
    Plain,
    /// The balloon was asked to leave the guest that much, from here, KiB; memory devices not counted.
    Balloon {
        /// Where it was.
        from: u64,
        /// Where it is to go.
        target: u64,
    },
    /// It was started, and its balloon is to go from here to there, KiB.
    Booted {
        /// Which start that was.
        boot: String,
        /// What it boots with.
        from: u64,
        /// What it is to have.
        target: u64,
    },
    /// The number of vCPUs was set.
    Vcpus,
    /// The guest has not given its vCPUs up in libvirt's time, with libvirt's words.
    Late {
        /// How many it was to keep.
        vcpus: u32,
        /// libvirt's words.
        words: String,
    },
}

/// Carries out `action` on exactly the domain and boot of `identity`. `seen` is what is known of it from a moment ago.
pub(super) fn apply(job: &Job<'_>, identity: &Identity, action: &Action, seen: Option<&Kept>) -> Result<Done, Fail> {
    let domain = domain(job, identity)?;
    match action {
        Action::Set { scope, values } => set(job, &domain, identity, (*scope, values), None, seen),
        Action::Restore { scope, values, native, .. } => {
            set(job, &domain, identity, (*scope, values), Some(native), seen)
        }
        Action::Define { definition, before, .. } => define(job, &domain, definition, before),
        Action::Start | Action::Boot { .. } => {
            let saved = xml::definition(&domain.xml(true)?).ok();
            job.about_to_change();
            domain.create()?;
            Ok(saved.and_then(|saved| booted(job, &domain, identity, &saved)).unwrap_or(Done::Plain))
        }
        Action::Restart { .. } => Err(BackendError::Unsupported("a VM is shut down and started instead".into()).into()),
        Action::Pause | Action::Unpause => {
            check_boot(job, &domain, identity)?;
            job.about_to_change();
            let asleep = domain.state()?.0 == sys::VIR_DOMAIN_PMSUSPENDED;
            match action {
                Action::Pause => domain.suspend()?,
                _ if asleep => domain.wake()?,
                _ => domain.resume()?,
            }
            Ok(Done::Plain)
        }
        Action::Shutdown | Action::Kill => {
            check_boot(job, &domain, identity)?;
            job.about_to_change();
            if *action == Action::Kill {
                domain.destroy()?
            } else {
                domain.shutdown()?
            }
            Ok(Done::Plain)
        }
    }
}

/// What a start has asked of the guest's balloon: it boots with all, and is to give back what is not saved for it.
fn booted(job: &Job<'_>, domain: &Domain, identity: &Identity, saved: &Definition) -> Option<Done> {
    let from = saved.memory.checked_sub(saved.device_size)?;
    let target = saved.current_memory;
    if !saved.balloon || target >= from {
        return None;
    }
    let start = process::find(job.pid_dirs, &domain.name().ok()?, &identity.id).map(|process| process.start);
    let boot = reading::boot(domain.id(), start)?;
    Some(Done::Booted { boot, from, target })
}

/// What becomes of its saved definition.
pub(super) fn redefined(job: &Job<'_>, identity: &Identity, wanted: &Redefinition) -> Result<Preparation, Fail> {
    let domain = job.connect.by_uuid(&identity.id)?;
    let old = domain.whole_xml()?;
    let refused = |why: String| BackendError::Unsupported(format!("its definition can't be changed: {why}"));
    let most = most_vcpus(job, &old);
    let vcpus = |cpus: Option<Cpus>| cpus.and_then(Cpus::as_whole).and_then(|count| u32::try_from(count).ok());
    let kib = |memory: Option<ByteCount>| memory.map(|memory| memory.bytes() >> 10);
    let prepared = match wanted {
        Redefinition::Headroom(Headroom { cpus, memory, .. }) => {
            prepare(&old, Wish { vcpus: vcpus(*cpus), memory: kib(*memory) }, most)
        }
        Redefinition::Boot { cpus, memory } => {
            boot_with(&old, Wish { vcpus: vcpus(*cpus), memory: kib(*memory) }, most)
        }
    };
    let prepared = prepared.map_err(refused)?;
    let (before, after) = (xml::definition(&old).map_err(refused)?, xml::definition(&prepared.xml).map_err(refused)?);
    let native =
        Native { max_vcpus: Some(after.max_vcpus), memory: Some(reading::saved_ceiling(&after)), xml: prepared.xml };
    let boots_anew = matches!(wanted, Redefinition::Boot { memory: Some(_), .. });
    let headroom = |of: &Definition| Headroom {
        boots_with: boots_anew.then(|| reading::saved_bytes(of)),
        ..reading::headroom(of)
    };
    Ok(Preparation {
        of: *wanted,
        before: headroom(&before),
        after: headroom(&after),
        changes: prepared.changes,
        notes: prepared.notes,
        old: json!(Native { max_vcpus: None, memory: None, xml: old }),
        new: json!(native),
    })
}

/// The most vCPUs that a definition's machine takes; `None` where libvirt doesn't say.
fn most_vcpus(job: &Job<'_>, definition: &str) -> Option<u32> {
    let root = parse(definition).ok()?;
    let os = root.child("os")?.child("type")?;
    let (architecture, machine) = (os.attribute(definition, "arch")?, os.attribute(definition, "machine")?);
    let offered = job.connect.capabilities(architecture, machine, root.attribute(definition, "type")?).ok()?;
    parse(&offered).ok()?.child("vcpu")?.attribute(&offered, "max")?.parse().ok()
}

/// A definition as a step carries it. With maxima it is one that libvirt has written anew since, in its own words, and is
/// known by those.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Native {
    xml: String,
    max_vcpus: Option<u32>,
    memory: Option<u64>,
}

fn define(
    job: &Job<'_>,
    domain: &Domain,
    definition: &serde_json::Value,
    before: &serde_json::Value,
) -> Result<Done, Fail> {
    let read = |value: &serde_json::Value| {
        Native::deserialize(value)
            .map_err(|error| BackendError::Failed(format!("the definition is unreadable: {error}")))
    };
    let (definition, before) = (read(definition)?, read(before)?);
    let now = domain.whole_xml()?;
    let same = match (before.max_vcpus, before.memory) {
        (Some(vcpus), Some(memory)) => {
            let told = xml::definition(&now).map_err(BackendError::Failed)?;
            (told.max_vcpus, reading::saved_ceiling(&told)) == (vcpus, memory) && rest(&now) == rest(&before.xml)
        }
        _ => now == before.xml,
    };
    if !same {
        let why = "its definition was changed by somebody else meanwhile; nothing was done";
        return Err(BackendError::InvalidState(why.into()).into());
    }
    job.about_to_change();
    job.connect.define(&definition.xml)?;
    Ok(Done::Plain)
}

/// What of a definition is none of ours: its tags and texts without those that a redefinition changes, and without the places
/// on the PCI bus that libvirt gives to new devices.
fn rest(xml: &str) -> Vec<&str> {
    const OURS: [&str; 15] = [
        "memory",
        "currentMemory",
        "maxMemory",
        "vcpu",
        "vcpus",
        "topology",
        "cpu",
        "numa",
        "cell",
        "size",
        "node",
        "block",
        "requested",
        "/target",
        "/controller",
    ];
    let is_ours = |piece: &str| {
        let tag = piece.rsplit_once('<').map_or("", |(_, tag)| tag);
        let name = tag.split([' ', '/']).find(|name| !name.is_empty()).unwrap_or_default();
        let closes = tag.strip_prefix('/').map(|name| format!("/{name}"));
        OURS.contains(&name)
            || closes.is_some_and(|closes| OURS.contains(&closes.as_str()))
            || tag == "target"
            || tag.starts_with("target chassis=")
            || tag.starts_with("address type='pci'")
            || tag.starts_with("address type='dimm'")
            || tag.starts_with("controller type='pci'")
            || tag.starts_with("model name='pci")
    };
    xml.split('>').map(str::trim).filter(|piece| !piece.is_empty() && !is_ours(piece)).collect()
}

/// The domain of a step. libvirt is not asked for one whose very run the kernel has.
fn domain(job: &Job<'_>, identity: &Identity) -> Result<Arc<Domain>, ffi::Error> {
    let is_this_run = |domain: &Arc<Domain>| {
        let start = domain.name().ok().and_then(|name| process::start(job.pid_dirs, &name, &identity.id));
        start.is_some() && reading::boot(domain.id(), start) == identity.boot
    };
    match job.connect.known(&identity.id).filter(is_this_run) {
        Some(domain) => Ok(domain),
        None => job.connect.by_uuid(&identity.id),
    }
}

fn check_boot(job: &Job<'_>, domain: &Domain, identity: &Identity) -> Result<(), Fail> {
    let name = domain.name()?;
    let start = domain.id().and_then(|_| process::start(job.pid_dirs, &name, &identity.id));
    let boot = reading::boot(domain.id(), start);
    if boot.is_some() && same_boot(boot.as_deref(), identity.boot.as_deref()) {
        return Ok(());
    }
    let now = boot.map_or_else(|| "it is down".into(), |boot| format!("it runs as {boot}"));
    let then = identity.boot.as_deref().map_or_else(|| "down".into(), |boot| format!("running as {boot}"));
    Err(BackendError::NotFound(format!("{name} was {then} when this was planned, now {now}; nothing was done")).into())
}

/// Sets what is set in `values`, in the scope's own units or, for an undo, to the native values of before.
fn set(
    job: &Job<'_>,
    domain: &Domain,
    identity: &Identity,
    (scope, values): (Scope, &Values),
    native: Option<&serde_json::Value>,
    seen: Option<&Kept>,
) -> Result<Done, Fail> {
    let (flags, side) = match scope {
        Scope::Live => (LIVE, "live"),
        Scope::Saved => (CONFIG, "saved"),
        Scope::Both => {
            let why = "a VM's saved and live values are set by calls of their own".into();
            return Err(BackendError::Unsupported(why).into());
        }
    };
    if values.fields().len() > 1 {
        return Err(BackendError::Unsupported("libvirt sets one field of a VM with one call".into()).into());
    }
    let live = scope == Scope::Live;
    if live {
        check_boot(job, domain, identity)?;
    }
    let mut done = Done::Plain;
    if let Some(limit) = values.cpu_limit {
        set_cpu_limit(job, domain, flags, limit, native.and_then(|native| native.get(side)))?;
    }
    if let Some(memory) = values.memory {
        let target = memory_kib(memory)?;
        let definition = || -> Result<(String, Definition), Fail> {
            let xml = domain.xml(!live)?;
            let definition = xml::definition(&xml).map_err(BackendError::Failed)?;
            Ok((xml, definition))
        };
        if let Some(plugged) = values.plugged {
            let (xml, definition) = definition()?;
            let device = device(&definition, &xml, plugged)?;
            job.about_to_change();
            domain.update_device(&device, flags)?;
        } else {
            let seen = seen.filter(|_| live).and_then(|kept| kept.stands(Instant::now()));
            // What was seen of a domain serves only where that has no memory devices.
            let devices = if seen.is_some() { 0 } else { definition()?.1.device_requested };
            let balloon = target.checked_sub(devices).filter(|balloon| *balloon > 0).ok_or_else(|| {
                BackendError::Unsupported(format!("its memory devices alone give it {devices} KiB; nothing was done"))
            })?;
            // Asked of QEMU itself: libvirt learns of a moving balloon once a second only.
            let from = match seen {
                Some(from) => Some(from),
                None if live => domain.memory_stats()?.actual,
                None => None,
            };
            job.about_to_change();
            domain.set_memory(balloon, flags)?;
            done = from.map_or(Done::Plain, |from| Done::Balloon { from, target: balloon });
        }
    }
    if let Some(cpus) = values.cpus {
        if live && let Some((counted, threads)) = look::sight(domain, job.pid_dirs, true)?.vcpu_disagreement() {
            return Err(BackendError::InvalidState(reading::disagreement(counted, threads)).into());
        }
        done = set_vcpus(job, domain, flags, vcpu_count(cpus)?)?;
    }
    Ok(done)
}

/// The virtio-mem device of a definition, asked for that much.
fn device(definition: &Definition, xml: &str, plugged: ByteCount) -> Result<String, BackendError> {
    let [plug] = &definition.plugs[..] else {
        let count = definition.plugs.len();
        return Err(BackendError::NotFound(format!(
            "it has {count} virtio-mem devices by now, not one; nothing was done"
        )));
    };
    plug.asked_for(xml, plugged.bytes() >> 10).ok_or_else(|| {
        BackendError::Unsupported(format!("its virtio-mem device can't be asked for {plugged}; nothing was done"))
    })
}

fn set_vcpus(job: &Job<'_>, domain: &Domain, flags: Flags, count: u32) -> Result<Done, Fail> {
    // What a boot brings could else not be taken away again while it runs. Needs ACPI, and a driver that knows of it.
    let takes_back = flags == CONFIG && {
        let saved = domain.xml(true)?;
        saved.contains("arch='x86_64'") && xml::definition(&saved).is_ok_and(|saved| saved.acpi)
    };
    job.about_to_change();
    if takes_back && domain.set_vcpus(count, CONFIG | ffi::HOTPLUGGABLE).is_ok() {
        return Ok(Done::Plain);
    }
    match domain.set_vcpus(count, flags) {
        Ok(()) if flags == LIVE => Ok(Done::Vcpus),
        Ok(()) => Ok(Done::Plain),
        // The same code stands for "another call holds the domain", and then nothing was asked of the guest.
        Err(error) if is_late_unplug(&error) => Ok(Done::Late { vcpus: count, words: error.message }),
        Err(error) => Err(error.into()),
    }
}

/// `vcpu unplug request timed out. Unplug result must be manually inspected in the domain`
fn is_late_unplug(error: &ffi::Error) -> bool {
    error.code == sys::VIR_ERR_OPERATION_TIMEOUT && !error.message.contains("state change lock")
}

/// The present period: the kernel's, where it is that of libvirt's own cgroup, which spares two questions.
fn period(job: &Job<'_>, domain: &Domain, flags: Flags) -> Result<u64, ffi::Error> {
    let pid = if flags == LIVE { process::pid(job.pid_dirs, &domain.name()?, &domain.uuid()?) } else { None };
    match pid.and_then(cgroup::bandwidth) {
        Some((enforced, true)) => Ok(enforced.period),
        _ => Ok(domain.bandwidth(flags)?.period),
    }
}

fn set_cpu_limit(
    job: &Job<'_>,
    domain: &Domain,
    flags: Flags,
    limit: Limit<Cpus>,
    before: Option<&serde_json::Value>,
) -> Result<(), Fail> {
    let native = |name: &str| before.and_then(|before| before.get(name));
    let (quota, period) = match (native("global_quota").and_then(serde_json::Value::as_i64), limit) {
        (Some(quota), _) => {
            // A period of 0 is one that was never set; libvirt takes none below 1,000.
            let period = native("global_period").and_then(serde_json::Value::as_u64);
            (quota, period.filter(|period| *period != 0))
        }
        (None, Limit::Unlimited) => (-1, None),
        (None, Limit::At(cpus)) => quota::bandwidth(cpus, period(job, domain, flags)?),
    };
    job.about_to_change();
    match domain.set_bandwidth(Some(quota), period, flags) {
        // Some versions refuse −1 on cgroup v2 and take their largest quota for none.
        Err(error) if quota < 0 && is_refused_value(&error) => {
            domain.set_bandwidth(Some(quota::NO_QUOTA), period, flags)?;
            Ok(())
        }
        other => Ok(other?),
    }
}

fn is_refused_value(error: &ffi::Error) -> bool {
    [sys::VIR_ERR_INVALID_ARG, sys::VIR_ERR_SYSTEM_ERROR].contains(&error.code)
        || error.message.contains("Invalid")
        || error.message.contains("range")
}

fn memory_kib(memory: Limit<ByteCount>) -> Result<u64, BackendError> {
    match memory {
        Limit::At(bytes) => Ok(bytes.bytes().div_ceil(1 << 10)),
        Limit::Unlimited => Err(BackendError::Unsupported("a VM has an amount of memory".into())),
    }
}

fn vcpu_count(cpus: Limit<Cpus>) -> Result<u32, BackendError> {
    let whole = cpus.at().and_then(Cpus::as_whole).and_then(|count| u32::try_from(count).ok());
    whole.ok_or_else(|| BackendError::Unsupported(format!("a VM has a whole number of vCPUs, not {cpus}")))
}

#[cfg(test)]
mod tests {
    use super::rest;

    const DOMAIN: &str = "<domain type='kvm'>\n  <name>web</name>\n  <memory unit='KiB'>1</memory>\n  <vcpu current='1'>2</vcpu>\n
        <devices>\n<disk type='file'><target dev='sda' bus='sata'/></disk>\n<controller type='scsi'/></devices>\n</domain>";

    #[test]
    fn what_a_redefinition_changes_is_not_the_rest_and_all_else_is() {
        let ours = DOMAIN
            .replace("'KiB'>1<", "'KiB'>2048<")
            .replace("<vcpu current='1'>2<", "<maxMemory slots='16'>9</maxMemory><vcpu>8<")
            .replace(
                "<devices>",
                "<cpu><numa><cell id='0'/></numa></cpu><devices><memory model='virtio-mem'><target><size unit='KiB'>4</size>\
                 <node>0</node></target><address type='pci' slot='0x1'/></memory><controller type='pci' index='1'>\
                 <model name='pcie-root-port'/><target chassis='1'/></controller>",
            );
        assert_eq!(rest(&ours), rest(DOMAIN));
        for (from, to) in [
            ("web", "db"),
            ("sda", "sdb"),
            ("<disk ", "<disk type='block'/><disk "),
            ("type='scsi'", "type='usb'"),
            ("</devices>", "<interface type='user'/></devices>"),
        ] {
            assert_ne!(rest(&DOMAIN.replace(from, to)), rest(DOMAIN), "{to}");
        }
    }
}
