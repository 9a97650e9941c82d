//! What is counted since the daemon's start, for Prometheus: operations, refusals, drift, how long engines take. What is so at
//! the moment of asking is `engine/metrics.rs`'s business.

use std::time::Duration;

use agentd_core::api::{Happening, HistoryEntry};
use agentd_core::instance::Kind;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

/// From what an engine answers from memory to what it is given up on, in seconds.
const BUCKETS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 20.0, 120.0];

/// Why making a metric or registering it can't fail: names and labels are constants, each made once a page; a test makes all.
const SOUND: &str = "a metric has a sound name and sound labels";

/// What is counted; clones share one.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    registry: Registry,
    operations: IntCounterVec,
    refusals: IntCounterVec,
    drift: IntCounter,
    calls: HistogramVec,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            IntCounterVec::new(Opts::new(name, help), labels).expect(SOUND) // see there
        };
        let calls = HistogramOpts::new("agentd_backend_call_seconds", "How long calls to an engine take")
            .buckets(BUCKETS.to_vec());
        let metrics = Metrics {
            registry: Registry::new(),
            operations: counters(
                "agentd_operations_total",
                "Changes by how they ended, refusals apart, since agentd's start",
                &["verb", "outcome"],
            ),
            refusals: counters(
                "agentd_refusals_total",
                "Changes that were refused, by the code, since agentd's start",
                &["verb", "code"],
            ),
            drift: IntCounter::new(
                "agentd_drift_total",
                "Changes of sizes behind agentd's back that were seen since its start",
            )
            .expect(SOUND), // see there
            calls: HistogramVec::new(calls, &["kind", "call", "result"]).expect(SOUND), // see there
        };
        let parts: [Box<dyn prometheus::core::Collector>; 4] = [
            Box::new(metrics.operations.clone()),
            Box::new(metrics.refusals.clone()),
            Box::new(metrics.drift.clone()),
            Box::new(metrics.calls.clone()),
        ];
        for part in parts {
            metrics.registry.register(part).expect(SOUND); // see there
        }
        metrics
    }

    /// Something went on record.
    pub(crate) fn recorded(&self, entry: &HistoryEntry) {
        let verb = entry.verb.as_deref().unwrap_or("none");
        match entry.happening {
            Happening::Change => {
                let outcome = entry.outcome.map_or("unknown", |outcome| outcome.as_str());
                self.operations.with_label_values(&[verb, outcome]).inc();
            }
            Happening::Refusal => {
                let code = entry.code.map_or("unknown", |code| code.as_str());
                self.refusals.with_label_values(&[verb, code]).inc();
            }
            Happening::Drift => self.drift.inc(),
            _ => {}
        }
    }

    /// A call to an engine has come back: with `ok`, or the code of its error.
    pub(crate) fn called(&self, kind: Kind, call: &str, result: &str, took: Duration) {
        self.calls.with_label_values(&[kind.as_str(), call, result]).observe(took.as_secs_f64());
    }
}

/// One answer to who asks for metrics: what was counted, and what is so now.
pub(crate) struct Page {
    now: Registry,
    counted: Registry,
}

impl Page {
    pub(crate) fn of(metrics: &Metrics) -> Self {
        Page { now: Registry::new(), counted: metrics.registry.clone() }
    }

    /// Values that go up and down. Without any a metric isn't on the page: what nobody knows is left out, never 0.
    pub(crate) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        let gauges = GaugeVec::new(Opts::new(name, help), labels).expect(SOUND); // see there
        self.now.register(Box::new(gauges.clone())).expect(SOUND); // see there
        gauges
    }

    /// Values that somebody else counts.
    pub(crate) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> CounterVec {
        let counters = CounterVec::new(Opts::new(name, help), labels).expect(SOUND); // see there
        self.now.register(Box::new(counters.clone())).expect(SOUND); // see there
        counters
    }

    /// A value without labels.
    pub(crate) fn gauge(&self, name: &str, help: &str, value: f64) {
        self.gauges(name, help, &[]).with_label_values::<&str>(&[]).set(value);
    }

    /// The page in Prometheus' text format, 0.0.4, with what the daemon itself takes.
    pub(crate) fn text(self) -> String {
        // With a prefix: the page may get to Prometheus by way of node_exporter, which has `process_…` of its own.
        let own = ProcessCollector::new(std::process::id().cast_signed(), "agentd");
        self.now.register(Box::new(own)).expect(SOUND); // see there
        let mut families = self.counted.gather();
        families.extend(self.now.gather());
        TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| {
            tracing::error!(%error, "defect: metrics can't be written");
            String::new()
        })
    }
}

#[cfg(test)]
mod tests {
    use agentd_core::error::Code;
    use agentd_core::instance::Ref;
    use agentd_core::operation::Outcome;

    use super::*;

    #[test]
    fn what_goes_on_record_is_counted_by_what_became_of_it() {
        let metrics = Metrics::new();
        let of = Ref::new(Kind::Vm, "web").unwrap();
        let entry = |happening| HistoryEntry { verb: Some("resize".into()), ..HistoryEntry::new(happening, &of, None) };
        let changed = HistoryEntry { outcome: Some(Outcome::Changed), ..entry(Happening::Change) };
        let refused = HistoryEntry { code: Some(Code::CapacityExceeded), ..entry(Happening::Refusal) };
        for entry in [&changed, &changed, &refused, &entry(Happening::Drift), &entry(Happening::HoldCleared)] {
            metrics.recorded(entry);
        }
        metrics.called(Kind::Vm, "observe", "ok", Duration::from_millis(20));
        let text = Page::of(&metrics).text();
        for line in [
            "agentd_operations_total{outcome=\"changed\",verb=\"resize\"} 2",
            "agentd_refusals_total{code=\"capacity-exceeded\",verb=\"resize\"} 1",
            "agentd_drift_total 1",
            "agentd_backend_call_seconds_bucket{call=\"observe\",kind=\"vm\",result=\"ok\",le=\"0.01\"} 0",
            "agentd_backend_call_seconds_bucket{call=\"observe\",kind=\"vm\",result=\"ok\",le=\"0.025\"} 1",
        ] {
            assert!(text.lines().any(|is| is == line), "{line} isn't in\n{text}");
        }
        assert!(text.contains("\nagentd_process_resident_memory_bytes ") && !text.contains("\nprocess_"), "{text}");
    }

    #[test]
    fn what_nobody_knows_is_not_on_the_page_and_names_are_data() {
        let page = Page::of(&Metrics::new());
        page.gauges("agentd_unknown", "x", &["ref"]);
        page.gauges("agentd_known", "x", &["ref"]).with_label_values(&["vm/a\"b\\c\nd"]).set(0.0);
        let text = page.text();
        assert!(!text.contains("agentd_unknown"), "{text}");
        assert!(text.contains("agentd_known{ref=\"vm/a\\\"b\\\\c\\nd\"} 0\n"), "{text}");
    }
}
