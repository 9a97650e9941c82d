//! Resizes that can't be made live, on real guests: down, redefined, up again; and what becomes of the definition meanwhile,
//! which others have put things into. And what an agent in the guest tells of its vCPUs.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use agentd_tests::lab::{Agentd, Domain, Lab, Libvirt};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn config(libvirt: &Libvirt) -> String {
    format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"16GiB\"\n[scaling]\nmax_cpus = 16\nmax_memory = \"4GiB\"\n\
         [[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\nstop_timeout = \"40s\"\n",
        libvirt.uri()
    )
}

fn resize(agentd: &Agentd, body: &Value) -> Result<(u16, Value)> {
    let reply = agentd.post("/v1/instances/vm/web/resize", body)?;
    Ok((reply.status, reply.json()))
}

/// What differs between two definitions: the lines that only one of them has.
fn changed<'a>(before: &'a str, after: &'a str) -> (Vec<&'a str>, Vec<&'a str>) {
    let only = |of: &'a str, other: &str| {
        let other: Vec<&str> = other.lines().collect();
        of.lines().filter(|line| !other.contains(line)).map(str::trim).collect()
    };
    (only(before, after), only(after, before))
}

/// Elements of others: another namespace with a comment in it, QEMU's own, devices.
const FOREIGN: [&str; 2] = [
    "<title>not ours</title><description>a &lt;b&gt; &amp; c</description>\
     <metadata><inv:owner xmlns:inv='https://example.org/inventory' id='7'><!-- kept by hand --><inv:desk>4 &gt; 3</inv:desk>\
     </inv:owner></metadata>",
    "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng><watchdog model='i6300esb' action='reset'/>\
     <input type='tablet' bus='virtio'/></devices>\
     <qemu:commandline><qemu:env name='FOREIGN' value='1'/></qemu:commandline><devices>",
];

#[test]
fn a_restart_gives_what_cant_be_had_live_and_changes_nothing_else_of_the_definition() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web")
        .vcpus(1, 2)
        .memory(256, 256)
        .with(FOREIGN[0], FOREIGN[1])
        .flag("acpid")
        .define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let definition = || guest.virsh("dumpxml", &["--inactive"]);
    let (before, pid) = (definition()?, guest.qemu_pid()?);
    ensure!(before.contains("kept by hand") && before.contains("FOREIGN"), "{before}");

    let body = json!({"cpus": 3, "memory": "400MiB", "cpu_limit": 1.5});
    let (status, refused) = resize(&agentd, &body)?;
    assert_eq!((status, &refused["code"]), (422, &json!("restart-required")), "{refused}");
    let allowed = json!({"cpus": 3, "memory": "400MiB", "cpu_limit": 1.5, "restart": "if-needed", "wait": "30s"});
    let output = agentd.ctl(&[
        "resize",
        "web",
        "--cpus",
        "3",
        "--memory",
        "400MiB",
        "--cpu-limit",
        "1.5",
        "--restart",
        "if-needed",
        "--dry-run",
    ]);
    ensure!(output.code == Some(0) && output.stdout.contains("restart"), "{output:?}");
    assert_eq!((guest.qemu_pid()?, definition()?), (pid, before.clone()), "nothing is done by a plan");

    let (status, reply) = resize(&agentd, &allowed)?;
    assert_eq!((status, &reply["outcome"], &reply["restart"]), (200, &json!("changed"), &json!(true)), "{reply}");
    ensure!(guest.qemu_pid()? != pid, "it was restarted");
    let stat = guest.wait_for("what it has now", LIMIT, |stat| stat.nproc == 3)?;
    ensure!(stat.memtotal_kib > 300 * 1024, "{stat:?}");
    let after = definition()?;
    let (gone, new) = changed(&before, &after);
    let expected = [
        "<memory unit='KiB'>409600</memory>",
        "<currentMemory unit='KiB'>409600</currentMemory>",
        "<vcpu placement='static'>3</vcpu>",
        // What a boot brings can be taken away again live.
        "<vcpus>",
        "<vcpu id='0' enabled='yes' hotpluggable='no'/>",
        "<vcpu id='1' enabled='yes' hotpluggable='yes'/>",
        "<vcpu id='2' enabled='yes' hotpluggable='yes'/>",
        "</vcpus>",
        "<cputune>",
        "<global_quota>150000</global_quota>",
        "</cputune>",
    ];
    assert_eq!(new, expected, "{gone:?}");
    assert_eq!(gone.len(), 3, "{gone:?}");
    // Smaller than before it is again, live, and its balloon takes it.
    let (status, reply) = resize(&agentd, &json!({"memory": "300MiB", "restart": "if-needed", "wait": "30s"}))?;
    assert_eq!((status, &reply["outcome"], &reply["restart"]), (200, &json!("changed"), &json!(false)), "{reply}");

    // What is down stays down.
    guest.virsh("destroy", &[])?;
    let (status, reply) = resize(&agentd, &json!({"cpus": 5, "memory": "512MiB", "restart": "if-needed"}))?;
    assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
    assert_eq!(reply["instance"]["state"], "stopped");
    assert_eq!(reply["instance"]["cpus"]["persistent"], 5);
    guest.start()?;
    let stat = guest.wait_for("what it has now", LIMIT, |stat| stat.nproc == 5)?;
    ensure!(stat.memtotal_kib > 400 * 1024, "{stat:?}");
    Ok(())
}

