//! Virtual machines on real QEMU guests, driven by `ctl`: what a resize does shows on the guest's own console, in its QEMU's
//! threads and in its cgroup.

use std::time::Duration;

use agentd_tests::lab::{Agentd, CtlOutput, Docker, Domain, Guest, Lab, Libvirt, vcpu_threads, wait_until};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);

fn config(libvirt: &Libvirt) -> String {
    format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"16GiB\"\n[scaling]\nmax_cpus = 16\n\
         [[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n",
        libvirt.uri()
    )
}

fn code(output: &CtlOutput) -> i32 {
    output.code.unwrap_or(-1)
}

fn show(agentd: &Agentd, name: &str) -> Result<Value> {
    Ok(agentd.get(&format!("/v1/instances/vm/{name}"))?.json())
}

#[test]
fn a_guests_vcpus_and_memory_follow_ctl_as_its_console_shows() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(512, 512).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let before = guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;

    let output = agentd.ctl(&["resize", "web", "--cpus", "3", "--memory", "400MiB"]);
    assert_eq!(code(&output), 0, "{output:?}");
    assert!(output.stdout.contains("cpus 1 → 3") && output.stdout.contains("memory 512 MiB → 400 MiB"), "{output:?}");
    guest.wait_for("three CPUs", LIMIT, |stat| stat.nproc == 3)?;
    let less = guest.wait_for("less memory", LIMIT, |stat| stat.memtotal_kib + 100 * 1024 < before.memtotal_kib)?;
    assert_eq!(vcpu_threads(guest.qemu_pid()?)?.len(), 3);

    let output = agentd.ctl(&["resize", "vm/web", "--memory", "450MiB"]);
    assert_eq!(code(&output), 0, "{output:?}");
    assert!(output.stdout.contains("live and saved, confirmed by the guest"), "{output:?}");
    guest.wait_for("more memory", LIMIT, |stat| stat.memtotal_kib > less.memtotal_kib + 40 * 1024)?;
    let shown = show(&agentd, "web")?;
    assert_eq!(shown["memory"]["persistent"], 450 << 20);
    assert_eq!(shown["cpus"]["persistent"], 3);

    // The boot maximum is the ceiling, and it is named.
    let output = agentd.ctl(&["resize", "web", "--memory", "513MiB"]);
    assert_eq!(code(&output), 9, "{output:?}");
    assert!(output.stderr.contains("restart-required") && output.stderr.contains("512 MiB"), "{output:?}");
    // What the guest uses is never taken.
    let output = agentd.ctl(&["resize", "web", "--memory", "24MiB"]);
    assert_eq!(code(&output), 4, "{output:?}");
    assert!(output.stderr.contains("below-minimum") && output.stderr.contains("uses"), "{output:?}");
    Ok(())
}

#[test]
fn a_guest_without_a_balloon_driver_is_silent_and_has_its_old_target() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("mute").memory(512, 512).flag("noballoon").define_and_start(&libvirt)?;
    let target = || guest.virsh("dumpxml", &[]).map(|xml| between(&xml, "<currentMemory unit='KiB'>", "<"));
    let before = target()?;
    for (word, config) in [
        ("if-unused", config(&libvirt)),
        ("always", config(&libvirt).replace("shrink_margin = \"16MiB\"", "shrink = \"always\"")),
    ] {
        let agentd = Agentd::with_config(&config).inside(&lab).start()?;
        let output = agentd.ctl(&["resize", "mute", "--memory", "400MiB", "--cpus", "2", "--wait", "3s"]);
        assert_eq!(code(&output), 8, "{word}: {output:?}");
        assert!(output.stderr.contains("guest-silent"), "{word}: {output:?}");
        assert_eq!(target()?, before, "{word}");
        let shown = show(&agentd, "mute")?;
        assert_eq!(shown["cpus"]["observed"], 1, "{word}: nothing else is changed");
        assert_eq!(shown["memory"]["persistent"], 512 << 20, "{word}");
    }
    Ok(())
}

