//! The record in trouble: a disk that is full or read-only, a file that was cut off, overwritten or is newer than agentd, a
//! backend that is away. Nothing is changed that can't be recorded, nothing that was recorded is taken for lost, and it is
//! said loudly.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use agentd_tests::kills::{Home, Kill};
use agentd_tests::lab::{Agentd, Docker, Lab, Response, binary, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: &str = "[capacity]\ncpus = 16\nmemory = \"64GiB\"\n[scaling]\nmax_cpus = 16\nmax_memory = \"32GiB\"\n";

/// A daemon on a fake engine that outlives it, with its state folder where the test wants it.
struct Bench {
    agentd: Agentd,
    folder: TempDir,
    lab: Option<Lab>,
}

fn engine(folder: &Path, extra: &Value) -> Result<PathBuf> {
    let vm = |name: &str| json!({"name": name, "cpus": 2, "memory": 1u64 << 30, "max_cpus": 8, "max_memory": 8u64 << 30, "used": 100 << 20});
    let mut spec = json!({"instances": [vm("web"), vm("db")], "state": folder.join("engine.json")});
    for (member, value) in extra.as_object().into_iter().flatten() {
        spec[member] = value.clone();
    }
    let file = folder.join("fake.json");
    fs::write(&file, spec.to_string())?;
    Ok(file)
}

impl Bench {
    /// One with its state on the same disk as everything else.
    fn new(extra: &Value) -> Result<Bench> {
        let folder = tempfile::tempdir()?;
        let file = engine(folder.path(), extra)?;
        let agentd = Agentd::with_config(CONFIG).folder(folder.path()).env("AGENTD_FAKE", &file.to_string_lossy());
        Ok(Bench { agentd: agentd.start()?, folder, lab: None })
    }

    /// One with its state on a small disk of its own, which only a lab sees.
    fn on_a_small_disk(extra: &Value) -> Result<Bench> {
        let (folder, lab) = (tempfile::tempdir()?, Lab::new()?);
        let file = engine(folder.path(), extra)?;
        let state = folder.path().join("state");
        fs::create_dir(&state)?;
        lab.run("mount", &["-t", "tmpfs", "-o", "size=2m", "small", &state.to_string_lossy()])?;
        let agentd = Agentd::with_config(CONFIG).folder(folder.path()).env("AGENTD_FAKE", &file.to_string_lossy());
        Ok(Bench { agentd: agentd.inside(&lab).start()?, folder, lab: Some(lab) })
    }

    /// Runs a shell's line with the state folder as `$0`, where the daemon sees it.
    fn shell(&self, line: &str) -> Result<String> {
        let lab = self.lab.as_ref().context("a small disk")?;
        lab.run("sh", &["-c", line, &self.agentd.state_dir().to_string_lossy()])
    }

    fn fill(&self) -> Result<()> {
        self.shell("dd if=/dev/zero of=\"$0/filler\" bs=4k 2>/dev/null || true").map(drop)
    }

    fn make_room(&self) -> Result<()> {
        self.shell("rm \"$0/filler\"").map(drop)
    }

    fn store(&self) -> PathBuf {
        self.agentd.state_dir().join("agentd.db")
    }

    /// What the engine has, by its own file: none before its first call.
    fn engine(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.folder.path().join("engine.json")).ok()?).ok()
    }

    fn resize(&self, name: &str, body: Value) -> Result<Response> {
        self.agentd.post(&format!("/v1/instances/vm/{name}/resize"), &body)
    }

    fn history(&self) -> Result<Vec<Value>> {
        let reply = self.agentd.get("/v1/history?limit=1000")?;
        ensure!(reply.status == 200, "{}", reply.text());
        Ok(reply.json()["items"].as_array().cloned().unwrap_or_default())
    }

    fn version(&self, name: &str) -> Result<Value> {
        Ok(self.agentd.get(&format!("/v1/instances/vm/{name}"))?.json()["version"].clone())
    }

    fn ends(&self, id: &str) -> Result<Value> {
        wait_until("the end of an operation", LIMIT, || {
            let operation = self.agentd.get(&format!("/v1/operations/{id}"))?.json();
            Ok((operation["outcome"] != "running").then_some(operation))
        })
    }

    /// Changes are refused for the record's sake, reads go on, and health says why.
    fn is_in_trouble(&self, why: &str) -> Result<()> {
        let before = self.engine();
        let refused = self.resize("web", json!({"cpus": 3}))?;
        assert_eq!((refused.status, &refused.json()["code"]), (503, &json!("store-unavailable")), "{}", refused.text());
        assert_eq!(self.engine(), before, "nothing was done");
        let ctl = self.agentd.ctl(&["resize", "web", "--cpus", "3"]);
        assert_eq!(ctl.code, Some(3), "{ctl:?}");
        assert!(ctl.stderr.contains("store-unavailable") && ctl.stderr.contains(why), "{ctl:?}");
        for read in ["/v1/instances", "/v1/instances/vm/web", "/v1/capacity", "/v1/health", "/v1/sizes"] {
            assert_eq!(self.agentd.get(read)?.status, 200, "{read}");
        }
        let health = self.agentd.ctl(&["health"]);
        assert_eq!(health.code, Some(3), "{health:?}");
        let said = format!("{}{}", health.stdout, health.stderr);
        assert!(said.contains("changes are refused") && said.contains(why), "{health:?}");
        let log = self.agentd.log();
        assert!(log.lines().any(|line| line.contains("ERROR") && line.contains("changes are refused")), "{log}");
        Ok(())
    }

    fn is_well(&self) -> Result<()> {
        wait_until("the record to be well", LIMIT, || {
            Ok((self.agentd.get("/v1/health")?.json()["ok"] == true).then_some(()))
        })
    }
}