#[test]
fn a_vm_without_a_balloon_is_made_smaller_and_larger_by_restarts() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").memory(384, 384).balloon(false).flag("acpid").define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    for (mib, least, most) in [(256, 180, 256), (320, 240, 320)] {
        let body = json!({"memory": format!("{mib}MiB"), "restart": "if-needed"});
        let (status, reply) = resize(&agentd, &body)?;
        assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
        assert_eq!(reply["instance"]["memory"]["observed"], mib * MIB, "{reply}");
        let within = |kib: u64| (least * 1024..most * 1024).contains(&kib);
        guest.wait_for("its new memory", LIMIT, |stat| stat.up < 60.0 && within(stat.memtotal_kib))?;
    }
    Ok(())
}

#[test]
fn a_restart_whose_start_fails_ends_with_the_old_vm_running() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    // A QEMU that knows no such machine as soon as the VM is given more vCPUs.
    let emulator = lab.dir().join("qemu");
    std::fs::write(
        &emulator,
        "#!/bin/sh\ncase \"$*\" in *maxcpus=8,*|*\"-smp 8,\"*) exec qemu-system-x86_64 -machine no-such-machine ;; esac\n\
         exec qemu-system-x86_64 \"$@\"\n",
    )?;
    std::fs::set_permissions(&emulator, std::fs::Permissions::from_mode(0o755))?;
    let emulator = format!("<emulator>{}</emulator>", emulator.display());
    let domain = Domain::new("web").vcpus(1, 2).with("", &emulator).flag("acpid");
    let guest = domain.define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let definition = || guest.virsh("dumpxml", &["--inactive"]);
    let (before, pid) = (definition()?, guest.qemu_pid()?);
    let (status, reply) = resize(&agentd, &json!({"cpus": 8, "memory": "512MiB", "restart": "if-needed"}))?;
    assert_eq!((status, &reply["code"]), (500, &json!("backend-failed")), "{reply}");
    assert_eq!(reply["outcome"], "rolled-back", "{reply}");
    ensure!(
        reply["detail"].to_string().contains("no-such-machine")
            || reply["detail"].to_string().contains("unsupported machine"),
        "{reply}"
    );
    ensure!(reply["detail"].to_string().contains("runs again as it was before"), "{reply}");
    assert_eq!(definition()?, before, "byte for byte");
    ensure!(guest.qemu_pid()? != pid, "it was down, and runs again");
    guest.wait_for("the guest as it was", LIMIT, |stat| stat.nproc == 1 && stat.up < 60.0)?;
    let shown = agentd.get("/v1/instances/vm/web")?.json();
    assert_eq!((&shown["state"], &shown["holds"]), (&json!("running"), &json!([])), "{shown}");
    Ok(())
}

#[test]
fn a_guest_that_ignores_its_power_button_is_left_alone_unless_it_may_be_forced() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 2).define_and_start(&libvirt)?;
    let short = config(&libvirt).replace("40s", "2s");
    let agentd = Agentd::with_config(&short).inside(&lab).start()?;
    let (definition, pid) = (guest.virsh("dumpxml", &["--inactive"])?, guest.qemu_pid()?);
    let output = agentd.ctl(&["resize", "web", "--cpus", "4", "--restart", "if-needed"]);
    ensure!(output.code == Some(8) && output.stderr.contains("guest-silent"), "{output:?}");
    assert_eq!((guest.virsh("dumpxml", &["--inactive"])?, guest.qemu_pid()?), (definition, pid));
    let output = agentd.ctl(&["resize", "web", "--cpus", "4", "--restart", "if-needed", "--force"]);
    assert_eq!(output.code, Some(0), "{output:?}");
    guest.wait_for("four CPUs", LIMIT, |stat| stat.nproc == 4)?;
    Ok(())
}