fn between(text: &str, start: &str, end: &str) -> String {
    let rest = text.split_once(start).map_or("", |(_, rest)| rest);
    rest.split_once(end).map_or("", |(found, _)| found).to_owned()
}

#[test]
fn a_vcpu_unplug_that_libvirt_gives_up_on_is_told_by_qemus_threads() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let late = Domain::new("late").vcpus(1, 4).define_and_start(&libvirt)?;
    let sticky = Domain::new("sticky").vcpus(1, 4).flag("sticky").define_and_start(&libvirt)?;
    for guest in [&late, &sticky] {
        assert_eq!(code(&agentd.ctl(&["resize", guest.name(), "--cpus", "2"])), 0);
        guest.wait_for("two CPUs", LIMIT, |stat| stat.nproc == 2)?;
    }
    // One guest is too slow for libvirt's 5 s, as guests under load are; the other never gives a CPU up.
    late.slow(true)?;
    let before = agentd.get("/v1/capacity")?.json()["cpus"]["committed"].clone();
    for guest in [&late, &sticky] {
        let output = agentd.ctl(&["resize", guest.name(), "--cpus", "1", "-o", "json"]);
        let reply: Value = serde_json::from_str(&output.stdout)?;
        assert_eq!((code(&output), &reply["outcome"]), (8, &json!("pending")), "{reply}");
        assert_eq!(reply["changes"][0]["accepted"], 1, "{reply}");
        assert_eq!(reply["changes"][0]["observed"], 2, "{reply}");
    }
    assert_eq!(agentd.get("/v1/capacity")?.json()["cpus"]["committed"], before, "not given back yet");
    late.slow(false)?;
    late.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
    let threads = |guest: &agentd_tests::lab::Guest| -> Result<usize> { Ok(vcpu_threads(guest.qemu_pid()?)?.len()) };
    wait_until("agentd to tell that QEMU has dropped the vCPU", LIMIT, || {
        let cpus = show(&agentd, "late")?["cpus"].clone();
        Ok((cpus["observed"] == 1 && cpus["confirmed"] == 1 && threads(&late)? == 1).then_some(()))
    })?;
    assert_eq!((show(&agentd, "sticky")?["cpus"]["observed"].clone(), threads(&sticky)?), (json!(2), 2));

    for guest in [&late, &sticky] {
        let log = std::fs::read_to_string(lab.outside(format!("/var/log/libvirt/qemu/{}.log", guest.name())))?;
        assert!(!log.contains("custom-monitor"), "no monitor command was used: {log}");
    }
    // libvirt counts 2, QEMU runs 1: vCPUs are left alone until they agree, at the latest after the next start.
    assert_eq!(late.virsh("vcpucount", &["--live", "--current"])?.trim(), "2", "libvirt has not heard of it");
    let output = agentd.ctl(&["resize", "late", "--cpus", "3"]);
    assert_eq!(code(&output), 10, "{output:?}");
    assert!(output.stderr.contains("invalid-state"), "{output:?}");
    assert_eq!(code(&agentd.ctl(&["resize", "late", "--memory", "200MiB"])), 0, "memory is another matter");
    late.virsh("destroy", &[])?;
    assert_eq!(code(&agentd.ctl(&["start", "late"])), 0);
    assert_eq!(code(&agentd.ctl(&["resize", "late", "--cpus", "3"])), 0);
    Ok(())
}

