//! Tables: lists of instances, one instance in its five values, the host, the sizes, the backends. Numbers stand to the
//! right. Knows the API's types and no HTTP.

use std::fmt::Display;

use agentd_core::api::{Capabilities, Capacity, CapacityOf, FieldView, Health, HoldKind, Instance, SizeList};
use agentd_core::instance::{Field, Kind, State};
use agentd_core::ledger::Charge;
use agentd_core::units::{ByteCount, Limit};
use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Table, presets};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Number;

use super::text::{WARNING, clean, paragraph};

/// Where nothing is known or nothing applies.
pub(super) const NOTHING: &str = "—";

/// How a column stands.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stand {
    Left,
    Right,
    /// To the left, and wrapped where the terminal is too narrow.
    Wrap,
}

/// Lays a table out: a header, rows, and for each column how it stands.
pub(crate) fn lay(header: &[&str], stands: &[Stand], rows: Vec<Vec<String>>, width: Option<usize>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if let Some(width) = width.and_then(|width| u16::try_from(width).ok()) {
        table.set_width(width).set_content_arrangement(ContentArrangement::Dynamic);
    }
    if header.iter().any(|title| !title.is_empty()) {
        table.set_header(header.to_vec());
    }
    table.add_rows(rows);
    for (column, stand) in table.column_iter_mut().zip(stands) {
        column.set_padding((0, 2));
        if *stand == Stand::Right {
            column.set_cell_alignment(CellAlignment::Right);
        }
        if *stand != Stand::Wrap {
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Many instances.
pub(crate) fn list(instances: &[Instance], why_unprepared: bool, width: Option<usize>) -> String {
    use Stand::{Left, Right, Wrap};
    let row = |instance: &Instance| {
        vec![
            clean(&instance.reference),
            instance.state.to_string(),
            present(&instance.cpus, instance.state),
            present(&instance.cpu_limit, instance.state),
            present(&instance.memory, instance.state),
            charge(instance.committed),
            marks(instance, why_unprepared),
        ]
    };
    let header = ["REF", "STATE", "CPUS", "CPU LIMIT", "MEMORY", "COMMITTED", ""];
    lay(&header, &[Left, Left, Right, Right, Right, Right, Wrap], instances.iter().map(row).collect(), width)
}

/// The value that a field has; what it is moving to where that is another; in brackets what it will start with.
fn present<T: Display + PartialEq>(field: &FieldView<T>, state: State) -> String {
    match (&field.observed, &field.accepted, &field.persistent) {
        (Some(observed), Some(accepted), _) if observed != accepted => {
            arrow(&observed.to_string(), &accepted.to_string())
        }
        (Some(value), ..) | (None, Some(value), _) => value.to_string(),
        (None, None, Some(saved)) if !state.is_up() => format!("({saved})"),
        _ => NOTHING.to_owned(),
    }
}

/// `512 → 400 MiB`: a unit that both have is said once.
fn arrow(from: &str, to: &str) -> String {
    match (from.split_once(' '), to.split_once(' ')) {
        (Some((number, unit)), Some((_, same))) if unit == same => format!("{number} → {to}"),
        _ => format!("{from} → {to}"),
    }
}

fn charge(charge: Charge) -> String {
    format!("{} / {}", charge.cpus, charge.memory)
}

fn marks(instance: &Instance, why_unprepared: bool) -> String {
    let mut marks: Vec<String> = instance.holds.iter().map(|hold| format!("held: {}", hold.hold.as_str())).collect();
    marks.extend(instance.size.as_deref().map(|size| format!("size {}", clean(size))));
    if !instance.next_boot.is_empty() {
        let fields: Vec<&str> = instance.next_boot.iter().map(|field| field.as_str()).collect();
        marks.push(format!("next boot: {}", fields.join(", ")));
    }
    marks.extend(instance.loans.iter().map(|loan| format!("goes back {}", when(loan.due_ms))));
    marks.extend(instance.unprepared.as_deref().filter(|_| why_unprepared).map(clean));
    match instance.notes.len() {
        0 => {}
        1 => marks.push("1 note".into()),
        many => marks.push(format!("{many} notes")),
    }
    marks.join(", ")
}

/// One instance, whole.
pub(crate) fn show(instance: &Instance, width: Option<usize>) -> String {
    use Stand::{Left, Right};
    let name = clean(&instance.reference);
    let mut out =
        format!("{name}  {}  id {}  version {}\n", instance.state, clean(&instance.id), clean(&instance.version));
    let rows = [five("cpus", &instance.cpus), five("cpu_limit", &instance.cpu_limit), five("memory", &instance.memory)];
    let header = ["", "accepted", "observed", "confirmed", "persistent", "ceiling"];
    out += &lay(&header, &[Left, Right, Right, Right, Right, Right], rows.into_iter().flatten().collect(), None);
    out += &format!("committed {} CPUs, {}\n", instance.committed.cpus, instance.committed.memory);
    out += &instance.size.as_deref().map(|size| format!("size {}\n", clean(size))).unwrap_or_default();
    out += &next_boot(instance, width);
    for loan in &instance.loans {
        let fields: Vec<&str> = loan.fields.iter().map(|field| field.as_str()).collect();
        let text =
            format!("{} for a time: goes back {} ({})", fields.join(", "), when(loan.due_ms), clean(&loan.operation));
        out += &paragraph(&text, 2, width);
    }
    out += &instance.capabilities.as_ref().map(|can| capabilities(can, width)).unwrap_or_default();
    for (key, value) in &instance.labels {
        out += &paragraph(&format!("label {}={}", clean(key), clean(value)), 6, width);
    }
    for note in &instance.notes {
        out += &paragraph(&format!("note: {}", clean(note)), 6, width);
    }
    for moving in [moving("cpus", &instance.cpus), moving("memory", &instance.memory)].into_iter().flatten() {
        out += &paragraph(&moving, 2, width);
    }
    for hold in &instance.holds {
        let who = hold.who.as_ref().map(|who| format!(", by {}", clean(&who.to_string()))).unwrap_or_default();
        let since = hold.since_ms.map(|ms| format!(", {}", when(ms))).unwrap_or_default();
        let held = format!("held ({}{who}{since}): {}", hold.hold.as_str(), clean(&hold.reason));
        out += &paragraph(&held, 6, width);
        let what = match hold.hold {
            HoldKind::Suspended => format!("when it may be changed again: ctl resume {name}; stop works meanwhile"),
            HoldKind::NeedsAttention => format!(
                "look at it, also with `ctl history {name}`, put right what is wrong, then: ctl clear-hold {name}; \
                 stop works meanwhile"
            ),
            HoldKind::Recovering => "it ends by itself once the backend answers; stop works meanwhile".to_owned(),
        };
        out += &paragraph(&format!("  what to do: {what}"), 14, width);
    }
    out
}

/// A moment in the local time zone.
fn when(ms: u64) -> String {
    let moment = i64::try_from(ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    moment
        .map_or_else(|| "later".into(), |at| at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string())
}

/// What the next start has that what runs hasn't.
fn next_boot(instance: &Instance, width: Option<usize>) -> String {
    let value = |field: &Field| match field {
        Field::Cpus => instance.cpus.persistent.map(|value| value.to_string()),
        Field::CpuLimit => instance.cpu_limit.persistent.map(|value| value.to_string()),
        Field::Memory => instance.memory.persistent.map(|value| value.to_string()),
    };
    let tell = |field: &Field| format!("{} {}", field.as_str(), value(field).unwrap_or_else(|| NOTHING.to_owned()));
    let fields: Vec<String> = instance.next_boot.iter().map(tell).collect();
    if fields.is_empty() { String::new() } else { paragraph(&format!("next boot: {}", fields.join(", ")), 11, width) }
}

/// What can be done about each field: live, from the next start on, without a limit; and why not.
fn capabilities(can: &Capabilities, width: Option<usize>) -> String {
    let bytes = |number: &Number| {
        let bytes = number.as_u64().and_then(ByteCount::new);
        bytes.map_or_else(|| number.to_string(), |bytes| bytes.to_string())
    };
    let mut out = String::new();
    for (name, field) in [("cpus", &can.cpus), ("cpu_limit", &can.cpu_limit), ("memory", &can.memory)] {
        let tell = |number: &Number| if name == "memory" { bytes(number) } else { number.to_string() };
        let ways = [("live", &field.live), ("by a restart", &field.restart), ("without a limit", &field.unlimited)];
        let ways = ways.map(|(way, possible)| {
            let why = possible.why.as_deref().map(|why| format!(" ({})", clean(why))).unwrap_or_default();
            let range = match (&possible.least, &possible.most) {
                (Some(least), Some(most)) => format!(" {} to {}", tell(least), tell(most)),
                (Some(least), None) => format!(" from {}", tell(least)),
                _ if possible.possible => String::new(),
                _ => return format!("not {way}{why}"),
            };
            format!("{way}{range}{why}")
        });
        out += &paragraph(&format!("{name}: {}", ways.join("; ")), 2, width);
    }
    out
}

/// The five values of a field, or nothing where the instance doesn't have it.
fn five<T: Display>(name: &str, field: &FieldView<T>) -> Option<Vec<String>> {
    let tell = |value: &Option<Limit<T>>| value.as_ref().map_or_else(|| NOTHING.to_owned(), ToString::to_string);
    let values = [&field.accepted, &field.observed, &field.confirmed, &field.persistent];
    if values.iter().all(|value| value.is_none()) && field.ceiling.is_none() {
        return None;
    }
    let mut row = vec![name.to_owned()];
    row.extend(values.map(tell));
    row.push(field.ceiling.as_ref().map_or_else(|| NOTHING.to_owned(), ToString::to_string));
    Some(row)
}

fn moving<T: Display + PartialEq>(name: &str, field: &FieldView<T>) -> Option<String> {
    match (&field.observed, &field.accepted) {
        (Some(observed), Some(accepted)) if observed != accepted => {
            Some(format!("{name} is {observed}, asked for {accepted}: the guest has not obeyed yet"))
        }
        _ => None,
    }
}

/// Memory of a host, which is rarely a whole number of anything: to a tenth of a GiB where it isn't. `-o json` is exact.
#[allow(clippy::cast_precision_loss, reason = "a tenth of a GiB is all that is told")]
fn rounded(bytes: &ByteCount) -> String {
    const GIB: f64 = (1_u64 << 30) as f64;
    if bytes.bytes().is_multiple_of(1 << 20) {
        bytes.to_string()
    } else {
        format!("{:.1} GiB", bytes.bytes() as f64 / GIB)
    }
}

/// The host.
pub(crate) fn capacity(capacity: &Capacity, width: Option<usize>) -> String {
    use Stand::{Left, Right};
    fn column<T>(of: &CapacityOf<T>, tell: impl Fn(&T) -> String) -> [String; 6] {
        let factor = format!("{:?}", of.overcommit);
        [tell(&of.total), tell(&of.reserved), factor, tell(&of.allowed), tell(&of.committed), tell(&of.free)]
    }
    let titles = ["total", "reserved", "overcommit", "allowed", "committed", "free"];
    let columns = column(&capacity.cpus, ToString::to_string).into_iter().zip(column(&capacity.memory, rounded));
    let over_cap = match (capacity.cpus.over, capacity.memory.over) {
        (true, true) => "OVER the cap",
        (true, false) => "CPUs OVER the cap",
        (false, true) => "memory OVER the cap",
        (false, false) => "",
    };
    let row = |(title, (cpus, memory)): (&str, (String, String))| {
        let mark = if title == "committed" { over_cap } else { "" };
        vec![title.to_owned(), cpus, memory, mark.to_owned()]
    };
    let rows = titles.into_iter().zip(columns).map(row).collect();
    let mut out = lay(&["HOST", "CPUS", "MEMORY", ""], &[Left, Right, Right, Left], rows, width);

    let kinds = capacity.by_kind.iter().map(|(kind, used)| {
        let up = format!("{} of {}", used.up, used.instances);
        vec![kind.to_string(), up, used.committed.cpus.to_string(), used.committed.memory.to_string()]
    });
    out += "\n";
    out += &lay(&["KIND", "UP", "CPUS", "MEMORY"], &[Left, Right, Right, Right], kinds.collect(), width);

    if !capacity.limits.is_empty() {
        let limits = capacity.limits.iter().map(|limit| {
            let of =
                |used: String, total: Option<String>| total.map_or(used.clone(), |total| format!("{used} of {total}"));
            vec![
                clean(&limit.pattern),
                of(limit.committed.cpus.to_string(), limit.total_cpus.map(|total| total.to_string())),
                of(limit.committed.memory.to_string(), limit.total_memory.map(|total| total.to_string())),
                if limit.over { "OVER" } else { "" }.to_owned(),
            ]
        });
        out += "\n";
        out += &lay(&["LIMIT", "CPUS", "MEMORY", ""], &[Left, Right, Right, Left], limits.collect(), width);
    }
    let vm = format!(
        "\na vm is charged its {} memory and {} more while it runs",
        clean(&capacity.vm_memory),
        capacity.vm_overhead
    );
    out += &paragraph(&vm, 2, width);
    if !capacity.unlimited.is_empty() {
        let names: Vec<String> = capacity.unlimited.iter().map(|name| clean(name)).collect();
        out += &paragraph(&format!("unlimited, charged what they use now: {}", names.join(", ")), 2, width);
    }
    out
}

/// What to say on standard error of backends that don't answer.
pub(crate) fn unavailable(kinds: &[Kind], what: &str) -> String {
    kinds.iter().map(|kind| format!("warning: the backend of kind {kind} does not answer; {what}\n")).collect()
}

/// The sizes of the config file.
pub(crate) fn sizes(sizes: &SizeList, width: Option<usize>) -> String {
    use Stand::{Left, Right};
    fn tell<T: Display>(value: Option<T>) -> String {
        value.map_or_else(|| NOTHING.to_owned(), |value| value.to_string())
    }
    let row = |size: &agentd_core::api::SizeView| {
        vec![clean(&size.name), tell(size.cpus), tell(size.memory), size.cpu_limit.to_string()]
    };
    let header = ["SIZE", "CPUS", "MEMORY", "CPU LIMIT"];
    lay(&header, &[Left, Right, Right, Right], sizes.items.iter().map(row).collect(), width)
}

/// agentd and its backends.
pub(crate) fn health(health: &Health, width: Option<usize>) -> String {
    let mode = if health.read_only { ", read-only: every change is refused" } else { "" };
    let verdict = if health.ok { "well" } else { "not well" };
    let mut out = format!("agentd {} is {verdict}{mode}\n", clean(&health.version));
    // Before the table: what is on record here concerns all of it, a store that fails not least.
    for note in &health.notes {
        out += &paragraph(&format!("{WARNING}warning:{WARNING:#} {}", clean(note)), "warning: ".len(), width);
    }
    let row = |backend: &agentd_core::api::BackendHealth| {
        let verdict = if backend.ok { "ok" } else { "DOWN" };
        vec![backend.kind.to_string(), verdict.to_owned(), clean(&backend.name), clean(&backend.detail)]
    };
    if !health.backends.is_empty() {
        use Stand::{Left, Wrap};
        let rows = health.backends.iter().map(row).collect();
        out += &lay(&["KIND", "STATE", "BACKEND", ""], &[Left, Left, Left, Wrap], rows, width);
    }
    out
}

#[cfg(test)]
mod tests;
