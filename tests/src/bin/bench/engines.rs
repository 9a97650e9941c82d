//! Changes of a real guest and of a real container beside virsh and docker, and what it costs to start `ctl`.

use std::{cell::RefCell, process::Command, time::Duration};

use agentd_tests::{
    bench::{Contender, Figures, Kept, Level, Match, Report},
    lab::{Agentd, Docker, Domain, Lab, Libvirt, wait_until},
};
use anyhow::{Result, ensure};
use serde_json::json;

use crate::{bare::Bare, tell};

/// Pairs of a row about changes.
const CHANGES: usize = 40;
/// Pairs of a row about the start of a program.
const STARTS: usize = 200;
/// How long a guest's balloon may take; nothing of it is counted.
const SETTLE: Duration = Duration::from_secs(60);

/// What a container is changed between: thousandths of a CPU and MiB.
fn container_values(level: Level) -> (u64, u64) {
    match level {
        Level::Low => (500, 128),
        Level::High => (1500, 256),
    }
}

/// What a VM is changed between: the CPU limit in thousandths and MiB of memory.
fn vm_values(level: Level) -> (u64, u64) {
    match level {
        Level::Low => (1500, 448),
        Level::High => (1800, 480),
    }
}

/// All rows of this file.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let libvirt = Libvirt::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker, &libvirt)).inside(&lab).start()?;
    report.facts.extend(facts(&docker, &libvirt, &agentd)?);
    docker.run("web", &["--cpus", "0.5", "-m", "128m", "--memory-swap", "128m"])?;
    let guest = Domain::new("web").vcpus(2, 4).memory(512, 512).define_and_start(&libvirt)?;

    tell(report, [vm(&lab, &libvirt, &agentd, Rival::Live)?.ratio(0.35)]);
    tell(report, [vm(&lab, &libvirt, &agentd, Rival::Bare)?.ratio(None)]);
    tell(report, [vm(&lab, &libvirt, &agentd, Rival::Saved)?.ratio(0.35)]);
    tell(report, [container(&lab, &docker, &agentd)?.ratio(0.75)]);
    tell(report, [container_bare(&docker, &agentd)?.ratio(1.25)]);
    tell(report, [start(&agentd, "start of ctl", &["--version"])?.difference(1.5)]);
    tell(report, [start(&agentd, "show of one", &["show", "container/web"])?.difference(3.0)]);
    guest.remove()
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

/// What runs on the machine: nothing of it is measured.
fn facts(docker: &Docker, libvirt: &Libvirt, agentd: &Agentd) -> Result<Vec<(String, String)>> {
    let version = libvirt.virsh(&["version"])?;
    let of = |what: &str| {
        let line = version.lines().find_map(|line| line.strip_prefix(what));
        line.unwrap_or("unknown").trim().trim_start_matches(": ").to_owned()
    };
    Ok([
        ("docker", docker.docker(&["version", "--format", "{{.Server.Version}}"])?),
        ("libvirt", of("Using library: libvirt")),
        ("guests", format!("{}, without KVM", of("Running hypervisor: "))),
        ("agentd", agentd.ctl(&["--version"]).stdout.trim().trim_start_matches("ctl ").to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into())
}

/// A command as a user would start it: not inside the lab, since entering it takes longer than what is measured.
pub(crate) fn plain(lab: &Lab, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env("HOME", lab.dir().join("home")).env("LC_ALL", "C").env_remove("DOCKER_HOST");
    command
}

/// A `ctl` command for the daemon.
pub(crate) fn ctl(agentd: &Agentd, args: &[&str]) -> Result<Vec<Command>> {
    let mut command = agentd.ctl_command()?;
    command.args(args);
    Ok(vec![command])
}

/// `ctl resize` of the container.
fn resize_container(agentd: &Agentd) -> Contender<'_> {
    Contender::commands("`ctl resize`, CPUs and memory", &[], |level| {
        let (millis, mib) = container_values(level);
        let (cpus, memory) = (format!("{}.{:03}", millis / 1000, millis % 1000), format!("{mib}MiB"));
        ctl(agentd, &["resize", "container/web", "--cpus", &cpus, "--memory", &memory])
    })
}

/// Waits until the container's cgroup has the values of a level.
fn container_settled(docker: &Docker) -> Result<impl Fn(Level) -> Result<()>> {
    let cgroup = docker.cgroup("web")?;
    Ok(move |level| {
        let (millis, mib) = container_values(level);
        wait_until("the container's limits", SETTLE, || {
            let (quota, period) = cgroup.cpu_quota()?;
            let there = quota.is_some_and(|quota| quota * 1000 == i64::try_from(millis).unwrap_or_default() * period);
            Ok((there && cgroup.memory_limit()? == Some(mib << 20)).then_some(()))
        })
    })
}

fn container(lab: &Lab, docker: &Docker, agentd: &Agentd) -> Result<Figures> {
    let host = format!("unix://{}", docker.socket().display());
    let rival = Contender::commands("`docker update`", &[], move |level| {
        let (millis, mib) = container_values(level);
        let (cpus, mib) = (format!("{}.{}", millis / 1000, millis % 1000 / 100), format!("{mib}m"));
        let args = ["-H", &host, "update", "--cpus", &cpus, "-m", &mib, "--memory-swap", &mib, "web"];
        Ok(vec![plain(lab, "docker", &args)])
    });
    Match::new("container", resize_container(agentd), rival).settled(container_settled(docker)?).run(CHANGES)
}

fn container_bare(docker: &Docker, agentd: &Agentd) -> Result<Figures> {
    let kept = RefCell::new(Kept::open(&docker.socket())?);
    let rival = Contender::call("the bare API call, on a kept connection", move |level| {
        let (millis, mib) = container_values(level);
        let body = json!({ "NanoCpus": millis * 1_000_000, "Memory": mib << 20, "MemorySwap": mib << 20 });
        let reply = kept.borrow_mut().ask("POST", "/containers/web/update", &body.to_string())?;
        ensure!(reply.status == 200, "{}", reply.text());
        Ok(())
    });
    Match::new("container, bare call", resize_container(agentd), rival).settled(container_settled(docker)?).run(CHANGES)
}

/// Beside what a VM is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rival {
    /// The commands for what runs.
    Live,
    /// The calls for that by themselves, on a connection that is kept.
    Bare,
    /// The commands for what runs and what is saved.
    Saved,
}