#[test]
fn a_cpu_limit_shows_in_the_cgroup_and_in_what_a_busy_guest_gets() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("busy").flag("burn").define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let observed = || -> Result<Value> { Ok(show(&agentd, "busy")?["cpu_limit"]["observed"].clone()) };
    assert_eq!(observed()?, "none");
    // What the guest's loop gets in one second of the guest's own clock (the first line after a change is a mixture), and the
    // CPU time that its QEMU used meanwhile, in CPUs.
    let pid = guest.qemu_pid()?;
    let rate = |lines: usize| -> Result<(f64, f64)> {
        let before = (cpu_seconds(pid)?, std::time::Instant::now());
        let stats = guest.next_stats(lines + 1)?;
        let used = (cpu_seconds(pid)? - before.0) / before.1.elapsed().as_secs_f64();
        let loops: u64 = stats[2..].iter().map(|stat| stat.loops).sum();
        Ok((loops as f64 / (stats[lines].up - stats[1].up), used))
    };
    // A machine with other work has less than a whole CPU to give, and half of that says nothing about the limit: rounds
    // count in which the guest got what each limit allows. One limit after the other, since machines speed up and slow down.
    let (mut of_time, mut of_loops, mut disturbed) = (Vec::new(), Vec::new(), Vec::new());
    while of_time.len() < 5 {
        let mut rates = Vec::new();
        for (limit, told) in [("1.0", json!(1)), ("0.5", json!(0.5))] {
            let output = agentd.ctl(&["resize", "busy", "--cpu-limit", limit]);
            assert_eq!(code(&output), 0, "{output:?}");
            assert_eq!(observed()?, told);
            rates.push(rate(6)?);
        }
        let ((whole, whole_time), (half, half_time)) = (rates[0], rates[1]);
        if whole_time > 0.9 && half_time > 0.45 {
            of_time.push(half_time / whole_time);
            of_loops.push(half / whole);
        } else {
            disturbed.push((whole_time, half_time));
        }
        assert!(disturbed.len() < 12, "this machine has no whole CPU to give, only {disturbed:?}");
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[2]
    };
    let (time, loops) = (median(&mut of_time), median(&mut of_loops));
    let told = format!("{of_time:?} of the time, {of_loops:?} of the rounds, disturbed {disturbed:?}");
    assert!((time - 0.5).abs() <= 0.1, "half of the limit gives {told}");
    // How much a guest gets done in its time is also its neighbours' doing: it has to get markedly less done, no more.
    assert!((0.25..=0.75).contains(&loops), "half of the limit gives {told}");
    let cgroup_says = guest.virsh("schedinfo", &["--live"])?;
    assert!(cgroup_says.contains("50000"), "{cgroup_says}");
    let output = agentd.ctl(&["resize", "busy", "--cpu-limit", "none"]);
    assert_eq!(code(&output), 0, "{output:?}");
    assert_eq!(observed()?, "none");
    Ok(())
}

/// The CPU time that a process has used: user and system, fields 14 and 15 of proc(5), in ticks of 10 ms.
fn cpu_seconds(pid: i32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    Ok(ticks.iter().sum::<f64>() / 100.0)
}

#[test]
fn a_definition_that_cant_be_written_fails_whole_with_its_cause() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("fixed").vcpus(1, 4).memory(512, 512).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let before = show(&agentd, "fixed")?;
    let folder = lab.outside("/etc/libvirt/qemu");
    let chattr = |word: &str| std::process::Command::new("chattr").arg(word).arg(&folder).status();
    assert!(chattr("+i")?.success(), "the folder of the definitions can be made unwritable");
    let output = agentd.ctl(&["resize", "fixed", "--cpus", "3", "--memory", "400MiB"]);
    let after = show(&agentd, "fixed");
    assert!(chattr("-i")?.success());
    let after = after?;
    assert_eq!(guest.virsh("vcpucount", &["--live", "--current"])?.trim(), "1", "what runs is as it was");
    // libvirtd never wrote it, and what it shows is what it was: nothing is left of the change, and nothing is held.
    assert_eq!(code(&output), 1, "{output:?}");
    assert_eq!((&after["cpus"], &after["memory"], &after["holds"]), (&before["cpus"], &before["memory"], &json!([])));
    assert!(output.stderr.contains("fixed.xml") || output.stderr.contains("file"), "the cause is told: {output:?}");
    Ok(())
}

