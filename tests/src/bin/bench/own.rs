//! What agentd itself takes of a change, on a fake engine that answers at once: time, throughput, and what readers notice.

use std::{
    cell::RefCell,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use agentd_tests::{
    bench::{Contender, Figures, Kept, Level, Match, Report, Row, Unit, milliseconds, percentile},
    lab::Agentd,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::tell;

const MIB: u64 = 1 << 20;
/// Caps that nothing here comes near.
const CONFIG: &str =
    "[capacity]\ncpus = 100000\nmemory = \"100000GiB\"\n[[limit]]\nmatch = \"*\"\nshrink = \"always\"\n";
/// Pairs of a row about single changes.
const CHANGES: usize = 1000;
/// Clients of the row about throughput.
const CLIENTS: usize = 64;
/// How long they go on.
const LOAD: Duration = Duration::from_secs(10);
/// Changes that readers are beside, and by how many clients at once.
const BESIDE: usize = 1000;
const BESIDE_CLIENTS: usize = 8;
/// How often eight are changed at once.
const AT_ONCE: usize = 30;
/// Requests after which memory must be what it was.
const MILLION: usize = 1_000_000;

/// All rows of this file.
pub(crate) fn measure(report: &mut Report) -> Result<()> {
    let one = start(1, 0)?;
    let thousand = start(1000, 0)?;
    let own = own_time(&one)?;
    tell(report, [own.ours(1.5), own.ratio_of_p99(2.0)]);
    tell(report, [beside_a_thousand(&one, &thousand)?.ratio(1.1)]);
    tell(report, throughput(&thousand)?);
    tell(report, [at_once()?]);
    tell(report, [reads(&thousand)?.ratio_of_p99(2.0)]);
    tell(report, [flat()?]);
    Ok(())
}

/// An agentd over so many fake VMs, each call to which takes so long.
fn start(instances: usize, delay_ms: u64) -> Result<Agentd> {
    let of = |number: usize| json!({"name": format!("vm-{number}"), "cpus": 1, "memory": 512 * MIB, "max_cpus": 8, "max_memory": 1024 * MIB});
    let instances: Vec<Value> = (0..instances).map(of).collect();
    Agentd::with_config(CONFIG).fake(json!({"instances": instances, "delay_ms": delay_ms, "announces": true})).start()
}

/// A change of one VM's memory and CPU limit, live.
fn change(level: Level) -> String {
    let (mib, limit) = if level == Level::Low { (512, 0.5) } else { (768, 0.75) };
    json!({"memory": mib * MIB, "cpu_limit": limit, "apply": "live"}).to_string()
}

fn resize(kept: &mut Kept, number: usize, body: &str) -> Result<()> {
    let reply = kept.ask("POST", &format!("/v1/instances/vm/vm-{number}/resize"), body)?;
    ensure!(reply.status == 200 && reply.json()["outcome"] == "changed", "{}", reply.text());
    Ok(())
}

fn changing<'a>(name: &str, agentd: &Agentd) -> Result<Contender<'a>> {
    let kept = RefCell::new(Kept::open(&agentd.socket())?);
    Ok(Contender::call(name, move |level| resize(&mut kept.borrow_mut(), 0, &change(level))))
}

/// Two commits to a SQLite of the same settings, beside the daemon's own.
fn commits(folder: &Path) -> Result<impl Fn(Level) -> Result<()>> {
    let db = rusqlite::Connection::open(folder.join("bare.db"))?;
    db.pragma_update(None, "synchronous", "EXTRA")?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, body TEXT NOT NULL)", [])?;
    // About what an operation takes on record.
    let body = "x".repeat(3000);
    Ok(move |_| {
        for _ in 0..2 {
            db.prepare_cached("INSERT INTO rows (body) VALUES (?1)")?.execute([&body])?;
        }
        Ok(())
    })
}

/// What a change takes where the engine takes nothing.
fn own_time(agentd: &Agentd) -> Result<Figures> {
    let ours = changing("all that is agentd's, over a kept connection", agentd)?;
    let rival = Contender::call("two bare commits (SQLite, synced)", commits(agentd.folder())?);
    Match::new("own time", ours, rival).run(CHANGES)
}

fn beside_a_thousand(one: &Agentd, thousand: &Agentd) -> Result<Figures> {
    let ours = changing("a change with 1,000 instances", thousand)?;
    Match::new("among 1,000", ours, changing("the same with 1", one)?).run(CHANGES)
}

/// Changes from many clients, each of its own VM: how many in a second, and how long one takes.
fn throughput(agentd: &Agentd) -> Result<[Row; 2]> {
    eprintln!("measuring: throughput …");
    let before = changes_on_record(agentd)?;
    let begun = Instant::now();
    let client = |number: usize| -> Result<Vec<Duration>> {
        let mut kept = Kept::open(&agentd.socket())?;
        let mut times = Vec::new();
        // What single changes left behind is either level.
        resize(&mut kept, number, &json!({"memory": 640 * MIB, "apply": "live"}).to_string())?;
        for level in [Level::High, Level::Low].into_iter().cycle() {
            if begun.elapsed() >= LOAD {
                break;
            }
            let asked = Instant::now();
            resize(&mut kept, number, &change(level))?;
            times.push(asked.elapsed());
        }
        Ok(times)
    };
    let times: Vec<Vec<Duration>> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
        clients.into_iter().map(|client| client.join().expect("a client")).collect::<Result<_>>()
    })?;
    let took = begun.elapsed().as_secs_f64();
    let made: usize = times.iter().map(|times| times.len() + 1).sum();
    let recorded = changes_on_record(agentd)? - before;
    ensure!(recorded == made, "{made} changes were told, {recorded} are on record");
    let all: Vec<f64> = times.iter().flatten().map(|time| milliseconds(*time)).collect();
    let p99: Vec<f64> =
        times.iter().map(|times| percentile(&times.iter().map(|t| milliseconds(*t)).collect::<Vec<_>>(), 99)).collect();
    #[allow(clippy::cast_precision_loss, reason = "some ten thousand")]
    let rate = made as f64 / took;
    let ours = format!("changes from {CLIENTS} clients");
    let rate = Row { samples: made, ..Row::alone("throughput", &ours, Unit::PerSecond, &[rate], 2000.0) };
    let slow = Row {
        value: percentile(&all, 99),
        samples: made,
        ..Row::alone("throughput, p99", &ours, Unit::Milliseconds, &p99, 50.0)
    };
    Ok([rate, slow])
}

