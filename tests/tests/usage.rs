//! What instances use, on real engines: agentd's rates beside what the kernel counts, read by the test itself; and null where
//! nobody knows.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use agentd_tests::lab::{Agentd, Docker, Domain, Guest, Lab, Libvirt, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// Over this time rates are compared.
const WINDOW: Duration = Duration::from_secs(10);
/// A tick of /proc/PID/stat, in seconds.
const TICK: f64 = 0.01;

/// CPU time of a container by its cgroup, in seconds.
fn cgroup_seconds(docker: &Docker, name: &str) -> Result<f64> {
    let folder = docker.cgroup(name)?.cpu;
    // In version 1 a controller of its own, wherever that is mounted.
    let root = Path::new("/sys/fs/cgroup");
    if let Ok(below) = folder.strip_prefix(root.join("cpu"))
        && let Ok(nanoseconds) = fs::read_to_string(root.join("cpuacct").join(below).join("cpuacct.usage"))
    {
        return Ok(nanoseconds.trim().parse::<f64>()? / 1e9);
    }
    let stat = fs::read_to_string(folder.join("cpu.stat"))?;
    let usec = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).context("cpu.stat has usage_usec")?;
    Ok(usec.parse::<f64>()? / 1e6)
}

/// CPU time of a process with all its threads, in seconds.
fn process_seconds(guest: &Guest<'_>) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", guest.qemu_pid()?))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("a name")?.1.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) * TICK)
}

fn usage(agentd: &Agentd, reference: &str) -> Result<Value> {
    let reply = agentd.get(&format!("/v1/instances/{reference}/usage"))?;
    ensure!(reply.status == 200, "{}", reply.text());
    Ok(reply.json())
}

/// Fails where two rates are further apart than a tenth of the one that was counted.
fn same(what: &str, told: &Value, counted: f64) -> Result<()> {
    let told = told["cpu"]["rate"].as_f64().with_context(|| format!("{what} has a rate: {told}"))?;
    println!("{what}: told {told:.3}, counted {counted:.3}");
    ensure!((told - counted).abs() <= counted / 10.0, "{what}: told {told} CPUs, the kernel counted {counted}");
    Ok(())
}

#[test]
fn rates_are_what_the_kernel_counts_over_the_same_time() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 1).flag("burn").define_and_start(&libvirt)?;
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n",
        libvirt.uri(),
        docker.socket().display()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    docker.run_command("half", &["--cpus", "0.5", "-m", "64m"], &["sh", "-c", "while :; do :; done"])?;
    docker.run("idle", &[])?;

    // The first who asks is told a rate, too; the next, one since then. The kernel's counter is read right after each.
    let idle = usage(&agentd, "container/idle")?;
    ensure!(idle["cpu"]["rate"].is_number() && idle["cpu"]["window_ms"].as_u64() >= Some(200), "{idle}");
    let ask = |reference: &str, counted: &dyn Fn() -> Result<f64>| -> Result<(Value, f64, Instant)> {
        Ok((usage(&agentd, reference)?, counted()?, Instant::now()))
    };
    let of_half = || ask("container/half", &|| cgroup_seconds(&docker, "half"));
    let of_web = || ask("vm/web", &|| process_seconds(&guest));
    let before = (of_half()?, of_web()?);
    ensure!(before.0.0["cpu"]["rate"].is_number() && before.1.0["cpu"]["rate"].is_number(), "{before:?}");
    std::thread::sleep(WINDOW);
    let after = (of_half()?, of_web()?);
    for (what, before, after) in [("container/half", &before.0, &after.0), ("vm/web", &before.1, &after.1)] {
        same(what, &after.0, (after.1 - before.1) / after.2.duration_since(before.2).as_secs_f64())?;
    }
    let (half, web) = (after.0.0, after.1.0);
    for of in [&half, &web] {
        ensure!(of["cpu"]["window_ms"].as_u64() >= Some(9000), "{of}");
    }
    let list = agentd.get("/v1/usage")?.json();
    ensure!(list["items"].as_array().map(Vec::len) == Some(3), "{list}");
    ensure!(list["host"]["cpus"].as_f64() > Some(0.0) && list["host"]["memory"].as_u64() > Some(MIB), "{list}");

    // What its limit did, and what there is no limit for.
    let share = half["cpu"]["throttled"].as_f64().context("it has a limit")?;
    // How often is up to what else the machine has to do.
    ensure!(share > 0.0 && share <= 1.0, "it burns more than it may: {half}");
    ensure!(half["cpu"]["throttled_ms"].as_u64() > Some(0), "{half}");
    ensure!(half["memory"]["limit"] == 64 * MIB, "{half}");
    let (used, available) = (half["memory"]["used"].as_u64(), half["memory"]["available"].as_u64());
    ensure!(used.zip(available).map(|(used, available)| used + available) == Some(64 * MIB), "{half}");
    let idle = usage(&agentd, "container/idle")?;
    ensure!(idle["cpu"]["throttled"].is_null() && idle["cpu"]["throttled_ms"].is_null(), "{idle}");
    ensure!(idle["memory"]["limit"] == "none" && idle["memory"]["available"].is_null(), "{idle}");
    ensure!(idle["cpu"]["rate"].as_f64() < Some(0.1), "{idle}");
    ensure!(idle["pressure"].is_null() || Path::new("/sys/fs/cgroup/cgroup.controllers").exists(), "{idle}");

    // A guest that reports: what is in use inside, and a balloon that has obeyed.
    let web = wait_until("a report of the balloon", LIMIT, || {
        Ok(Some(usage(&agentd, "vm/web")?).filter(|web| web["memory"]["used"].is_u64()))
    })?;
    let of = |name: &str| web["memory"][name].as_u64();
    ensure!(of("used").zip(of("available")).map(|(used, rest)| used + rest) == Some(256 * MIB), "{web}");
    ensure!(of("host") > Some(64 * MIB), "its QEMU takes more of the host than that: {web}");
    ensure!(web["memory"]["balloon"]["lag"] == 0, "{web}");

    // A VM's limit holds it back as a container's does; its QEMU's cgroup tells.
    ensure!(web["cpu"]["throttled"].is_null(), "it has no limit yet: {web}");
    let limited = agentd.post("/v1/instances/vm/web/resize", &serde_json::json!({"cpu_limit": 0.2}))?;
    ensure!(limited.status == 200, "{}", limited.text());
    wait_until("the VM to be held back", LIMIT, || {
        let web = usage(&agentd, "vm/web")?;
        ensure!(web["memory"]["oom_kills"].is_u64(), "{web}");
        Ok((web["cpu"]["throttled"].as_f64() > Some(0.0)).then_some(()))
    })?;

    // The command says the same, and `show` has it in a line.
    let shown = agentd.ctl(&["usage"]);
    ensure!(shown.code == Some(0) && shown.stdout.contains("container/half"), "{shown:?}");
    ensure!(shown.stdout.lines().last().is_some_and(|line| line.starts_with("the host")), "{shown:?}");
    let shown = agentd.ctl(&["usage", "half"]);
    ensure!(shown.stdout.contains("of its periods"), "{shown:?}");
    let shown = agentd.ctl(&["show", "vm/web"]);
    ensure!(shown.stdout.contains("\nuses ") && shown.stdout.contains("available"), "{shown:?}");
    Ok(())
}

