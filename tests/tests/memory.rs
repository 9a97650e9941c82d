//! Memory beyond what a VM was booted with: a virtio-mem device beside its balloon, on a real guest. One number goes in; the
//! plan says which part moves, and the guest's own console shows what came of it.

use std::time::Duration;

use agentd_tests::lab::{Agentd, Domain, Guest, Lab, Libvirt, Stat};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(120);

fn config(libvirt: &Libvirt) -> String {
    format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"16GiB\"\n[scaling]\nmax_cpus = 16\nmax_memory = \"4GiB\"\n\
         [[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n",
        libvirt.uri()
    )
}

/// A resize that is waited for; the steps that it took.
fn resize(agentd: &Agentd, body: &Value) -> Result<(u16, Value, Vec<String>)> {
    let reply = agentd.post("/v1/instances/vm/web/resize", body)?;
    let json = reply.json();
    let steps = json["steps"].as_array().into_iter().flatten();
    let steps = steps.filter_map(|step| Some(step["what"].as_str()?.to_owned())).collect();
    Ok((reply.status, json, steps))
}

/// Waits until the guest has that much memory more than it had then, or less.
fn moved(guest: &Guest, then: Stat, mib: i64) -> Result<()> {
    let apart = |stat: Stat| stat.memtotal_kib.cast_signed() - then.memtotal_kib.cast_signed() - mib * 1024;
    guest.wait_for(&format!("{mib} MiB more than at first"), LIMIT, |stat| apart(stat).abs() < 8 * 1024).map(drop)
}

#[test]
fn memory_grows_beyond_the_boot_size_and_gives_back_what_was_plugged_first() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").memory(256, 256).virtio_mem(512, 128).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    // What was asked for at boot is plugged by the guest's own driver.
    let shown = || -> Result<Value> { Ok(agentd.get("/v1/instances/vm/web")?.json()) };
    agentd_tests::lab::wait_until("what was plugged at boot", LIMIT, || {
        Ok((shown()?["memory"]["observed"] == 384 * MIB).then_some(()))
    })?;
    let first = guest.wait_for("a first line", LIMIT, |stat| stat.memtotal_kib > 250 * 1024)?;
    let web = shown()?;
    assert_eq!(
        (&web["memory"]["accepted"], &web["memory"]["ceiling"]),
        (&json!(384 * MIB), &json!(768 * MIB)),
        "{web}"
    );
    assert_eq!(web["memory"]["persistent"], 384 * MIB);

    // 128 → 384 → 256 MiB of it.
    let (status, reply, steps) = resize(&agentd, &json!({"memory": "640MiB", "wait": "60s"}))?;
    assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
    assert_eq!(
        steps,
        ["libvirt virtio-mem saved 384 MiB, 640 MiB in all", "libvirt virtio-mem live 384 MiB, 640 MiB in all"]
    );
    moved(&guest, first, 256)?;
    let (status, reply, _) = resize(&agentd, &json!({"memory": "512MiB", "wait": "60s"}))?;
    assert_eq!(status, 200, "{reply}");
    moved(&guest, first, 128)?;
    // It comes in blocks, and the plan says so.
    let (_, reply, _) = resize(&agentd, &json!({"memory": "513MiB", "dry_run": true}))?;
    ensure!(reply["notes"].to_string().contains("rounded up to 514 MiB"), "{reply}");

    // Below what it was booted with: what was plugged goes first, then the balloon takes the rest; and back the other way.
    let (status, reply, steps) = resize(&agentd, &json!({"memory": "200MiB", "wait": "15s", "apply": "live"}))?;
    assert_eq!(status, 200, "{reply}");
    assert_eq!(steps, ["libvirt virtio-mem live 0 bytes, 256 MiB in all", "libvirt setMemory live 200 MiB"]);
    // A guest may keep some of what was plugged: its own pages are in it. Then that is told, and charged.
    let observed = reply["changes"][0]["observed"].as_u64().context("a number")?;
    let resists = observed > 200 * MIB;
    assert_eq!(reply["outcome"], if resists { "pending" } else { "changed" }, "{reply}");
    ensure!(!resists || reply["notes"].to_string().contains("has not obeyed yet"), "{reply}");
    ensure!(reply["instance"]["committed"]["memory"].as_u64() >= Some(observed), "{reply}");
    println!("of 200 MiB asked for: {observed} bytes");
    // It may go on giving back: what agentd tells and what the guest has are the same all the time.
    agentd_tests::lab::wait_until("what agentd tells in the guest", LIMIT, || {
        let told = shown()?["memory"]["observed"].as_u64().context("a number")?;
        let mib = i64::try_from(told / MIB)? - 384;
        let now = guest.stats().last().copied().context("a line")?;
        let apart = now.memtotal_kib.cast_signed() - first.memtotal_kib.cast_signed() - mib * 1024;
        Ok((apart.abs() < 8 * 1024).then_some(()))
    })?;
    let operation = reply["operation"].as_str().context("an operation")?;
    let undone = agentd.post(&format!("/v1/operations/{operation}/undo"), &json!({"wait": "15s"}))?;
    assert_eq!(undone.status, 200, "{}", undone.text());
    moved(&guest, first, 128)?;

    // Beyond all of it there is nothing without a restart.
    let (status, reply, _) = resize(&agentd, &json!({"memory": "800MiB"}))?;
    assert_eq!((status, &reply["code"]), (422, &json!("restart-required")), "{reply}");
    // For the next boot only, and by hand: seen, and told as drift.
    let (status, reply, steps) = resize(&agentd, &json!({"memory": "300MiB", "apply": "next-boot"}))?;
    assert_eq!(
        (status, &steps[..]),
        (200, &["libvirt virtio-mem saved 44 MiB, 300 MiB in all".to_owned()][..]),
        "{reply}"
    );
    assert_eq!(shown()?["next_boot"], json!(["memory"]));
    Ok(())
}

