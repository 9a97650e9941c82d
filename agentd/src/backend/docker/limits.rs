//! Docker's own numbers for CPU and memory and what one update call has to carry. Pure.
//!
//! Docker keeps a CPU limit in one of two forms, NanoCpus (`--cpus`) or CpuQuota with CpuPeriod, and refuses an update in
//! the other form. In an update 0 means "unchanged", so a form once in use stays for the container's life:
//!
//! ```text
//!   nothing ──► CpuQuota > 0 ◄──► CpuQuota −1 (no limit)     any number of times
//!   NanoCpus a ◄──► NanoCpus b ──► NanoCpus b, CpuQuota −1   for ever: the quota wins at each start
//! ```
//!
//! In the last state NanoCpus still changes what runs, but the next start has no limit whatever is asked for (measured with
//! 20.10; `getCPUResources` in moby's daemon/oci_linux.go lets CPUQuota override NanoCPUs). So a container without a limit
//! gets one as a quota, and taking a NanoCpus limit away is not offered.

use agentd_core::plan::Values;
use agentd_core::units::{ByteCount, Cpus, Limit};
use bollard::models::{ContainerUpdateBody, HostConfig};
use serde::{Deserialize, Serialize};

use crate::backend::cgroup::{cpus_of_quota, memory_of_bytes};

/// The kernel's default period, in microseconds.
const DEFAULT_PERIOD: i64 = 100_000;
/// The least quota that Docker and the kernel take, in microseconds.
const LEAST_QUOTA: i64 = 1_000;
/// What NanoCpus are to thousandths of a CPU.
const NANO_PER_MILLI: i64 = 1_000_000;

/// The values of HostConfig that this backend changes, in Docker's units and verbatim: what an undo hands back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Native {
    /// Billionths of a CPU, 0 where the form is not in use.
    pub(super) nano_cpus: i64,
    /// Microseconds a period; below 0 no limit, 0 where the form is not in use.
    pub(super) cpu_quota: i64,
    /// Microseconds, 0 for the default.
    pub(super) cpu_period: i64,
    /// Bytes, 0 for no limit.
    pub(super) memory: i64,
    /// Bytes of memory and swap together; −1 for any amount of swap, 0 where unset.
    pub(super) memory_swap: i64,
}

/// Why an update can't be made; nothing was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Impossible {
    /// Docker has no way to do it.
    Unsupported(String),
    /// The way back is closed.
    NoWayBack(String),
}

/// Why a memory limit stays once it is there.
pub(super) const MEMORY_STAYS: &str = "Docker can change the memory limit of a container but not take it away; \
     recreate the container without one";

impl Native {
    pub(super) fn of(config: &HostConfig) -> Self {
        Native {
            nano_cpus: config.nano_cpus.unwrap_or(0),
            cpu_quota: config.cpu_quota.unwrap_or(0),
            cpu_period: config.cpu_period.unwrap_or(0),
            memory: config.memory.unwrap_or(0),
            memory_swap: config.memory_swap.unwrap_or(0),
        }
    }

    /// The CPU limit that the next start has.
    pub(super) fn saved_cpus(&self) -> Limit<Cpus> {
        if self.cpu_quota != 0 {
            cpus_of_quota(self.cpu_quota, self.period())
        } else {
            self.nano_limit().map_or(Limit::Unlimited, Limit::At)
        }
    }

    /// The CPU limit that Docker last set on what runs. Where both forms are in use its config doesn't say which came
    /// last; the cgroup does.
    pub(super) fn live_cpus(&self, seen: Option<Limit<Cpus>>) -> Limit<Cpus> {
        match self.nano_limit() {
            Some(nano) if self.is_stuck() && seen.is_some_and(|seen| same_cpus(Limit::At(nano), seen)) => {
                Limit::At(nano)
            }
            _ => self.saved_cpus(),
        }
    }

    /// The memory limit.
    pub(super) fn memory_limit(&self) -> Limit<ByteCount> {
        match u64::try_from(self.memory) {
            Ok(bytes) if bytes > 0 => memory_of_bytes(bytes),
            _ => Limit::Unlimited,
        }
    }

    /// Whether a NanoCpus limit was lifted by a quota, so that no CPU limit lasts over a start any more.
    pub(super) fn is_stuck(&self) -> bool {
        self.nano_cpus > 0 && self.cpu_quota < 0
    }

    /// Whether the limit is in NanoCpus.
    pub(super) fn in_nano_form(&self) -> bool {
        self.nano_cpus > 0
    }

    /// The least CPU limit that Docker takes and the kernel keeps, in this container's form.
    pub(super) fn least_cpus(&self) -> Cpus {
        let (quota, period) = (LEAST_QUOTA.unsigned_abs() * 1000, self.period().unsigned_abs());
        Cpus::from_millis(quota.div_ceil(period))
    }

    fn period(&self) -> i64 {
        if self.cpu_period > 0 { self.cpu_period } else { DEFAULT_PERIOD }
    }

    fn nano_limit(&self) -> Option<Cpus> {
        let nano = u64::try_from(self.nano_cpus).ok().filter(|nano| *nano > 0)?;
        Some(Cpus::from_millis((nano + 500_000) / 1_000_000))
    }