#[test]
fn what_nobody_knows_is_null_and_says_why() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let libvirt = Libvirt::start(&lab)?;
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n",
        libvirt.uri(),
        docker.socket().display()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    Domain::new("mute").vcpus(1, 1).flag("noballoon").define_and_start(&libvirt)?;
    let mute = usage(&agentd, "vm/mute")?;
    ensure!(mute["memory"]["used"].is_null() && mute["memory"]["available"].is_null(), "{mute}");
    ensure!(mute["memory"]["balloon"].is_null() && mute["cpu"]["throttled"].is_null(), "{mute}");
    ensure!(mute["memory"]["host"].is_u64() && mute["cpu"]["rate"].is_number(), "{mute}");
    ensure!(mute["notes"].to_string().contains("never spoken"), "{mute}");

    // A container in which something is killed for want of memory, and which lives on; then it is down.
    let eat = ["sh", "-c", "/bin/eat 64; sleep 1000000"];
    docker.run_command("greedy", &["-m", "16m", "--memory-swap", "16m"], &eat)?;
    wait_until("an OOM kill to be counted", LIMIT, || {
        Ok((usage(&agentd, "container/greedy")?["memory"]["oom_kills"].as_u64() >= Some(1)).then_some(()))
    })?;
    let shown = agentd.ctl(&["usage", "--kind", "container"]);
    ensure!(shown.stdout.contains("OOM kill"), "{shown:?}");
    docker.docker(&["stop", "-t", "1", "greedy"])?;
    let down = usage(&agentd, "container/greedy")?;
    for (part, name) in [("cpu", "rate"), ("cpu", "total_ms"), ("memory", "used"), ("memory", "oom_kills")] {
        ensure!(down[part][name].is_null(), "{name}: {down}");
    }
    ensure!(agentd.get("/v1/usage?kind=container")?.json()["items"] == serde_json::json!([]));

    // The cgroup of a container without limits, by a name of the config: counted as well, and never held back.
    let free = docker.run("free", &[])?;
    let folder = docker.cgroup(&free)?.memory;
    let below = folder.strip_prefix("/sys/fs/cgroup/memory").or_else(|_| folder.strip_prefix("/sys/fs/cgroup"))?;
    let named = format!("[units]\n[units.cgroups]\nfree = \"/{}\"\n[capacity]\ncpus = 8\n", below.display());
    let named = Agentd::with_config(&named).start()?;
    let free = usage(&named, "unit/free")?;
    ensure!(free["cpu"]["rate"].is_number() && free["cpu"]["throttled"].is_null(), "{free}");
    ensure!(free["memory"]["used"].is_u64() && free["memory"]["available"].is_null(), "{free}");
    ensure!(free["memory"]["balloon"].is_null() && free["memory"]["oom_kills"] == 0, "{free}");

    // Another run begins anew: what was counted of the one before isn't compared with it.
    docker.docker(&["start", "greedy"])?;
    let again = usage(&agentd, "container/greedy")?;
    ensure!(again["cpu"]["rate"].as_f64() >= Some(0.0), "{again}");
    ensure!(again["cpu"]["window_ms"].as_u64() < Some(5000), "{again}");
    Ok(())
}
