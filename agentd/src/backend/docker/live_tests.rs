//! The same promises on a real engine, built with the feature `live-docker` only: `AGENTD_TEST_DOCKER` names the socket of
//! one that nobody else uses, `AGENTD_TEST_DOCKER_IMAGE` an image with a `/bin/sh` (busybox where it is absent).
//! What matters of them through agentd's front door is in the end-to-end tests; these look closer.

use std::process::Command;
use std::time::Duration;

use agentd_core::instance::{Ability, Usage};
use agentd_core::plan::{Reached, Values, reached};
use agentd_core::units::{ByteCount, Limit};

use super::*;

const OBEDIENT: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
const STUBBORN: &str = "trap '' TERM; while :; do sleep 0.1; done";

/// A container of a test, removed at its end.
struct Lab {
    socket: String,
    docker: Docker,
    name: String,
}

impl Lab {
    fn new(name: &str, script: &str, options: &[&str]) -> Lab {
        let socket = std::env::var("AGENTD_TEST_DOCKER").expect("AGENTD_TEST_DOCKER names an engine's socket");
        let image = std::env::var("AGENTD_TEST_DOCKER_IMAGE").unwrap_or_else(|_| "busybox".into());
        let name = format!("agentd-test-{name}-{}", std::process::id());
        let lab = Lab { docker: Docker::new(socket.clone().into()), socket, name };
        let mut arguments = vec!["run", "-d", "--network", "none", "--name", &lab.name];
        arguments.extend_from_slice(options);
        arguments.extend_from_slice(&[&image, "/bin/sh", "-c", script]);
        lab.cli(&arguments);
        lab
    }

    fn cli(&self, arguments: &[&str]) -> String {
        let done =
            Command::new("docker").args(["-H", &format!("unix://{}", self.socket)]).args(arguments).output().unwrap();
        assert!(done.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stdout).trim().to_owned()
    }

    async fn see(&self) -> Observed {
        self.docker.observe(&self.name, Look::Plain).await.unwrap()
    }

    async fn try_apply(&self, action: &Action) -> Result<(), BackendError> {
        let seen = self.see().await;
        self.docker.apply(&seen.reference, &Identity::of(&seen), action).await
    }

    /// Applies and reads back as the executor does.
    async fn apply(&self, action: &Action) -> Observed {
        self.try_apply(action).await.unwrap();
        let seen = self.see().await;
        assert_eq!(reached(action, &seen), Reached::Yes, "{action:?}");
        seen
    }

