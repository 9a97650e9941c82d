//! What live scaling can do, as a table: sizes and numbers, up and down, with and without a cap on CPU time, and everything
//! that forbids it. On a real guest; each row is asked for by `ctl` and looked up where agentd doesn't: in QEMU's threads,
//! in its balloon and in its cgroup.

use std::time::Duration;

use agentd_tests::lab::{Agentd, Domain, Guest, Lab, Libvirt, vcpu_threads, wait_until};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// What every row's config begins with. More than the host's 6 CPUs may be promised, so that what bounds a single VM shows.
const CONFIG: &str = "[capacity]\ncpus = 6\nmemory = \"1GiB\"\nreserved_memory = 0\ncpu_overcommit = 4\nmemory_overcommit = 4\n\
    vm_overhead = 0\n\
    [sizes.small]\ncpus = 1\nmemory = \"160MiB\"\n[sizes.medium]\ncpus = 2\nmemory = \"224MiB\"\n\
    [sizes.large]\ncpus = 3\nmemory = \"288MiB\"\n[sizes.capped]\ncpus = 2\nmemory = \"224MiB\"\ncpu_limit = 0.5\n";

/// What must come of a row.
#[derive(Debug, Clone, Copy)]
enum Comes {
    /// vCPUs, MiB, the cap in thousandths of a CPU.
    To(u64, u64, Option<u64>),
    /// A refusal: its code, the exit code, and a word of the reason.
    Refused(&'static str, i32, &'static str),
}
use Comes::{Refused, To};

/// More config, what is asked for in ctl's words, what must come of it. What a row leaves, the next one finds; the VM
/// begins with 1 of 4 vCPUs and 160 of 320 MiB.
type Row = (&'static str, &'static str, Comes);

const WITHOUT: &str = "";
const SMALLER: &str = "[[limit]]\nmatch = \"*\"\nshrink_margin = \"8MiB\"\n";

const UP: &[Row] = &[
    // Fixed sizes, custom ones, and back.
    (WITHOUT, "--size medium", To(2, 224, None)),
    (WITHOUT, "--size medium", To(2, 224, None)),
    (WITHOUT, "--size large", To(3, 288, None)),
    (WITHOUT, "--cpus 4 --memory 300MiB", To(4, 300, None)),
    (WITHOUT, "--memory +20MiB", To(4, 320, None)),
];

const CAPS: &[Row] = &[
    // The cap applied, changed and removed on the fly; alone, with other fields, by a size.
    (WITHOUT, "--cpu-limit 0.5", To(4, 320, Some(500))),
    (WITHOUT, "--cpu-limit 2.5", To(4, 320, Some(2500))),
    (WITHOUT, "--cpu-limit +0.5", To(4, 320, Some(3000))),
    (WITHOUT, "--cpu-limit 0.25", To(4, 320, Some(250))),
    (WITHOUT, "--cpu-limit none", To(4, 320, None)),
    (WITHOUT, "--cpu-limit 1", To(4, 320, Some(1000))),
];

const DOWN: &[Row] = &[
    // Every way down: memory, vCPUs, both, to a size, with the cap.
    (SMALLER, "--memory 300MiB", To(4, 300, Some(1000))),
    (SMALLER, "--memory -12MiB --cpu-limit 0.75", To(4, 288, Some(750))),
    (SMALLER, "--cpu-limit none", To(4, 288, None)),
    (SMALLER, "--cpus 3", To(3, 288, None)),
    (SMALLER, "--size capped", To(2, 224, Some(500))),
    (SMALLER, "--size medium", To(2, 224, None)),
    (SMALLER, "--cpus 1 --memory 200MiB", To(1, 200, None)),
    (SMALLER, "--size medium", To(2, 224, None)),
    (SMALLER, "--size small", To(1, 160, None)),
    (SMALLER, "--memory 8MiB", Refused("below-minimum", 4, "uses")),
    ("[[limit]]\nmatch = \"*\"\nshrink = \"never\"\n", "--memory 150MiB", Refused("below-minimum", 4, "shrink")),
    (
        "[[limit]]\nmatch = \"*\"\nmin_memory = \"160MiB\"\n",
        "--memory 150MiB",
        Refused("below-minimum", 4, "min_memory"),
    ),
];

