//! `make bench`: what a change through `ctl` costs beside the engines' own commands, on engines of its own. Prints ratios of
//! medians, which say more on another machine than times do, and writes all of it as JSON.

use std::{fs, path::Path, process::Command, time::Duration};

use agentd_tests::{
    bench::{Contender, Figures, Level, Match, table},
    lab::{Agentd, Docker, Domain, Lab, Libvirt, wait_until},
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Pairs of a row about changes.
const CHANGES: usize = 40;
/// Pairs of the row about the start of a program.
const STARTS: usize = 200;
/// How long a guest's balloon may take; nothing of it is counted.
const SETTLE: Duration = Duration::from_secs(60);
/// Longer than agentd's listing of all instances serves for admitting a growth: after it, a growth lists them anew.
const QUIET: Duration = Duration::from_millis(2200);

/// How a change is found by the commands that make it.
#[derive(Debug, Clone, Copy)]
enum Row {
    /// One after the other.
    Successive,
    /// After some quiet, as it is typed by hand.
    Alone,
    /// One after the other, and the rival with as few processes as it can do with.
    RivalAtOnce,
}

impl Row {
    fn of(self, kind: &str) -> String {
        match self {
            Row::Successive => kind.to_owned(),
            Row::Alone => format!("{kind}, after 2 s quiet"),
            Row::RivalAtOnce => format!("{kind}, rival at once"),
        }
    }

    fn quiet(self) -> Duration {
        match self {
            Row::Successive | Row::RivalAtOnce => Duration::ZERO,
            Row::Alone => QUIET,
        }
    }
}

/// What a container is changed between: CPUs and MiB.
fn container_values(level: Level) -> (&'static str, u64) {
    match level {
        Level::Low => ("0.5", 128),
        Level::High => ("1.5", 256),
    }
}

/// What a VM is changed between: the CPU limit in thousandths and MiB of memory.
fn vm_values(level: Level) -> (u64, u64) {
    match level {
        Level::Low => (1500, 448),
        Level::High => (1800, 480),
    }
}

fn main() -> Result<()> {
    if cfg!(debug_assertions) {
        bail!("the figures are those of a release build: run `make bench`");
    }
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let libvirt = Libvirt::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker, &libvirt)).inside(&lab).start()?;
    let facts = facts(&docker, &libvirt, &agentd)?;
    for (name, value) in &facts {
        println!("{name:<10} {value}");
    }

    let start = start_of_ctl(&agentd)?;
    docker.run("web", &["--cpus", "0.5", "-m", "128m", "--memory-swap", "128m"])?;
    let guest = Domain::new("web").vcpus(2, 4).memory(512, 512).define_and_start(&libvirt)?;
    let rows = [
        container(&lab, &docker, &agentd, Row::Successive)?,
        container(&lab, &docker, &agentd, Row::Alone)?,
        vm(&lab, &libvirt, &agentd, Row::Successive)?,
        vm(&lab, &libvirt, &agentd, Row::Alone)?,
        vm(&lab, &libvirt, &agentd, Row::RivalAtOnce)?,
        start,
    ];
    guest.remove()?;

    println!("\n{}", table(&rows));
    println!(
        "A ratio below 1: ctl is the quicker one. It is that of the medians; half of the single pairs' ratios lie within"
    );
    println!("the middle half. Each row was measured in turns, a pair at a time.");
    let facts: serde_json::Map<String, Value> =
        facts.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    let report = json!({ "facts": facts, "rows": rows.iter().map(Figures::json).collect::<Vec<_>>() });
    let exe = std::env::current_exe()?;
    let file = exe.ancestors().nth(2).context("a target folder")?.join("bench.json");
    fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("{}", file.display());
    Ok(())
}

/// Caps that nothing here comes near, whatever the machine has.
fn config(docker: &Docker, libvirt: &Libvirt) -> String {
    format!(
        "[docker]\nsocket = \"{}\"\n[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 64\nmemory = \"64GiB\"\n\
         [scaling]\nmax_cpus = 64\nmax_memory = \"64GiB\"\n[[limit]]\nmatch = \"*\"\nshrink_margin = \"4MiB\"\n",
        docker.socket().display(),
        libvirt.uri()
    )
}

