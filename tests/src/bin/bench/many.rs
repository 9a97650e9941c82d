//! A host with 1,000 VMs and 200 containers on real engines: lists, the start, a change among them, memory, and what an idle
//! daemon takes.

use std::{
    cell::RefCell,
    fmt::Write as _,
    fs,
    os::unix::net::UnixDatagram,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use agentd_tests::{
    bench::{Contender, Figures, Kept, Level, Match, Report, Row, Unit},
    lab::{Agentd, Docker, Lab, Libvirt, binary, wait_until},
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::{
    engines::{ctl, plain},
    own::own_memory,
    tell,
};

const VMS: usize = 1000;
/// Of those, how many run, and how many are paused.
const RUNNING: usize = 50;
const PAUSED: usize = 50;
const CONTAINERS: usize = 200;
/// Pairs of a row.
const LISTS: usize = 30;
/// How long it may take until all is there.
const LIMIT: Duration = Duration::from_secs(120);
/// How long a daemon is idle before its memory is looked at: what is free it gives back each half minute.
const AT_REST: Duration = Duration::from_secs(35);
/// How long an idle daemon is looked at.
const IDLE: Duration = Duration::from_secs(600);

/// A VM without a disk: it comes to rest in its firmware.
fn xml(name: &str) -> String {
    format!(
        "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu current='1'>2</vcpu>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os><features><acpi/></features>\
         <devices><memballoon model='virtio'/></devices></domain>"
    )
}

/// Defines so many VMs; runs the first of them, and leaves some of those paused.
fn define(libvirt: &Libvirt, count: usize, running: usize, paused: usize) -> Result<()> {
    let folder = libvirt.lab().dir().join("many");
    fs::create_dir_all(&folder)?;
    let name = |number: usize| format!("vm-{number:04}");
    let mut script = String::new();
    for number in 0..count {
        let file = folder.join(format!("{number}.xml"));
        fs::write(&file, xml(&name(number)))?;
        let _ = writeln!(script, "define {}", file.display());
    }
    for number in 0..running + paused {
        let paused = if number < running { "" } else { " --paused" };
        let _ = writeln!(script, "start {}{paused}", name(number));
    }
    let file = folder.join("script");
    fs::write(&file, script)?;
    let mut virsh = libvirt.command();
    let output = virsh.stdin(fs::File::open(&file)?).stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
    let listed = libvirt.virsh(&["list", "--all", "--name"])?.lines().filter(|line| !line.trim().is_empty()).count();
    let up = libvirt.virsh(&["list", "--name"])?.lines().filter(|line| !line.trim().is_empty()).count();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!((listed, up) == (count, running + paused), "{listed} VMs are defined, {up} are up: {said}");
    Ok(())
}

fn config(libvirt: &Libvirt, docker: Option<&Docker>) -> String {
    let docker = docker.map(|docker| format!("[docker]\nsocket = \"{}\"\n", docker.socket().display()));
    format!(
        "{}[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 4096\nmemory = \"4096GiB\"\n",
        docker.unwrap_or_default(),
        libvirt.uri()
    )
}

/// All rows of this file but that of the idle daemon.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let empty = Agentd::with_config(&config(&libvirt, None)).inside(&lab).start()?;
    tell(report, [memory("own memory, no instance", &empty, 4.0)?]);
    empty.stop()?;

    eprintln!("making {VMS} VMs, {RUNNING} of them running and {PAUSED} paused, and {CONTAINERS} containers …");
    define(&libvirt, VMS, RUNNING, PAUSED)?;
    let vms = Agentd::with_config(&config(&libvirt, None)).inside(&lab).start()?;
    has_all(&vms, VMS)?;
    tell(report, [memory("own memory, 1,000 VMs", &vms, 12.0)?]);
    let few = Lab::new()?;
    let few_libvirt = Libvirt::start(&few)?;
    define(&few_libvirt, 1, 1, 0)?;
    let one = Agentd::with_config(&config(&few_libvirt, None)).inside(&few).start()?;
    tell(report, [beside_a_thousand(&vms, &one)?.ratio(1.1)]);
    one.stop()?;

    let uri = libvirt.uri();
    let virsh = |args: &'static [&'static str]| {
        let (lab, uri) = (&lab, &uri);
        Contender::commands(&format!("`virsh {}`", args.join(" ")), &[], move |_| {
            Ok(vec![plain(lab, "virsh", &[&["-c", uri], args].concat())])
        })
    };
    let list = |args: &'static [&'static str]| {
        let vms = &vms;
        Contender::commands(&format!("`ctl {}`", args.join(" ")), &[], move |_| ctl(vms, args))
    };
    let lists = Match::new("list of 1,000 VMs", list(&["list"]), virsh(&["list", "--all"])).run(LISTS)?;
    tell(report, [lists.ratio(0.3)]);
    let lists =
        Match::new("list of 1,000 VMs, all values", list(&["list", "-o", "json"]), virsh(&["domstats"])).run(LISTS)?;
    tell(report, [lists.ratio(0.2)]);
    vms.stop()?;

    let docker = Docker::start(&lab)?;
    for number in 0..CONTAINERS {
        docker.docker(&["create", "--network=none", "--name", &format!("c-{number:03}"), "lab", "sleep", "1000000"])?;
    }
    let containers = format!("[docker]\nsocket = \"{}\"\n", docker.socket().display());
    let containers = Agentd::with_config(&containers).start()?;
    has_all(&containers, CONTAINERS)?;
    let host = format!("unix://{}", docker.socket().display());
    let ours = Contender::commands("`ctl list`", &[], |_| ctl(&containers, &["list"]));
    let rival =
        Contender::commands("`docker ps -a`", &[], |_| Ok(vec![plain(&lab, "docker", &["-H", &host, "ps", "-a"])]));
    tell(report, [Match::new("list of 200 containers", ours, rival).run(LISTS)?.ratio(0.3)]);
    containers.stop()?;
    tell(report, [ready(&lab, &libvirt, &docker)?.ratio(1.5)]);
    Ok(())
}