const BOUNDS: &[Row] = &[
    // Switched off for the host, for this VM, for another one; root is bound, too.
    ("[[limit]]\nmatch = \"*\"\nlive = false\n", "--cpus 2", Refused("restart-required", 9, "live = false")),
    (
        "[[limit]]\nmatch = \"vm/web\"\nlive = false\n",
        "--memory 200MiB",
        Refused("restart-required", 9, "live = false"),
    ),
    ("[[limit]]\nmatch = \"vm/web\"\nlive = false\n", "--cpu-limit 1", Refused("restart-required", 9, "live = false")),
    ("[[limit]]\nmatch = \"vm/db\"\nlive = false\n", "--memory 164MiB", To(1, 164, None)),
    (
        "[[limit]]\nmatch = \"*\"\nlive = false\n[[limit]]\nmatch = \"vm/web\"\nlive = true\n",
        "--memory 160MiB",
        To(1, 160, None),
    ),
    // Maxima of ours, and of the host where they are 0 or less.
    ("[scaling]\nmax_cpus = 2\n", "--cpus 3", Refused("limit-exceeded", 4, "[scaling] max_cpus")),
    ("[scaling]\nmax_cpus = 2\n", "--cpus 2", To(2, 160, None)),
    ("[scaling]\nmax_cpus = 1\n", "--memory 170MiB", To(2, 170, None)),
    ("[scaling]\nmax_cpus = 1\n", "--cpus 1", To(1, 170, None)),
    ("[scaling]\nmax_memory = \"200MiB\"\n", "--memory 201MiB", Refused("limit-exceeded", 4, "[scaling] max_memory")),
    ("[scaling]\nmax_memory = \"200MiB\"\n", "--memory 200MiB", To(1, 200, None)),
    ("[scaling]\nmax_cpus = 0\nmax_memory = 0\n", "--cpus 7", Refused("limit-exceeded", 4, "6")),
    ("[scaling]\nmax_cpus = -1\nmax_memory = -1\n", "--memory 1040MiB", Refused("limit-exceeded", 4, "1 GiB")),
    ("[scaling]\nmax_cpus = -1\nmax_memory = -1\n", "--memory 210MiB", To(1, 210, None)),
    (
        "[[limit]]\nmatch = \"*\"\nmax_memory = \"220MiB\"\n",
        "--memory 221MiB",
        Refused("limit-exceeded", 4, "max_memory"),
    ),
    ("[[limit]]\nmatch = \"*\"\nmax_cpus = 1\n", "--cpus 2", Refused("limit-exceeded", 4, "max_cpus")),
    // Beyond what it was started with: its ceiling is named.
    (WITHOUT, "--cpus 5", Refused("restart-required", 9, "4")),
    (WITHOUT, "--memory 321MiB", Refused("restart-required", 9, "320 MiB")),
    // Too little capacity, with the reason: the host's, and that of a group.
    ("[[limit]]\nmatch = \"*\"\ntotal_cpus = 2\n", "--cpus 3", Refused("capacity-exceeded", 4, "total_cpus")),
    (
        "[[limit]]\nmatch = \"*\"\ntotal_memory = \"220MiB\"\n",
        "--memory 230MiB",
        Refused("capacity-exceeded", 4, "total_memory"),
    ),
];

/// A VM that was given no headroom.
const UNPREPARED: &[Row] = &[
    (WITHOUT, "--cpus 3", Refused("restart-required", 9, "2")),
    (WITHOUT, "--memory 257MiB", Refused("restart-required", 9, "256 MiB")),
    (WITHOUT, "--size large", Refused("restart-required", 9, "2")),
    // What it was started with can't be taken from it, either.
    (WITHOUT, "--cpus 1", Refused("restart-required", 9, "can't be taken")),
    (WITHOUT, "--cpu-limit 0.5", To(2, 256, Some(500))),
    (SMALLER, "--memory 240MiB", To(2, 240, Some(500))),
    (WITHOUT, "--memory 256MiB --cpu-limit none", To(2, 256, None)),
];

/// What is there, asked of QEMU's threads, of its balloon and of the cgroup that libvirt made.
fn there(guest: &Guest) -> Result<(u64, u64, Option<u64>)> {
    let threads = vcpu_threads(guest.qemu_pid()?)?.len();
    let stats = guest.virsh("dommemstat", &[])?;
    let actual =
        stats.lines().find_map(|line| line.strip_prefix("actual ")).context("a balloon")?.trim().parse::<u64>()?;
    let scheduler = guest.virsh("schedinfo", &["--live"])?;
    let number = |name: &str| {
        let line = scheduler.lines().find(|line| line.trim_start().starts_with(name))?;
        line.split(':').nth(1)?.trim().parse::<i64>().ok()
    };
    let (quota, period) = (number("global_quota").context("a quota")?, number("global_period").context("a period")?);
    // What libvirt calls none is −1 or its largest number.
    let cap = (quota > 0 && quota < 1 << 40).then(|| (quota * 1000 / period).cast_unsigned());
    Ok((threads as u64, actual >> 10, cap))
}

