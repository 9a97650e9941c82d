//! A schedule, carried out: lives of the daemon one after the other, over one hypervisor and one disk that outlive them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agentd::backend::Backend;
use agentd::backend::fake::{Fake, FakeSpec};
use agentd::clock;
use agentd::engine::{Ask, Engine, Failure, Peer, Settings, Wish};
use agentd::failpoint::{Fate, hook};
use agentd::store::{Location, Store};
use agentd_core::access::{AccessTable, Caller, Right};
use agentd_core::api::OperationView;
use agentd_core::config::Config;
use agentd_core::instance::{Kind, Ref, Target};
use agentd_core::operation::{Outcome, Who};
use agentd_core::plan::{HostCapacity, Values};
use agentd_core::units::{ByteCount, Cpus, Limit};
use tokio::sync::Notify;
use tokio::time::sleep;

use super::check;
use super::disk::{Disk, Faults};
use super::rng::Rng;
use super::schedule::{End, Request, Schedule, What, some_time};

/// What happened in a schedule.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Kills and power cuts.
    pub crashes: u64,
    /// Operations on record at the end.
    pub operations: u64,
    /// Of these, those that changed something.
    pub changed: u64,
    /// And those that were taken back, abandoned or left partial.
    pub ended_badly: u64,
}

/// What a caller was told.
#[derive(Debug, Clone)]
pub(super) struct Said {
    pub(super) key: Option<String>,
    pub(super) id: String,
    pub(super) reply: Option<Result<OperationView, Failure>>,
    /// It was told that the operation runs.
    pub(super) acknowledged: bool,
}

pub(super) struct World {
    pub(super) schedule: Schedule,
    pub(super) config: Config,
    pub(super) fake: Arc<Fake>,
    disk: Disk,
    created: Cell<bool>,
    pub(super) said: RefCell<Vec<Said>>,
    /// How far each caller has come.
    done: RefCell<Vec<usize>>,
    rng: RefCell<Rng>,
    /// A cap that was seen to be passed.
    passed: Rc<RefCell<Option<String>>>,
    power_was_cut: Cell<bool>,
    /// A sync has failed since the host had its power last.
    unsynced: Cell<bool>,
    /// The time of day at which the next life begins.
    time: Cell<SystemTime>,
    aloud: bool,
}

/// The longest that anything may take to settle once nothing fails any more, in seconds of virtual time.
const SETTLED: u64 = 900;

/// Carries out the schedule of a seed and checks the promises; what was broken, in words.
///
/// With `aloud` it says what happens.
pub fn run(seed: u64, aloud: bool) -> Result<Stats, String> {
    let mut rng = Rng::new(seed);
    let schedule = Schedule::draw(&mut rng);
    let spec: FakeSpec = serde_json::from_value(schedule.fake.clone()).map_err(|error| error.to_string())?;
    let config = "[server]\nhistory_retention = \"900d\"\n[capacity]\nreserved_memory = 0\nvm_overhead = 0\n\
                  [[limit]]\nmatch = \"*\"\nstop_timeout = \"1s\"\n";
    let disk = Disk::new(rng.bits());
    // As SQLite's own VFS has it of the disks that there are.
    disk.set_powersafe_overwrite(true);
    let world = World {
        config: Config::parse("simulation", config).map_err(|error| format!("{error:?}"))?,
        fake: Arc::new(Fake::new(spec)),
        disk,
        created: Cell::new(false),
        said: RefCell::default(),
        done: RefCell::new(vec![0; schedule.callers.len()]),
        rng: RefCell::new(rng),
        passed: Rc::default(),
        schedule,
        power_was_cut: Cell::new(false),
        unsynced: Cell::new(false),
        time: Cell::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)),
        aloud,
    };
    world.tell(|| format!("{:#?}", world.schedule));
    let mut crashes = 0;
    for end in world.schedule.ends.clone() {
        crashes += u64::from(world.live(Some(end))?.is_none());
    }
    let Some(stats) = world.live(None)? else { return Err("the last life ended by itself".into()) };
    if let Some(passed) = world.passed.borrow_mut().take() {
        return Err(passed);
    }
    Ok(Stats { crashes, ..stats })
}

