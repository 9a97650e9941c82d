//! The backend on libvirt's own test driver: a whole libvirt inside the library, without daemon, QEMU or cgroups.

use std::io::Write;
use std::sync::Arc;

use agentd_core::error::Code;
use agentd_core::instance::{Ability, Saved, Usage};
use agentd_core::plan::{Scope, Values};
use agentd_core::units::{ByteCount, Cpus, Limit};

use super::ffi::events::{Subscription, Tell};
use super::*;

const WEB: &str = "6d9a8a5e-0000-4000-8000-000000000001";

/// A host of its own with `web` (running) and `spare` (down), 2 of 4 vCPUs and 1 of 4 GiB each.
fn libvirt() -> (Libvirt, tempfile::NamedTempFile) {
    let domain = |name: &str, n: u32, state: u32| {
        format!(
            "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
             <test:runstate>{state}</test:runstate><name>{name}</name>
             <uuid>6d9a8a5e-0000-4000-8000-00000000000{n}</uuid>
             <memory unit='GiB'>4</memory><currentMemory unit='GiB'>1</currentMemory><vcpu current='2'>4</vcpu>
             <os><type>hvm</type></os><devices><memballoon model='virtio'/></devices></domain>"
        )
    };
    let mut file = tempfile::Builder::new().suffix(".xml").tempfile().unwrap();
    write!(file, "<node>{}{}</node>", domain("web", 1, 1), domain("spare", 2, 5)).unwrap();
    (Libvirt::new(format!("test://{}", file.path().display())), file)
}

fn vm(name: &str) -> Ref {
    Ref::new(Kind::Vm, name).unwrap()
}

async fn seen(libvirt: &Libvirt, name: &str) -> Observed {
    libvirt.observe(name, Look::Plain).await.unwrap()
}

async fn set(libvirt: &Libvirt, name: &str, scope: Scope, values: Values) -> Result<(), BackendError> {
    let identity = Identity::of(&seen(libvirt, name).await);
    libvirt.apply(&vm(name), &identity, &Action::Set { scope, values }).await
}

fn cpus(count: u32) -> Values {
    Values { cpus: Some(Limit::At(Cpus::whole(count))), ..Values::default() }
}

fn memory(mib: u32) -> Values {
    Values { memory: Some(Limit::At(ByteCount::mib(mib))), ..Values::default() }
}

#[tokio::test]
async fn every_domain_is_listed_with_its_values() {
    let (libvirt, _file) = libvirt();
    let mut all = libvirt.list().await.unwrap();
    all.sort_by(|a, b| a.reference.cmp(&b.reference));
    assert_eq!(all.iter().map(|one| one.reference.as_str()).collect::<Vec<_>>(), ["vm/spare", "vm/web"]);
    let [spare, web] = &all[..] else { panic!() };
    assert_eq!((web.state, web.saved, web.id.as_str()), (State::Running, Saved::Apart, WEB));
    assert!(web.boot.is_some());
    assert_eq!(web.cpus.accepted, Some(Limit::At(Cpus::whole(2))));
    assert_eq!(web.cpus.observed, web.cpus.accepted);
    assert_eq!((web.cpus.ceiling, web.cpus.saved_ceiling), (Some(Cpus::whole(4)), Some(Cpus::whole(4))));
    assert_eq!(web.memory.observed, Some(Limit::At(ByteCount::gib(1))));
    assert_eq!(web.memory.ceiling, Some(ByteCount::gib(4)));
    assert_eq!(web.demand.memory, Some(Limit::At(ByteCount::gib(4))));
    assert_eq!((spare.state, spare.boot.as_ref()), (State::Stopped, None));
    assert_eq!((spare.cpus.accepted, spare.memory.observed), (None, None));
    assert_eq!(spare.memory.persistent, Some(Limit::At(ByteCount::gib(1))));
    assert_eq!(spare.used, Usage::Unknown);
}

#[tokio::test]
async fn a_uuid_serves_as_a_name_and_the_answer_has_the_proper_one() {
    let (libvirt, _file) = libvirt();
    assert_eq!(seen(&libvirt, WEB).await.reference, vm("web"));
    assert_eq!(seen(&libvirt, &WEB.replace('-', "")).await.reference, vm("web"));
}

#[tokio::test]
async fn names_that_fit_no_domain_are_not_found() {
    let (libvirt, _file) = libvirt();
    for name in ["", "nobody", "we", "web\0x", "\0", "../web", "6d9a8a5e-0000-4000-8000-00000000000f"] {
        let answer = libvirt.observe(name, Look::Plain).await;
        assert!(matches!(answer, Err(BackendError::NotFound(_))), "{name:?}: {answer:?}");
    }
}

