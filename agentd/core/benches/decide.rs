//! What a decision costs, without anything around it: `cargo bench -p agentd-core` times it (criterion).
//!
//! ```text
//!   cargo bench -p agentd-core --bench decide -- --instructions   counts instructions (valgrind), compares them with those kept
//!   cargo bench -p agentd-core --bench decide -- --keep           keeps them
//! ```
//!
//! Instructions don't depend on the machine's mood, so CI goes by them.

#![allow(clippy::unwrap_used, reason = "what is made here is right, or nothing can be measured")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::{Command, ExitCode, Stdio};
use std::{env, fs};

use agentd_core::access::{AccessTable, Caller, ResolvedPrincipal, ResolvedRule, Right};
use agentd_core::api::{Instance, ResizeRequest};
use agentd_core::config::{Config, Rules};
use agentd_core::drift::drift;
use agentd_core::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::ledger::{Charge, Ledger};
use agentd_core::operation::{Operation, Who};
use agentd_core::pattern::Pattern;
use agentd_core::plan::{HostCapacity, Inputs, caps, charge_of, resize};
use agentd_core::units::{ByteCount, Cpus, Limit};
use criterion::Criterion;
use serde_json::{Map, Value, json};

/// Where the numbers are kept, from this crate's folder.
const KEPT: &str = "../../docs/instructions.json";
/// What stands before a case and a number of rounds, for the process that is counted.
const ONE: &str = "--count";
/// How many instructions more than are kept a case may take, in percent.
const MORE: u64 = 10;

/// A case, once.
type Case = Box<dyn FnMut()>;

/// Each with its name, and how many more times it runs in the longer of two counted runs than in the shorter: what differs
/// between those is these rounds, and what the seeds of hash maps make of the rest, which must not weigh.
fn cases() -> Vec<(&'static str, Case, u64)> {
    vec![
        ("resize planned among 1,000 charged", planned(), 500),
        ("charge taken and given back among 1,000", charged(), 5000),
        ("rules found among 100", ruled(), 500),
        ("access decided by 50 rules", decided(), 20_000),
        ("operation written and read", recorded(), 200),
        ("instance told", told(), 2000),
        ("drift looked for", drifted(), 20_000),
        ("config read", configured(), 10),
    ]
}

fn reading<T: Copy>(value: Limit<T>, grain: T, least: T, ceiling: Option<T>) -> Reading<T> {
    Reading {
        accepted: Some(value),
        observed: Some(value),
        confirmed: None,
        persistent: Some(value),
        ceiling,
        saved_ceiling: ceiling,
        floor: None,
        grain,
        least,
        live: Ability::Yes,
        unlimit: Ability::Yes,
    }
}

/// A running VM: 2 of 8 vCPUs, 1 of 4 GiB.
fn vm(name: &str) -> Observed {
    let (cpus, memory) = (Limit::At(Cpus::whole(2)), Limit::At(ByteCount::mib(1024)));
    Observed {
        reference: Ref::new(Kind::Vm, name).unwrap(),
        id: format!("6d9a8a5e-0000-4000-8000-{name}"),
        boot: Some("7@12345".into()),
        state: State::Running,
        saved: Saved::Apart,
        cpus: reading(cpus, Cpus::whole(1), Cpus::whole(1), Some(Cpus::whole(8))),
        cpu_limit: reading(Limit::Unlimited, Cpus::from_millis(1), Cpus::from_millis(10), None),
        memory: reading(memory, ByteCount::new(4096).unwrap(), ByteCount::mib(4), Some(ByteCount::mib(4096))),
        used: Usage::Known(ByteCount::mib(300)),
        demand: Demand { cpus: Some(cpus), memory: Some(memory) },
        covered: Covered::default(),
        barred: Barred::default(),
        parts: None,
        saved_parts: None,
        labels: BTreeMap::new(),
        notes: vec!["balloon driver silent".into()],
        switched_off: false,
        unchangeable: None,
        native: json!({"live": {"vcpus": 2, "memory_kib": 1_048_576}, "saved": {"vcpus": 2, "memory_kib": 1_048_576}}),
    }
}

/// A config with a hundred limits.
fn config() -> String {
    let limits = (0..100).map(|number| format!("[[limit]]\nmatch = \"vm/group-{number}-*\"\nmax_cpus = 8\n"));
    "[capacity]\ncpus = 4096\nmemory = \"4096GiB\"\n".to_owned() + &limits.collect::<String>()
}

/// What a plan is made from, on a host with a thousand VMs.
struct Host {
    observed: Observed,
    config: Config,
    rules: Rules,
    ledger: Ledger,
}

impl Host {
    fn new() -> Self {
        let config = Config::parse("bench", &config()).unwrap();
        let mut ledger = Ledger::new(caps(&config, Self::capacity()));
        for number in 0..1000 {
            let observed = vm(&format!("group-{}-{number}", number % 100));
            let rules = config.rules_for(observed.reference.as_str(), &observed.labels);
            ledger.observe(&observed.instance_id(), charge_of(&observed, &config), &rules.matching);
        }
        let observed = vm("group-7-7");
        let rules = config.rules_for(observed.reference.as_str(), &observed.labels);
        Host { observed, config, rules, ledger }
    }

    fn capacity() -> HostCapacity {
        HostCapacity { cpus: Cpus::whole(4096), memory: ByteCount::mib(4096 * 1024) }
    }

    fn inputs(&self) -> Inputs<'_> {
        let Host { observed, config, rules, ledger } = self;
        Inputs { observed, holds: &[], config, rules, host: Self::capacity(), ledger }
    }
}