/// The machine and what runs on it: nothing of it is measured.
fn facts(docker: &Docker, libvirt: &Libvirt, agentd: &Agentd) -> Result<Vec<(&'static str, String)>> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let version = libvirt.virsh(&["version"])?;
    let of = |what: &str| {
        let line = version.lines().find_map(|line| line.strip_prefix(what));
        line.unwrap_or("unknown").trim().trim_start_matches(": ").to_owned()
    };
    let load = fs::read_to_string("/proc/loadavg")?;
    Ok(vec![
        ("cores", std::thread::available_parallelism()?.to_string()),
        ("processor", model.trim_start_matches([' ', '\t', ':']).to_owned()),
        ("load", load.split(' ').take(3).collect::<Vec<_>>().join(" ")),
        ("kernel", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned()),
        ("cgroups", if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" }.to_owned()),
        ("docker", docker.docker(&["version", "--format", "{{.Server.Version}}, client {{.Client.Version}}"])?),
        ("libvirt", of("Using library: libvirt")),
        ("guest", format!("{}, without KVM", of("Running hypervisor: "))),
        ("agentd", agentd.ctl(&["--version"]).stdout.trim().trim_start_matches("ctl ").to_owned()),
    ])
}

/// A command as a user would start it: not inside the lab, since entering it takes longer than what is measured.
fn plain(lab: &Lab, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env("HOME", lab.dir().join("home")).env("LC_ALL", "C").env_remove("DOCKER_HOST");
    command
}

/// A `ctl` command for the daemon.
fn ctl(agentd: &Agentd, args: &[&str]) -> Result<Vec<Command>> {
    let mut command = agentd.ctl_command()?;
    command.args(args);
    Ok(vec![command])
}

/// Row: a container's CPUs and memory.
fn container(lab: &Lab, docker: &Docker, agentd: &Agentd, row: Row) -> Result<Figures> {
    let host = format!("unix://{}", docker.socket().display());
    let ours = Contender::new("ctl resize container/web --cpus --memory", |level| {
        let (cpus, mib) = container_values(level);
        ctl(agentd, &["resize", "container/web", "--cpus", cpus, "--memory", &format!("{mib}MiB")])
    });
    let rival = Contender::new("docker update --cpus --memory --memory-swap", move |level| {
        let (cpus, mib) = container_values(level);
        let mib = format!("{mib}m");
        let args = ["-H", &host, "update", "--cpus", cpus, "-m", &mib, "--memory-swap", &mib, "web"];
        Ok(vec![plain(lab, "docker", &args)])
    });
    let cgroup = docker.cgroup("web")?;
    let settled = move |level| {
        let (cpus, mib) = container_values(level);
        wait_until("the container's limits", SETTLE, || {
            let (quota, period) = cgroup.cpu_quota()?;
            let millis = quota.map(|quota| quota * 1000 / period);
            let wanted: f64 = cpus.parse()?;
            let there = millis.is_some_and(|millis| millis as f64 == wanted * 1000.0);
            Ok((there && cgroup.memory_limit()? == Some(mib << 20)).then_some(()))
        })
    };
    Match::new(&row.of("container"), ours, rival).settled(settled).after_quiet(row.quiet()).run(CHANGES)
}

/// Row: a VM's memory and CPU limit, live; the rival is virsh, run twice, or once with both commands.
fn vm(lab: &Lab, libvirt: &Libvirt, agentd: &Agentd, row: Row) -> Result<Figures> {
    let uri = libvirt.uri();
    let ours = Contender::new("ctl resize vm/web --memory --cpu-limit --live-only --wait 0", |level| {
        let (millis, mib) = vm_values(level);
        let (limit, memory) = (format!("{}.{:03}", millis / 1000, millis % 1000), format!("{mib}MiB"));
        ctl(agentd, &["resize", "vm/web", "--memory", &memory, "--cpu-limit", &limit, "--live-only", "--wait", "0"])
    });
    // 8 says that the change was accepted and the guest is still moving, which is all that virsh tells, too.
    let ours = ours.fine(&[0, 8]);
    let virsh = move |args: &[&str]| plain(lab, "virsh", &[&["-q", "-c", &uri], args].concat());
    let rival = if matches!(row, Row::RivalAtOnce) {
        Contender::new("one virsh with both commands", move |level| {
            let (millis, mib) = vm_values(level);
            let quota = millis * 100;
            Ok(vec![virsh(&[&format!("setmem web {mib}M --live; schedinfo web --live global_quota={quota}")])])
        })
    } else {
        Contender::new("virsh setmem --live, virsh schedinfo --live global_quota", move |level| {
            let (millis, mib) = vm_values(level);
            let quota = format!("global_quota={}", millis * 100);
            Ok(vec![
                virsh(&["setmem", "web", &format!("{mib}M"), "--live"]),
                virsh(&["schedinfo", "web", "--live", &quota]),
            ])
        })
    };
    let settled = |level| {
        let (millis, mib) = vm_values(level);
        wait_until("the guest's memory and CPU limit", SETTLE, || {
            let shown = agentd.get("/v1/instances/vm/web")?.json();
            let limit = shown["cpu_limit"]["observed"].as_f64().map(|cpus| cpus * 1000.0);
            let there = limit == Some(millis as f64) && shown["memory"]["observed"] == mib << 20;
            Ok(there.then_some(()))
        })
    };
    Match::new(&row.of("vm"), ours, rival).settled(settled).after_quiet(row.quiet()).run(CHANGES)
}

/// Row: the start of `ctl`, beside that of the smallest program.
fn start_of_ctl(agentd: &Agentd) -> Result<Figures> {
    let ours = Contender::new("ctl --version", |_| ctl(agentd, &["--version"]));
    let rival = Contender::new("true", |_| Ok(vec![Command::new("/bin/true")]));
    Match::new("start", ours, rival).run(STARTS)
}