impl World {
    /// One life of the daemon; `None` where it was cut off. The last one ends well and is checked.
    fn live(&self, end: Option<End>) -> Result<Option<Stats>, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .map_err(|error| error.to_string())?;
        let died = Rc::new(Notify::new());
        // A sync that failed, a kill before the next, and then a power cut in the very moment in which the next life brings
        // what the kernel kept onto the disk: against these three together there is no remedy.
        let end = match end {
            Some(End::TornWrite(call)) if self.unsynced.replace(false) => Some(End::PowerCut(call)),
            end => end,
        };
        if matches!(end, Some(End::PowerCut(_) | End::TornWrite(_))) {
            self.unsynced.set(false);
        }
        self.tell(|| format!("a life that ends by {end:?}"));
        self.set_hook(end, Rc::clone(&died));
        if let Some(End::TornWrite(call)) = end {
            self.disk.crash_at(self.disk.counters().calls() + call);
        } else {
            self.disk.set_faults(Faults::default());
            self.disk.set_capacity(None);
        }
        if end.is_none() {
            self.fake.calm();
            self.disk.set_faults(Faults::default());
            self.disk.set_capacity(None);
        }
        let ended = runtime.block_on(async {
            let (born, began) = (self.time.get(), tokio::time::Instant::now());
            clock::set(Some(Box::new(move || born + began.elapsed())));
            let time = || self.time.set(born + began.elapsed() + Duration::from_secs(1));
            tokio::select! {
                biased;
                () = died.notified() => {
                    time();
                    Ok(None)
                }
                ended = self.days(end.is_none()) => {
                    time();
                    ended
                }
            }
        });
        hook(None);
        clock::set(None);
        // Before the daemon's tasks are dropped: what they would tidy up on their way out is not done by a kill.
        match end {
            Some(End::PowerCut(_)) => {
                self.disk.crash();
                self.power_was_cut.set(true);
                self.fake.power_cut();
            }
            Some(End::TornWrite(_)) => {
                self.disk.restart();
                self.power_was_cut.set(true);
                self.fake.power_cut();
            }
            Some(End::Kill(_)) => self.disk.kill(),
            None => {}
        }
        drop(runtime);
        ended
    }

    /// At each place of the daemon: whether it goes on, and how soon.
    fn set_hook(&self, end: Option<End>, died: Rc<Notify>) {
        let mut rng = Rng::new(self.rng.borrow_mut().bits());
        let last = match end {
            Some(End::Kill(place) | End::PowerCut(place)) => place,
            _ => u64::MAX,
        };
        let (fake, passed) = (Arc::clone(&self.fake), Rc::clone(&self.passed));
        // After a power cut everything runs with what is saved, which nobody has admitted to run.
        let watched = !self.schedule.meddling && !self.schedule.restarting && !self.power_was_cut.get();
        let most = Cpus::whole(u32::try_from(self.schedule.cpus).unwrap_or(u32::MAX).max(self.start_cpus()));
        let (mut reached, aloud, has_power) = (0, self.aloud, self.disk.has_power());
        hook(Some(Box::new(move |place| {
            if place == "defect" {
                passed.borrow_mut().get_or_insert("a step took a way that there is none".into());
            }
            reached += 1;
            // A host without power does nothing more.
            if !has_power() {
                died.notify_one();
                return Fate::Die;
            }
            if watched && let Some(over) = check::over_cap(&fake, most) {
                passed.borrow_mut().get_or_insert(format!("{over} at {place}"));
            }
            if reached >= last {
                died.notify_one();
                return Fate::Die;
            }
            if aloud {
                println!("    {reached} {place}");
            }
            if rng.chance(1, 6) { Fate::Delay(some_time(&mut rng)) } else { Fate::Pass }
        })));
    }

    /// What the instances have at the beginning, which may be more than the caps allow.
    fn start_cpus(&self) -> u32 {
        u32::try_from(self.schedule.instances.len() * 2).unwrap_or(u32::MAX)
    }

    async fn days(&self, last: bool) -> Result<Option<Stats>, String> {
        let engine = self.engine();
        if let Err(error) = engine.restore().await {
            // A disk that fails just now can't be read; one that is well must be.
            return if last { Err(format!("the record was lost: {error}")) } else { Ok(None) };
        }
        self.created.set(true);
        if self.aloud {
            self.tell(|| format!("disk: {:?} {:?}", self.disk.files(), self.disk.counters()));
        }
        engine.keep_fresh(Duration::from_secs(30));
        let callers = (0..self.schedule.callers.len()).map(|caller| self.call(caller, &engine));
        let callers = futures_util::future::join_all(callers);
        tokio::select! {
            biased;
            _ = callers => {}
            () = self.weather(last) => {}
        }
        if !last {
            return Ok(None);
        }
        for _ in 0..SETTLED {
            while self.fake.land() {}
            self.fake.settle();
            sleep(Duration::from_secs(1)).await;
            if check::is_quiet(&engine, &self.schedule.instances).await {
                return check::promises(self, &engine).await.map(Some);
            }
        }
        Err(format!("not settled after {SETTLED} s: {}", check::unsettled(&engine).await))
    }

    fn engine(&self) -> Engine {
        let location = Location { path: "/agentd.db".into(), vfs: Some(self.disk.vfs_name().to_owned()) };
        let store = Store::inline(location, !self.created.get());
        let host =
            HostCapacity { cpus: Cpus::whole(u32::try_from(self.schedule.cpus).unwrap_or(1)), memory: self.memory() };
        let access = AccessTable::new(Vec::new(), 0);
        let settings = Settings { config: self.config.clone(), access, host, notes: Vec::new() };
        let epoch = format!("{:x}", self.rng.borrow_mut().bits());
        Engine::new(vec![Arc::clone(&self.fake) as Arc<dyn Backend>], settings, store, epoch)
    }

    fn memory(&self) -> ByteCount {
        ByteCount::mib(self.schedule.memory_mib)
    }

    /// Where one schedule is looked at, what happens in it.
    pub(super) fn tell(&self, what: impl FnOnce() -> String) {
        if self.aloud {
            println!("  {}", what());
        }
    }

    /// What one caller does in this life. One that was not answered asks again with the same key, or goes on without.
    async fn call(&self, caller: usize, engine: &Engine) {
        loop {
            let at = self.done.borrow()[caller];
            let Some(request) = self.schedule.callers[caller].get(at) else { return };
            let pause = some_time(&mut self.rng.borrow_mut());
            sleep(pause).await;
            let retried = request.key.is_some();
            if !retried {
                self.done.borrow_mut()[caller] = at + 1;
            }
            let answered = self.ask(request, engine).await;
            if retried && answered {
                self.done.borrow_mut()[caller] = at + 1;
            }
        }
    }

    /// Whether the caller was answered.
    async fn ask(&self, request: &Request, engine: &Engine) -> bool {
        let reference = Ref::new(Kind::Vm, &request.instance).map(Target::Full);
        let Ok(target) = reference else { return true };
        let wait = Duration::from_millis(300);
        let (wish, right) = match &request.what {
            What::Resize(body) => match serde_json::from_value(body.clone()) {
                Ok(request) => (Wish::Resize(request, wait, None), Right::Resize),
                Err(_) => return true,
            },
            What::Stop { force } => (Wish::Stop { timeout: None, force: *force }, Right::Power),
            What::Start => (Wish::Start, Right::Power),
            What::Undo => match self.newest_change(&request.instance, engine).await {
                Some(operation) => (Wish::Undo(Box::new(operation), wait), Right::Resize),
                None => return true,
            },
        };
        let ask = Ask { target, wish, right, dry_run: false, if_version: None };
        // What an undo takes back is in the path of its request.
        let text = match &ask.wish {
            Wish::Undo(operation, _) => format!("undo {}", operation.id),
            _ => format!("{:?}", request.what),
        };
        let key = request.key.clone().map(|key| (key, text));
        let Ok(submitted) = engine.submit(peer(), ask.clone(), key) else { return true };
        self.tell(|| format!("asked: {request:?} as {}", submitted.id));
        let place = {
            let mut said = self.said.borrow_mut();
            let (key, id) = (request.key.clone(), submitted.id.clone());
            said.push(Said { key, id, reply: None, acknowledged: false });
            said.len() - 1
        };
        if request.hurried && engine.acknowledge(&submitted, &peer(), &ask).await.is_some() && !self.disk.is_down() {
            self.said.borrow_mut()[place].acknowledged = true;
        }
        let reply = engine.reply(submitted).await;
        // Nobody hears of a host without power.
        if self.disk.is_down() {
            std::future::pending::<()>().await;
        }
        self.tell(|| match &reply {
            Ok(view) => format!("told: {:?} {:?}", view.operation, view.outcome),
            Err(failure) => format!("told: {} {:?}", failure.problem, failure.operation.as_ref().map(|o| o.outcome)),
        });
        self.said.borrow_mut()[place].reply = Some(reply);
        true
    }

    async fn newest_change(&self, instance: &str, engine: &Engine) -> Option<agentd_core::operation::Operation> {
        let newest = engine.store().newest(Some(format!("vm/{instance}")), None, None, 5).await.ok()?;
        newest.into_iter().find(|operation| matches!(operation.outcome, Outcome::Changed | Outcome::Pending))
    }

    /// What happens by itself: values changed behind the daemon's back, restarts, late guests and calls, a disk that is full
    /// or fails for a while. Ends when the host's power is gone.
    async fn weather(&self, calm: bool) {
        loop {
            let pause = some_time(&mut self.rng.borrow_mut()) * 3;
            sleep(pause + Duration::from_millis(50)).await;
            if self.disk.is_down() {
                return;
            }
            let mut rng = self.rng.borrow_mut();
            let name = self.schedule.instances[rng.index(self.schedule.instances.len())].clone();
            match rng.below(8) {
                0 => drop(self.fake.land()),
                1 => self.fake.settle(),
                2 if self.schedule.meddling => {
                    let cpus = Cpus::whole(u32::try_from(1 + rng.below(3)).unwrap_or(1));
                    self.fake.meddle(&name, &Values { cpus: Some(Limit::At(cpus)), ..Values::default() });
                }
                3 if self.schedule.restarting => self.fake.restart(&name),
                4 if self.schedule.disk_faults && !calm => {
                    let count = u32::try_from(1 + rng.below(3)).unwrap_or(1);
                    match rng.below(4) {
                        0 => self.disk.set_full(true),
                        1 => {
                            self.unsynced.set(true);
                            self.disk.set_faults(Faults { syncs: count, ..Faults::default() });
                        }
                        2 => self.disk.set_faults(Faults { writes: count, ..Faults::default() }),
                        _ => self.disk.set_faults(Faults { reads: count, ..Faults::default() }),
                    }
                }
                5 | 6 if self.schedule.disk_faults => {
                    self.disk.set_full(false);
                    self.disk.set_faults(Faults::default());
                }
                _ => {}
            }
        }
    }
}

pub(super) fn peer() -> Peer {
    Peer {
        caller: Caller { uid: 0, gid: 0, groups: Vec::new() },
        who: Who { uid: 0, gid: 0, pid: 1, command: "simulation".into() },
    }
}