    /// One update that sets `values` on a container that has these values now. `None` where there is nothing to send.
    pub(super) fn set(&self, values: &Values) -> Result<Option<ContainerUpdateBody>, Impossible> {
        let mut body = ContainerUpdateBody::default();
        match values.cpus {
            Some(Limit::At(_)) if self.is_stuck() => return Err(Impossible::Unsupported(STUCK.into())),
            Some(Limit::At(cpus)) if self.in_nano_form() => body.nano_cpus = Some(millis(cpus) * NANO_PER_MILLI),
            Some(Limit::At(cpus)) => {
                let quota = (i128::from(millis(cpus)) * i128::from(self.period()) + 500) / 1000;
                let quota = i64::try_from(quota).unwrap_or(i64::MAX);
                self.put_quota(&mut body, quota.max(LEAST_QUOTA), self.cpu_period);
            }
            Some(Limit::Unlimited) => self.put_no_quota(&mut body),
            None => {}
        }
        match values.memory {
            Some(Limit::At(memory)) => {
                let memory = i64::try_from(memory.bytes()).unwrap_or(i64::MAX);
                body.memory = Some(memory);
                body.memory_swap = Some(self.swap_for(memory));
            }
            Some(Limit::Unlimited) if self.memory_limit() != Limit::Unlimited => {
                return Err(Impossible::Unsupported(MEMORY_STAYS.into()));
            }
            Some(Limit::Unlimited) | None => {}
        }
        Ok(filled(body))
    }

    /// One update that puts the fields of `values` back to what they were in `before`, on a container that has these
    /// values now.
    pub(super) fn restore(&self, before: &Native, values: &Values) -> Result<Option<ContainerUpdateBody>, Impossible> {
        let mut body = ContainerUpdateBody::default();
        match values.cpus {
            Some(Limit::At(_)) if before.cpu_quota > 0 => {
                self.put_quota(&mut body, before.cpu_quota, before.cpu_period)
            }
            Some(Limit::At(_)) if before.nano_cpus > 0 => body.nano_cpus = Some(before.nano_cpus),
            Some(Limit::At(_)) => {
                return Err(Impossible::NoWayBack("the record of the former CPU limit has no limit in it".into()));
            }
            Some(Limit::Unlimited) => self.put_no_quota(&mut body),
            None => {}
        }
        if values.memory.is_some() {
            if before.memory > 0 {
                body.memory = Some(before.memory);
                // An engine always has a value here once there is a memory limit; without one it means twice the memory.
                let swap = if before.memory_swap == 0 { before.memory.saturating_mul(2) } else { before.memory_swap };
                body.memory_swap = Some(swap);
            } else if self.memory > 0 {
                return Err(Impossible::NoWayBack(format!("it had no memory limit before: {MEMORY_STAYS}")));
            }
        }
        Ok(filled(body))
    }

    /// Quota and period travel together: on cgroup v2 they are one file, and the runtime takes an absent period for the
    /// default.
    fn put_quota(&self, body: &mut ContainerUpdateBody, quota: i64, period: i64) {
        body.cpu_quota = Some(quota);
        if period > 0 {
            body.cpu_period = Some(period);
        } else if self.cpu_period > 0 {
            body.cpu_period = Some(DEFAULT_PERIOD);
        }
    }

    fn put_no_quota(&self, body: &mut ContainerUpdateBody) {
        if self.nano_cpus == 0 && self.cpu_quota <= 0 {
            return;
        }
        body.cpu_quota = Some(-1);
        // A period beside NanoCpus is a conflict for Docker.
        if self.cpu_period > 0 && self.nano_cpus == 0 {
            body.cpu_period = Some(self.cpu_period);
        }
    }

    /// Memory and swap together for a new memory limit: any amount stays any amount, no swap stays no swap, else the
    /// proportion is kept.
    fn swap_for(&self, memory: i64) -> i64 {
        if self.memory_swap < 0 {
            return -1;
        }
        if self.memory <= 0 || self.memory_swap == 0 {
            return memory.saturating_mul(2);
        }
        let scaled = i128::from(self.memory_swap) * i128::from(memory) / i128::from(self.memory);
        i64::try_from(scaled).unwrap_or(i64::MAX).max(memory)
    }
}

/// Why a CPU limit can't be set on a container whose NanoCpus limit was lifted by a quota of −1.
pub(super) const STUCK: &str = "its --cpus limit was taken away with --cpu-quota -1, and Docker would drop any new limit at \
     the next start; recreate the container";

/// Whether a CPU limit that is seen is the one that was set: runc's systemd driver rounds up to 1 % of a CPU.
pub(super) fn same_cpus(set: Limit<Cpus>, seen: Limit<Cpus>) -> bool {
    match (set, seen) {
        (Limit::At(set), Limit::At(seen)) => {
            seen.checked_sub(set).is_some_and(|more| more < Cpus::from_millis(10)) || seen == set
        }
        (set, seen) => set == seen,
    }
}

fn millis(cpus: Cpus) -> i64 {
    // Cpus::MAX is a million CPUs, far from the end of i64 even in NanoCpus.
    i64::try_from(cpus.millis()).unwrap_or(i64::MAX / NANO_PER_MILLI)
}

fn filled(body: ContainerUpdateBody) -> Option<ContainerUpdateBody> {
    (body != ContainerUpdateBody::default()).then_some(body)
}

#[cfg(test)]
mod tests;
