//! Tests of the lab itself, on real engines: what the end-to-end tests stand on.

use std::time::Duration;

use agentd_tests::lab::{Docker, Domain, Lab, Libvirt, vcpu_threads};
use anyhow::Result;

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(60);

#[test]
fn docker_update_shows_in_the_containers_cgroup_and_containers_outlive_dockerd() -> Result<()> {
    let lab = Lab::new()?;
    let mut docker = Docker::start(&lab)?;
    let id = docker.run("web", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?;
    let cgroup = docker.cgroup(&id)?;
    assert_eq!(cgroup.cpu_quota()?, (Some(50_000), 100_000));
    assert_eq!(cgroup.memory_limit()?, Some(64 * MIB));

    docker.docker(&["update", "--cpus", "1.5", "-m", "96m", "--memory-swap", "96m", "web"])?;
    assert_eq!(cgroup.cpu_quota()?, (Some(150_000), 100_000));
    assert_eq!(cgroup.memory_limit()?, Some(96 * MIB));

    let free = docker.run_memory_eater("eater", &[], 32)?;
    let eater = docker.cgroup(&free)?;
    assert_eq!((eater.cpu_quota()?.0, eater.memory_limit()?), (None, None));

    docker.kill()?;
    assert!(docker.docker(&["ps"]).is_err());
    assert_eq!(cgroup.memory_limit()?, Some(96 * MIB), "the container lives on");
    docker.start_again()?;
    docker.docker(&["update", "-m", "80m", "--memory-swap", "80m", "web"])?;
    assert_eq!(cgroup.memory_limit()?, Some(80 * MIB));
    docker.rm("web")?;
    assert!(!cgroup.memory.exists());
    Ok(())
}

#[test]
fn a_guest_shows_on_its_console_what_virsh_changed_and_outlives_libvirtd() -> Result<()> {
    let lab = Lab::new()?;
    let mut libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(512, 512).define_and_start(&libvirt)?;
    let before = guest.wait_for("one CPU", LONG, |stat| stat.nproc == 1)?;
    assert_eq!(vcpu_threads(guest.qemu_pid()?)?.len(), 1);

    guest.virsh("setvcpus", &["3", "--live"])?;
    guest.wait_for("three CPUs", LONG, |stat| stat.nproc == 3)?;
    assert_eq!(vcpu_threads(guest.qemu_pid()?)?.len(), 3);

    guest.virsh("setmem", &["400M", "--live"])?;
    guest.wait_for("less memory", LONG, |stat| stat.memtotal_kib + 100 * 1024 < before.memtotal_kib)?;

    let pid = guest.qemu_pid()?;
    libvirt.kill()?;
    assert!(libvirt.virsh(&["list"]).is_err());
    libvirt.start_again()?;
    assert_eq!(libvirt.virsh(&["domstate", "web"])?, "running");
    assert_eq!(libvirt.qemu_pid("web")?, pid);
    libvirt.virsh(&["setmem", "web", "512M", "--live"])?;
    Ok(())
}

#[test]
fn a_busy_guest_slows_down_under_a_cpu_limit() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("busy").flag("burn").define_and_start(&libvirt)?;
    let rate = |lines: usize| -> Result<f64> {
        let stats = guest.next_stats(lines)?;
        let loops: u64 = stats[1..].iter().map(|stat| stat.loops).sum();
        Ok(loops as f64 / (stats[lines - 1].up - stats[0].up))
    };
    let free = rate(4)?;
    guest.virsh("schedinfo", &["--live", "global_period=100000", "global_quota=25000"])?;
    let limited = rate(6)?;
    assert!(free > 0.0 && limited < free / 2.0, "{free:.0} rounds a second, then {limited:.0}");
    Ok(())
}

#[test]
fn two_labs_with_a_domain_of_one_name_do_not_meet_and_nothing_remains() -> Result<()> {
    let (one, two) = (Lab::new()?, Lab::new()?);
    let (first, second) = (Libvirt::start(&one)?, Libvirt::start(&two)?);
    let guest = Domain::new("web").define_and_start(&first)?;
    let other = Domain::new("web").define_and_start(&second)?;
    let pids = [guest.qemu_pid()?, other.qemu_pid()?];
    assert_ne!(pids[0], pids[1]);
    let folders = [one.dir().to_owned(), two.dir().to_owned()];
    drop((first, second, one, two));
    for pid in pids {
        assert!(vcpu_threads(pid).is_err(), "{pid} runs on");
    }
    for folder in folders {
        assert!(!folder.exists(), "{} is left", folder.display());
    }
    Ok(())
}