#[test]
fn a_full_disk_refuses_changes_before_they_begin_and_takes_them_again_when_there_is_room() -> Result<()> {
    let bench = Bench::on_a_small_disk(&json!({}))?;
    assert_eq!(bench.resize("db", json!({"cpus": 3}))?.status, 200);
    let before = bench.history()?;
    bench.fill()?;
    bench.is_in_trouble("full")?;
    // And it goes on saying so, looked at again and again: a little that still fits is not room for a change.
    for _ in 0..15 {
        std::thread::sleep(Duration::from_millis(200));
        let health = bench.agentd.get("/v1/health")?.json();
        assert_eq!(health["ok"], false, "{health}");
    }
    assert_eq!(bench.history()?, before, "what is on record can be read on a full disk");
    bench.make_room()?;
    assert_eq!(bench.resize("web", json!({"cpus": 3}))?.status, 200, "without a restart");
    bench.is_well()?;
    let changes = |history: &[Value]| -> Vec<Value> {
        history.iter().filter(|entry| entry["outcome"] == "changed").cloned().collect()
    };
    let after = bench.history()?;
    assert_eq!(changes(&after)[1..], changes(&before)[..], "{after:?}");
    bench.agentd.kill()?;
    bench.agentd.start_again()?;
    assert_eq!(bench.history()?, after);
    Ok(())
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_change_leaves_it_whole_told_and_recorded_later() -> Result<()> {
    // One whose steps are exact, one whose only other step went on record with its plan, and one with another that isn't begun
    // unless that is on record.
    let bodies = [
        (json!({"cpu_limit": 1.5}), "changed"),
        (json!({"memory": "2GiB"}), "changed"),
        (json!({"memory": "2GiB", "cpus": 3}), "rolled-back"),
    ];
    for (body, outcome) in bodies {
        let bench = Bench::on_a_small_disk(&json!({"delay_ms": 500}))?;
        let headers = [("Content-Type", "application/json"), ("Prefer", "wait=0")];
        let path = "/v1/instances/vm/web/resize";
        let reply = bench.agentd.http("POST", path, &headers, body.to_string().as_bytes())?;
        assert_eq!(reply.status, 202, "{}", reply.text());
        let id = reply.json()["operation"].as_str().unwrap_or_default().to_owned();
        wait_until("its first step", LIMIT, || {
            let steps = bench.agentd.get(&format!("/v1/operations/{id}"))?.json()["steps"].to_string();
            Ok(steps.contains("doing").then_some(()))
        })?;
        bench.fill()?;
        let told = bench.ends(&id)?;
        assert_eq!(told["outcome"], outcome, "{told}");
        bench.is_in_trouble("full")?;
        bench.make_room()?;
        bench.is_well()?;
        bench.agentd.kill()?;
        bench.agentd.start_again()?;
        let recorded = bench.ends(&id)?;
        assert_eq!((&recorded["outcome"], &recorded["steps"]), (&told["outcome"], &told["steps"]), "{recorded}");
        let history = bench.history()?;
        let ends = history.iter().filter(|entry| entry["operation"] == id.as_str() && entry["outcome"] == outcome);
        assert_eq!(ends.count(), 1, "{history:?}");
        let held = bench.agentd.get("/v1/instances/vm/web")?.json();
        assert_eq!(held["holds"], json!([]), "{held}");
        let web = bench.engine().context("the engine's file")?["web"].clone();
        assert_eq!(web["live"], web["saved"], "{web}");
    }
    Ok(())
}

#[test]
fn a_disk_that_can_only_be_read_is_told_and_written_again_once_it_can_be() -> Result<()> {
    let bench = Bench::on_a_small_disk(&json!({}))?;
    assert_eq!(bench.resize("db", json!({"cpus": 3}))?.status, 200);
    let before = bench.history()?;
    let remount = |how: &str| bench.shell(&format!("mount -o remount,{how} \"$0\""));
    // Linux makes no disk read-only below files that are open for writing: the daemon is away meanwhile.
    bench.agentd.stop()?;
    remount("ro")?;
    bench.agentd.start_again()?;
    bench.is_in_trouble("ead-only")?;
    remount("rw")?;
    bench.is_well()?;
    assert_eq!(bench.resize("web", json!({"cpus": 3}))?.status, 200, "without a restart");
    let after = bench.history()?;
    assert!(before.iter().all(|entry| after.contains(entry)), "{after:?}");
    Ok(())
}

/// What a damaged store must not be taken for, and must stay.
fn is_left_alone_as_damaged(bench: &Bench, damaged: &[u8], why: &str) -> Result<()> {
    bench.is_in_trouble(why)?;
    let reply = bench.agentd.get("/v1/history")?;
    assert_eq!((reply.status, &reply.json()["code"]), (503, &json!("store-unavailable")), "never an empty one");
    assert_eq!(bench.agentd.get("/v1/operations")?.status, 503, "never an empty one");
    // It is tried again and again; what is there stays.
    let tries = bench.agentd.log().len();
    assert!(fs::read(bench.store())? == damaged, "the damaged file is left as it is ({tries})");
    Ok(())
}

#[test]
fn a_store_that_was_cut_off_or_overwritten_is_never_taken_for_an_empty_one() -> Result<()> {
    let noise: Vec<u8> = (0u32..40_960).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let whole_pages = |file: &[u8], pages: usize| file[..(pages * 4096).min(file.len())].to_vec();
    let overwritten = |file: &[u8]| {
        let mut file = file.to_vec();
        for byte in file.iter_mut().skip(4096) {
            *byte = 0xa5;
        }
        file
    };
    for while_it_runs in [false, true] {
        for (how, damage) in [
            ("to nothing", &(|_: &[u8]| Vec::new()) as &dyn Fn(&[u8]) -> Vec<u8>),
            ("to one page", &|file| whole_pages(file, 1)),
            ("to three pages", &|file| whole_pages(file, 3)),
            ("to half a page", &|file| file[..2048].to_vec()),
            ("by noise", &|_| noise.clone()),
            ("but for its first page", &overwritten),
        ] {
            let bench = Bench::new(&json!({}))?;
            assert_eq!(bench.resize("web", json!({"cpus": 3, "memory": "2GiB"}))?.status, 200);
            if !while_it_runs {
                assert_eq!(bench.agentd.stop()?, Some(0));
                // Whoever closes it last brings the log beside it into the file.
                rusqlite::Connection::open(bench.store())?.query_row("SELECT count(*) FROM history", [], |_| Ok(()))?;
            }
            let whole = fs::read(bench.store())?;
            let damaged = damage(&whole);
            fs::write(bench.store(), &damaged)?;
            if while_it_runs {
                bench.agentd.kill()?;
                for beside in ["agentd.db-wal", "agentd.db-shm"] {
                    let _ = fs::remove_file(bench.agentd.state_dir().join(beside));
                }
            }
            bench.agentd.start_again()?;
            is_left_alone_as_damaged(&bench, &damaged, "can't be read")
                .with_context(|| format!("{how}, while it runs: {while_it_runs}"))?;
            // Put back, it is the record again.
            if !while_it_runs {
                fs::write(bench.store(), &whole)?;
                bench.is_well()?;
                assert!(bench.history()?.iter().any(|entry| entry["outcome"] == "changed"));
            }
        }
    }
    Ok(())
}

#[test]
fn a_store_of_a_newer_agentd_is_left_alone() -> Result<()> {
    let bench = Bench::new(&json!({}))?;
    assert_eq!(bench.resize("web", json!({"cpus": 3}))?.status, 200);
    assert_eq!(bench.agentd.stop()?, Some(0));
    rusqlite::Connection::open(bench.store())?.pragma_update(None, "user_version", 99)?;
    let newer = fs::read(bench.store())?;
    bench.agentd.start_again()?;
    is_left_alone_as_damaged(&bench, &newer, "newer agentd")
}

#[test]
fn a_state_folder_has_one_agentd_and_a_store_that_vanished_is_not_a_new_one() -> Result<()> {
    let bench = Bench::new(&json!({}))?;
    assert_eq!(bench.resize("web", json!({"cpus": 3}))?.status, 200);
    let second = Command::new(binary("AGENTD_BIN", "agentd")?)
        .args(["--config".as_ref(), bench.agentd.config_file().as_os_str()])
        .args(["--state-dir".as_ref(), bench.agentd.state_dir().as_os_str()])
        .args(["--socket".as_ref(), bench.folder.path().join("second.sock").as_os_str()])
        .output()?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && said.contains("in use by another agentd"), "{said}");
    assert_eq!(bench.resize("web", json!({"cpus": 4}))?.status, 200, "the first goes on");

    assert_eq!(bench.agentd.stop()?, Some(0));
    let aside = bench.folder.path().join("aside.db");
    fs::rename(bench.store(), &aside)?;
    bench.agentd.start_again()?;
    bench.is_in_trouble("it is gone")?;
    assert!(!bench.store().exists(), "no new one is made in its place");
    fs::rename(&aside, bench.store())?;
    bench.is_well()?;
    assert_eq!(bench.history()?.iter().filter(|entry| entry["outcome"] == "changed").count(), 2);
    Ok(())
}

