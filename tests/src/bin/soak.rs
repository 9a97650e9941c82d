//! `soak`: what takes too long for every day, with a seed that makes a failure come again.
//!
//! ```text
//!   soak kills [--count N] [--seed S] [--threads T]    kills a daemon N times, anywhere and in its recoveries
//!   soak schedules [--count N] [--seed S]              simulates N schedules
//!   soak kills --case S                                the one case of that seed
//!   soak mixed [--seconds N] [--seed S]                N seconds of mixed load with faults
//! ```

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use agentd_tests::kills::{Tally, all, random_case};
use agentd_tests::mixed;
use agentd_tests::sim::{Totals, run_many};
use anyhow::{Context, Result, bail};

const USAGE: &str = "soak schedules [--count N] [--seed S] | soak kills [--count N] [--seed S] [--threads T] | \
                     soak kills --case S | soak mixed [--seconds N] [--seed S]";
/// How often it says how far it has come, in kills.
const TOLD_EVERY: u64 = 500;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.first().map(String::as_str) {
        Some("schedules") => Options::parse(&args[1..]).and_then(|options| schedules(&options)),
        Some("kills") => Options::parse(&args[1..]).and_then(|options| kills(&options)),
        Some("mixed") => Options::parse(&args[1..]).and_then(|options| mixed(&options)),
        _ => Err(anyhow::anyhow!("usage: {USAGE}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug)]
struct Options {
    count: u64,
    seed: u64,
    threads: u64,
    case: Option<u64>,
    seconds: u64,
}

impl Options {
    fn parse(args: &[String]) -> Result<Options> {
        let mut options = Options { count: 10_000, seed: 1, threads: 8, case: None, seconds: 7200 };
        for pair in args.chunks(2) {
            let [name, value] = pair else { bail!("{pair:?} has no value; usage: {USAGE}") };
            let number = value.parse().with_context(|| format!("{name} takes a number, not {value:?}"))?;
            match name.as_str() {
                "--count" => options.count = number,
                "--seed" => options.seed = number,
                "--threads" => options.threads = number,
                "--case" => options.case = Some(number),
                "--seconds" => options.seconds = number,
                _ => bail!("{name:?} isn't known; usage: {USAGE}"),
            }
        }
        Ok(options)
    }
}

/// Mixed load for so long.
fn mixed(options: &Options) -> Result<()> {
    let began = Instant::now();
    let totals = mixed::run(Duration::from_secs(options.seconds), options.seed)?;
    println!("{:.2} hours of mixed load, every promise kept:\n{totals:#?}", began.elapsed().as_secs_f64() / 3600.0);
    Ok(())
}

/// Schedules of the simulation, until one breaks a promise.
fn schedules(options: &Options) -> Result<()> {
    let began = Instant::now();
    let progress = |done: u64| {
        if done.is_multiple_of(100_000) {
            println!("{done} schedules after {:.0} s", began.elapsed().as_secs_f32());
        }
    };
    let Totals { schedules, stats } = run_many(options.seed, options.count, progress)
        .map_err(|broken| anyhow::anyhow!("seed {}: {}", broken.seed, broken.what))?;
    println!(
        "{schedules} schedules with {} crashes and {} operations, of which {} changed something and {} were taken back, \
         abandoned or left partial: every promise kept, in {:.0} s",
        stats.crashes,
        stats.operations,
        stats.changed,
        stats.ended_badly,
        began.elapsed().as_secs_f32()
    );
    Ok(())
}

/// Cases one after the other, each with a seed of its own, until there were enough kills.
fn kills(options: &Options) -> Result<()> {
    let scenarios = all();
    if let Some(seed) = options.case {
        let tally = random_case(&scenarios, seed)?;
        println!("case {seed}: {} kills, whole", tally.kills);
        return Ok(());
    }
    let began = Instant::now();
    let (next, failed) = (AtomicU64::new(options.seed), AtomicBool::new(false));
    let tally: Mutex<Tally> = Mutex::default();
    let work = || -> Result<()> {
        while !failed.load(Ordering::SeqCst) {
            let counted = random_case(&scenarios, next.fetch_add(1, Ordering::SeqCst))
                .inspect_err(|_| failed.store(true, Ordering::SeqCst))?;
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            let before = tally.kills;
            tally.add(counted);
            if tally.kills / TOLD_EVERY > before / TOLD_EVERY {
                println!("{} kills after {} s", tally.kills, began.elapsed().as_secs());
            }
            if tally.kills >= options.count {
                break;
            }
        }
        Ok(())
    };
    let ended: Result<()> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow::anyhow!("a worker broke"))?)
    });
    let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "kills: {} ({} in recoveries), recoveries: {}, places: {:?}, seeds {}..{}, {:.0} s{}",
        tally.kills,
        tally.in_recovery,
        tally.recoveries,
        tally.places,
        options.seed,
        next.load(Ordering::SeqCst),
        began.elapsed().as_secs_f64(),
        if ended.is_ok() { "" } else { ": FAILED" }
    );
    ended.context("run the case again with `soak kills --case SEED`")
}