#[test]
fn libvirtd_may_die_and_come_back_while_agentd_and_containers_go_on() -> Result<()> {
    let lab = Lab::new()?;
    let mut libvirt = Libvirt::start(&lab)?;
    let docker = Docker::start(&lab)?;
    docker.run("db", &["--cpus", "0.5", "-m", "64m"])?;
    let guest = Domain::new("web").define_and_start(&libvirt)?;
    let name = guest.name().to_owned();
    let config = format!("{}[docker]\nsocket = \"{}\"\n", config(&libvirt), docker.socket().display());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    assert_eq!(code(&agentd.ctl(&["resize", "vm/web", "--cpus", "2"])), 0);
    drop(guest);
    libvirt.kill()?;
    let output = agentd.ctl(&["resize", "vm/web", "--cpus", "3"]);
    assert_eq!(code(&output), 3, "{output:?}");
    assert!(output.stderr.contains("backend-unavailable"), "{output:?}");
    assert_eq!(agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 3}))?.status, 503);
    assert_eq!(code(&agentd.ctl(&["resize", "container/db", "--cpus", "1"])), 0);
    libvirt.start_again()?;
    libvirt.virsh(&["dominfo", &name])?;
    wait_until("VMs to be served again", Duration::from_secs(5), || {
        let reply = agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 3}))?;
        Ok((reply.status == 200).then_some(()))
    })
}

#[test]
fn a_vm_stops_by_acpi_or_says_that_it_does_not_and_starts_again() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    // The lab's guest has nothing that listens to the power button: it never goes down by itself.
    let guest = Domain::new("web").define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let output = agentd.ctl(&["stop", "web", "--timeout", "2s"]);
    assert_eq!(code(&output), 8, "{output:?}");
    assert_eq!(guest.virsh("domstate", &[])?.trim(), "running");
    guest.virsh("suspend", &[])?;
    assert_eq!(code(&agentd.ctl(&["stop", "web"])), 10);
    assert_eq!(code(&agentd.ctl(&["resize", "web", "--cpus", "2", "--live-only"])), 10);
    guest.virsh("resume", &[])?;
    let output = agentd.ctl(&["stop", "web", "--timeout", "1s", "--force"]);
    assert_eq!(code(&output), 0, "{output:?}");
    assert!(output.stdout.contains("hard"), "{output:?}");
    assert_eq!(guest.virsh("domstate", &[])?.trim(), "shut off");
    assert_eq!(code(&agentd.ctl(&["resize", "web", "--cpus", "2"])), 0, "for the next start");
    assert_eq!(code(&agentd.ctl(&["start", "web"])), 0);
    guest.wait_for("two CPUs", LIMIT, |stat| stat.nproc == 2)?;
    Ok(())
}

/// What is on record of an operation.
fn recorded(agentd: &Agentd, operation: &Value) -> Result<Value> {
    let id = operation.as_str().context("an operation")?;
    Ok(agentd.get(&format!("/v1/operations/{id}"))?.json())
}

/// A process that answers nothing, until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(pid: i32) -> Result<Self> {
        let pid = Pid::from_raw(pid);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Gone is fine, too.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Waits until nothing holds a VM and what is told of it is what its QEMU has; gives its vCPUs.
fn settled_vcpus(agentd: &Agentd, guest: &Guest) -> Result<usize> {
    wait_until("the hold to end by itself", LIMIT, || {
        let shown = show(agentd, guest.name())?;
        let threads = vcpu_threads(guest.qemu_pid()?)?.len();
        let settled = shown["holds"] == json!([]) && shown["state"] == "running";
        Ok((settled && shown["cpus"]["observed"] == threads).then_some(threads))
    })
}

