//! Undo on real engines: what a change touched comes back as it was, to the engine's own numbers, and `ctl history` tells how.

use std::time::Duration;

use agentd_tests::lab::{Agentd, CtlOutput, Docker, Domain, Lab, Libvirt, vcpu_threads, wait_until};
use anyhow::{Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn code(output: &CtlOutput) -> i32 {
    output.code.unwrap_or(-1)
}

fn show(agentd: &Agentd, reference: &str) -> Result<Value> {
    Ok(agentd.get(&format!("/v1/instances/{reference}"))?.json())
}

/// Both sides of both fields.
fn sizes(instance: &Value) -> [[Value; 2]; 3] {
    ["cpus", "memory", "cpu_limit"].map(|field| ["accepted", "persistent"].map(|side| instance[field][side].clone()))
}

/// The lines of a table below its head, newest first.
fn rows(output: &CtlOutput) -> Vec<&str> {
    output.stdout.lines().skip(1).collect()
}

#[test]
fn a_container_gets_back_what_it_had_to_the_microsecond() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display());
    // A third of a CPU, which no number of thousandths is; and twice as much of memory and swap.
    let quota = ["--cpu-period", "100000", "--cpu-quota", "20000", "-m", "64m", "--memory-swap", "128m"];
    let cgroup = docker.cgroup(&docker.run("db", &quota)?)?;
    docker.docker(&["update", "--cpu-quota", "33333", "db"])?;
    let agentd = Agentd::with_config(&config).start()?;
    let native = || -> Result<_> {
        let format = "{{.HostConfig.CpuQuota}} {{.HostConfig.CpuPeriod}} {{.HostConfig.NanoCpus}} \
                      {{.HostConfig.Memory}} {{.HostConfig.MemorySwap}}";
        Ok((cgroup.cpu_quota()?, cgroup.memory_limit()?, docker.docker(&["inspect", "-f", format, "db"])?))
    };
    let before = native()?;
    ensure!(before.0 == (Some(33333), 100_000), "{before:?}");
    let output = agentd.ctl(&["resize", "db", "--cpus", "1.5", "--memory", "96MiB"]);
    assert_eq!(code(&output), 0, "{output:?}");
    ensure!(cgroup.cpu_quota()?.0 == Some(150_000) && cgroup.memory_limit()? == Some(96 * MIB));
    let output = agentd.ctl(&["undo", "db"]);
    assert_eq!(code(&output), 0, "{output:?}");
    println!("{}", output.stdout);
    ensure!(
        output.stdout.contains("cpus 1.5 → 0.33") && output.stdout.contains("memory 96 MiB → 64 MiB"),
        "{output:?}"
    );
    assert_eq!(native()?, before);
    // It is taken back by now: there is nothing left to take back, and that changes nothing.
    let again = agentd.ctl(&["undo", "db"]);
    assert_eq!(code(&again), 6, "{again:?}");
    assert_eq!(native()?, before);

    // Several, one after the other, newest first.
    for cpus in ["0.5", "0.75"] {
        assert_eq!(code(&agentd.ctl(&["resize", "db", "--cpus", cpus])), 0);
    }
    for quota in [50_000, 33_333] {
        let output = agentd.ctl(&["undo", "db"]);
        assert_eq!((code(&output), cgroup.cpu_quota()?.0), (0, Some(quota)), "{output:?}");
    }
    assert_eq!(native()?, before);
    // What was changed since by hand is not overruled.
    assert_eq!(code(&agentd.ctl(&["resize", "db", "--cpus", "1"])), 0);
    docker.docker(&["update", "--cpu-quota", "77000", "db"])?;
    let output = agentd.ctl(&["undo", "db"]);
    assert_eq!(code(&output), 10, "{output:?}");
    ensure!(output.stderr.contains("invalid-state") && output.stderr.contains("0.77"), "{output:?}");
    ensure!(cgroup.cpu_quota()?.0 == Some(77_000));

    // Refusals are recorded while nobody waits for that.
    let output = wait_until("the refusal on record", LIMIT, || {
        let output = agentd.ctl(&["history", "db"]);
        Ok(output.stdout.contains("refused").then_some(output))
    })?;
    println!("{}", output.stdout);
    let rows = rows(&output);
    assert_eq!((code(&output), rows.len()), (0, 9), "{output:?}");
    for (row, words) in [
        (0, &["undo", "refused", "invalid-state"][..]),
        (1, &["drift", "cpus 1 → 0.77"]),
        (2, &["resize", "changed", "→ 1"]),
        (7, &["undo", "changed", "cpus 1.5 → 0.33", "memory 96 MiB → 64 MiB"]),
        (8, &["resize", "changed", "→ 1.5, memory 64 MiB → 96 MiB", "root ctl["]),
    ] {
        ensure!(words.iter().all(|word| rows[row].contains(word)), "{words:?}: {}", rows[row]);
    }
    Ok(())
}

