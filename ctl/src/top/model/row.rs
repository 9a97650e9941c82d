//! One instance as a line of the table: its values in the words of the table, and how two of them are sorted.

use std::cmp::Ordering;

use agentd_core::api::{Instance, UsageView};
use agentd_core::units::{ByteCount, Cpus, Limit};
use jiff::{SignedDuration, Timestamp, Zoned};

use super::Trail;
use crate::args::SortKey;
use crate::render::bar::hundredths;
use crate::render::text::clean;

/// What is unknown, or does not apply.
const NOTHING: &str = "-";

/// What an instance is known by over samples.
pub(super) fn key(instance: &Instance) -> String {
    format!("{}/{}", instance.kind, instance.id)
}

/// Memory in use, for a sparkline.
#[allow(clippy::cast_precision_loss, reason = "a line of eight steps")]
pub(super) fn memory_used(usage: &UsageView) -> Option<f64> {
    usage.memory.used.map(|bytes| bytes.bytes() as f64)
}

/// A line of the table.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    instance: &'a Instance,
    usage: Option<&'a UsageView>,
    trails: Option<(&'a Trail, &'a Trail)>,
}

impl<'a> Row<'a> {
    /// An instance with what it uses and has used.
    pub(crate) fn new(
        instance: &'a Instance,
        usage: Option<&'a UsageView>,
        trails: Option<(&'a Trail, &'a Trail)>,
    ) -> Self {
        Row { instance, usage, trails }
    }

    /// `kind/name`, safe for a terminal.
    pub(crate) fn reference(&self) -> String {
        clean(&self.instance.reference)
    }

    /// `running`
    pub(crate) fn state(&self) -> String {
        self.instance.state.to_string()
    }

    /// Whether it has CPU and memory now.
    pub(crate) fn is_up(&self) -> bool {
        self.instance.state.is_up()
    }

    /// `0.5/1.5`: CPUs in use, and the most that it can use.
    pub(crate) fn cpu(&self) -> String {
        slash(
            self.cpu_rate().map(hundredths),
            self.cpu_limit().map(|limit| tell(limit, |cpus| hundredths(number(cpus)))),
        )
    }

    /// `120M/1.5G`: memory in use, and what it has.
    pub(crate) fn memory(&self) -> String {
        slash(self.memory_use().map(compact), self.memory_limit().map(|limit| tell(limit, compact)))
    }

    /// `12%`: of the periods in the window, those in which its CPU limit held it back.
    pub(crate) fn throttled(&self) -> String {
        self.throttled_share().map_or_else(|| NOTHING.into(), |share| format!("{:.0}%", share * 100.0))
    }

    /// `112M`: how far a balloon is from its target.
    pub(crate) fn lag(&self) -> String {
        self.balloon_lag().map_or_else(|| NOTHING.into(), compact)
    }

    /// What blocks changes, and until when it has what it has.
    pub(crate) fn notes(&self, now: &Zoned) -> Vec<String> {
        let holds = self.instance.holds.iter().map(|hold| hold.hold.as_str().to_owned());
        let first = self.instance.loans.iter().map(|loan| loan.due_ms).min();
        holds.chain(first.map(|due| until(due, now))).collect()
    }

    /// Whether a balloon is under way.
    pub(crate) fn lags(&self) -> bool {
        self.balloon_lag().is_some_and(|lag| !lag.is_zero())
    }

    /// CPUs in use at each sample, and what is the top of the line: its limit, or else the most that was seen.
    pub(crate) fn cpu_trail(&self) -> (Option<&'a Trail>, f64) {
        let trail = self.trails.map(|(cpu, _)| cpu);
        let limit = self.cpu_limit().and_then(Limit::at).map(number);
        (trail, limit.unwrap_or_else(|| most(trail).max(1.0)))
    }

    /// The same of memory.
    #[allow(clippy::cast_precision_loss, reason = "a line of eight steps")]
    pub(crate) fn memory_trail(&self) -> (Option<&'a Trail>, f64) {
        let trail = self.trails.map(|(_, memory)| memory);
        let limit = self.memory_limit().and_then(Limit::at).map(|bytes| bytes.bytes() as f64);
        (trail, limit.unwrap_or_else(|| most(trail)))
    }

    fn cpu_rate(&self) -> Option<f64> {
        self.usage?.cpu.rate
    }