#[tokio::test]
async fn live_and_saved_values_are_set_apart() {
    let (libvirt, _file) = libvirt();
    set(&libvirt, "web", Scope::Live, cpus(3)).await.unwrap();
    set(&libvirt, "web", Scope::Live, memory(2048)).await.unwrap();
    let web = seen(&libvirt, "web").await;
    assert_eq!((web.cpus.observed, web.cpus.persistent), (cpus(3).cpus, cpus(2).cpus));
    assert_eq!((web.memory.observed, web.memory.persistent), (memory(2048).memory, memory(1024).memory));
    set(&libvirt, "web", Scope::Saved, cpus(4)).await.unwrap();
    set(&libvirt, "web", Scope::Saved, memory(512)).await.unwrap();
    let web = seen(&libvirt, "web").await;
    assert_eq!((web.cpus.observed, web.cpus.persistent), (cpus(3).cpus, cpus(4).cpus));
    assert_eq!((web.memory.observed, web.memory.persistent), (memory(2048).memory, memory(512).memory));
}

#[tokio::test]
async fn a_restore_puts_back_what_was_there() {
    let (libvirt, _file) = libvirt();
    let before = seen(&libvirt, "web").await;
    set(&libvirt, "web", Scope::Live, memory(2048)).await.unwrap();
    assert_eq!(seen(&libvirt, "web").await.memory.accepted, memory(2048).memory);
    let (values, native) = (memory(1024), before.native.clone());
    let restore = Action::Restore { scope: Scope::Live, values, saved: None, native };
    libvirt.apply(&vm("web"), &Identity::of(&before), &restore).await.unwrap();
    assert_eq!(seen(&libvirt, "web").await, before);
}

#[tokio::test]
async fn a_guest_that_still_follows_what_an_earlier_life_asked_for_follows_nobody_else() {
    let (libvirt, _file) = libvirt();
    let before = seen(&libvirt, "web").await;
    let step = Action::Set { scope: Scope::Live, values: memory(512) };
    // Past the backend: as a guest moves, or somebody else.
    let moves_to = async |mib: u64| {
        let job = move |job: &calls::Job<'_>| Ok(job.connect.by_uuid(WEB)?.set_memory(mib << 10, ffi::LIVE)?);
        libvirt.calls.run(Class::Change, WEB, "move", job).await.unwrap();
        seen(&libvirt, "web").await.memory
    };
    for (told, accepted) in [(false, memory(900).memory), (true, memory(1024).memory)] {
        if told {
            libvirt.may_have_been_asked(&step, &before);
        }
        set(&libvirt, "web", Scope::Live, memory(1024)).await.unwrap();
        let now = moves_to(900).await;
        assert_eq!((now.accepted, now.observed), (accepted, memory(900).memory), "told: {told}");
        assert_eq!(moves_to(1024).await.accepted, memory(1024).memory);
    }
}

#[tokio::test]
async fn more_than_the_maximum_fails_in_libvirts_words() {
    let (libvirt, _file) = libvirt();
    let answer = set(&libvirt, "web", Scope::Live, cpus(5)).await;
    assert!(matches!(&answer, Err(BackendError::Failed(words)) if !words.is_empty()), "{answer:?}");
}

#[tokio::test]
async fn a_domain_goes_up_down_and_off() {
    let (libvirt, _file) = libvirt();
    let down = Identity::of(&seen(&libvirt, "spare").await);
    libvirt.apply(&vm("spare"), &down, &Action::Start).await.unwrap();
    let up = seen(&libvirt, "spare").await;
    assert_eq!(up.state, State::Running);
    libvirt.apply(&vm("spare"), &Identity::of(&up), &Action::Shutdown).await.unwrap();
    assert_eq!(seen(&libvirt, "spare").await.state, State::Stopped);
    libvirt.apply(&vm("spare"), &down, &Action::Start).await.unwrap();
    let again = Identity::of(&seen(&libvirt, "spare").await);
    libvirt.apply(&vm("spare"), &again, &Action::Kill).await.unwrap();
    assert_eq!(seen(&libvirt, "spare").await.state, State::Stopped);
}

