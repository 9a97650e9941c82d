//! Any XML as a definition, any numbers as what libvirt, QEMU and a guest tell of a domain.

use agentd_core::units::{Cpus, Limit};

use super::asked::Memory;
use super::ffi::{Bandwidth, MemoryStats};
use super::look::{Balloon, Sighting};
use super::prepare::{Wish, boot_with, prepare};
use super::process::Process;
use super::xml::{self, Definition, tree};
use super::{cgroup, console, counters, process, quota, reading};
use crate::backend::fuzzing::Numbers;

/// A definition, and headroom in it.
pub fn definition(data: &[u8]) {
    let mut numbers = Numbers(data);
    let wish = Wish { vcpus: numbers.maybe(Numbers::u32), memory: numbers.maybe(Numbers::kib) };
    // Each vCPU is an element; no machine type takes more.
    let most = Some(numbers.maybe(Numbers::u32).unwrap_or(1024).min(1024));
    let Some(xml) = numbers.text() else { return };
    let _ = console::log_path(xml);
    let read = xml::definition(xml);
    for prepared in [prepare(xml, wish, most), boot_with(xml, wish, most)].into_iter().flatten() {
        let before = read.as_ref().expect("what is prepared was read");
        let after = xml::definition(&prepared.xml).expect("what was prepared can be read");
        assert!(tree::parse(&prepared.xml).is_ok(), "{} is no XML", prepared.xml);
        assert!(after.max_vcpus >= before.max_vcpus, "vCPUs are lost: {}", prepared.xml);
    }
    let Ok(read) = read else { return };
    for plug in &read.plugs {
        if let Some(device) = plug.asked_for(xml, 2 << 20) {
            assert!(xml.len() + 20 >= device.len(), "{device} is more than the definition");
        }
    }
    observe(Some(read), &mut Numbers(data));
}

/// A running domain of which everything is told at random.
pub fn domain(data: &[u8]) {
    let mut numbers = Numbers(data);
    let definition = numbers.maybe(|numbers| Definition {
        fixed_vcpus: numbers.maybe(Numbers::u32),
        memory: numbers.kib(),
        current_memory: numbers.kib(),
        max_vcpus: numbers.u32(),
        vcpus: numbers.u32(),
        balloon: numbers.flag(),
        stats_period: numbers.u32(),
        device_size: numbers.kib(),
        device_current: numbers.kib(),
        device_requested: numbers.kib(),
        agent: numbers.flag(),
        ..Definition::default()
    });
    observe(definition, &mut numbers);
}

fn observe(definition: Option<Definition>, numbers: &mut Numbers<'_>) {
    let bandwidth = |numbers: &mut Numbers<'_>| Bandwidth { quota: numbers.i64(), period: numbers.u64() };
    let maybe = |numbers: &mut Numbers<'_>| numbers.maybe(Numbers::u64);
    let stats = |numbers: &mut Numbers<'_>| MemoryStats::told(maybe(numbers), maybe(numbers), maybe(numbers));
    let (live, enforced) = (numbers.flag(), bandwidth(numbers));
    let seen = Sighting {
        name: "web".into(),
        uuid: "uuid".into(),
        id: numbers.maybe(Numbers::u32),
        state: (numbers.u8().into(), numbers.u8().into()),
        live: definition.clone().filter(|_| live),
        saved: definition.filter(|_| numbers.flag()),
        live_bandwidth: numbers.maybe(bandwidth).ok_or_else(|| "none".into()),
        saved_bandwidth: numbers.maybe(bandwidth).ok_or_else(|| "none".into()),
        process: numbers.maybe(|numbers| Process {
            pid: 1,
            start: 2,
            vcpus: numbers.maybe(Numbers::u32),
            emulates: numbers.flag(),
        }),
        cgroup_limit: numbers.maybe(|_| quota::limit(enforced)),
        balloon: match numbers.u8() % 3 {
            0 => Balloon::NotAsked,
            1 => Balloon::Deaf("it is deaf".into()),
            _ => Balloon::Said { stats: stats(numbers), fresh: numbers.flag() },
        },
        online: numbers.maybe(Numbers::u64),
    };
    let mut asked = Memory::default();
    let Some(boot) = seen.boot() else { return drop(reading::observed(&seen, &mut asked)) };
    if numbers.flag() {
        asked.balloon_asked(&seen.uuid, &boot, numbers.kib(), numbers.kib());
    }
    if numbers.flag() {
        asked.unplug_is_late(&seen.uuid, &boot, numbers.u32());
    }
    if let Ok(observed) = reading::observed(&seen, &mut asked) {
        // What is remembered of it comes back from the record.
        reading::asked_in(&observed.native);
        reading::observed(&seen, &mut asked).expect("it was seen before");
    }
    quota::bandwidth(Cpus::from_millis(numbers.u64().min(Cpus::MAX.millis())), enforced.period);
    let _ = matches!(quota::limit(enforced), Limit::Unlimited);
}

/// Files of `/proc`.
pub(in crate::backend) fn proc_files(text: &str) {
    process::start_time(text);
    counters::cpu_usec(text);
    counters::resident(text);
    for unified in [true, false] {
        let Some(path) = cgroup::membership(text, unified) else { continue };
        if let Some(own) = cgroup::own_path(path) {
            assert!(!own.split('/').any(|part| part == ".."), "{own:?} leads out");
        }
    }
}
