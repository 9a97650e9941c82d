//! The cases: one scenario, killed at one place and then in its recoveries. All of them in order, or some at random.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    life::{Home, Kill, Life},
    scenario::{Ask, CONFIG, Scenario, What},
    verify::{Told, verify, verify_keys},
};

/// The outcomes of an operation that nobody knows the end of.
pub(super) const OPEN: &[&str] = &["running", "unknown"];
/// A recovery has no more places than this.
const MOST_PLACES: u64 = 100;
/// Nearly every recovery has this many.
const SOME_PLACES: u64 = 5;

/// What was done and found.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// How often a daemon was killed in the middle of something.
    pub kills: u64,
    /// Of these, in a recovery.
    pub in_recovery: u64,
    /// How often what it had left was taken up by another life to the end, and looked at.
    pub recoveries: u64,
    /// How often it was killed at each kind of place.
    pub places: BTreeMap<String, u64>,
    /// How many places each scenario has.
    pub lengths: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Adds another one's numbers to these.
    pub fn add(&mut self, other: Tally) {
        self.kills += other.kills;
        self.in_recovery += other.in_recovery;
        self.recoveries += other.recoveries;
        for (place, count) in other.places {
            *self.places.entry(place).or_default() += count;
        }
        for (name, length) in other.lengths {
            let known = self.lengths.entry(name).or_default();
            *known = length.max(*known);
        }
    }
}

/// How recoveries are killed.
#[derive(Debug, Clone)]
enum Then {
    /// The first at its first place, the next at its second, and so on until one comes to its end.
    EachPlace,
    /// One after the other like this.
    These(Vec<Kill>),
}

/// Runs one case; whether the scenario itself was cut off, and what was counted.
fn case(scenario: &Scenario, first: Kill, then: &Then) -> Result<(bool, Tally)> {
    let home = Home::new(CONFIG)?;
    let engine = home.folder().join("engine.json");
    let mut spec = scenario.engine.clone();
    spec["state"] = json!(engine);
    let file = home.folder().join("fake.json");
    fs::write(&file, spec.to_string())?;
    let home = home.env("AGENTD_FAKE", &file.to_string_lossy());
    lives(scenario, &home, first, then).with_context(|| {
        let log = home.log();
        format!("scenario {:?}, killed {first:?}, then {then:?}\n--- log ---\n{log}--- end ---", scenario.name)
    })
}

fn lives(scenario: &Scenario, home: &Home, first: Kill, then: &Then) -> Result<(bool, Tally)> {
    let mut tally = Tally::default();
    let mut told = Vec::new();
    if !scenario.before.is_empty() {
        let life = home.start(Kill::Never)?;
        for ask in &scenario.before {
            told.extend(together(&life, std::slice::from_ref(ask), &told)?);
        }
        ensure!(told.iter().all(|told| told.reply.as_ref().is_some_and(|reply| reply.status == 200)), "{told:?}");
        life.kill()?;
    }

    let life = home.start(first)?;
    let cut_off = std::thread::scope(|scope| -> Result<bool> {
        if let Kill::After(time) = first {
            let life = &life;
            scope.spawn(move || {
                std::thread::sleep(time);
                life.kill()
            });
        }
        for group in &scenario.asks {
            if life.is_dead()? {
                break;
            }
            told.extend(together(&life, group, &told)?);
        }
        life.settle(OPEN).map(|settled| !settled)
    })?;
    tally.kills += u64::from(cut_off);
    life.kill()?;

    let each = (1..=MOST_PLACES).map(Kill::At);
    let kills: Vec<Kill> = match then {
        Then::EachPlace => each.collect(),
        Then::These(kills) => kills.clone(),
    };
    for kill in kills {
        let life = home.start(kill)?;
        let lived = std::thread::scope(|scope| {
            if let Kill::After(time) = kill {
                let life = &life;
                scope.spawn(move || {
                    std::thread::sleep(time);
                    life.kill()
                });
            }
            life.settle(OPEN)
        })?;
        life.kill()?;
        if lived {
            break;
        }
        tally.kills += 1;
        tally.in_recovery += 1;
    }

    let life = home.start(Kill::Never)?;
    ensure!(life.settle(OPEN)?, "the last life was killed by nobody");
    verify(scenario, home, &life, &told)?;
    verify_keys(scenario, home, &life, &told)?;
    life.kill()?;
    tally.recoveries += 1;
    for place in home.places() {
        *tally.places.entry(place).or_default() += 1;
    }
    Ok((cut_off, tally))
}