/// A VM's memory and CPU limit beside virsh's commands, live, or live and saved.
fn vm(lab: &Lab, libvirt: &Libvirt, agentd: &Agentd, beside: Rival) -> Result<Figures> {
    let (uri, saved) = (libvirt.uri(), beside == Rival::Saved);
    let ours = if saved { "`ctl resize`, live and saved" } else { "`ctl resize --live-only`" };
    // 8 says that the change was accepted and the guest is still moving, which is all that virsh tells, too.
    let ours = Contender::commands(ours, &[8], move |level| {
        let (millis, mib) = vm_values(level);
        let (limit, memory) = (format!("{}.{:03}", millis / 1000, millis % 1000), format!("{mib}MiB"));
        let mut args = vec!["resize", "vm/web", "--memory", &memory, "--cpu-limit", &limit, "--wait", "0"];
        args.extend((!saved).then_some("--live-only"));
        ctl(agentd, &args)
    });
    let lines = move |level| -> Vec<Vec<String>> {
        let (millis, mib) = vm_values(level);
        let sides: &[&str] = if saved { &["--live", "--config"] } else { &["--live"] };
        let words = |line: String| line.split(' ').map(str::to_owned).collect();
        let of = |side: &&str| {
            let quota = format!("schedinfo web {side} global_quota={}", millis * 100);
            [words(format!("setmem web {mib}M {side}")), words(quota)]
        };
        sides.iter().flat_map(of).collect()
    };
    let rival = if beside == Rival::Bare {
        let bare = Bare::open(&uri, "web")?;
        Contender::call("libvirt’s two calls, on a kept connection", move |level| {
            let (millis, mib) = vm_values(level);
            bare.set_memory(mib << 10)?;
            bare.set_quota(i64::try_from(millis * 100)?)
        })
    } else {
        let name = if saved { "the four `virsh` commands" } else { "`virsh setmem` and `virsh schedinfo`" };
        Contender::commands(name, &[], move |level| {
            let virsh = |line: &Vec<String>| {
                let words: Vec<&str> = line.iter().map(String::as_str).collect();
                plain(lab, "virsh", &[&["-q", "-c", &uri], &words[..]].concat())
            };
            Ok(lines(level).iter().map(virsh).collect())
        })
    };
    let settled = |level| {
        let (millis, mib) = vm_values(level);
        wait_until("the guest's memory and CPU limit", SETTLE, || {
            let shown = agentd.get("/v1/instances/vm/web")?.json();
            let (limit, memory) = (&shown["cpu_limit"], &shown["memory"]);
            let has = |side: &str| limit[side] == json!(millis as f64 / 1000.0) && memory[side] == mib << 20;
            Ok((has("observed") && (!saved || has("persistent"))).then_some(()))
        })?;
        // A guest tells once a second what it uses, and a shrink waits for that: seldom in life, where a balloon rarely moved a
        // moment before, and each time here.
        let dry = agentd.post("/v1/instances/vm/web/resize", &json!({"memory": "400MiB", "dry_run": true}))?;
        ensure!(dry.status == 200, "{}", dry.text());
        Ok(())
    };
    let what = match beside {
        Rival::Live => "vm, live",
        Rival::Bare => "vm, live, bare calls",
        Rival::Saved => "vm, live and saved",
    };
    Match::new(what, ours, rival).settled(settled).run(CHANGES)
}

/// A run of `ctl` beside that of the smallest program.
fn start(agentd: &Agentd, what: &str, args: &'static [&'static str]) -> Result<Figures> {
    let ours = Contender::commands(&format!("`ctl {}`", args.join(" ")), &[], |_| ctl(agentd, args));
    let rival = Contender::commands("`true`", &[], |_| Ok(vec![Command::new("/bin/true")]));
    Match::new(what, ours, rival).run(STARTS)
}
