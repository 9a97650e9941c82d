//! The page for Prometheus: what the host has and has promised, what instances use, what waits. Sums are over everything, as
//! in `ctl capacity`; series of single instances are of those that the caller may see, and of a bounded number.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use agentd_core::api::{CapacityOf, HoldKind};
use agentd_core::units::{ByteCount, Cpus, Limit};
use agentd_core::usage::view;
use prometheus::GaugeVec;

use super::usage::Looked;
use super::{Engine, Peer};
use crate::metrics::Page;

/// The most instances that have series of their own.
const MOST_INSTANCES: usize = 500;
/// What an instance's series are told apart by.
const OF_INSTANCE: [&str; 2] = ["kind", "ref"];

impl Engine {
    /// The page, in Prometheus' text format.
    pub async fn metrics(&self, peer: &Peer) -> String {
        let page = Page::of(&self.inner.metrics);
        self.tell_capacity(&page, peer).await;
        self.tell_instances(&page, peer).await;
        self.tell_itself(&page);
        page.text()
    }

    async fn tell_capacity(&self, page: &Page, peer: &Peer) {
        let capacity = self.capacity(peer).await;
        fn sides<T>(gauges: &GaugeVec, of: &CapacityOf<T>, number: impl Fn(&T) -> f64) {
            let sides = [
                ("total", &of.total),
                ("reserved", &of.reserved),
                ("allowed", &of.allowed),
                ("committed", &of.committed),
                ("free", &of.free),
            ];
            for (what, value) in sides {
                gauges.with_label_values(&[what]).set(number(value));
            }
        }
        sides(&page.gauges("agentd_capacity_cpus", "CPUs of the host", &["what"]), &capacity.cpus, cpus);
        sides(&page.gauges("agentd_capacity_memory_bytes", "Memory of the host", &["what"]), &capacity.memory, bytes);

        let known = page.gauges("agentd_instances", "Instances that there are", &["kind"]);
        let up = page.gauges("agentd_instances_up", "Instances that are up", &["kind"]);
        let of_cpus = page.gauges("agentd_committed_cpus", "CPUs promised to a kind", &["kind"]);
        let of_memory = page.gauges("agentd_committed_memory_bytes", "Memory promised to a kind", &["kind"]);
        let is_up = page.gauges("agentd_backend_up", "Whether a backend answers", &["kind"]);
        for kind in self.inner.sources.keys() {
            let used = capacity.by_kind.get(kind).copied().unwrap_or_default();
            let kind_label = [kind.as_str()];
            known.with_label_values(&kind_label).set(count(used.instances));
            up.with_label_values(&kind_label).set(count(used.up));
            of_cpus.with_label_values(&kind_label).set(cpus(&used.committed.cpus));
            of_memory.with_label_values(&kind_label).set(bytes(&used.committed.memory));
            is_up.with_label_values(&kind_label).set(truth(!capacity.unavailable.contains(kind)));
        }

        // By its pattern, so that a limit keeps its series when another one is put before it.
        let of = ["limit", "what"];
        let of_cpus = page.gauges("agentd_limit_cpus", "CPUs promised and allowed under a [[limit]]", &of);
        let of_memory = page.gauges("agentd_limit_memory_bytes", "Memory promised and allowed under a [[limit]]", &of);
        for limit in &capacity.limits {
            let set = |gauges: &GaugeVec, what, value: f64| {
                gauges.with_label_values(&[limit.pattern.as_str(), what]).set(value)
            };
            set(&of_cpus, "committed", cpus(&limit.committed.cpus));
            set(&of_memory, "committed", bytes(&limit.committed.memory));
            if let Some(total) = &limit.total_cpus {
                set(&of_cpus, "allowed", cpus(total));
            }
            if let Some(total) = &limit.total_memory {
                set(&of_memory, "allowed", bytes(total));
            }
        }
    }

