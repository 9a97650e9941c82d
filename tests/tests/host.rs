//! Installed as an administrator would, on a whole host of its own: the package, the units, users and groups, the journal, a
//! reboot, an upgrade, a removal.

use std::path::PathBuf;
use std::time::Duration;

use agentd_tests::lab::{Host, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

/// The package that `make deb` has built.
fn package() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let target = exe.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists()).context("a target folder")?;
    let built = std::fs::read_dir(target.join("debian")).context("no package: run `make deb`")?;
    let mut built: Vec<PathBuf> = built.filter_map(|entry| Some(entry.ok()?.path())).collect();
    built.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    built.sort();
    built.pop().context("no package: run `make deb`")
}

#[test]
fn the_package_alone_makes_a_service_that_a_group_can_use() -> Result<()> {
    let host = Host::boot()?;
    host.put(&package()?, "/root/agentd.deb")?;
    println!("{}", host.ssh("root", "apt-get install -y ./agentd.deb 2>&1")?);
    wait_until("the service to be up", LIMIT, || {
        Ok((host.ssh("root", "systemctl is-active agentd")? == "active").then_some(()))
    })?;
    let exposure = host.ssh("root", "systemd-analyze security --no-pager agentd.service | tail -1")?;
    let level = exposure.split_whitespace().find_map(|word| word.parse::<f64>().ok()).context("a level")?;
    ensure!(level <= 1.3, "{exposure}");
    println!("{exposure}\n{}", host.ssh("root", "systemctl status --no-pager agentd")?);
    let health: Value = serde_json::from_str(&host.ssh("root", "ctl health -o json")?)?;
    ensure!(health["ok"] == true, "{health}");
    Ok(())
}
