//! What an instance uses, on the wire. Null is unknown or not applicable, never 0.

use serde::{Deserialize, Serialize};

use crate::instance::Kind;
use crate::units::{ByteCount, Limit};

/// What one instance uses now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UsageView {
    /// `kind/name`
    #[serde(rename = "ref")]
    pub reference: String,
    /// Its kind.
    pub kind: Kind,
    /// When it was looked at, RFC 3339 in UTC.
    pub at: String,
    /// CPU time.
    pub cpu: CpuUse,
    /// Memory.
    pub memory: MemoryUse,
    /// Pressure stall information of its cgroup; null where the kernel keeps none.
    pub pressure: Option<PressureUse>,
    /// What a person should know: why something is unknown.
    pub notes: Vec<String>,
}

/// CPU time that an instance uses.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CpuUse {
    /// CPUs in use, as the mean over `window_ms`: 0.5 is half of one CPU. Null until two looks were had.
    pub rate: Option<f64>,
    /// The time between the two looks that `rate` and `throttled` are of, in milliseconds.
    pub window_ms: Option<u64>,
    /// CPU time since its start, in milliseconds.
    pub total_ms: Option<u64>,
    /// The share of the kernel's enforcement periods in the window in which its limit held it back: 0 to 1. Null where it has
    /// no limit of CPU time, and until two looks were had.
    pub throttled: Option<f64>,
    /// For how long its limit has held it back since its start, in milliseconds.
    pub throttled_ms: Option<u64>,
}

/// Memory that an instance uses.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemoryUse {
    /// In use inside, caches that can be dropped not counted: of a VM by its balloon driver's report, of anything else by its
    /// cgroup.
    pub used: Option<ByteCount>,
    /// What could still be used inside before something has to give: of a VM by its balloon driver's report, of anything else
    /// what its limit leaves.
    pub available: Option<ByteCount>,
    /// What it takes of the host's memory: of a VM its whole QEMU.
    pub host: Option<ByteCount>,
    /// Its limit, or what a VM's guest has.
    pub limit: Option<Limit<ByteCount>>,
    /// Processes that the kernel has killed in it for want of memory since its start (not inside a VM's guest).
    pub oom_kills: Option<u64>,
    /// How far a VM's balloon is from its target; null for anything else.
    pub balloon: Option<BalloonUse>,
}

/// A VM's balloon.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct BalloonUse {
    /// What the guest is asked to have; null where nobody knows.
    pub target: Option<ByteCount>,
    /// What it has.
    pub actual: ByteCount,
    /// What it has beyond its target, or lacks of it: 0 once it has obeyed.
    pub lag: Option<ByteCount>,
}

/// The share of time in which something was held up for want of a resource (PSI), of its cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PressureUse {
    /// For want of CPU: some process waited.
    pub cpu_some: Option<f64>,
    /// For want of memory: some process waited.
    pub memory_some: Option<f64>,
    /// For want of memory: all of them waited.
    pub memory_full: Option<f64>,
}

/// What the instances that a caller may see use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct UsageList {
    /// All that are up, by reference.
    pub items: Vec<UsageView>,
    /// What is in use of the host itself, where /proc tells.
    pub host: HostUse,
}

/// What is in use of the host, by whatever runs on it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HostUse {
    /// CPUs in use, as the mean since the look before. Null until two looks were had.
    pub cpus: Option<f64>,
    /// Memory in use: MemTotal less MemAvailable of /proc/meminfo.
    pub memory: Option<ByteCount>,
}
