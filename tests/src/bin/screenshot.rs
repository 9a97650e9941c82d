//! `make screenshot`: `ctl top` as it is, on containers and a guest with some work, drawn from a terminal into an SVG.

use std::{fs, thread, time::Duration};

use agentd_tests::{
    lab::{Agentd, Docker, Domain, Lab, Libvirt, Tmux, binary},
    svg::picture,
};
use anyhow::{Context, Result, ensure};

const SIZE: (u16, u16) = (110, 14);
/// Between two looks: with as many of them as a sparkline has room for, it is full.
const INTERVAL: Duration = Duration::from_millis(500);
const LOOKS: u32 = 36;
/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_secs(180);

/// Works for a while, and rests for so many seconds.
fn works(rounds: u32, rests: &str) -> String {
    format!("while :; do i=0; while [ $i -lt {rounds} ]; do i=$((i+1)); done; sleep {rests}; done")
}

fn main() -> Result<()> {
    let file = std::env::args().nth(1).context("usage: screenshot FILE.svg")?;
    let lab = Lab::new()?;
    let (docker, libvirt) = (Docker::start(&lab)?, Libvirt::start(&lab)?);
    let guest = Domain::new("mail").vcpus(1, 4).memory(192, 256).define_and_start(&libvirt)?;
    guest.wait_for("its boot", BOOT, |stat| stat.nproc == 1)?;
    for (name, cpus, memory, command) in [
        ("build", "0.5", "512m", works(1_000_000, "0")),
        ("web", "0.4", "256m", works(60_000, "1")),
        ("queue", "0.25", "128m", works(20_000, "2")),
        ("cron", "0.1", "64m", works(40_000, "3")),
    ] {
        docker.run_command(name, &["--cpus", cpus, "-m", memory], &["sh", "-c", &command])?;
    }
    docker.run_memory_eater("cache", &["--cpus", "1", "-m", "384m"], 290)?;
    docker.run("old", &["--cpus", "1", "-m", "64m"])?;
    docker.docker(&["stop", "-t", "0", "old"])?;

    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 4\nmemory = \"4GiB\"\nreserved_memory = 0\n",
        libvirt.uri(),
        docker.socket().display()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let lent = agentd.ctl(&["resize", "build", "--memory", "+256MiB", "--for", "2h"]);
    ensure!(lent.code == Some(0), "{lent:?}");

    let socket = agentd.socket();
    let variables =
        [("AGENTD_SOCKET", socket.to_str().context("a path")?), ("LC_ALL", "C.UTF-8"), ("TERM", "screen-256color")];
    let tmux = Tmux::open(SIZE, &variables)?;
    tmux.line(&format!("{} top --interval {}ms", binary("CTL_BIN", "ctl")?.display(), INTERVAL.as_millis()))?;
    tmux.wait_for("the instances", |screen| screen.contains("vm/mail") && screen.contains("until "))?;
    thread::sleep(INTERVAL * LOOKS);
    let screen = tmux.styled_screen()?;
    tmux.keys(&["q"])?;
    fs::write(&file, picture(&screen, usize::from(SIZE.0))).with_context(|| file.clone())?;
    println!("{file}");
    Ok(())
}