fn planned() -> Case {
    let host = Host::new();
    let request: ResizeRequest =
        serde_json::from_value(json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5})).unwrap();
    Box::new(move || drop(black_box(resize(&host.inputs(), &request, None).unwrap())))
}

fn charged() -> Case {
    let mut host = Host::new();
    let instance = host.observed.instance_id();
    let less = Charge { cpus: Cpus::whole(2), memory: ByteCount::mib(1024) };
    let more = Charge { cpus: Cpus::whole(4), memory: ByteCount::mib(2048) };
    Box::new(move || {
        host.ledger.check(&instance, more).unwrap();
        host.ledger.reserve(&instance, more);
        host.ledger.release(&instance, less);
        black_box(host.ledger.committed());
    })
}

fn ruled() -> Case {
    let config = Config::parse("bench", &config()).unwrap();
    let labels = BTreeMap::new();
    Box::new(move || drop(black_box(config.rules_for("vm/group-77-7", &labels))))
}

fn decided() -> Case {
    let rule = |number: u32| ResolvedRule {
        description: format!("[[access]] {number}"),
        principal: ResolvedPrincipal::Uid(number),
        rights: [Right::Read, Right::Resize].into_iter().collect(),
        pattern: Pattern::parse(&format!("vm/group-{number}-*")).unwrap(),
    };
    let table = AccessTable::new((1..=50).map(rule).collect(), 0);
    let (caller, labels) = (Caller { uid: 49, gid: 49, groups: vec![50] }, BTreeMap::new());
    Box::new(move || drop(black_box(table.decide(&caller, Right::Resize, Some(("vm/group-49-1", &labels))))))
}

fn recorded() -> Case {
    let host = Host::new();
    let request: ResizeRequest =
        serde_json::from_value(json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5})).unwrap();
    let plan = resize(&host.inputs(), &request, None).unwrap();
    let who = Who { uid: 0, gid: 0, pid: 1, command: "ctl".into() };
    let operation = Operation::new("01J00000000000000000000000".into(), who, plan, 1);
    Box::new(move || {
        let text = serde_json::to_string(&operation).unwrap();
        drop(black_box(serde_json::from_str::<Operation>(&text).unwrap()));
    })
}

fn told() -> Case {
    let (observed, sizes) = (vm("web"), BTreeMap::new());
    let charge = Charge { cpus: Cpus::whole(2), memory: ByteCount::mib(1024) };
    Box::new(move || {
        let instance = Instance::new(&observed, "1-1".into(), charge, Vec::new(), &sizes);
        drop(black_box(serde_json::to_string(&instance).unwrap()));
    })
}

fn drifted() -> Case {
    let (before, mut after) = (vm("web"), vm("web"));
    after.cpus.accepted = Some(Limit::At(Cpus::whole(3)));
    Box::new(move || drop(black_box(drift(&before, &after, false))))
}

fn configured() -> Case {
    let text = config();
    Box::new(move || drop(black_box(Config::parse("bench", &text).unwrap())))
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [ONE, name, rounds] => run(name, rounds.parse().unwrap_or(1)),
        ["--instructions"] => return judge(false),
        ["--keep"] => return judge(true),
        _ => {
            let mut criterion = Criterion::default().configure_from_args();
            for (name, mut case, _) in cases() {
                criterion.bench_function(name, |bencher| bencher.iter(&mut case));
            }
            criterion.final_summary();
        }
    }
    ExitCode::SUCCESS
}

fn run(name: &str, rounds: u64) {
    for (known, mut case, _) in cases() {
        if known == name {
            (0..rounds).for_each(|_| case());
        }
    }
}

/// Counts all cases; compares them with what is kept, or keeps them.
fn judge(keep: bool) -> ExitCode {
    let mut counted = Map::new();
    for (name, _, rounds) in cases() {
        match (count(name, 1), count(name, 1 + rounds)) {
            (Ok(less), Ok(more)) => {
                let each = more.saturating_sub(less) / rounds;
                println!("{each:>12}  {name}");
                counted.insert(name.to_owned(), each.into());
            }
            (Err(why), _) | (_, Err(why)) => {
                eprintln!("{name} can't be counted: {why}");
                return ExitCode::FAILURE;
            }
        }
    }
    if keep {
        let text = serde_json::to_string_pretty(&counted).unwrap() + "\n";
        return match fs::write(KEPT, text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{KEPT}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let kept: Map<String, Value> =
        fs::read_to_string(KEPT).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    let names = counted.keys().chain(kept.keys()).collect::<std::collections::BTreeSet<_>>();
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match (counted.get(name).and_then(Value::as_u64), kept.get(name).and_then(Value::as_u64)) {
            (Some(now), Some(before)) if now * 100 > before * (100 + MORE) => {
                eprintln!("{name}: {now} instructions, {before} are kept: more than {MORE} % more");
                code = ExitCode::FAILURE;
            }
            (Some(_), Some(_)) => {}
            _ => {
                eprintln!("{name}: counted or kept, and not both; keep the numbers anew with --keep");
                code = ExitCode::FAILURE;
            }
        }
    }
    code
}

/// The instructions of a process that runs a case so often, as valgrind counts them.
fn count(name: &str, rounds: u64) -> Result<u64, String> {
    let exe = env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(exe)
        .args([ONE, name, &rounds.to_string()])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("valgrind: {error}; packaging/setup.sh check installs it"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let collected = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    collected.filter(|_| output.status.success()).ok_or(said)
}