/// An agentd that is killed anywhere in a restart: the VM runs afterwards, wholly before or wholly after.
#[test]
fn killed_in_a_restart_it_runs_wholly_before_or_wholly_after() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 2).flag("acpid").define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    let mut cpus = 1;
    for (after, wanted) in [(100, 3), (1500, 4), (4000, 5)] {
        guest.wait_for("the guest to have its button", LIMIT, |stat| stat.up > 3.0)?;
        let body = json!({"cpus": wanted, "restart": "if-needed"}).to_string();
        let headers = [("Content-Type", "application/json"), ("Prefer", "wait=0")];
        let reply = agentd.http("POST", "/v1/instances/vm/web/resize", &headers, body.as_bytes())?;
        assert_eq!(reply.status, 202, "{reply:?}");
        let operation = reply.json()["operation"].as_str().context("an id")?.to_owned();
        std::thread::sleep(Duration::from_millis(after));
        agentd.kill()?;
        agentd.start_again()?;
        let ended = agentd_tests::lab::wait_until("the end of the change", LIMIT, || {
            let view = agentd.get(&format!("/v1/operations/{operation}"))?.json();
            Ok((!matches!(view["outcome"].as_str(), Some("running" | "unknown"))).then_some(view))
        })?;
        println!("killed after {after} ms: {} {}", ended["outcome"], ended["steps"]);
        let shown = agentd.get("/v1/instances/vm/web")?.json();
        assert_eq!((&shown["state"], &shown["holds"]), (&json!("running"), &json!([])), "{shown} {ended}");
        match ended["outcome"].as_str() {
            Some("changed" | "pending") => cpus = wanted,
            Some("rolled-back") => {}
            _ => anyhow::bail!("neither before nor after: {ended}"),
        }
        let there = &shown["cpus"];
        assert_eq!((&there["observed"], &there["persistent"]), (&json!(cpus), &json!(cpus)), "{shown} {ended}");
        guest.wait_for("as many CPUs as it has", LIMIT, |stat| stat.nproc == cpus)?;
    }
    Ok(())
}

#[test]
fn what_an_agent_in_the_guest_tells_confirms_a_growth_or_shows_that_there_is_none() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).agent().define_and_start(&libvirt)?;
    let lazy = Domain::new("lazy").vcpus(1, 4).agent().flag("passive").define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    for guest in [&guest, &lazy] {
        agentd_tests::lab::wait_until("its agent to be heard", LIMIT, || {
            let shown = agentd.get(&format!("/v1/instances/vm/{}", guest.name()))?.json();
            Ok((shown["cpus"]["confirmed"] == 1).then_some(()))
        })?;
    }
    let output = agentd.ctl(&["resize", "web", "--cpus", "3", "--wait", "60s", "-o", "json"]);
    let reply: Value = serde_json::from_str(&output.stdout)?;
    assert_eq!((output.code, &reply["outcome"]), (Some(0), &json!("changed")), "{reply}");
    assert_eq!(
        (&reply["changes"][0]["observed"], &reply["changes"][0]["confirmed"]),
        (&json!(3), &json!(3)),
        "{reply}"
    );
    let output = agentd.ctl(&["resize", "web", "--cpus", "4", "--wait", "60s"]);
    ensure!(output.stdout.contains("confirmed by the guest"), "{output:?}");

    // QEMU has it, the guest does not use it.
    let output = agentd.ctl(&["resize", "lazy", "--cpus", "2", "--wait", "3s", "-o", "json"]);
    let reply: Value = serde_json::from_str(&output.stdout)?;
    assert_eq!((output.code, &reply["outcome"]), (Some(8), &json!("pending")), "{reply}");
    assert_eq!(
        (&reply["changes"][0]["observed"], &reply["changes"][0]["confirmed"]),
        (&json!(2), &json!(1)),
        "{reply}"
    );
    ensure!(reply["notes"].to_string().contains("1 of its 2 vCPUs online"), "{reply}");
    Ok(())
}
