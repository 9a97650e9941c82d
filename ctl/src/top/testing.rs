//! Samples for the tests of the model and of the drawing.

use agentd_core::api::{Capacity, HostUse, Instance, UsageView};
use jiff::{Timestamp, Zoned, tz::TimeZone};
use serde_json::{Value, json};

use super::source::Sample;

pub(super) const MIB: u64 = 1 << 20;
/// 2026-03-01 14:00:00, a Sunday.
pub(super) const NOW_MS: u64 = 1_772_373_600_000;

pub(super) fn now() -> Zoned {
    let now = Timestamp::from_millisecond(i64::try_from(NOW_MS).unwrap()).unwrap();
    now.to_zoned(TimeZone::UTC)
}

pub(super) fn capacity() -> Capacity {
    let of = |total: u64, committed: u64, overcommit: f64, allowed: u64| {
        json!({"total": total, "reserved": 0, "overcommit": overcommit, "allowed": allowed, "committed": committed,
            "free": allowed - committed, "over": false})
    };
    serde_json::from_value(json!({"cpus": of(32, 54, 2.0, 60), "memory": of(128 << 30, 96 << 30, 1.0, 127 << 30),
        "by_kind": {}, "limits": [], "vm_memory": "observed", "vm_overhead": 0, "unlimited": [], "unavailable": []}))
    .unwrap()
}

fn overlay(mut whole: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().unwrap() {
        whole[key] = value.clone();
    }
    whole
}

/// A running instance with 2 CPUs and 512 MiB.
pub(super) fn instance(reference: &str, more: &Value) -> Instance {
    let (kind, name) = reference.split_once('/').unwrap();
    let field = |value: Value| json!({"accepted": value, "observed": value, "confirmed": null, "persistent": value, "ceiling": null});
    let whole = json!({"ref": reference, "kind": kind, "name": name, "id": name, "state": "running", "version": "v",
        "cpus": field(json!(2)), "cpu_limit": field(Value::Null), "memory": field(json!(512 * MIB)),
        "committed": {"cpus": 2, "memory": 512 * MIB}, "labels": {}, "holds": [], "notes": []});
    serde_json::from_value(overlay(whole, more)).unwrap()
}

/// Half a CPU and 128 MiB.
pub(super) fn usage(reference: &str, cpu: &Value, memory: &Value) -> UsageView {
    let (kind, _) = reference.split_once('/').unwrap();
    let least = json!({"rate": 0.5, "window_ms": 2000, "total_ms": 9000, "throttled": null, "throttled_ms": null});
    let used =
        json!({"used": 128 * MIB, "available": null, "host": null, "limit": null, "oom_kills": null, "balloon": null});
    serde_json::from_value(
        json!({"ref": reference, "kind": kind, "at": "2026-03-01T14:00:00Z", "cpu": overlay(least, cpu),
        "memory": overlay(used, memory), "pressure": null, "notes": []}),
    )
    .unwrap()
}

pub(super) fn balloon(lag: u64) -> Value {
    json!({"balloon": {"target": 512 * MIB, "actual": 512 * MIB + lag, "lag": lag}})
}

/// Some that use much, some that use nothing, one that is held, one that nobody knows anything of.
pub(super) fn sample() -> Sample {
    let none = &json!({});
    let down = json!({"state": "stopped", "cpus": {"accepted": null, "observed": null, "confirmed": null, "persistent": 2, "ceiling": null},
        "memory": {"accepted": null, "observed": null, "confirmed": null, "persistent": 512 * MIB, "ceiling": null}});
    Sample {
        capacity: capacity(),
        host: HostUse { cpus: Some(27.3), memory: agentd_core::units::ByteCount::new(64 << 30) },
        instances: vec![
            (
                instance(
                    "container/db",
                    &json!({"loans": [{"operation": "01J", "fields": ["memory"], "due_ms": NOW_MS + 300_000}]}),
                ),
                Some(usage("container/db", &json!({"rate": 1.9, "throttled": 0.125}), &json!({"used": 400 * MIB}))),
            ),
            (
                instance("vm/ci-1", &json!({"holds": [{"hold": "needs-attention", "reason": "r"}]})),
                Some(usage("vm/ci-1", none, &balloon(112 * MIB))),
            ),
            (
                instance(
                    "vm/idle",
                    &json!({"cpu_limit": {"accepted": 0.5, "observed": 0.5, "confirmed": null, "persistent": 0.5, "ceiling": null}}),
                ),
                Some(usage("vm/idle", &json!({"rate": 0.004, "throttled": 0}), &balloon(0))),
            ),
            (
                instance(
                    "unit/batch.service",
                    &json!({"cpus": {"accepted": "none", "observed": "none", "confirmed": null, "persistent": "none", "ceiling": null}}),
                ),
                Some(usage("unit/batch.service", &json!({"rate": null}), &json!({"used": null}))),
            ),
            (instance("vm/off", &down), None),
        ],
        unavailable: Vec::new(),
    }
}
