//! Changes of a container beside those of LXD.

use agentd_tests::{
    bench::{Contender, Level, Match, Report},
    lab::{Agentd, Docker, Lab, Lxd},
};
use anyhow::{Result, ensure};

use crate::{engines::ctl, tell};

const CHANGES: usize = 40;

/// The row of this file. Each side changes a container of its own engine.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    docker.run("web", &["--cpus", "0.5", "-m", "128m", "--memory-swap", "128m"])?;
    let config = format!("[docker]\nsocket = \"{}\"\n", docker.socket().display());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let lxd = Lxd::start(&lab, "web")?;
    report.facts.push(("lxd".into(), lxd.lxc(&["version"])?.lines().last().unwrap_or_default().to_owned()));
    let ours = Contender::commands("`ctl resize`, CPUs and memory", &[], |level| {
        let (cpus, memory) = if level == Level::Low { ("0.5", "128MiB") } else { ("0.75", "256MiB") };
        ctl(&agentd, &["resize", "container/web", "--cpus", cpus, "--memory", memory])
    });
    let values = |level| {
        let (allowance, memory) = if level == Level::Low { ("50ms/100ms", "128MiB") } else { ("75ms/100ms", "256MiB") };
        [format!("limits.cpu.allowance={allowance}"), format!("limits.memory={memory}")]
    };
    let rival = Contender::commands("`lxc config set`", &[], |level| {
        let mut command = lxd.command();
        command.args(["config", "set", "web"]).args(values(level));
        Ok(vec![command])
    });
    let figures = Match::new("container, beside LXD", ours, rival).run(CHANGES)?;
    let now = lxd.lxc(&["config", "get", "web", "limits.memory"])?;
    ensure!(now.trim() == "128MiB", "LXD's container has {now:?}");
    tell(report, [figures.ratio(0.8)]);
    Ok(())
}
