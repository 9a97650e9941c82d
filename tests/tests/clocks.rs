//! A clock that is set while something is lent: agentd goes by the host's uptime, and by the time of day only where the host was
//! booted since. The clock of one daemon is set by libfaketime, in the way of its library calls; the host's own is left alone.

use std::{fs, path::PathBuf, time::Duration};

use agentd_tests::lab::{Agentd, Lab, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const CONFIG: &str = "[capacity]\ncpus = 16\nmemory = \"64GiB\"\n";

struct Bench {
    agentd: Agentd,
    lab: Lab,
    /// What its clock is ahead of the host's: `+0`, `+1d`.
    clock: PathBuf,
    boot_id: PathBuf,
}

impl Bench {
    fn new() -> Result<Bench> {
        let lab = Lab::new()?;
        let (clock, engine, boot_id) =
            (lab.dir().join("clock"), lab.dir().join("fake.json"), lab.dir().join("boot_id"));
        fs::write(&clock, "+0")?;
        let web = json!({"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 8, "max_memory": "8GiB"});
        fs::write(&engine, json!({"instances": [web], "state": lab.dir().join("engine.json")}).to_string())?;
        // Of this lab alone: another boot of the same host.
        fs::write(&boot_id, "00000000-0000-4000-8000-000000000001\n")?;
        lab.run("mount", &["--bind", &boot_id.to_string_lossy(), "/proc/sys/kernel/random/boot_id"])?;
        let library = lab.run("sh", &["-c", "ls /usr/lib/*/faketime/libfaketime.so.1"])?;
        let agentd = Agentd::with_config(CONFIG)
            .inside(&lab)
            .env("AGENTD_FAKE", &engine.to_string_lossy())
            .env("LD_PRELOAD", library.trim())
            .env("FAKETIME_TIMESTAMP_FILE", &clock.to_string_lossy())
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .start()?;
        Ok(Bench { agentd, lab, clock, boot_id })
    }

    fn set_clock(&self, ahead: &str) -> Result<()> {
        Ok(fs::write(&self.clock, ahead)?)
    }

    fn lend(&self, time: &str) -> Result<()> {
        let reply = self.agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 4, "for": time}))?;
        ensure!(reply.status == 200, "{}", reply.text());
        Ok(())
    }

    fn web(&self) -> Result<Value> {
        Ok(self.agentd.get("/v1/instances/vm/web")?.json())
    }

    /// When it goes back, as it is told, in seconds from the host's own time of day on.
    fn due_in(&self) -> Result<i64> {
        let due = self.web()?["loans"][0]["due_ms"].as_u64().context("it is lent something")?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis();
        Ok((i64::try_from(due)? - i64::try_from(now)?) / 1000)
    }

    fn is_lent(&self) -> Result<()> {
        let web = self.web()?;
        ensure!(web["cpus"]["accepted"] == 4 && web["loans"][0]["fields"] == json!(["cpus"]), "{web}");
        Ok(())
    }

    fn is_back(&self) -> Result<()> {
        wait_until("what was lent to be back", LIMIT, || {
            let web = self.web()?;
            Ok((web["cpus"]["accepted"] == 2 && web["loans"] == json!([])).then_some(()))
        })
    }
}

const DAY: i64 = 24 * 3600;

#[test]
fn what_is_lent_goes_back_on_time_however_the_clock_is_set() -> Result<()> {
    let bench = Bench::new()?;
    bench.lend("10m")?;
    bench.set_clock("+1d")?;
    let log = bench.agentd.log();
    // It looks for what is due each second.
    std::thread::sleep(Duration::from_secs(3));
    bench.is_lent()?;
    let due = bench.due_in()?;
    ensure!((DAY..=DAY + 600).contains(&due), "due in {due} s, with a clock that is a day ahead: {log}");
    bench.agentd.kill()?;
    bench.agentd.start_again()?;
    std::thread::sleep(Duration::from_secs(3));
    bench.is_lent()?;
    ensure!(bench.agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 2}))?.status == 200);
    bench.is_back()?;
    // Backwards, it would be lent for another day.
    bench.lend("4s")?;
    bench.set_clock("+0")?;
    bench.is_back()?;
    ensure!(!bench.agentd.log().contains("the host was booted since"), "{}", bench.agentd.log());
    Ok(())
}

#[test]
fn over_a_boot_the_time_of_day_decides_and_that_is_said() -> Result<()> {
    let bench = Bench::new()?;
    bench.lend("1h")?;
    bench.agentd.kill()?;
    fs::write(&bench.boot_id, "00000000-0000-4000-8000-000000000002\n")?;
    bench.agentd.start_again()?;
    bench.is_lent()?;
    bench.agentd.kill()?;
    bench.set_clock("+2h")?;
    bench.agentd.start_again()?;
    bench.is_back()?;
    let log = bench.agentd.log();
    ensure!(log.contains("the host was booted since"), "{log}");
    drop(bench.lab);
    Ok(())
}