/// How many changes the history has.
fn changes_on_record(agentd: &Agentd) -> Result<usize> {
    let (mut kept, mut count, mut before) = (Kept::open(&agentd.socket())?, 0, String::new());
    loop {
        let page = kept.ask("GET", &format!("/v1/history?limit=1000{before}"), "")?.json();
        let items = page["items"].as_array().context("a page of the history")?;
        count += items.iter().filter(|entry| entry["happening"] == "change" && entry["outcome"] == "changed").count();
        let Some(next) = page["next"].as_u64() else { return Ok(count) };
        before = format!("&before={next}");
    }
}

/// Eight VMs whose engine takes a second for each: at once they take little more than one.
fn at_once() -> Result<Row> {
    eprintln!("measuring: eight at once …");
    let agentd = start(8, 1000)?;
    let mut ratios = Vec::new();
    for level in [Level::High, Level::Low].into_iter().cycle().take(AT_ONCE) {
        let body = json!({"cpu_limit": if level == Level::High { 0.75 } else { 0.5 }, "apply": "live"}).to_string();
        let (agentd, body) = (&agentd, &body);
        let begun = Instant::now();
        thread::scope(|scope| {
            let one = |number: usize| scope.spawn(move || resize(&mut Kept::open(&agentd.socket())?, number, body));
            let all: Vec<_> = (0..8).map(one).collect();
            all.into_iter().try_for_each(|one| one.join().expect("a client"))
        })?;
        ratios.push(begun.elapsed().as_secs_f64());
    }
    let row =
        Row::alone("eight at once", "eight changes that take 1 s each in their engine", Unit::Ratio, &ratios, 1.2);
    Ok(Row { rival: "one second".into(), ..row })
}

/// Answers each byte with a byte.
fn echo(listener: &UnixListener) {
    for stream in listener.incoming().map_while(Result::ok) {
        thread::spawn(move || {
            let (mut stream, mut byte) = (stream, [0; 256]);
            while let Ok(count @ 1..) = stream.read(&mut byte) {
                if stream.write_all(&byte[..count]).is_err() {
                    return;
                }
            }
        });
    }
}