    /// The least of what bounds its CPU time.
    fn cpu_limit(&self) -> Option<Limit<Cpus>> {
        let of = |field: &agentd_core::api::FieldView<Cpus>| field.observed.or(field.accepted);
        match (of(&self.instance.cpus), of(&self.instance.cpu_limit)) {
            (Some(Limit::At(cpus)), Some(Limit::At(limit))) => Some(Limit::At(cpus.min(limit))),
            (Some(Limit::Unlimited) | None, Some(limit @ Limit::At(_))) => Some(limit),
            (cpus, _) => cpus,
        }
    }

    fn memory_use(&self) -> Option<ByteCount> {
        self.usage?.memory.used
    }

    fn memory_limit(&self) -> Option<Limit<ByteCount>> {
        let memory = &self.instance.memory;
        self.usage.and_then(|usage| usage.memory.limit).or(memory.observed).or(memory.accepted)
    }

    fn throttled_share(&self) -> Option<f64> {
        self.usage?.cpu.throttled
    }

    fn balloon_lag(&self) -> Option<ByteCount> {
        self.usage?.memory.balloon?.lag
    }

    /// The largest first, names from A on; `reverse` turns that about. What is unknown comes last in any case.
    pub(crate) fn compare(&self, other: &Self, by: SortKey, reverse: bool) -> Ordering {
        let way = |order: Ordering| if reverse { order.reverse() } else { order };
        let names = self.instance.reference.cmp(&other.instance.reference);
        let order = match by {
            SortKey::Name => return way(names),
            SortKey::Cpu => largest(self.cpu_rate(), other.cpu_rate(), f64::total_cmp, way),
            SortKey::Memory => largest(self.memory_use(), other.memory_use(), Ord::cmp, way),
            SortKey::Throttled => largest(self.throttled_share(), other.throttled_share(), f64::total_cmp, way),
            SortKey::Lag => largest(self.balloon_lag(), other.balloon_lag(), Ord::cmp, way),
        };
        order.then(names)
    }
}

fn largest<T>(
    a: Option<T>,
    b: Option<T>,
    compare: impl Fn(&T, &T) -> Ordering,
    way: impl Fn(Ordering) -> Ordering,
) -> Ordering {
    match (a, b) {
        (Some(a), Some(b)) => way(compare(&b, &a)),
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}

fn slash(used: Option<String>, limit: Option<String>) -> String {
    match (used, limit) {
        (None, None) => NOTHING.to_owned(),
        (used, limit) => {
            let tell = |value: Option<String>| value.unwrap_or_else(|| NOTHING.to_owned());
            format!("{}/{}", tell(used), tell(limit))
        }
    }
}

fn tell<T>(limit: Limit<T>, tell: impl Fn(T) -> String) -> String {
    match limit {
        Limit::At(value) => tell(value),
        Limit::Unlimited => "none".to_owned(),
    }
}

#[allow(clippy::cast_precision_loss, reason = "thousandths of a CPU, for people")]
fn number(cpus: Cpus) -> f64 {
    cpus.millis() as f64 / 1000.0
}

fn most(trail: Option<&Trail>) -> f64 {
    trail.into_iter().flatten().flatten().fold(0.0, |most, value| value.max(most))
}

/// `0`, `120M`, `1.5G`, `12G`: four characters at most, up to a thousand TiB.
#[allow(clippy::cast_precision_loss, reason = "three digits are told")]
fn compact(bytes: ByteCount) -> String {
    let mut value = bytes.bytes() as f64 / 1024.0;
    if value == 0.0 {
        return "0".to_owned();
    }
    for unit in ["K", "M", "G"] {
        if value < 999.5 {
            return format!("{}{unit}", three(value));
        }
        value /= 1024.0;
    }
    format!("{}T", three(value))
}

fn three(value: f64) -> String {
    if value < 9.95 { format!("{value:.1}").replace(".0", "") } else { format!("{value:.0}") }
}

/// `until 14:05`, in the time zone of `now`; with the day where that is not the next 14:05.
fn until(due_ms: u64, now: &Zoned) -> String {
    let at = i64::try_from(due_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    let Some(at) = at else { return "for a time".to_owned() };
    let left = at.duration_since(now.timestamp());
    let form = if left < SignedDuration::from_hours(24) { "until %H:%M" } else { "until %m-%d %H:%M" };
    at.to_zoned(now.time_zone().clone()).strftime(form).to_string()
}
