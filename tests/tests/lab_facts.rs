//! Not assertions but measurements: what this machine's libvirt and QEMU show in the corners that agentd's design rests
//! on. Run with `cargo test -p agentd-tests --test lab_facts -- --ignored --nocapture`.

use std::time::{Duration, Instant};

use agentd_tests::lab::{Domain, Guest, Lab, Libvirt, vcpu_threads};
use anyhow::Result;

const LONG: Duration = Duration::from_secs(60);

fn mem(guest: &Guest<'_>) -> String {
    let stats = guest.virsh("dommemstat", &[]).unwrap_or_else(|e| format!("{e:#}"));
    stats.lines().collect::<Vec<_>>().join(", ")
}

#[test]
#[ignore = "a measurement, not a check"]
fn balloon_statistics_in_each_case() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let cases = [
        ("period", Domain::new("period")),
        ("noperiod", Domain::new("noperiod").without_stats_period()),
        ("nodriver", Domain::new("nodriver").flag("noballoon")),
        ("nodevice", Domain::new("nodevice").balloon(false)),
        ("nodriver-noperiod", Domain::new("nodriver-noperiod").flag("noballoon").without_stats_period()),
    ];
    for (name, domain) in cases {
        let start = Instant::now();
        let guest = domain.memory(256, 256).define_and_start(&libvirt)?;
        println!(
            "== {name}: booted in {:.1} s, memtotal {}",
            start.elapsed().as_secs_f64(),
            guest.stats()[0].memtotal_kib
        );
        guest.next_stats(4)?;
        println!("after 4 s: {}", mem(&guest));
        println!("domstats: {}", guest.virsh("domstats", &["--balloon"])?.replace('\n', ","));
        let t = Instant::now();
        println!(
            "setmem 200M: {:?} in {} ms",
            guest.virsh("setmem", &["200M", "--live"]).map_err(|e| format!("{e:#}")),
            t.elapsed().as_millis()
        );
        println!("at once: {}", mem(&guest));
        guest.next_stats(3)?;
        println!("after 3 s: {} / guest {}", mem(&guest), guest.stats().last().unwrap().memtotal_kib);
        println!(
            "dommemstat --period 1: {:?}",
            guest.virsh("dommemstat", &["--period", "1", "--live"]).map_err(|e| format!("{e:#}"))
        );
        guest.next_stats(4)?;
        println!("4 s later: {}", mem(&guest));
        println!(
            "xml: {}",
            guest
                .virsh("dumpxml", &[])?
                .lines()
                .filter(|l| l.contains("currentMemory") || l.contains("stats"))
                .map(str::trim)
                .collect::<Vec<_>>()
                .join(" ")
        );
        guest.remove()?;
    }
    Ok(())
}

fn vcpu(guest: &Guest<'_>, start: Instant) {
    let one = |r: Result<String>| {
        r.map(|s| s.replace('\n', ";")).unwrap_or_else(|e| format!("ERR {}", format!("{e:#}").replace('\n', " ")))
    };
    let count = one(guest.virsh("vcpucount", &["--live", "--active"]));
    let xml = one(guest
        .virsh("dumpxml", &[])
        .map(|x| x.lines().filter(|l| l.contains("<vcpu")).map(|l| l.trim().to_owned()).collect::<Vec<_>>().join(" ")));
    let stats = one(guest.virsh("domstats", &["--vcpu"]).map(|s| {
        s.lines().filter(|l| l.contains("vcpu.current") || l.contains(".state")).collect::<Vec<_>>().join(" ")
    }));
    println!(
        "  {:5.1} s: vcpucount {count} | {xml} | {stats} | vcpuinfo {} | threads {:?} | guest nproc {:?}",
        start.elapsed().as_secs_f64(),
        one(guest.virsh("vcpuinfo", &[]).map(|s| s.lines().filter(|l| l.starts_with("VCPU")).count().to_string())),
        guest.qemu_pid().and_then(vcpu_threads),
        guest.stats().last().map(|stat| stat.nproc)
    );
}

