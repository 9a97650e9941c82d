//! What the backends hear of real engines: every change made by hand is told within two seconds, and a call that somebody
//! else has left with libvirt is seen. The backend runs inside the lab, as the daemon would, in this very program.

use std::{
    io::{BufRead, BufReader, Write},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use agentd::backend::{Backend, Notice, docker::Docker as DockerBackend, libvirt::Libvirt as LibvirtBackend};
use agentd_core::operation::Identity;
use agentd_tests::lab::{Docker, Domain, Lab, Libvirt, wait_until};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const LIMIT: Duration = Duration::from_secs(120);
/// Within this a change is to be heard.
const SOON: Duration = Duration::from_secs(2);

/// What runs inside: prints each notice, and for each id on its input whether a call on it is under way.
#[test]
#[ignore = "run by the other tests, inside their lab"]
fn inside() {
    let backend: Box<dyn Backend> = match (std::env::var("TEST_LIBVIRT"), std::env::var("TEST_DOCKER")) {
        (Ok(uri), _) => Box::new(LibvirtBackend::new(uri)),
        (_, Ok(socket)) => Box::new(DockerBackend::new(PathBuf::from(socket))),
        _ => return,
    };
    let (ask, mut asked) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for id in std::io::stdin().lines().map_while(Result::ok) {
            let _ = ask.send(id);
        }
        // Whoever made us is gone.
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (send, mut notices) = tokio::sync::mpsc::channel(64);
        let ended = backend.watch(send);
        tokio::pin!(ended);
        let mut listens = true;
        loop {
            tokio::select! {
                Some(notice) = notices.recv() => match notice {
                    Notice::All => println!("\nheard all"),
                    Notice::Instance(id) => println!("\nheard {id}"),
                },
                error = &mut ended, if listens => {
                    println!("\nended {error:?}");
                    listens = false;
                }
                Some(id) = asked.recv() => {
                    println!("\nbusy {}", backend.is_under_way(&Identity { id, boot: None }).await);
                }
            }
        }
    });
}

/// A backend that listens inside a lab.
struct Ear {
    child: Child,
    lines: Receiver<(Instant, String)>,
}

