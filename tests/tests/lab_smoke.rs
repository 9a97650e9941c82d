//! Tests of the lab itself, on real engines: what the end-to-end tests stand on.

use std::time::Duration;

use agentd_tests::lab::{Docker, Domain, Lab, Libvirt, TestNode, vcpu_threads, wait_until};
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
fn the_test_driver_has_the_domains_of_its_node_file() -> Result<()> {
    let lab = Lab::new()?;
    let node = TestNode::uniform(lab.dir(), 3, (2, 8), (1024, 4096))?;
    let virsh = |args: &[&str]| lab.run("virsh", &[&["-q", "-c", &node.uri()], args].concat());
    assert_eq!(
        virsh(&["list", "--state-running", "--name"])?.split_whitespace().collect::<Vec<_>>(),
        ["vm-0", "vm-1", "vm-2"]
    );
    assert_eq!(virsh(&["vcpucount", "vm-1", "--live", "--active"])?.trim(), "2");
    assert_eq!(virsh(&["vcpucount", "vm-1", "--live", "--maximum"])?.trim(), "8");
    assert!(
        virsh(&["dominfo", "vm-2"])?.lines().any(|line| line.starts_with("Used memory") && line.contains("1048576"))
    );
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

/// Runs only as the victim of the test below: makes engines, says so, and waits to be killed.
#[test]
#[ignore = "the victim of another test"]
fn victim() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let docker = Docker::start(&lab)?;
    docker.run("web", &[])?;
    // What is frozen does not die by itself.
    docker.docker(&["pause", "web"])?;
    let guest = Domain::new("web").define_and_start(&libvirt)?;
    std::fs::write(std::env::var("VICTIM_FILE")?, format!("{} {}", guest.qemu_pid()?, lab.dir().display()))?;
    loop {
        std::thread::park();
    }
}

#[test]
fn nothing_outlives_a_test_process_that_is_killed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("ready");
    let mut victim = std::process::Command::new(std::env::current_exe()?)
        .args(["--ignored", "--exact", "victim"])
        .env("VICTIM_FILE", &file)
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let ready = wait_until("the victim's engines", 2 * LONG, || Ok(std::fs::read_to_string(&file).ok()));
    victim.kill()?;
    victim.wait()?;
    let ready = ready?;
    let (pid, lab) = ready.split_once(' ').unwrap();
    let (pid, lab) = (pid.parse()?, std::path::Path::new(lab));
    wait_until("the end of all", LONG, || Ok((vcpu_threads(pid).is_err() && !lab.exists()).then_some(())))?;
    let name = format!("agentd-{}", lab.file_name().unwrap().to_string_lossy());
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup")? {
        assert!(!hierarchy?.path().join(&name).exists());
    }
    Ok(())
}