/// The CPU time of a daemon that nobody asks anything, with 1,000 VMs that are down.
pub(crate) fn idle(report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    define(&libvirt, VMS, 0, 0)?;
    let agentd = Agentd::with_config(&config(&libvirt, None)).inside(&lab).start()?;
    has_all(&agentd, VMS)?;
    // What the start still does.
    thread::sleep(Duration::from_secs(10));
    eprintln!("measuring: an idle daemon for {} s …", IDLE.as_secs());
    let pid = agentd.pid().context("it runs")?;
    let (before, begun) = (cpu_time(pid)?, Instant::now());
    thread::sleep(IDLE);
    let percent = (cpu_time(pid)? - before) / begun.elapsed().as_secs_f64() * 100.0;
    let ours = format!("CPU of an idle daemon with {VMS} VMs, over {} s", IDLE.as_secs());
    tell(report, [Row::alone("idle", &ours, Unit::Percent, &[percent], 0.05)]);
    Ok(())
}

/// User and system time of a process in seconds, threads that have ended included.
fn cpu_time(pid: i32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("a stat")?.split_whitespace().collect();
    let ticks = |field: usize| -> Result<f64> { Ok(fields.get(field).context("a field of stat")?.parse()?) };
    // Fields 14 and 15, of which two stand before the closing parenthesis; a tick is 10 ms.
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

fn has_all(agentd: &Agentd, count: usize) -> Result<()> {
    wait_until("all instances in agentd's list", LIMIT, || {
        let total = agentd.get("/v1/instances?limit=1")?.json()["total"].as_u64();
        Ok((total == u64::try_from(count).ok()).then_some(()))
    })
}

/// What of an idle daemon's memory is its own.
fn memory(what: &str, agentd: &Agentd, goal: f64) -> Result<Row> {
    let pid = agentd.pid().context("it runs")?;
    let mut values = Vec::new();
    thread::sleep(AT_REST);
    for _ in 0..5 {
        thread::sleep(Duration::from_secs(2));
        #[allow(clippy::cast_precision_loss, reason = "some megabytes")]
        values.push(own_memory(pid)? as f64 / 1e6);
    }
    Ok(Row::alone(what, "RssAnon of an idle daemon", Unit::Megabytes, &values, goal))
}

/// The same change of a VM on a host with 1,000 and on a host with one.
fn beside_a_thousand(thousand: &Agentd, one: &Agentd) -> Result<Figures> {
    let changing = |agentd: &Agentd, name: &str| -> Result<Contender<'_>> {
        let kept = RefCell::new(Kept::open(&agentd.socket())?);
        Ok(Contender::call(name, move |level| {
            let limit = if level == Level::Low { 1.5 } else { 1.8 };
            let body = json!({ "cpu_limit": limit, "apply": "live" }).to_string();
            let reply = kept.borrow_mut().ask("POST", "/v1/instances/vm/vm-0000/resize", &body)?;
            ensure!(reply.status == 200, "{}", reply.text());
            Ok(())
        }))
    };
    // A growth is what a listing could have to be waited for.
    let ours = changing(thousand, "a VM’s change with 1,000 VMs")?;
    Match::new("vm among 1,000", ours, changing(one, "the same with 1")?).run(100)
}

/// From the start of the daemon to READY beside a bare listing of both engines.
fn ready(lab: &Lab, libvirt: &Libvirt, docker: &Docker) -> Result<Figures> {
    let folder = lab.dir().join("ready");
    fs::create_dir_all(folder.join("state"))?;
    fs::write(folder.join("agentd.toml"), config(libvirt, Some(docker)))?;
    let notify = UnixDatagram::bind(folder.join("notify"))?;
    notify.set_read_timeout(Some(LIMIT))?;
    let ours = Contender::timed("start to READY", |_| {
        let mut command = Command::new(binary("AGENTD_BIN", "agentd")?);
        command.arg("--config").arg(folder.join("agentd.toml")).arg("--socket").arg(folder.join("socket"));
        command.arg("--state-dir").arg(folder.join("state")).env("NOTIFY_SOCKET", folder.join("notify"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let begun = Instant::now();
        let mut child = command.spawn()?;
        let time = loop {
            let mut message = [0; 4096];
            let length = notify.recv(&mut message)?;
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            if text.lines().any(|line| line == "READY=1") {
                break begun.elapsed();
            }
        };
        child.kill()?;
        child.wait()?;
        // What it has said since then.
        notify.set_nonblocking(true)?;
        while notify.recv(&mut [0; 4096]).is_ok() {}
        notify.set_nonblocking(false)?;
        Ok(time)
    });
    let uri = libvirt.uri();
    let rival = Contender::call("a bare listing of both", move |_| {
        let list = Command::new("virsh").args(["-c", &uri, "list", "--all", "--uuid"]).output()?;
        let listed = Kept::open(&docker.socket())?.ask("GET", "/containers/json?all=1", "")?;
        if !list.status.success() || listed.status != 200 {
            bail!("an engine can't be listed");
        }
        Ok(())
    });
    Match::new("start with 1,000 VMs and 200 containers", ours, rival).run(LISTS)
}