fn unplug(libvirt: &Libvirt, domain: &Domain, name: &str, throttle: bool) -> Result<()> {
    let guest = domain.clone().vcpus(1, 4).define_and_start(libvirt)?;
    guest.virsh("setvcpus", &["3", "--live"])?;
    guest.wait_for("three CPUs", LONG, |stat| stat.nproc == 3)?;
    println!("== {name}");
    vcpu(&guest, Instant::now());
    if throttle {
        println!("{:?}", guest.virsh("schedinfo", &["--live", "vcpu_period=1000000", "vcpu_quota=1000"]).is_ok());
    }
    let start = Instant::now();
    let result = guest.virsh("setvcpus", &["2", "--live"]);
    println!("setvcpus 2 after {:.1} s: {:?}", start.elapsed().as_secs_f64(), result.map_err(|e| format!("{e:#}")));
    vcpu(&guest, start);
    if throttle {
        println!("{:?}", guest.virsh("schedinfo", &["--live", "vcpu_quota=-1"]).is_ok());
    }
    for _ in 0..3 {
        guest.next_stats(5)?;
        vcpu(&guest, start);
    }
    let start = Instant::now();
    let result = guest.virsh("setvcpus", &["2", "--live"]);
    println!("again after {:.1} s: {:?}", start.elapsed().as_secs_f64(), result.map_err(|e| format!("{e:#}")));
    guest.next_stats(2)?;
    vcpu(&guest, start);
    println!("{}", guest.console().lines().filter(|l| !l.contains("STAT")).collect::<Vec<_>>().join("\n"));
    guest.remove()
}

#[test]
#[ignore = "a measurement, not a check"]
fn what_a_vcpu_unplug_shows() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    unplug(&libvirt, &Domain::new("plain"), "plain guest", false)?;
    unplug(&libvirt, &Domain::new("plain2"), "plain guest", false)?;
    unplug(&libvirt, &Domain::new("sticky").flag("sticky"), "sticky guest", false)?;
    Ok(())
}

#[test]
#[ignore = "a measurement, not a check"]
fn what_a_throttled_unplug_shows() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    unplug(&libvirt, &Domain::new("throttled"), "throttled guest", true)?;
    let log = std::fs::read_to_string(lab.outside("/var/log/libvirt/qemu/throttled.log"))?;
    println!("{}", log.lines().rev().take(4).collect::<Vec<_>>().join("\n"));
    Ok(())
}

#[test]
#[ignore = "a measurement, not a check"]
fn what_restarting_libvirtd_does_to_a_wrong_count() -> Result<()> {
    let lab = Lab::new()?;
    let mut libvirt = Libvirt::start(&lab)?;
    let start = Instant::now();
    {
        let guest = Domain::new("web").define_and_start(&libvirt)?;
        guest.virsh("setvcpus", &["3", "--live"])?;
        guest.wait_for("three CPUs", LONG, |stat| stat.nproc == 3)?;
        let pid = guest.qemu_pid()?;
        let events = libvirt
            .command()
            .args(["qemu-monitor-event", "web", "--loop", "--timeout", "8", "--timestamp"])
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let watch = std::thread::spawn(move || {
            let start = Instant::now();
            while vcpu_threads(pid).is_ok_and(|t| t.len() == 3) && start.elapsed() < LONG {
                std::thread::sleep(Duration::from_millis(5));
            }
            start.elapsed()
        });
        println!("{:?}", guest.virsh("setvcpus", &["2", "--live"]).map_err(|e| format!("{e:#}")));
        println!("the thread went {:?} after the request", watch.join().unwrap());
        println!("events: {}", String::from_utf8_lossy(&events.wait_with_output()?.stdout));
        vcpu(&guest, start);
    }
    libvirt.kill()?;
    libvirt.start_again()?;
    for l in ["vcpucount", "vcpuinfo", "domstate"] {
        println!("{l}: {:?}", libvirt.virsh(&[l, "web"]).map_err(|e| format!("{e:#}")));
    }
    println!("{:?}", libvirt.virsh(&["dumpxml", "web"])?.lines().filter(|l| l.contains("<vcpu")).collect::<Vec<_>>());
    println!("again to 3: {:?}", libvirt.virsh(&["setvcpus", "web", "3", "--live"]).map_err(|e| format!("{e:#}")));
    println!(
        "{}",
        std::fs::read_to_string(lab.outside("/var/log/libvirt/qemu/web.log"))?
            .lines()
            .rev()
            .take(3)
            .collect::<Vec<_>>()
            .join("\n")
    );
    println!("again to 2: {:?}", libvirt.virsh(&["setvcpus", "web", "2", "--live"]).map_err(|e| format!("{e:#}")));
    println!(
        "{:?} {:?}",
        libvirt.virsh(&["domstate", "web"]),
        libvirt.virsh(&["vcpucount", "web", "--live", "--active"])
    );
    Ok(())
}
