//! What strangers write and agentd reads, thrown at it: one function for each kind of input, which panics where agentd breaks
//! a promise about it. `make fuzz` lets libFuzzer call them; `cargo test` gives them the inputs of `corpora/`, and those
//! with some bytes of them changed.
//!
//! | function | input |
//! |---|---|
//! | [`http()`] | a connection to the socket: the bytes of requests |
//! | [`requests()`] | the body of a change, planned on an instance of each kind |
//! | [`config()`] | a config file |
//! | [`units()`], [`references()`], [`patterns()`] | sizes, limits, durations; names and targets; patterns |
//! | [`definition()`], [`domain()`] | a domain's XML; the numbers that libvirt tells of a domain |
//! | [`container()`] | what Docker tells of a container, and its log |
//! | [`cgroup()`], [`unit_files()`] | files of the kernel; files of systemd's units |
//! | [`record()`] | what is read back from the record |

mod http;
mod instances;
mod requests;
mod words;

pub use agentd::backend::fuzzing::{cgroup, container, definition, domain, unit_files};
pub use http::http;
pub use requests::{record, requests};
pub use words::{config, patterns, references, units};

/// A function that is thrown at.
pub type Target = fn(&[u8]);

/// All of them, by their names.
pub const TARGETS: [(&str, Target); 12] = [
    ("units", units),
    ("references", references),
    ("patterns", patterns),
    ("config", config),
    ("requests", requests),
    ("record", record),
    ("definition", definition),
    ("domain", domain),
    ("container", container),
    ("cgroup", cgroup),
    ("unit_files", unit_files),
    ("http", http),
];