/// Sends what belongs together at once, and gives what each was told.
fn together(life: &Life, asks: &[Ask], before: &[Told]) -> Result<Vec<Told>> {
    std::thread::scope(|scope| {
        let sent: Vec<_> = asks.iter().map(|ask| scope.spawn(move || send(life, ask, before))).collect();
        sent.into_iter().map(|sent| sent.join().map_err(|_| anyhow::anyhow!("a client broke"))?).collect()
    })
}

/// Sends one request.
pub(super) fn send(life: &Life, ask: &Ask, before: &[Told]) -> Result<Told> {
    let path = match ask.what {
        What::Verb(verb, name) => format!("/v1/instances/vm/{name}/{verb}"),
        What::UndoOf(place) => {
            let operation = before.get(place).and_then(Told::operation).context("there is nothing to undo")?;
            format!("/v1/operations/{operation}/undo")
        }
    };
    let mut headers = vec![("Content-Type", "application/json")];
    headers.extend(ask.key.map(|key| ("Idempotency-Key", key)));
    headers.extend(ask.at_once.then_some(("Prefer", "wait=0")));
    let reply = life.ask("POST", &path, &headers, ask.body.to_string().as_bytes())?;
    Ok(Told { ask: ask.clone(), reply })
}

/// Kills every scenario at each of its places in turn; of each `chain`-th of these every recovery at its next place until one
/// comes to its end, of the others one recovery. Several at once, since most of the time is spent waiting.
///
/// # Errors
/// The first case that ends otherwise than it must, with its daemon's log.
pub fn sweep(scenarios: &[Scenario], chain: u64, threads: usize) -> Result<Tally> {
    // The scenarios that have not been seen to end, each with its next place.
    let queue: Mutex<VecDeque<(usize, u64)>> = Mutex::new((0..scenarios.len()).map(|index| (index, 1)).collect());
    let ended: Vec<AtomicBool> = scenarios.iter().map(|_| AtomicBool::new(false)).collect();
    let tally: Mutex<Tally> = Mutex::default();
    let failed = AtomicBool::new(false);
    let lock = |queue: &Mutex<VecDeque<(usize, u64)>>| {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let (index, place) = queue.pop_front()?;
            if !ended[index].load(Ordering::SeqCst) {
                queue.push_back((index, place + 1));
                return Some((index, place));
            }
        }
    };
    let work = || -> Result<()> {
        while let Some((index, place)) = lock(&queue) {
            if failed.load(Ordering::SeqCst) {
                return Ok(());
            }
            let turn = place + index as u64;
            let then = if turn.is_multiple_of(chain) {
                Then::EachPlace
            } else {
                Then::These(vec![Kill::At(1 + turn % SOME_PLACES)])
            };
            let (cut_off, mut counted) = case(&scenarios[index], Kill::At(place), &then)
                .inspect_err(|_| failed.store(true, Ordering::SeqCst))?;
            if cut_off {
                counted.lengths.insert(scenarios[index].name, place);
            } else {
                ended[index].store(true, Ordering::SeqCst);
            }
            tally.lock().unwrap_or_else(PoisonError::into_inner).add(counted);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow::anyhow!("a worker broke"))?)
    })?;
    Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Numbers that look random and are the same again for the same seed (xorshift64*).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers of this seed.
    pub fn new(seed: u64) -> Random {
        // Seeds that are neighbours should not begin alike, and 0 would stay 0.
        Random(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// One below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) % bound.max(1)
    }

    fn kill(&mut self, places: u64) -> Kill {
        if self.below(4) == 0 {
            Kill::After(Duration::from_millis(self.below(700)))
        } else {
            Kill::At(1 + self.below(places))
        }
    }
}

/// Runs the case of this seed: any scenario, killed at any place or moment, its recoveries too.
///
/// # Errors
/// It ends otherwise than it must; the message has the case and its daemon's log.
pub fn random_case(scenarios: &[Scenario], seed: u64) -> Result<Tally> {
    let mut random = Random::new(seed);
    let choice = random.below(scenarios.len() as u64);
    let scenario = &scenarios[usize::try_from(choice)?];
    let first = random.kill(24);
    let then = (0..random.below(5)).map(|_| random.kill(8)).collect();
    case(scenario, first, &Then::These(then)).map(|(_, tally)| tally).with_context(|| format!("seed {seed}"))
}
