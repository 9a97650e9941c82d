//! The accounting rules: what an instance is charged, what the config lets the host and each limit promise, and the
//! sentence and the numbers of a refusal.

use serde_json::Number;

use super::Inputs;
use crate::config::{Config, VmMemory};
use crate::error::{Code, Numbers, Problem};
use crate::instance::{Kind, Observed, Usage};
use crate::ledger::{Cap, Caps, Charge, LimitCap, Refused, Resource};
use crate::units::{ByteCount, Cpus, Limit};

/// What the host has, as the config says or, where it says `auto`, as the kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostCapacity {
    /// CPUs.
    pub cpus: Cpus,
    /// Memory.
    pub memory: ByteCount,
}

/// The caps of a config on a host: (capacity − reserved) × overcommit, and the totals of each limit.
pub fn caps(config: &Config, host: HostCapacity) -> Caps {
    let capacity = &config.capacity;
    Caps {
        host: Charge {
            cpus: capacity.cpu_overcommit.apply_cpus(host.cpus.saturating_sub(capacity.reserved_cpus)),
            memory: capacity.memory_overcommit.apply(host.memory.saturating_sub(capacity.reserved_memory)),
        },
        limits: config
            .limits
            .iter()
            .map(|limit| LimitCap { cpus: limit.total_cpus, memory: limit.total_memory })
            .collect(),
    }
}

/// What an instance is charged: max(accepted, observed) of what is up, nothing for what is down.
pub fn charge_of(observed: &Observed, config: &Config) -> Charge {
    if !observed.state.is_up() {
        return Charge::ZERO;
    }
    let limits = |a: Option<Limit<Cpus>>, b: Option<Limit<Cpus>>| {
        [a, b].into_iter().flatten().filter_map(Limit::at).max().unwrap_or(Cpus::ZERO)
    };
    let cpus = limits(observed.cpus.accepted, observed.cpus.observed);
    let memory = [observed.memory.accepted, observed.memory.observed];
    // An unlimited one is charged what it uses now.
    let unlimited = memory.iter().flatten().any(|value| *value == Limit::Unlimited);
    let used = match observed.used {
        Usage::Known(used) if unlimited => used,
        _ => ByteCount::ZERO,
    };
    let memory = memory.into_iter().flatten().filter_map(Limit::at).max().unwrap_or(ByteCount::ZERO).max(used);
    uncovered(observed, Charge { cpus, memory: charged_memory(observed, memory, config) })
}

/// Of nested instances the outermost that has a limit is charged.
fn uncovered(observed: &Observed, charge: Charge) -> Charge {
    Charge {
        cpus: if observed.covered.cpus { Cpus::ZERO } else { charge.cpus },
        memory: if observed.covered.memory { ByteCount::ZERO } else { charge.memory },
    }
}

/// What an instance will be charged when it starts: all that it takes before a guest has given anything back.
pub fn start_charge(observed: &Observed, config: &Config) -> Charge {
    let charge = Charge {
        cpus: observed.demand.cpus.and_then(Limit::at).unwrap_or(Cpus::ZERO),
        memory: charged_memory(observed, observed.demand.memory.and_then(Limit::at).unwrap_or(ByteCount::ZERO), config),
    };
    uncovered(observed, charge)
}

/// The memory charged for an instance that has `memory`.
pub(super) fn charged_memory(observed: &Observed, memory: ByteCount, config: &Config) -> ByteCount {
    if observed.reference.kind() != Kind::Vm {
        return memory;
    }
    let memory = match config.capacity.vm_memory {
        VmMemory::Observed => memory,
        VmMemory::Maximum => memory.max(observed.memory.ceiling.unwrap_or(memory)),
    };
    memory.saturating_add(config.capacity.vm_overhead)
}

/// A number of the wire for CPUs.
pub(super) fn cpus_number(cpus: Cpus) -> Option<Number> {
    match serde_json::to_value(cpus) {
        Ok(serde_json::Value::Number(number)) => Some(number),
        _ => None,
    }
}

/// A number of the wire for bytes.
pub(super) fn bytes_number(bytes: ByteCount) -> Option<Number> {
    Some(Number::from(bytes.bytes()))
}