#[test]
fn a_qemu_that_hangs_holds_up_its_own_vm_only_until_the_truth_is_seen() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let docker = Docker::start(&lab)?;
    docker.run("db", &["--cpus", "0.5", "-m", "64m"])?;
    let hung = Domain::new("hung").vcpus(1, 4).define_and_start(&libvirt)?;
    let other = Domain::new("other").vcpus(1, 4).define_and_start(&libvirt)?;
    let config = format!("{}[docker]\nsocket = \"{}\"\n", config(&libvirt), docker.socket().display());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let resize = |name: &str, cpus: u32| -> Result<(u16, Value)> {
        let path = format!("/v1/instances/vm/{name}/resize");
        let reply = agentd.post(&path, &json!({"cpus": cpus, "apply": "live"}))?;
        Ok((reply.status, reply.json()))
    };
    assert_eq!(code(&agentd.ctl(&["show", "vm/hung"])), 0);
    let stopped = Stopped::new(hung.qemu_pid()?)?;
    let (status, problem) = std::thread::scope(|scope| -> Result<_> {
        let hanging = scope.spawn(|| resize("hung", 2));
        wait_until("the change on record", LIMIT, || {
            let open = agentd.get("/v1/operations?ref=vm/hung")?.json();
            Ok((open["items"][0]["outcome"] == "running").then_some(()))
        })?;
        // Others go on meanwhile.
        assert_eq!(resize("other", 2)?.0, 200);
        assert_eq!(code(&agentd.ctl(&["resize", "container/db", "--cpus", "1"])), 0);
        assert!(!hanging.is_finished(), "the call hangs all the while");
        hanging.join().expect("a request")
    })?;
    assert_eq!((status, &problem["code"], &problem["outcome"]), (504, &json!("backend-timeout"), &json!("unknown")));
    assert_eq!(recorded(&agentd, &problem["operation"])?["outcome"], "unknown");
    let shown = show(&agentd, "hung")?;
    assert_eq!(shown["holds"][0]["hold"], "recovering", "{shown}");
    assert_eq!(resize("other", 3)?.0, 200);
    assert_eq!(resize("hung", 3)?.1["code"], "held");
    let committed = agentd.get("/v1/capacity")?.json()["cpus"]["committed"].clone();
    assert_eq!(
        committed, 6,
        "2 of the one, 3 of the other, 1 of the container: what may still come about stays charged"
    );
    drop(stopped);

    // Once QEMU answers again libvirt's call ends, one way or the other; the hold ends with it, and the record says how.
    let vcpus = settled_vcpus(&agentd, &hung)?;
    let on_record = wait_until("the outcome on record", LIMIT, || {
        let on_record = recorded(&agentd, &problem["operation"])?;
        Ok((on_record["outcome"] != "unknown").then_some(on_record))
    })?;
    println!("the hanging hot-add ended as {} with {vcpus} vCPUs", on_record["outcome"]);
    let expected = if vcpus == 2 { "changed" } else { "rolled-back" };
    assert_eq!(on_record["outcome"], expected, "{on_record}");
    assert_eq!(
        agentd.get("/v1/capacity")?.json()["cpus"]["committed"],
        vcpus + vcpu_threads(other.qemu_pid()?)?.len() + 1
    );
    assert_eq!(resize("hung", 3)?.0, 200, "it is as any other");
    Ok(())
}

#[test]
fn a_libvirtd_that_hangs_holds_up_nothing_but_its_vms() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let docker = Docker::start(&lab)?;
    docker.run("db", &["--cpus", "0.5", "-m", "64m"])?;
    let guest = Domain::new("web").vcpus(1, 4).define_and_start(&libvirt)?;
    let config = format!("{}[docker]\nsocket = \"{}\"\n", config(&libvirt), docker.socket().display());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let resize = |reference: &str, cpus: f64| -> Result<(u16, Value)> {
        let reply = agentd.post(&format!("/v1/instances/{reference}/resize"), &json!({ "cpus": cpus }))?;
        Ok((reply.status, reply.json()))
    };
    assert_eq!(resize("vm/web", 2.0)?.0, 200);
    let stopped = Stopped::new(libvirt.pid().context("libvirtd")?)?;
    let (status, problem) = std::thread::scope(|scope| -> Result<_> {
        let waits = scope.spawn(|| resize("vm/web", 3.0));
        for cpus in [1.0, 0.5, 1.0] {
            assert_eq!(resize("container/db", cpus)?.0, 200);
            assert_eq!(agentd.get("/v1/capacity")?.status, 200);
            assert!(!waits.is_finished(), "the change waits for libvirtd all the while");
        }
        waits.join().expect("a request")
    })?;
    assert!(matches!(status, 503 | 504) && problem["detail"].to_string().contains("libvirt"), "{status} {problem}");
    let listed = agentd.get("/v1/instances")?.json();
    assert!(listed["unavailable"].to_string().contains("vm"), "it is said to be away: {listed}");
    let charged = agentd.get("/v1/capacity")?.json()["cpus"]["committed"].as_u64();
    assert!(charged >= Some(3), "its VM stays charged: {charged:?}");
    drop(stopped);

    wait_until("VMs to be served again", LIMIT, || Ok((resize("vm/web", 4.0)?.0 == 200).then_some(())))?;
    assert_eq!(vcpu_threads(guest.qemu_pid()?)?.len(), 4);
    assert_eq!(agentd.get("/v1/instances")?.json()["unavailable"], json!([]));
    Ok(())
}

