//! What a daemon is doing when it is killed: changes of every kind on the fake engine, with its faults.

use serde_json::{Value, json};

/// One request of a client.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What is asked for.
    pub what: What,
    /// Its body.
    pub body: Value,
    /// Its Idempotency-Key.
    pub key: Option<&'static str>,
    /// Whether it wants no more than an acknowledgement (`Prefer: wait=0`).
    pub at_once: bool,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub enum What {
    /// A verb on a VM.
    Verb(&'static str, &'static str),
    /// To take back what the ask at this place began.
    UndoOf(usize),
}

impl Ask {
    fn resize(name: &'static str, body: Value) -> Ask {
        Ask { what: What::Verb("resize", name), body, key: None, at_once: false }
    }

    fn verb(verb: &'static str, body: Value) -> Ask {
        Ask { what: What::Verb(verb, "web"), body, key: None, at_once: false }
    }

    fn undo_of(place: usize) -> Ask {
        Ask { what: What::UndoOf(place), body: json!({}), key: None, at_once: false }
    }

    fn key(self, key: &'static str) -> Ask {
        Ask { key: Some(key), ..self }
    }

    fn at_once(self) -> Ask {
        Ask { at_once: true, ..self }
    }
}

/// A daemon's work, which is cut off.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// The fake engine, without the place of its state.
    pub engine: Value,
    /// What is asked for and done before.
    pub before: Vec<Ask>,
    /// What is asked for: those of a group at once, one group after the other.
    pub asks: Vec<Vec<Ask>>,
    /// Whether a change may end neither done nor undone.
    pub may_be_partial: bool,
}

impl Scenario {
    fn new(name: &'static str, asks: Vec<Vec<Ask>>) -> Scenario {
        let engine = json!({"instances": [vm("web"), vm("db")]});
        Scenario { name, engine, before: Vec::new(), asks, may_be_partial: false }
    }

    /// A growth of all fields, with faults at these calls.
    fn faulty(name: &'static str, faults: &[(usize, &'static str)]) -> Scenario {
        Scenario::new(name, vec![vec![Ask::resize("web", grown())]]).faults(faults)
    }

    fn faults(mut self, faults: &[(usize, &'static str)]) -> Scenario {
        let fault = |(nth, fault): &(usize, &str)| json!({"instance": "vm/web", "nth": nth, "fault": fault});
        self.engine["faults"] = faults.iter().map(fault).collect();
        // Where the daemon is killed first, the call that fails, or never shows, is one that takes something back. A call
        // that hangs fails nothing by itself.
        self.may_be_partial = faults.iter().any(|(_, fault)| !fault.starts_with("hang"));
        self
    }

    fn web(mut self, member: &str, value: Value) -> Scenario {
        self.engine["instances"][0][member] = value;
        self
    }

    fn delay(mut self, ms: u64) -> Scenario {
        self.engine["delay_ms"] = json!(ms);
        self
    }

    fn after(mut self, before: Vec<Ask>) -> Scenario {
        self.before = before;
        self
    }

    /// A call that does not return in time comes about this long after it was sent, the daemon's life or death aside.
    fn late(mut self, ms: u64) -> Scenario {
        self.engine["late_ms"] = json!(ms);
        self
    }
}

/// The config file of all scenarios.
pub(super) const CONFIG: &str = "[capacity]\ncpus = 32\nmemory = \"64GiB\"\nvm_overhead = \"200MiB\"\n\
     [scaling]\nmax_cpus = 16\nmax_memory = \"32GiB\"\n[[limit]]\nmatch = \"*\"\nstop_timeout = \"300ms\"\n";
/// What each running VM is charged on top, as that file says.
pub(super) const OVERHEAD: u64 = 200 << 20;

fn vm(name: &str) -> Value {
    json!({"name": name, "cpus": 2, "memory": 1u64 << 30, "max_cpus": 8, "max_memory": 8u64 << 30, "used": 100 << 20})
}

fn grown() -> Value {
    json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5, "wait": "200ms"})
}

/// More than it can get live. Five calls: down, its definition, saved vCPUs and CPU limit, up; with force one more where it
/// does not go down.
fn beyond(force: bool) -> Value {
    json!({"cpus": 12, "memory": "12GiB", "cpu_limit": 1.5, "wait": "200ms", "restart": "if-needed", "force": force})
}

