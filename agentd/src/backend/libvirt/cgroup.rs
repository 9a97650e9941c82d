//! Finds a domain's own cgroup and reads its CPU bandwidth: what the kernel enforces, whatever libvirt believes. Never writes.

use std::path::{Component, Path, PathBuf};

use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::{Cgroup, Controller, hierarchies};

use super::ffi::Bandwidth;
use super::quota;

/// The cgroup that holds the whole VM of this process, as its CPU controller has it, and whether libvirt made it; `None` where
/// it is in none.
fn vm(pid: u32) -> Option<(Cgroup, bool)> {
    let unified = hierarchies::is_cgroup2_unified_mode();
    let memberships = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let member = membership(&memberships, unified)?;
    let cgroup = Cgroup::load_with_specified_controllers(hierarchies::auto(), vm_path(member)?, vec!["cpu".into()]);
    Some((cgroup, own_path(member).is_some()))
}

/// Where that cgroup is: the folder in which libvirt makes one for each vCPU.
pub(super) fn folder(pid: u32) -> Option<PathBuf> {
    Some(vm(pid)?.0.controller_of::<CpuController>()?.path().to_owned())
}

/// The bandwidth of that cgroup, and whether that is the VM's own, so that it is what libvirt would tell; `None` where there is
/// none to read.
pub(super) fn bandwidth(pid: u32) -> Option<(Bandwidth, bool)> {
    let (cgroup, own) = vm(pid)?;
    let cpu: &CpuController = cgroup.controller_of()?;
    let period = cpu.cfs_period().ok()?;
    // v2's `max` arrives as the largest number; libvirt takes −1 for none.
    let quota = cpu.cfs_quota().ok().map(|quota| if quota >= quota::NO_QUOTA { -1 } else { quota })?;
    Some((Bandwidth { quota, period }, own))
}

/// The path of the CPU controller in `/proc/PID/cgroup` (cgroups(7)).
pub(super) fn membership(text: &str, unified: bool) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let fits = if unified {
            hierarchy == "0" && controllers.is_empty()
        } else {
            controllers.split(',').any(|controller| controller == "cpu")
        };
        fits.then_some(path)
    })
}

/// Where libvirt puts the whole VM's quota, below the root of the hierarchy: the parent of the cgroups that it makes for
/// the emulator, each vCPU and each I/O thread. `None` for the root and for a path that would leave it.
fn vm_path(path: &str) -> Option<&str> {
    let path = match path.rsplit_once('/') {
        Some((parent, last)) if is_part_of_vm(last) => parent,
        _ => path,
    };
    let below = path.trim_matches('/');
    let inside = Path::new(below).components().all(|part| matches!(part, Component::Normal(_)));
    (inside && !below.is_empty()).then_some(below)
}

/// The same, only where libvirt made it: else the process shares the cgroup of whoever started libvirt, and what is counted
/// there is everybody's.
pub(super) fn own_path(path: &str) -> Option<&str> {
    let vm = vm_path(path)?;
    let last = vm.rsplit('/').next().unwrap_or_default();
    let parts = vm.len() < path.trim_matches('/').len();
    (parts || last.starts_with("qemu-") || last.starts_with("machine-qemu")).then_some(vm)
}

fn is_part_of_vm(last: &str) -> bool {
    let numbered = |prefix| {
        last.strip_prefix(prefix).is_some_and(|n: &str| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    last == "emulator" || numbered("vcpu") || numbered("iothread")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vms_own_cgroup_is_above_its_emulator_and_vcpus() {
        for (path, expected) in [
            ("/machine/qemu-1-web.libvirt-qemu/emulator", Some("machine/qemu-1-web.libvirt-qemu")),
            ("/machine/qemu-1-web.libvirt-qemu/vcpu3", Some("machine/qemu-1-web.libvirt-qemu")),
            (
                "/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator",
                Some("machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt"),
            ),
            ("/machine/qemu-1-vcpu.libvirt-qemu", Some("machine/qemu-1-vcpu.libvirt-qemu")),
            ("/machine/vcpu", Some("machine/vcpu")),
            ("/", None),
            ("/emulator", None),
            ("/../emulator", None),
            ("/a/../../b", None),
        ] {
            assert_eq!(vm_path(path), expected, "{path}");
        }
    }

    #[test]
    fn a_cgroup_that_others_share_is_not_the_vms_own() {
        let scope = "machine.slice/machine-qemu\\x2d1\\x2dweb.scope";
        for (path, expected) in [
            ("/machine/qemu-1-web.libvirt-qemu/emulator", Some("machine/qemu-1-web.libvirt-qemu")),
            ("/machine/qemu-1-web.libvirt-qemu", Some("machine/qemu-1-web.libvirt-qemu")),
            (&format!("/{scope}/libvirt/vcpu0"), Some(&format!("{scope}/libvirt"))),
            (&format!("/{scope}"), Some(scope)),
            ("/user.slice/session-2.scope", None),
            ("/", None),
        ] {
            assert_eq!(own_path(path), expected.map(|path| path as &str), "{path}");
        }
    }

    #[test]
    fn the_cpu_controllers_line_is_found_in_either_hierarchy() {
        let legacy = "3:cpuset:/a\n2:cpuacct:/b\n1:cpu,foo:/c:d\n0::/e\n";
        assert_eq!(membership(legacy, false), Some("/c:d"));
        assert_eq!(membership("0::/machine.slice/x\n", true), Some("/machine.slice/x"));
        assert_eq!(membership("", true), None);
    }
}