#[test]
fn a_daemon_killed_while_a_qemu_hangs_takes_the_change_up_again_and_ends_it_whole() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("hung").vcpus(1, 8).memory(400, 512).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
    assert_eq!(show(&agentd, "hung")?["cpus"]["observed"], 1);
    // Killed as the call begins, and after it was given up. The saved definition is changed by then; of both the balloon goes
    // first, and hangs.
    for (given_up, body) in [(false, json!({"cpus": "+1"})), (true, json!({"cpus": "+1", "memory": "450MiB"}))] {
        let first = show(&agentd, "hung")?;
        let stopped = Stopped::new(guest.qemu_pid()?)?;
        let headers = [("Content-Type", "application/json"), ("Prefer", "wait=0")];
        let path = "/v1/instances/vm/hung/resize";
        let reply = agentd.http("POST", path, &headers, body.to_string().as_bytes())?;
        assert_eq!(reply.status, 202, "{}", reply.text());
        let operation = reply.json()["operation"].clone();
        wait_until("the call that hangs", LIMIT, || {
            let recorded = recorded(&agentd, &operation)?;
            let begun =
                recorded["steps"].as_array().is_some_and(|steps| steps.iter().any(|step| step["state"] == "doing"));
            Ok((begun && (!given_up || recorded["outcome"] == "unknown")).then_some(()))
        })?;
        agentd.kill()?;
        agentd.start_again()?;
        let shown = show(&agentd, "hung")?;
        assert_eq!(shown["holds"][0]["hold"], "recovering", "{shown}");
        assert_eq!(agentd.post(path, &json!({"cpu_limit": 1}))?.json()["code"], "held");
        drop(stopped);

        let vcpus = settled_vcpus(&agentd, &guest)?;
        let ended = wait_until("the end of the change on record", LIMIT, || {
            let ended = recorded(&agentd, &operation)?;
            Ok((ended["outcome"] != "running" && ended["outcome"] != "unknown").then_some(ended))
        })?;
        let last = show(&agentd, "hung")?;
        println!("{body}, given up {given_up}: {} with {vcpus} vCPUs", ended["outcome"]);
        let sizes = |instance: &Value| {
            ["cpus", "memory"].map(|field| ["accepted", "persistent"].map(|side| instance[field][side].clone()))
        };
        match ended["outcome"].as_str() {
            Some("rolled-back") => assert_eq!(sizes(&last), sizes(&first), "wholly as before"),
            Some("changed" | "pending") => {
                for change in ended["changes"].as_array().into_iter().flatten() {
                    let field = &last[change["field"].as_str().unwrap_or_default()];
                    assert_eq!(
                        (&field["accepted"], &field["persistent"]),
                        (&change["requested"], &change["requested"]),
                        "{last}"
                    );
                }
            }
            _ => panic!("{ended}"),
        }
        assert_eq!(last["holds"], json!([]));
        assert_eq!(last["committed"]["cpus"], vcpus);
        // Nothing of it comes about later, on top of the next change.
        let next = agentd.post(path, &json!({"cpus": vcpus + 1}))?;
        assert_eq!((next.status, vcpu_threads(guest.qemu_pid()?)?.len()), (200, vcpus + 1), "{}", next.text());
    }
    Ok(())
}