/// All of them. A growth of all fields makes six calls: saved vCPUs, CPU limit and memory, then live CPU limit, memory and
/// vCPUs; those that follow take it back.
pub fn all() -> Vec<Scenario> {
    let shrunk = json!({"cpus": 1, "memory": "512MiB", "cpu_limit": 0.5, "wait": "200ms"});
    let one_more = || Ask::resize("web", json!({"cpus": "+1", "memory": "+256MiB"}));
    let stop = |force: bool| Ask::verb("stop", json!({"timeout": "300ms", "force": force}));
    let again = |force: bool| Ask::verb("restart", json!({"timeout": "300ms", "force": force}));
    let suspend = || Ask::verb("suspend", json!({"reason": "backup"}));
    let alone = |ask: Ask| vec![vec![ask]];
    vec![
        Scenario::new("growth", alone(Ask::resize("web", grown()))),
        Scenario::new("shrink", alone(Ask::resize("web", shrunk))),
        Scenario::faulty("first step fails", &[(0, "fail")]),
        Scenario::faulty("second step finds no engine", &[(1, "unavailable")]),
        Scenario::faulty("third step fails after it was done", &[(2, "fail-after")]),
        Scenario::faulty("fourth step breaks", &[(3, "panic")]),
        Scenario::faulty("fifth step fails after it was done", &[(4, "fail-after")]),
        Scenario::faulty("last step fails", &[(5, "fail")]),
        Scenario::faulty("last step lies", &[(5, "lie")]),
        Scenario::faulty("an undo fails too", &[(4, "fail"), (5, "fail"), (6, "fail-after")]),
        Scenario::faulty("an undo hangs", &[(5, "fail"), (7, "hang-after")]),
        Scenario::faulty("an undo fails and the next hangs", &[(5, "fail"), (6, "fail"), (7, "hang-after")]),
        Scenario::faulty("third step hangs", &[(2, "hang")]),
        Scenario::faulty("fourth step is done and hangs", &[(3, "hang-after")]),
        Scenario::faulty("last step hangs", &[(5, "hang")]),
        Scenario::faulty("last step is done and hangs", &[(5, "hang-after")]),
        Scenario::faulty("fifth step never returns", &[(4, "hang-late")]).late(400),
        Scenario::faulty("the guest's memory is late", &[(4, "guest-late")]),
        Scenario::faulty("the guest's vCPUs are late", &[(5, "guest-late")]),
        Scenario::new("stop", alone(stop(false))),
        Scenario::new("stop of one that ignores it", alone(stop(false))).web("stubborn", json!(true)),
        Scenario::new("hard stop", alone(stop(true))).web("stubborn", json!(true)),
        Scenario::new("stop that hangs", alone(stop(true))).faults(&[(0, "hang-after")]),
        Scenario::new("start", alone(Ask::verb("start", json!({})))).web("stopped", json!(true)),
        Scenario::new("start that is done and hangs", alone(Ask::verb("start", json!({}))))
            .web("stopped", json!(true))
            .faults(&[(0, "hang-after")]),
        Scenario::new("restart", alone(Ask::resize("web", beyond(false)))),
        Scenario::new("restart of one that ignores it", alone(Ask::resize("web", beyond(false))))
            .web("stubborn", json!(true)),
        Scenario::new("hard restart", alone(Ask::resize("web", beyond(true)))).web("stubborn", json!(true)),
        Scenario::new("restart whose definition fails", alone(Ask::resize("web", beyond(true)))).faults(&[(1, "fail")]),
        Scenario::new("restart whose start fails", alone(Ask::resize("web", beyond(false)))).faults(&[(4, "fail")]),
        Scenario::new("restart that hangs on its way down", alone(Ask::resize("web", beyond(false))))
            .faults(&[(0, "hang-after")]),
        Scenario::new("restart that hangs on its way up", alone(Ask::resize("web", beyond(false))))
            .faults(&[(4, "hang-after")]),
        Scenario::new("restart alone", alone(again(false))),
        Scenario::new("restart alone, of one that ignores it", alone(again(false))).web("stubborn", json!(true)),
        Scenario::new("hard restart alone", alone(again(true))).web("stubborn", json!(true)),
        Scenario::new("restart alone whose start fails", alone(again(false))).faults(&[(1, "fail")]),
        Scenario::new("restart alone that hangs on its way up", alone(again(false))).faults(&[(1, "hang-after")]),
        Scenario::new("suspend", alone(suspend())),
        Scenario::new("suspend that fails after it was done", alone(suspend())).faults(&[(0, "fail-after")]),
        Scenario::new("suspend that hangs", alone(suspend())).faults(&[(0, "hang-after")]),
        Scenario::new("resume", alone(Ask::verb("resume", json!({})))).after(vec![suspend()]),
        Scenario::new("undo", alone(Ask::undo_of(0))).after(vec![Ask::resize("web", grown())]),
        Scenario::new("undo whose step fails", alone(Ask::undo_of(0)))
            .after(vec![Ask::resize("web", grown())])
            .faults(&[(9, "fail-after")]),
        Scenario::new(
            "two in a queue that nobody waits for",
            vec![
                vec![Ask::resize("web", grown()).at_once()],
                vec![Ask::resize("web", json!({"cpus": 3, "memory": "1536MiB"})).at_once().key("queued")],
            ],
        )
        .delay(10),
        Scenario::new("one more under a key", alone(one_more().key("more"))),
        Scenario::new("one more under a key, and a step fails", alone(one_more().key("more"))).faults(&[(2, "fail")]),
        Scenario::new("one more under a key, and a step hangs", alone(one_more().key("more")))
            .faults(&[(3, "hang-after")]),
        Scenario::new(
            "two instances at once",
            vec![vec![Ask::resize("web", grown()), Ask::resize("db", grown()).key("db")]],
        ),
        Scenario::new(
            "one after the other",
            vec![
                vec![Ask::resize("web", json!({"cpus": 3}))],
                vec![Ask::resize("web", json!({"memory": "3GiB"})), Ask::resize("db", json!({"memory": "512MiB"}))],
                vec![stop(false)],
                vec![Ask::resize("web", json!({"cpus": 1}))],
                vec![Ask::verb("start", json!({}))],
            ],
        ),
    ]
}