#[test]
fn a_vm_gets_back_what_runs_and_what_is_saved_each_to_its_own() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    // The next start is to have 3 vCPUs and 480 MiB; what runs has 1 and 512.
    let guest = Domain::new("web").vcpus(1, 4).memory(512, 512).define_and_start(&libvirt)?;
    guest.virsh("setvcpus", &["3", "--config"])?;
    guest.virsh("setmem", &["480M", "--config"])?;
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"16GiB\"\n[scaling]\nmax_cpus = 16\n\
         [[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n",
        libvirt.uri()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
    let before = show(&agentd, "vm/web")?;
    let differ = [[json!(1), json!(3)], [json!(512 * MIB), json!(480 * MIB)], [json!("none"), json!("none")]];
    assert_eq!(sizes(&before), differ);
    let output = agentd.ctl(&["resize", "web", "--memory", "400MiB", "--cpu-limit", "0.5"]);
    assert_eq!(code(&output), 0, "{output:?}");
    guest.wait_for("less memory", LIMIT, |stat| stat.memtotal_kib < 400 * 1024)?;
    assert_eq!(sizes(&show(&agentd, "vm/web")?)[1], [json!(400 * MIB), json!(400 * MIB)]);
    let output = agentd.ctl(&["undo", "web"]);
    println!("{}", output.stdout);
    assert_eq!(code(&output), 0, "{output:?}");
    assert_eq!(sizes(&show(&agentd, "vm/web")?), differ);

    // A hot-added vCPU has to be given up by the guest: obeyed, or said to be on its way.
    let output = agentd.ctl(&["resize", "web", "--memory", "450MiB", "--cpus", "2"]);
    assert_eq!(code(&output), 0, "{output:?}");
    guest.wait_for("two CPUs", LIMIT, |stat| stat.nproc == 2)?;
    let output = agentd.ctl(&["undo", "web"]);
    println!("{}", output.stdout);
    ensure!(matches!(code(&output), 0 | 8), "{output:?}");
    guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
    wait_until("all to be as it was", LIMIT, || Ok((sizes(&show(&agentd, "vm/web")?) == differ).then_some(())))?;
    assert_eq!(vcpu_threads(guest.qemu_pid()?)?.len(), 1);
    let saved = guest.virsh("dumpxml", &["--inactive"])?;
    ensure!(saved.contains("<vcpu placement='static' current='3'>4</vcpu>"), "{saved}");
    ensure!(saved.contains(&format!("<currentMemory unit='KiB'>{}<", 480 * 1024)), "{saved}");

    let output = agentd.ctl(&["history", "web"]);
    println!("{}", output.stdout);
    let rows = rows(&output);
    assert_eq!((code(&output), rows.len()), (0, 4), "{output:?}");
    for (row, words) in [
        (
            0,
            &[
                "undo",
                "cpus 2 → 1",
                "cpus 2 → 3 (saved)",
                "memory 450 MiB → 512 MiB",
                "memory 450 MiB → 480 MiB (saved)",
            ][..],
        ),
        (1, &["resize", "changed", "cpus 1 → 2", "cpus 3 → 2 (saved)"]),
        (2, &["undo", "changed", "cpu_limit 0.5 → none", "memory 400 MiB → 480 MiB (saved)"]),
        (3, &["resize", "changed", "cpu_limit none → 0.5", "memory 512 MiB → 400 MiB"]),
    ] {
        ensure!(words.iter().all(|word| rows[row].contains(word)), "{words:?}: {}", rows[row]);
    }
    Ok(())
}