fn carry_out(table: &[Row], agentd: &Agentd, base: &str, guest: &Guest) -> Result<()> {
    let mut failed = Vec::new();
    for (config, words, comes) in table {
        agentd.write_config(&format!("{base}{config}"))?;
        let reloads = || agentd.log().matches("is in force").count();
        let earlier = reloads();
        agentd.signal(Signal::SIGHUP)?;
        wait_until("the config to be in force", LIMIT, || Ok((reloads() > earlier).then_some(())))?;
        let shown = if config.is_empty() { "the config as it is".to_owned() } else { config.replace('\n', " ") };
        let args: Vec<&str> = ["resize", guest.name()]
            .into_iter()
            .chain(words.split(' '))
            .chain(["-o", "json", "--wait", "60s"])
            .collect();
        let before = there(guest)?;
        let output = agentd.ctl(&args);
        let reply: Value =
            serde_json::from_str(if output.stdout.is_empty() { &output.stderr } else { &output.stdout })?;
        let came = match comes {
            To(cpus, mib, cap) => {
                let wanted = (*cpus, *mib, *cap);
                let saved = &reply["instance"];
                let is_saved = saved["cpus"]["persistent"] == *cpus && saved["memory"]["persistent"] == mib << 20;
                // An emulated guest may take longer than the 5 s that libvirt gives it to let a vCPU go. That is told, and its
                // vCPUs are then left alone until its next start.
                let late = reply.to_string().contains("unplug") && matches!(output.code, Some(0 | 8));
                if late {
                    wait_until("the late unplug", LIMIT, || Ok((there(guest)? == wanted).then_some(())))?;
                    guest.virsh("destroy", &[])?;
                    guest.start()?;
                    wait_until("what is saved", LIMIT, || Ok((there(guest)? == wanted).then_some(())))?;
                    println!("     its unplug was late");
                }
                is_saved && (late || output.code == Some(0)) && there(guest)? == wanted
            }
            Refused(code, exit, word) => {
                output.code == Some(*exit)
                    && reply["code"] == *code
                    && format!("{} {}", reply["detail"], reply["hint"]).contains(word)
                    && there(guest)? == before
            }
        };
        println!("{} {words:40} {comes:?}, {shown}", if came { "ok  " } else { "FAIL" });
        if !came {
            failed.push(format!("{words} with {shown}: {comes:?}, but {:?}: {reply}", there(guest)?));
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

fn begin(lab: &Lab, libvirt: &Libvirt) -> Result<(Agentd, String)> {
    let base = format!("[libvirt]\nuri = \"{}\"\n{CONFIG}", libvirt.uri());
    Ok((Agentd::with_config(&base).inside(lab).start()?, base))
}

#[test]
fn a_prepared_vm_scales_live_in_every_direction_within_its_bounds() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(160, 320).define_and_start(&libvirt)?;
    let (agentd, base) = begin(&lab, &libvirt)?;
    wait_until("the guest to have what it was booted with", LIMIT, || Ok((there(&guest)?.1 == 160).then_some(())))?;
    for table in [UP, CAPS, DOWN, BOUNDS] {
        carry_out(table, &agentd, &base, &guest)?;
    }
    Ok(())
}

#[test]
fn a_vm_that_was_not_prepared_takes_a_cap_and_shrinks_and_says_why_it_cant_grow() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("plain").vcpus(2, 2).memory(256, 256).define_and_start(&libvirt)?;
    let (agentd, base) = begin(&lab, &libvirt)?;
    carry_out(UNPREPARED, &agentd, &base, &guest)?;
    let output = agentd.ctl(&["list", "--unprepared"]);
    ensure!(output.stdout.contains("vm/plain"), "{output:?}");
    Ok(())
}

#[test]
fn a_host_that_is_full_refuses_growth_with_its_numbers() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(160, 320).define_and_start(&libvirt)?;
    let full = CONFIG
        .replace("cpu_overcommit = 4", "cpu_overcommit = 0.5")
        .replace("memory_overcommit = 4", "memory_overcommit = 0.25");
    let config = format!("[libvirt]\nuri = \"{}\"\n{full}", libvirt.uri());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    wait_until("the guest to have what it was booted with", LIMIT, || Ok((there(&guest)?.1 == 160).then_some(())))?;
    let table: &[Row] = &[
        (WITHOUT, "--cpus 4", Refused("capacity-exceeded", 4, "3 CPUs")),
        (WITHOUT, "--memory 257MiB", Refused("capacity-exceeded", 4, "256 MiB")),
        (WITHOUT, "--size large", Refused("capacity-exceeded", 4, "256 MiB")),
        (WITHOUT, "--cpus 3 --memory 256MiB", To(3, 256, None)),
        (WITHOUT, "--cpu-limit 0.5", To(3, 256, Some(500))),
    ];
    carry_out(table, &agentd, &config, &guest)
}
