//! Any JSON as what Docker tells of a container, and any bytes as its log.

use agentd_core::plan::Values;
use agentd_core::units::{ByteCount, Cpus, Limit};
use bollard::models::{ContainerInspectResponse, ContainerSummary};

use super::limits::Native;
use super::{logs, view};
use crate::backend::cgroup::Seen;
use crate::backend::fuzzing::Numbers;

/// A container's description, its limits, and its log.
pub fn container(data: &[u8]) {
    let mut numbers = Numbers(data);
    let limit = |numbers: &mut Numbers<'_>| match numbers.u64() {
        u64::MAX => Limit::Unlimited,
        millis => Limit::At(Cpus::from_millis(millis.min(Cpus::MAX.millis()))),
    };
    let memory = |numbers: &mut Numbers<'_>| ByteCount::new(numbers.u64()).map_or(Limit::Unlimited, Limit::At);
    let (cpus, bytes) = (numbers.maybe(limit), numbers.maybe(memory));
    let up = numbers.flag();
    logs::fuzzing::log(numbers.0);
    let Some(text) = numbers.text() else { return };
    if let Ok(summary) = serde_json::from_str::<ContainerSummary>(text) {
        view::unreadable(&summary, "it is not to be read");
    }
    let Ok(inspected) = serde_json::from_str::<ContainerInspectResponse>(text) else { return };
    let seen = Seen { cpus, memory: bytes, used: bytes.and_then(Limit::at) };
    let _ = view::observed(&inspected, up.then_some(seen), Some(Cpus::whole(8)));
    let native = view::native(&inspected);
    let values = Values { cpus, memory: bytes, ..Values::default() };
    for values in [values, Values { cpus: Some(native.saved_cpus()), memory: Some(native.memory_limit()), ..values }] {
        let _ = native.set(&values);
        let _ = native.restore(&Native::default(), &values);
        let _ = Native::default().restore(&native, &values);
    }
}