impl Ear {
    fn new(lab: &Lab, variable: &str, engine: &str) -> Result<Ear> {
        let mut command: Command = lab.command(std::env::current_exe()?);
        command.args(["--exact", "inside", "--ignored", "--nocapture"]).env(variable, engine);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let output = BufReader::new(child.stdout.take().context("its output is a pipe")?);
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = send.send((Instant::now(), line));
            }
        });
        let ear = Ear { child, lines };
        ear.wait("heard all", Instant::now(), LIMIT)?;
        Ok(ear)
    }

    /// How long after `began` a line with this beginning came, and its rest.
    fn wait(&self, line: &str, began: Instant, limit: Duration) -> Result<(Duration, String)> {
        loop {
            let left = (began + limit).saturating_duration_since(Instant::now());
            let (at, text) = self.lines.recv_timeout(left).with_context(|| format!("{line:?} within {limit:?}"))?;
            if let Some(rest) = text.strip_prefix(line) {
                return Ok((at.saturating_duration_since(began), rest.trim().to_owned()));
            }
        }
    }

    /// Forgets what was heard until there is silence.
    fn quiet(&self) {
        while self.lines.recv_timeout(Duration::from_millis(300)).is_ok() {}
    }

    /// A change made by hand is heard.
    fn hears(&self, id: &str, what: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.quiet();
        let began = Instant::now();
        change().with_context(|| what.to_owned())?;
        let took = began.elapsed();
        let (after, _) = self.wait(&format!("heard {id}"), began, took + SOON).with_context(|| what.to_owned())?;
        println!("{what}: the command took {took:.0?}, heard after {after:.0?}");
        Ok(())
    }

    fn ask(&mut self, id: &str) -> Result<()> {
        Ok(writeln!(self.child.stdin.as_mut().context("its input is a pipe")?, "{id}")?)
    }

    fn is_busy(&mut self, id: &str) -> Result<bool> {
        self.ask(id)?;
        Ok(self.wait("busy", Instant::now(), LIMIT)?.1 == "true")
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_is_done_to_a_container_by_hand_is_heard() -> Result<()> {
    let lab = Lab::new()?;
    let mut docker = Docker::start(&lab)?;
    let id = docker.run("db", &["--cpus", "0.5", "-m", "64m"])?;
    let ear = Ear::new(&lab, "TEST_DOCKER", docker.socket().to_str().context("a path in UTF-8")?)?;
    for (what, arguments) in [
        ("docker update of both", &["update", "--cpus", "0.7", "-m", "80m", "--memory-swap", "160m", "db"][..]),
        ("docker pause", &["pause", "db"]),
        ("docker unpause", &["unpause", "db"]),
        ("docker rename", &["rename", "db", "store"]),
        ("docker kill", &["kill", "store"]),
        ("docker start", &["start", "store"]),
        ("docker rm", &["rm", "-f", "store"]),
    ] {
        ear.hears(id.trim(), what, || docker.docker(arguments).map(drop))?;
    }
    let began = Instant::now();
    docker.kill()?;
    let (after, words) = ear.wait("ended", began, SOON)?;
    println!("dockerd's end is known after {after:.0?}: {words}");
    ensure!(words.starts_with("Unavailable"), "{words}");
    Ok(())
}

#[test]
fn what_is_done_to_a_vm_by_hand_is_heard() -> Result<()> {
    let lab = Lab::new()?;
    let mut libvirt = Libvirt::start(&lab)?;
    let early = Domain::new("early").vcpus(1, 4).define_and_start(&libvirt)?;
    let ear = Ear::new(&lab, "TEST_LIBVIRT", &libvirt.uri())?;
    // One that ran before anybody listened, and one that is started later.
    let late = Domain::new("late").vcpus(1, 4).virtio_mem(256, 0).define(&libvirt)?;
    let id = |name: &str| libvirt.virsh(&["domuuid", name]).map(|id| id.trim().to_owned());
    ear.hears(&id("late")?, "virsh start", || late.start())?;
    for guest in [&early, &late] {
        guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
        let id = id(guest.name())?;
        for (what, command, arguments) in [
            ("virsh setvcpus (hot-add)", "setvcpus", &["2", "--live"][..]),
            ("virsh setmem (balloon)", "setmem", &["200M", "--live"]),
            ("virsh schedinfo (quota)", "schedinfo", &["--live", "--set", "global_quota=50000"]),
            ("virsh suspend", "suspend", &[]),
            ("virsh resume", "resume", &[]),
        ] {
            let heard = ear.hears(&id, what, || guest.virsh(command, arguments).map(drop));
            heard.with_context(|| guest.name().to_owned())?;
        }
    }
    late.wait_for("two CPUs", LIMIT, |stat| stat.nproc == 2)?;
    let late_id = id("late")?;
    ear.hears(&late_id, "virtio-mem", || {
        late.virsh("update-memory-device", &["--live", "--requested-size", "128M"]).map(drop)
    })?;
    ear.hears(&late_id, "virsh destroy", || late.virsh("destroy", &[]).map(drop))?;
    let began = Instant::now();
    drop((early, late));
    libvirt.kill()?;
    let (after, words) = ear.wait("ended", began, SOON)?;
    println!("libvirtd's end is known after {after:.0?}: {words}");
    ensure!(words.starts_with("Unavailable"), "{words}");
    Ok(())
}

#[test]
fn a_call_that_somebody_else_left_with_libvirt_is_under_way() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("sticky").vcpus(1, 4).flag("sticky").define_and_start(&libvirt)?;
    let id = libvirt.virsh(&["domuuid", "sticky"])?.trim().to_owned();
    let mut ear = Ear::new(&lab, "TEST_LIBVIRT", &libvirt.uri())?;
    guest.virsh("setvcpus", &["2", "--live"])?;
    guest.wait_for("two CPUs", LIMIT, |stat| stat.nproc == 2)?;
    ensure!(!ear.is_busy(&id)?, "nobody has asked for anything");

    // QEMU answers nothing.
    let pid = Pid::from_raw(guest.qemu_pid()?);
    kill(pid, Signal::SIGSTOP)?;
    let mut set = libvirt.command().args(["setmem", "sticky", "200M", "--live"]).spawn()?;
    let seen = wait_until("the call to be seen", SOON, || Ok(ear.is_busy(&id)?.then_some(())));
    kill(pid, Signal::SIGCONT)?;
    seen?;
    ensure!(set.wait()?.success(), "the call ends well");
    wait_until("the call to have ended", SOON, || Ok((!ear.is_busy(&id)?).then_some(())))?;

    // libvirt waits for the guest, and QEMU has nothing to answer meanwhile.
    let mut set = libvirt.command().args(["setvcpus", "sticky", "1", "--live"]).stderr(Stdio::null()).spawn()?;
    // A quick no is from before libvirt has begun.
    let (busy, took) = wait_until("an answer during the unplug", LIMIT, || {
        let began = Instant::now();
        let (busy, took) = (ear.is_busy(&id)?, began.elapsed());
        Ok((busy || took > Duration::from_secs(1)).then_some((busy, took)))
    })?;
    println!("during an unplug: busy {busy}, told after {took:.1?}");
    if !busy {
        wait_until("the end of the unplug that is over", SOON, || Ok(set.try_wait()?))?;
    }
    ensure!(!set.wait()?.success(), "this guest gives no vCPU up");
    Ok(())
}