/// A refused admission as the caller is told: the arithmetic, and the largest value that would fit.
pub(super) fn refusal(inputs: &Inputs<'_>, refused: &Refused, wanted: Charge) -> Problem {
    let capacity = &inputs.config.capacity;
    let reference = &inputs.observed.reference;
    let vm = reference.kind() == Kind::Vm;
    let mut numbers = Numbers::default();
    let (resource, allowed, committed, more, arithmetic, mut largest, fits);
    match refused.resource {
        Resource::Cpus => {
            let reading = &inputs.observed.cpus;
            resource = "CPUs";
            let most = [reading.ceiling, inputs.rules.max_cpus.map(|bound| bound.value)]
                .into_iter()
                .flatten()
                .min()
                .unwrap_or(Cpus::MAX);
            let largest_cpus = most.min(round_down_cpus(refused.largest.cpus, reading.grain));
            (allowed, committed) = (refused.allowed.cpus.to_string(), refused.committed.cpus.to_string());
            more = wanted.cpus.saturating_sub(refused.now.cpus).to_string();
            fits = largest_cpus >= reading.least;
            largest = format!("{largest_cpus} CPUs");
            arithmetic = format!(
                "({} − {} reserved) × {}, [capacity] cpu_overcommit",
                inputs.host.cpus, capacity.reserved_cpus, capacity.cpu_overcommit
            );
            numbers.resource = Some("cpus".into());
            numbers.allowed = cpus_number(refused.allowed.cpus);
            numbers.committed = cpus_number(refused.committed.cpus);
            numbers.requested = cpus_number(wanted.cpus.saturating_sub(refused.now.cpus));
            numbers.largest_feasible = cpus_number(largest_cpus);
            if refused.cap == Cap::Host {
                numbers.capacity = cpus_number(inputs.host.cpus);
                numbers.reserved = cpus_number(capacity.reserved_cpus);
                numbers.overcommit = serde_json::from_str(&capacity.cpu_overcommit.to_string()).ok();
                numbers.config_key = Some("capacity.cpu_overcommit".into());
            }
        }
        Resource::Memory => {
            let reading = &inputs.observed.memory;
            resource = "of memory";
            let overhead = if vm { capacity.vm_overhead } else { ByteCount::ZERO };
            let room = refused.largest.memory.saturating_sub(overhead).round_down_to(reading.grain);
            let most = [reading.ceiling, inputs.rules.max_memory.map(|bound| bound.value)]
                .into_iter()
                .flatten()
                .min()
                .unwrap_or(ByteCount::MAX);
            let largest_memory = most.min(room);
            (allowed, committed) = (refused.allowed.memory.to_string(), refused.committed.memory.to_string());
            more = wanted.memory.saturating_sub(refused.now.memory).to_string();
            fits = largest_memory >= reading.least;
            largest = largest_memory.to_string();
            arithmetic = format!(
                "({} − {} reserved) × {}, [capacity] memory_overcommit",
                inputs.host.memory, capacity.reserved_memory, capacity.memory_overcommit
            );
            numbers.resource = Some("memory".into());
            numbers.allowed = bytes_number(refused.allowed.memory);
            numbers.committed = bytes_number(refused.committed.memory);
            numbers.requested = bytes_number(wanted.memory.saturating_sub(refused.now.memory));
            numbers.largest_feasible = bytes_number(largest_memory);
            if refused.cap == Cap::Host {
                numbers.capacity = bytes_number(inputs.host.memory);
                numbers.reserved = bytes_number(capacity.reserved_memory);
                numbers.overcommit = serde_json::from_str(&capacity.memory_overcommit.to_string()).ok();
                numbers.config_key = Some("capacity.memory_overcommit".into());
            }
        }
    }
    let (who, arithmetic) = match refused.cap {
        Cap::Host => ("the host".to_owned(), arithmetic),
        Cap::Limit(place) => {
            let key = match refused.resource {
                Resource::Cpus => "total_cpus",
                Resource::Memory => "total_memory",
            };
            let pattern = inputs.config.limits.get(place).map_or_else(String::new, |limit| limit.pattern.to_string());
            numbers.config_key = Some(Config::limit_key(place, key));
            (format!("the limit on {pattern:?}"), format!("[[limit]] {key}"))
        }
    };
    if !fits {
        largest = "nothing".into();
    }
    let overhead = match (refused.resource, vm) {
        (Resource::Memory, true) => format!(" (each VM's memory counts with {} of overhead)", capacity.vm_overhead),
        _ => String::new(),
    };
    Problem::new(
        Code::CapacityExceeded,
        format!(
            "{who} allows {allowed} {resource} ({arithmetic}), {committed} are committed, {reference} asks for {more} more"
        ),
    )
    .hint(if fits {
        format!("the most {reference} can have now is {largest}{overhead}")
    } else {
        format!("nothing is free; `ctl capacity` shows who has it{overhead}")
    })
    .numbers(numbers)
}

pub(super) fn round_down_cpus(cpus: Cpus, grain: Cpus) -> Cpus {
    Cpus::from_millis(cpus.millis() - cpus.millis().checked_rem(grain.millis()).unwrap_or(0))
}