    async fn tell_instances(&self, page: &Page, peer: &Peer) {
        let mut shown = self.visible_and_up(peer, |_| true);
        shown.sort_by(|a, b| a.reference.cmp(&b.reference));
        let left_out = shown.len().saturating_sub(MOST_INSTANCES);
        shown.truncate(MOST_INSTANCES);
        page.gauge(
            "agentd_instances_left_out",
            "Instances without series of their own, because there are too many",
            count(left_out),
        );
        let counters = |name, help| page.counters(name, help, &OF_INSTANCE);
        let gauges = |name, help| page.gauges(name, help, &OF_INSTANCE);
        let cpu = counters("agentd_instance_cpu_seconds_total", "CPU time since its start");
        let throttled =
            counters("agentd_instance_throttled_seconds_total", "For how long its CPU limit has held it back");
        let kills = counters("agentd_instance_oom_kills_total", "Processes in it killed for want of memory");
        let has_cpus = gauges("agentd_instance_cpus", "vCPUs, or the limit of CPU time, where there is one");
        let has_memory = gauges("agentd_instance_memory_bytes", "What a guest has, or the limit, where there is one");
        let used = gauges("agentd_instance_memory_used_bytes", "Memory in use inside, droppable caches not counted");
        let host = gauges("agentd_instance_memory_host_bytes", "What it takes of the host's memory");
        let lag = gauges("agentd_instance_balloon_lag_bytes", "How far a VM's balloon is from its target");
        for Looked { observed, counted, .. } in self.look_at(shown).await {
            let of = [observed.reference.kind().as_str(), observed.reference.as_str()];
            let seen = view(&observed, counted.as_ref().map_err(String::as_str), None, String::new());
            for (counter, value) in [(&cpu, seen.cpu.total_ms), (&throttled, seen.cpu.throttled_ms)] {
                if let Some(ms) = value {
                    counter.with_label_values(&of).inc_by(number(ms) / 1000.0);
                }
            }
            if let Some(n) = seen.memory.oom_kills {
                kills.with_label_values(&of).inc_by(number(n));
            }
            let values = [
                (&has_cpus, observed.cpus.observed.and_then(Limit::at).map(|value| cpus(&value))),
                (&has_memory, seen.memory.limit.and_then(Limit::at).map(|value| bytes(&value))),
                (&used, seen.memory.used.map(|value| bytes(&value))),
                (&host, seen.memory.host.map(|value| bytes(&value))),
                (&lag, seen.memory.balloon.and_then(|balloon| balloon.lag).map(|value| bytes(&value))),
            ];
            for (gauges, value) in values {
                if let Some(value) = value {
                    gauges.with_label_values(&of).set(value);
                }
            }
        }
    }

    fn tell_itself(&self, page: &Page) {
        let mut holds: BTreeMap<&str, usize> =
            [HoldKind::Suspended, HoldKind::NeedsAttention, HoldKind::Recovering].map(|hold| (hold.as_str(), 0)).into();
        for known in self.book().all() {
            for hold in &known.holds {
                *holds.entry(hold.hold.as_str()).or_default() += 1;
            }
        }
        let gauges = page.gauges("agentd_holds", "Holds on instances", &["hold"]);
        for (hold, held) in holds {
            gauges.with_label_values(&[hold]).set(count(held));
        }

        let queued: Vec<usize> = {
            let slots = self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.values().map(|slot| slot.queued.load(Ordering::Acquire)).filter(|queued| *queued > 0).collect()
        };
        let changes =
            page.gauges("agentd_changes", "Changes under way, and those that wait for their turn", &["state"]);
        changes.with_label_values(&["under-way"]).set(count(queued.len()));
        changes.with_label_values(&["waiting"]).set(count(queued.iter().map(|queued| queued - 1).sum()));

        let (store, settings) = (self.store(), self.settings());
        page.gauge("agentd_store_waiting", "Commits that wait for the disk", count(store.waiting()));
        page.gauge("agentd_store_up", "Whether the record takes what is to go on it", truth(store.trouble().is_none()));
        page.gauge("agentd_read_only", "Whether changes are switched off", truth(settings.config.server.read_only));
        if let Some(size) = store.size() {
            page.gauge("agentd_store_size_bytes", "The record's size on disk, its log included", number(size));
        }
        let build = page.gauges("agentd_build_info", "1, and which agentd this is", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    }
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus has no other numbers; 53 bits are 8 PiB")]
fn number(value: u64) -> f64 {
    value as f64
}

fn count(value: usize) -> f64 {
    number(u64::try_from(value).unwrap_or(u64::MAX))
}

fn cpus(value: &Cpus) -> f64 {
    number(value.millis()) / 1000.0
}

fn bytes(value: &ByteCount) -> f64 {
    number(value.bytes())
}

fn truth(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engine::tests::{CONFIG, engine, peer};

    #[tokio::test]
    async fn instances_beyond_the_bound_are_counted_and_have_no_series() {
        let machine = |n: usize| json!({"name": format!("vm-{n:04}"), "cpus": 1, "memory": "1GiB", "max_cpus": 1, "max_memory": "1GiB"});
        let machines: Vec<_> = (0..MOST_INSTANCES + 3).map(machine).collect();
        let (engine, _) = engine(json!({"instances": machines}), CONFIG);
        let page = engine.metrics(&peer()).await;
        assert!(page.contains("\nagentd_instances_left_out 3\n"), "{page}");
        assert_eq!(page.matches("\nagentd_instance_cpus{").count(), MOST_INSTANCES);
        assert!(page.contains("\nagentd_instances{kind=\"vm\"} 503\n"), "sums are over all of them");
    }
}