    async fn wait_for(&self, state: State) {
        for _ in 0..100 {
            if self.see().await.state == state {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{} never came to be {state}", self.name);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ =
            Command::new("docker").args(["-H", &format!("unix://{}", self.socket), "rm", "-f", &self.name]).output();
    }
}

fn set(millis: Option<u64>, mib: Option<u32>) -> Action {
    Action::Set { scope: Scope::Both, values: values(millis, mib) }
}

fn values(millis: Option<u64>, mib: Option<u32>) -> Values {
    Values {
        cpus: millis.map(|millis| Limit::At(Cpus::from_millis(millis))),
        memory: mib.map(|mib| Limit::At(ByteCount::mib(mib))),
        cpu_limit: None,
    }
}

fn no_cpu_limit() -> Action {
    Action::Set { scope: Scope::Both, values: Values { cpus: Some(Limit::Unlimited), ..Values::default() } }
}

/// What takes back every change since `before`.
fn restore(before: &Observed) -> Action {
    let values = Values { cpus: before.cpus.accepted, memory: before.memory.accepted, ..Values::default() };
    Action::Restore { scope: Scope::Both, values, saved: None, native: before.native.clone() }
}

#[tokio::test]
async fn cpus_and_memory_change_in_one_call_and_come_back_verbatim() {
    for options in [
        &["--cpus", "0.5", "-m", "64m"][..],
        &["--cpu-quota", "33333", "--cpu-period", "50000", "-m", "64m", "--memory-swap", "-1"],
        &["--cpu-quota", "50000", "-m", "64m", "--memory-swap", "64m"],
    ] {
        let lab = Lab::new("both", OBEDIENT, options);
        let before = lab.see().await;
        assert!(before.notes.is_empty(), "{:?}", before.notes);
        lab.apply(&set(Some(1500), Some(128))).await;
        lab.apply(&set(None, Some(1024))).await;
        let after = lab.apply(&restore(&before)).await;
        assert_eq!(after.native, before.native, "{options:?}");
        assert_eq!(after.boot, before.boot);
        assert!(matches!(after.used, Usage::Known(_)));
    }
}

#[tokio::test]
async fn a_first_cpu_limit_is_taken_back_and_given_again_and_lasts_over_a_start() {
    let lab = Lab::new("first", OBEDIENT, &[]);
    let before = lab.see().await;
    lab.apply(&set(Some(700), None)).await;
    let after = lab.apply(&restore(&before)).await;
    assert_eq!(after.cpus.persistent, Some(Limit::Unlimited));
    lab.apply(&set(Some(400), None)).await;
    lab.apply(&no_cpu_limit()).await;
    let action = set(Some(300), None);
    lab.apply(&action).await;
    lab.cli(&["restart", "-t", "0", &lab.name]);
    assert_eq!(reached(&action, &lab.see().await), Reached::Yes);
}

#[tokio::test]
async fn a_limit_made_with_cpus_is_taken_away_one_way_since_no_other_would_last() {
    let lab = Lab::new("stuck", OBEDIENT, &["--cpus", "0.5"]);
    assert!(matches!(lab.see().await.cpus.unlimit, Ability::OneWay(_)));
    let lifted = lab.apply(&no_cpu_limit()).await;
    assert_eq!((lifted.cpus.accepted, lifted.cpus.observed), (Some(Limit::Unlimited), Some(Limit::Unlimited)));
    lab.cli(&["update", "--cpus", "0.4", &lab.name]);
    let again = lab.see().await;
    assert_eq!(again.cpus.observed, Some(Limit::At(Cpus::from_millis(400))));
    assert_eq!(again.cpus.persistent, Some(Limit::Unlimited));
    assert!(matches!(lab.try_apply(&set(Some(300), None)).await, Err(BackendError::Unsupported(_))));
    lab.cli(&["restart", "-t", "0", &lab.name]);
    assert_eq!(lab.see().await.cpus.observed, again.cpus.persistent);
}

#[tokio::test]
async fn a_memory_limit_stays() {
    let lab = Lab::new("memory", OBEDIENT, &[]);
    let before = lab.see().await;
    lab.apply(&set(None, Some(64))).await;
    lab.apply(&set(None, Some(256))).await;
    lab.apply(&set(None, Some(32))).await;
    assert!(matches!(lab.try_apply(&restore(&before)).await, Err(BackendError::Failed(_))));
    assert!(matches!(lab.see().await.memory.unlimit, Ability::No(..)));
}

#[tokio::test]
async fn dockers_refusal_changes_nothing() {
    let lab = Lab::new("refused", OBEDIENT, &["--cpus", "0.5", "-m", "64m"]);
    let before = lab.see().await;
    let Err(BackendError::Failed(words)) = lab.try_apply(&set(Some(900_000), Some(128))).await else {
        panic!("not refused")
    };
    assert!(words.contains("CPUs"), "{words}");
    let after = lab.see().await;
    assert_eq!((after.cpus, after.memory, after.native), (before.cpus, before.memory, before.native));
}

#[tokio::test]
async fn what_others_wrote_to_the_cgroup_is_seen() {
    let lab = Lab::new("lie", OBEDIENT, &["--cpus", "0.5"]);
    let pid = lab.cli(&["inspect", "-f", "{{.State.Pid}}", &lab.name]);
    let list = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path =
        |controller: &str| list.lines().find_map(|line| line.split_once(controller).map(|(_, path)| path)).unwrap();
    let (file, text) = if lab.docker.host.unified {
        (format!("/sys/fs/cgroup{}/cpu.max", path("0::")), "100000 100000")
    } else {
        (format!("/sys/fs/cgroup/cpu{}/cpu.cfs_quota_us", path(":cpu:")), "100000")
    };
    std::fs::write(file, text).unwrap();
    let seen = lab.see().await;
    assert_eq!(seen.cpus.observed, Some(Limit::At(Cpus::whole(1))));
    assert_eq!(seen.notes, ["docker says 0.5 CPUs, the cgroup has 1"]);
}

#[tokio::test]
async fn paused_ones_change_at_once_and_stopped_ones_for_their_next_start() {
    let lab = Lab::new("states", OBEDIENT, &["--cpus", "0.5", "-m", "64m"]);
    lab.cli(&["pause", &lab.name]);
    assert_eq!(lab.apply(&set(Some(800), Some(96))).await.state, State::Paused);
    assert!(matches!(lab.try_apply(&Action::Shutdown).await, Err(BackendError::InvalidState(_))));
    assert_eq!(lab.see().await.state, State::Paused);
    lab.cli(&["unpause", &lab.name]);
    lab.try_apply(&Action::Kill).await.unwrap();
    lab.wait_for(State::Stopped).await;
    let action = set(Some(1200), Some(128));
    assert_eq!(lab.apply(&action).await.boot, None);
    lab.try_apply(&Action::Start).await.unwrap();
    assert_eq!(reached(&action, &lab.see().await), Reached::Yes);
    lab.try_apply(&Action::Start).await.unwrap();
}

#[tokio::test]
async fn a_shutdown_asks_once_and_no_restart_policy_undoes_it() {
    let lab = Lab::new("always", OBEDIENT, &["--restart", "always"]);
    lab.try_apply(&Action::Shutdown).await.unwrap();
    lab.wait_for(State::Stopped).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(lab.see().await.state, State::Stopped);
    lab.try_apply(&Action::Shutdown).await.unwrap();
    lab.try_apply(&Action::Kill).await.unwrap();

    let lab = Lab::new("own", "trap 'exit 0' USR1; while :; do sleep 0.1; done", &["--stop-signal", "USR1"]);
    lab.try_apply(&Action::Shutdown).await.unwrap();
    lab.wait_for(State::Stopped).await;

    let lab = Lab::new("stubborn", STUBBORN, &["--restart", "always"]);
    lab.try_apply(&Action::Shutdown).await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(lab.see().await.state, State::Running);
    lab.try_apply(&Action::Kill).await.unwrap();
    lab.wait_for(State::Stopped).await;
}

#[tokio::test]
async fn a_step_is_for_one_run_of_one_container() {
    let lab = Lab::new("same", OBEDIENT, &["--cpus", "0.5"]);
    let before = lab.see().await;
    lab.cli(&["restart", "-t", "0", &lab.name]);
    let late = lab.docker.apply(&before.reference, &Identity::of(&before), &set(Some(900), None)).await;
    assert!(matches!(late, Err(BackendError::NotFound(_))), "{late:?}");
    lab.cli(&["rm", "-f", &lab.name]);
    let gone = lab.docker.apply(&before.reference, &Identity::of(&before), &Action::Start).await;
    assert!(matches!(gone, Err(BackendError::NotFound(_))), "{gone:?}");
}

#[tokio::test]
async fn six_characters_of_an_id_serve_and_five_do_not() {
    let lab = Lab::new("prefix", OBEDIENT, &[]);
    let seen = lab.see().await;
    for name in [&seen.id, &seen.id[..12], &seen.id[..6]] {
        assert_eq!(lab.docker.observe(name, Look::Plain).await.unwrap().reference, seen.reference);
    }
    assert!(matches!(lab.docker.observe(&seen.id[..5], Look::Plain).await, Err(BackendError::NotFound(_))));
}

#[tokio::test]
async fn the_list_has_stopped_ones_too() {
    let lab = Lab::new("list", OBEDIENT, &[]);
    lab.cli(&["kill", &lab.name]);
    let list = lab.docker.list().await.unwrap();
    assert!(list.iter().any(|one| one.reference.name() == lab.name && one.state == State::Stopped));
    assert!(lab.docker.health().await.unwrap().starts_with("docker "));
}