#[test]
fn holds_history_keys_and_versions_survive_the_daemon() -> Result<()> {
    // The fifth call of a growth fails, and so does what takes the one before it back.
    let faults = json!({"faults": [{"instance": "vm/web", "nth": 2, "fault": "fail"},
        {"instance": "vm/web", "nth": 3, "fault": "fail-after"}, {"instance": "vm/web", "nth": 4, "fault": "fail"}]});
    let bench = Bench::new(&faults)?;
    let key = [("Content-Type", "application/json"), ("Idempotency-Key", "once")];
    let path = "/v1/instances/vm/db/resize";
    let first = bench.agentd.http("POST", path, &key, br#"{"cpus":"+1"}"#)?;
    assert_eq!(first.status, 200, "{}", first.text());
    let partial = bench.resize("web", json!({"cpus": 4, "memory": "2GiB"}))?;
    assert_eq!(partial.json()["code"], "partial", "{}", partial.text());
    for hard in [false, true] {
        let (history, versions) = (bench.history()?, (bench.version("web")?, bench.version("db")?));
        if hard {
            bench.agentd.kill()?
        } else {
            assert_eq!(bench.agentd.stop()?, Some(0))
        }
        bench.agentd.start_again()?;
        assert_eq!(bench.history()?, history);
        assert_eq!((bench.version("web")?, bench.version("db")?), versions, "nobody changed them (hard: {hard})");
        let again = bench.agentd.http("POST", path, &key, br#"{"cpus":"+1"}"#)?;
        assert_eq!((again.status, &again.body), (first.status, &first.body));
        let held = bench.resize("web", json!({"cpus": 3}))?;
        assert_eq!((held.status, &held.json()["code"]), (409, &json!("held")));
        // Nobody waits for the record of a refusal.
        wait_until("the refusal on record", LIMIT, || Ok((bench.history()?.len() == history.len() + 1).then_some(())))?;
    }
    assert_eq!(bench.agentd.ctl(&["clear-hold", "web"]).code, Some(0));
    bench.agentd.kill()?;
    bench.agentd.start_again()?;
    assert_eq!(bench.resize("web", json!({"cpus": 3}))?.status, 200, "a hold that was cleared stays so");
    let history = bench.history()?;
    let cleared: Vec<_> = history.iter().filter(|entry| entry["happening"] == "hold-cleared").collect();
    assert!(matches!(&cleared[..], [entry] if entry["ref"] == "vm/web" && entry["who"]["uid"] == 0), "{history:?}");
    Ok(())
}

#[test]
fn a_backend_that_is_away_at_the_start_keeps_its_promises_charged() -> Result<()> {
    let lab = Lab::new()?;
    let mut docker = Docker::start(&lab)?;
    docker.run("big", &["--cpus", "1.5", "-m", "64m"])?;
    let folder = tempfile::tempdir()?;
    let file = engine(folder.path(), &json!({}))?;
    let config = format!(
        "[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 7\nmemory = \"64GiB\"\n[scaling]\nmax_cpus = 16\n",
        docker.socket().display()
    );
    let home = Home::new(&config)?.env("AGENTD_FAKE", &file.to_string_lossy());
    let committed = |capacity: &Value| capacity["cpus"]["committed"].clone();
    let ask = |life: &agentd_tests::kills::Life, reference: &str, body: Value| -> Result<Option<(u16, Value)>> {
        let json = [("Content-Type", "application/json")];
        let reply =
            life.ask("POST", &format!("/v1/instances/{reference}/resize"), &json, body.to_string().as_bytes())?;
        Ok(reply.map(|reply| (reply.status, reply.json())))
    };
    // The first life is killed when the engine has taken a growth and nobody has recorded it.
    let life = home.start(Kill::At(4))?;
    assert_eq!(committed(&life.get("/v1/capacity")?.context("it lives")?), 5.5);
    assert!(ask(&life, "container/big", json!({"cpus": 2}))?.is_none(), "it is killed in the middle");
    assert_eq!(home.places(), ["backend: after"]);
    docker.kill()?;

    let life = home.start(Kill::Never)?;
    let capacity = life.get("/v1/capacity")?.context("it lives")?;
    assert_eq!((committed(&capacity), &capacity["unavailable"]), (json!(6), &json!(["container"])), "{capacity}");
    let (status, refused) = ask(&life, "vm/web", json!({"cpus": 4}))?.context("it lives")?;
    assert_eq!((status, &refused["code"]), (429, &json!("capacity-exceeded")), "{refused}");
    assert_eq!(ask(&life, "vm/web", json!({"cpus": 3}))?.context("it lives")?.0, 200, "what fits is done");
    let list = life.get("/v1/instances")?.context("it lives")?;
    assert!(list["items"].to_string().contains("recovering"), "{list}");

    docker.start_again()?;
    assert!(life.settle(&["running", "unknown"])?);
    let operations = life.operations()?.context("it lives")?;
    let cut_off = operations.iter().find(|operation| operation["ref"] == "container/big").context("it is on record")?;
    let quota = docker.cgroup("big")?.cpu_quota()?;
    let (wanted, promised) = match cut_off["outcome"].as_str() {
        Some("changed") => (2.0, 7.0),
        Some("rolled-back") => (1.5, 6.5),
        _ => anyhow::bail!("{cut_off}"),
    };
    #[allow(clippy::cast_precision_loss, reason = "a quota is some hundred thousand microseconds")]
    let has = quota.0.context("a quota")? as f64 / quota.1 as f64;
    assert!((has - wanted).abs() < 0.001, "{quota:?} and {cut_off}");
    assert_eq!(committed(&life.get("/v1/capacity")?.context("it lives")?).as_f64(), Some(promised));
    Ok(())
}

/// Twenty who send the same under the same key: one effect, and the same answer for all, also of a daemon that is killed
/// before it has answered any of them.
#[test]
fn twenty_clients_with_one_key_have_one_effect_and_one_answer_between_them() -> Result<()> {
    for place in [None, Some(1), Some(2), Some(3), Some(5), Some(8), Some(10), Some(12), Some(13), Some(14)] {
        let folder = tempfile::tempdir()?;
        let file = engine(folder.path(), &json!({"delay_ms": 20}))?;
        let home = Home::new(CONFIG)?.env("AGENTD_FAKE", &file.to_string_lossy());
        let twenty = |life: &agentd_tests::kills::Life| -> Result<Vec<Option<Response>>> {
            let path = "/v1/instances/vm/web/resize";
            let headers = [("Content-Type", "application/json"), ("Idempotency-Key", "all-of-us")];
            let body = br#"{"cpus":"+1","memory":"+256MiB"}"#;
            // One uid may hold sixteen connections; who finds no place comes again.
            let one = || loop {
                match life.ask("POST", path, &headers, body)? {
                    Some(reply) if reply.json()["code"] == "overloaded" => {
                        wait_until("a place", LIMIT, || {
                            Ok(life.ask("GET", "/v1/health", &[], b"")?.is_none_or(|it| it.status == 200).then_some(()))
                        })?;
                    }
                    other => return Ok(other),
                }
            };
            std::thread::scope(|scope| {
                let clients: Vec<_> = (0..20).map(|_| scope.spawn(one)).collect();
                clients.into_iter().map(|client| client.join().map_err(|_| anyhow::anyhow!("it broke"))?).collect()
            })
        };
        let mut told = Vec::new();
        if let Some(place) = place {
            let life = home.start(Kill::At(place))?;
            told.extend(twenty(&life)?.into_iter().flatten());
            ensure!(life.is_dead()?, "place {place} was not reached");
        }
        let life = home.start(Kill::Never)?;
        told.extend(twenty(&life)?.into_iter().flatten());
        assert!(life.settle(&["running", "unknown"])?);
        assert!(told.len() >= 20, "{place:?}: {} answers", told.len());
        for reply in &told {
            let (first, text) = (&told[0], reply.text());
            assert_eq!((reply.status, &text), (first.status, &first.text()), "{place:?}");
        }
        let operations = life.operations()?.context("it lives")?;
        assert_eq!(operations.len(), 1, "{place:?}: {operations:?}");
        let effect = usize::from(operations[0]["outcome"] == "changed");
        let web = life.get("/v1/instances/vm/web")?.context("it lives")?;
        for side in ["accepted", "observed", "persistent"] {
            assert_eq!(web["cpus"][side], 2 + effect, "{place:?}: {operations:?}");
            assert_eq!(web["memory"][side], (1024 + 256 * effect) << 20, "{place:?}: {operations:?}");
        }
    }
    Ok(())
}