#[tokio::test]
async fn another_boot_or_uuid_is_never_touched() {
    let (libvirt, _file) = libvirt();
    let web = Identity::of(&seen(&libvirt, "web").await);
    let other_boot = Identity { boot: Some("4711".into()), ..web.clone() };
    let other_id = Identity { id: WEB.replace("0001", "00ff"), ..web.clone() };
    for action in [Action::Shutdown, Action::Kill, Action::Set { scope: Scope::Live, values: cpus(3) }] {
        for identity in [&other_boot, &other_id] {
            let answer = libvirt.apply(&vm("web"), identity, &action).await;
            assert!(matches!(answer, Err(BackendError::NotFound(_))), "{action:?}: {answer:?}");
        }
    }
    let nul = Identity { id: "\0".into(), ..web.clone() };
    assert!(matches!(libvirt.apply(&vm("web"), &nul, &Action::Kill).await, Err(BackendError::NotFound(_))));
    assert_eq!(Identity::of(&seen(&libvirt, "web").await), web);
    let saved = Action::Set { scope: Scope::Saved, values: cpus(3) };
    libvirt.apply(&vm("web"), &other_boot, &saved).await.unwrap();
}

#[tokio::test]
async fn a_driver_without_cpu_bandwidth_says_why() {
    let (libvirt, _file) = libvirt();
    let web = seen(&libvirt, "web").await;
    assert_eq!((web.cpu_limit.accepted, web.cpu_limit.persistent), (None, None));
    assert!(matches!(&web.cpu_limit.live, Ability::No(Code::Unsupported, why) if why.contains("bandwidth")));
    let limit = Values { cpu_limit: Some(Limit::At(Cpus::whole(1))), ..Values::default() };
    assert!(set(&libvirt, "web", Scope::Live, limit).await.is_err());
}

#[tokio::test]
async fn health_names_the_versions() {
    let health = libvirt().0.health().await.unwrap();
    assert!(health.starts_with("libvirt "), "{health}");
}

#[tokio::test]
async fn what_happens_to_a_domain_is_announced_after_a_call_to_look_at_all() {
    let (libvirt, _file) = libvirt();
    let spare = Identity::of(&seen(&libvirt, "spare").await);
    let (send, mut notices) = mpsc::channel(16);
    let about_spare = Notice::Instance(spare.id.clone());
    let story = async {
        assert_eq!(notices.recv().await, Some(Notice::All));
        libvirt.apply(&vm("spare"), &spare, &Action::Start).await.unwrap();
        assert_eq!(notices.recv().await, Some(about_spare.clone()));
        let up = Identity::of(&seen(&libvirt, "spare").await);
        libvirt.apply(&vm("spare"), &up, &Action::Kill).await.unwrap();
        while notices.recv().await != Some(about_spare.clone()) {}
    };
    tokio::select! {
        () = story => {}
        error = libvirt.watch(send) => panic!("{error}"),
    }
}

#[tokio::test]
async fn more_announcements_than_anybody_takes_end_in_a_call_to_look_at_all() {
    let (libvirt, _file) = libvirt();
    let down = Identity::of(&seen(&libvirt, "spare").await);
    let (send, mut notices) = mpsc::channel(1);
    let story = async {
        for _ in 0..200 {
            libvirt.apply(&vm("spare"), &down, &Action::Start).await.unwrap();
            let up = Identity::of(&seen(&libvirt, "spare").await);
            libvirt.apply(&vm("spare"), &up, &Action::Kill).await.unwrap();
        }
        let mut alls = 0;
        while alls < 2 {
            alls += u32::from(notices.recv().await == Some(Notice::All));
        }
    };
    tokio::select! {
        () = story => {}
        error = libvirt.watch(send) => panic!("{error}"),
    }
}

#[test]
fn a_subscription_that_is_dropped_gives_back_what_it_was_given() {
    let connect = Arc::new(ffi::Connect::open("test:///default").unwrap());
    let tell: Tell = Arc::new(|_| {});
    let held = Arc::downgrade(&tell);
    let subscription = Subscription::open(&connect, tell).unwrap();
    assert_eq!(held.strong_count(), 1);
    drop(subscription);
    assert_eq!(held.strong_count(), 0);
}

#[tokio::test]
async fn a_libvirt_that_is_away_announces_nothing() {
    let libvirt = Libvirt::new("qemu+unix:///system?socket=/nonexistent/libvirt-sock".into());
    let answer = libvirt.watch(mpsc::channel(1).0).await;
    assert!(matches!(&answer, BackendError::Unavailable(_)), "{answer:?}");
    let web = Identity { id: WEB.into(), boot: None };
    assert!(!libvirt.is_under_way(&web).await);
}

#[tokio::test]
async fn a_domain_that_nobody_works_on_is_not_under_way() {
    let (libvirt, _file) = libvirt();
    assert!(!libvirt.is_under_way(&Identity::of(&seen(&libvirt, "web").await)).await);
}