/// Reads of one instance while others change, beside an echo over a Unix socket on the same busy machine.
fn reads(agentd: &Agentd) -> Result<Figures> {
    eprintln!("measuring: reads beside changes …");
    let path = agentd.folder().join("echo.sock");
    let listener = UnixListener::bind(&path)?;
    thread::spawn(move || echo(&listener));
    let mut times = Vec::new();
    // Each round has changes of its own, until there are enough reads for a percentile.
    while times.len() < 20_000 {
        let (over, made) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| -> Result<()> {
            let writer = |number: usize| -> Result<()> {
                let mut kept = Kept::open(&agentd.socket())?;
                for level in [Level::High, Level::Low].into_iter().cycle() {
                    if made.fetch_add(1, Ordering::Relaxed) >= BESIDE {
                        break;
                    }
                    let body = change(level);
                    let reply = kept.ask("POST", &format!("/v1/instances/vm/vm-{number}/resize"), &body)?;
                    ensure!(reply.status == 200, "{}", reply.text());
                }
                Ok(())
            };
            let writers: Vec<_> = (0..BESIDE_CLIENTS).map(|number| scope.spawn(move || writer(number))).collect();
            let reader = scope.spawn(|| -> Result<Vec<(Duration, Duration)>> {
                let (mut kept, mut echo) = (Kept::open(&agentd.socket())?, UnixStream::connect(&path)?);
                let mut times = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    let reply = kept.ask("GET", "/v1/instances/vm/vm-999", "")?;
                    let ours = asked.elapsed();
                    ensure!(reply.status == 200, "{}", reply.text());
                    let asked = Instant::now();
                    echo.write_all(&[0; 256])?;
                    echo.read_exact(&mut [0; 256])?;
                    times.push((ours, asked.elapsed()));
                }
                Ok(times)
            });
            let ended: Result<Vec<()>> = writers.into_iter().map(|writer| writer.join().expect("a writer")).collect();
            over.store(true, Ordering::Relaxed);
            times.extend(reader.join().expect("the reader")?);
            ended.map(drop)
        })?;
    }
    Ok(Figures::new("reads beside changes", "a read while 1,000 changes run", "an echo under the same load", times))
}

/// What of a process' memory is its own, in bytes (`RssAnon` of /proc).
pub(crate) fn own_memory(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib =
        status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().split(' ').next()?.parse::<u64>().ok());
    Ok(kib.context("RssAnon")? << 10)
}

/// Memory after a million requests beside what it was after the first tenth of them.
fn flat() -> Result<Row> {
    eprintln!("measuring: a million requests …");
    let agentd = start(1000, 0)?;
    let pid = agentd.pid().context("it runs")?;
    let some = |count: usize| -> Result<()> {
        let client = |number: usize| -> Result<()> {
            let mut kept = Kept::open(&agentd.socket())?;
            for turn in 0..count / 4 {
                // One in a hundred is a change.
                if turn % 100 == 0 {
                    let level = if turn % 200 == 0 { Level::High } else { Level::Low };
                    let reply = kept.ask("POST", &format!("/v1/instances/vm/vm-{number}/resize"), &change(level))?;
                    ensure!(reply.status == 200, "{}", reply.text());
                } else {
                    let reply = kept.ask("GET", &format!("/v1/instances/vm/vm-{}", turn % 1000), "")?;
                    ensure!(reply.status == 200, "{}", reply.text());
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let clients: Vec<_> = (0..4).map(|number| scope.spawn(move || client(number))).collect();
            clients.into_iter().try_for_each(|client| client.join().expect("a client"))
        })
    };
    some(MILLION / 10)?;
    let early = own_memory(pid)?;
    some(MILLION - MILLION / 10)?;
    let late = own_memory(pid)?;
    #[allow(clippy::cast_precision_loss, reason = "some megabytes")]
    let ratio = late as f64 / early as f64;
    let row = Row::alone("memory, flat", "agentd’s own memory after 1,000,000 requests", Unit::Ratio, &[ratio], 1.1);
    Ok(Row { rival: "after 100,000".into(), samples: MILLION, ..row })
}