#[test]
fn a_guest_that_does_not_give_back_what_was_plugged_is_told_as_it_is() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").memory(256, 256).virtio_mem(256, 0).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    guest.wait_for("a first line", LIMIT, |_| true)?;
    let (status, reply, _) = resize(&agentd, &json!({"memory": "512MiB", "wait": "60s"}))?;
    assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
    // A guest that does nothing at all for a while.
    guest.slow(true)?;
    let (status, reply, _) = resize(&agentd, &json!({"memory": "300MiB", "wait": "1s", "apply": "live"}))?;
    guest.slow(false)?;
    assert_eq!((status, &reply["outcome"]), (200, &json!("pending")), "{reply}");
    let committed = &reply["instance"]["committed"]["memory"];
    ensure!(committed.as_u64() > Some(500 * MIB), "what it has not given back is charged: {reply}");
    agentd_tests::lab::wait_until("it to obey", LIMIT, || {
        Ok((agentd.get("/v1/instances/vm/web")?.json()["memory"]["observed"] == 300 * MIB).then_some(()))
    })
}

#[test]
fn a_vm_that_was_prepared_grows_beyond_its_old_maximum_after_its_next_boot() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 1).memory(256, 256).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(&libvirt)).inside(&lab).start()?;
    guest.wait_for("a first line", LIMIT, |stat| stat.nproc == 1)?;
    let unprepared = agentd.ctl(&["list", "--unprepared"]);
    ensure!(unprepared.stdout.contains("cpus: 1 is its maximum; memory: 256 MiB is its maximum"), "{unprepared:?}");
    assert_eq!(agentd.ctl(&["resize", "web", "--cpus", "2"]).code, Some(9));

    let before = guest.virsh("dumpxml", &["--inactive"])?;
    let planned = agentd.ctl(&["prepare", "web", "--max-cpus", "4", "--max-memory", "768MiB", "--dry-run"]);
    ensure!(planned.code == Some(0) && planned.stdout.contains("virtio-mem"), "{planned:?}");
    assert_eq!(guest.virsh("dumpxml", &["--inactive"])?, before, "a dry run changes nothing");
    let prepared = agentd.ctl(&["prepare", "web", "--max-cpus", "4", "--max-memory", "768MiB"]);
    ensure!(prepared.code == Some(0) && prepared.stdout.contains("after the next boot"), "{prepared:?}");
    let again = agentd.ctl(&["prepare", "web", "--max-cpus", "4", "--max-memory", "768MiB"]);
    ensure!(again.stdout.contains("has that headroom already"), "{again:?}");
    // What runs is as it was, and so is what it starts with.
    assert_eq!(agentd.ctl(&["resize", "web", "--cpus", "2", "--live-only"]).code, Some(9));

    assert_eq!(agentd.ctl(&["stop", "web", "--force", "--timeout", "20s"]).code, Some(0));
    assert_eq!(agentd.ctl(&["start", "web"]).code, Some(0));
    let first = guest.wait_for("one CPU again", LIMIT, |stat| stat.nproc == 1 && stat.up < 60.0)?;
    let grown = agentd.ctl(&["resize", "web", "--cpus", "3", "--memory", "640MiB", "--wait", "60s"]);
    ensure!(grown.code == Some(0), "{grown:?}");
    guest.wait_for("three CPUs", LIMIT, |stat| stat.nproc == 3)?;
    moved(&guest, first, 384)?;
    ensure!(!agentd.ctl(&["list", "--unprepared"]).stdout.contains("vm/web"), "it can grow");
    Ok(())
}
