//! What instances use, for people: a table of all, one in detail, and the lines of it that `ctl show` has.

use agentd_core::api::{MemoryUse, UsageList, UsageView};
use agentd_core::units::{ByteCount, Limit};

use super::table::{NOTHING, Stand, lay};
use super::text::{clean, paragraph};

/// All that are up, and the host.
pub(crate) fn all(list: &UsageList, width: Option<usize>) -> String {
    use Stand::{Left, Right, Wrap};
    let row = |view: &UsageView| {
        vec![
            clean(&view.reference),
            tell(view.cpu.rate.map(cpus)),
            tell(view.cpu.throttled.map(percent)),
            tell(view.memory.used.map(bytes)),
            tell(view.memory.available.map(bytes)),
            tell(view.memory.host.map(bytes)),
            marks(view),
        ]
    };
    let mut rows: Vec<Vec<String>> = list.items.iter().map(row).collect();
    // Under the same headings, since it is a sum of the same things, and of what agentd doesn't know.
    let host = [Some("the host".into()), list.host.cpus.map(cpus), None, list.host.memory.map(bytes), None, None];
    rows.push(host.into_iter().map(tell).chain([String::new()]).collect());
    let header = ["REF", "CPUS", "THROTTLED", "MEMORY", "AVAILABLE", "OF THE HOST", ""];
    lay(&header, &[Left, Right, Right, Right, Right, Right, Wrap], rows, width)
}

/// What of an instance is not as it should be.
fn marks(view: &UsageView) -> String {
    let mut marks = Vec::new();
    marks.extend(view.memory.oom_kills.filter(|kills| *kills > 0).map(kills));
    marks.extend(lag(&view.memory));
    let stalled = view.pressure.and_then(|pressure| pressure.memory_some).filter(|share| *share >= 0.01);
    marks.extend(stalled.map(|share| format!("waits for memory {}", percent(share))));
    match view.notes.len() {
        0 => {}
        1 => marks.push("1 note".into()),
        many => marks.push(format!("{many} notes")),
    }
    marks.join(", ")
}

/// One instance, whole.
pub(crate) fn one(view: &UsageView, width: Option<usize>) -> String {
    use Stand::{Left, Right, Wrap};
    let (cpu, memory) = (&view.cpu, &view.memory);
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |what: &str, value: Option<String>, more: String| {
        rows.push(vec![what.to_owned(), tell(value), more]);
    };
    let over = cpu.window_ms.map(|ms| format!("mean of {}", seconds(ms))).unwrap_or_default();
    row("CPUs in use", cpu.rate.map(cpus), over);
    row("CPU time", cpu.total_ms.map(seconds), "since its start".into());
    let held = cpu.throttled_ms.map(|ms| format!("of its periods; {} in all", seconds(ms))).unwrap_or_default();
    row("throttled", cpu.throttled.map(percent), held);
    row("memory in use", memory.used.map(bytes), String::new());
    row("available", memory.available.map(bytes), limit(memory));
    row("of the host", memory.host.map(bytes), String::new());
    row("OOM kills", memory.oom_kills.map(|kills| kills.to_string()), "since its start".into());
    if let Some(balloon) = &memory.balloon {
        let target = balloon.target.map(|target| format!("of {}", bytes(target))).unwrap_or_default();
        row("balloon", Some(bytes(balloon.actual)), target);
        row("balloon lag", balloon.lag.map(bytes), String::new());
    }
    if let Some(pressure) = &view.pressure {
        row("waits for CPU", pressure.cpu_some.map(percent), "of the last 10 s".into());
        row("waits for memory", pressure.memory_some.map(percent), String::new());
        row("all of it waits", pressure.memory_full.map(percent), String::new());
    }
    let mut out = format!("{}\n", clean(&view.reference));
    out += &lay(&["", "", ""], &[Left, Right, Wrap], rows, width);
    out + &notes(view, width)
}

/// What `ctl show` tells of it.
pub(crate) fn in_short(view: &UsageView, width: Option<usize>) -> String {
    let (cpu, memory) = (&view.cpu, &view.memory);
    let mut parts = Vec::new();
    parts.extend(cpu.rate.map(|rate| format!("{} CPUs", cpus(rate))));
    parts.extend(cpu.throttled.filter(|share| *share > 0.0).map(|share| format!("throttled {}", percent(share))));
    parts.extend(memory.used.map(|used| format!("{} of memory", bytes(used))));
    parts.extend(memory.available.map(|available| format!("{} available", bytes(available))));
    parts.extend(memory.host.map(|host| format!("{} of the host's memory", bytes(host))));
    parts.extend(memory.oom_kills.filter(|kills| *kills > 0).map(kills));
    parts.extend(lag(memory));
    let uses =
        if parts.is_empty() { String::new() } else { paragraph(&format!("uses {}", parts.join(", ")), 2, width) };
    uses + &notes(view, width)
}

fn notes(view: &UsageView, width: Option<usize>) -> String {
    view.notes.iter().map(|note| paragraph(&format!("note: {}", clean(note)), 6, width)).collect()
}

fn limit(memory: &MemoryUse) -> String {
    match memory.limit {
        Some(Limit::At(limit)) => format!("of {}", bytes(limit)),
        Some(Limit::Unlimited) => "no limit".to_owned(),
        None => String::new(),
    }
}

fn lag(memory: &MemoryUse) -> Option<String> {
    let lag = memory.balloon.and_then(|balloon| balloon.lag).filter(|lag| lag.bytes() > 0)?;
    Some(format!("balloon {} from its target", bytes(lag)))
}

fn kills(kills: u64) -> String {
    format!("{kills} OOM kill{}", if kills == 1 { "" } else { "s" })
}

fn tell(value: Option<String>) -> String {
    value.unwrap_or_else(|| NOTHING.to_owned())
}

fn cpus(rate: f64) -> String {
    format!("{rate:.2}")
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

#[allow(clippy::cast_precision_loss, reason = "a tenth of a second is all that is told")]
fn seconds(ms: u64) -> String {
    format!("{:.1} s", ms as f64 / 1000.0)
}

/// To a tenth: what is in use changes with every look. `-o json` is exact.
#[allow(clippy::cast_precision_loss, reason = "a tenth of a MiB is all that is told")]
fn bytes(bytes: ByteCount) -> String {
    let mib = bytes.bytes() as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

#[cfg(test)]
mod tests {
    use agentd_core::api::HostUse;
    use serde_json::json;

    use super::*;

    fn view(cpu: serde_json::Value, memory: serde_json::Value) -> UsageView {
        let view = json!({"ref": "vm/web", "kind": "vm", "at": "2026-01-01T00:00:00.000Z", "cpu": cpu, "memory": memory,
            "pressure": null, "notes": []});
        serde_json::from_value(view).unwrap()
    }

    fn busy() -> UsageView {
        view(
            json!({"rate": 0.504, "window_ms": 1000, "total_ms": 61_500, "throttled": 0.125, "throttled_ms": 300}),
            json!({"used": 88_604_672, "available": 1 << 30, "host": 2_u64 << 30, "limit": 1 << 30, "oom_kills": 2,
                "balloon": {"target": 512 << 20, "actual": 612 << 20, "lag": 100 << 20}}),
        )
    }

    #[test]
    fn what_is_unknown_is_a_dash_and_what_is_0_is_0() {
        let idle = view(json!({"rate": 0.0}), json!({"oom_kills": 0}));
        let list = UsageList { items: vec![idle], host: HostUse::default() };
        let text = all(&list, None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["vm/web", "0.00", "—", "—", "—", "—"]);
        assert_eq!(lines[2].split_whitespace().collect::<Vec<_>>(), ["the", "host", "—", "—", "—", "—", "—"]);
    }

    #[test]
    fn what_is_not_as_it_should_be_stands_beside_the_numbers() {
        let host = HostUse { cpus: Some(1.25), memory: Some(ByteCount::mib(3072)) };
        let text = all(&UsageList { items: vec![busy()], host }, None);
        for part in
            ["0.50", "12 %", "84.5 MiB", "1.0 GiB", "2.0 GiB", "2 OOM kills", "balloon 100.0 MiB from its target"]
        {
            assert!(text.contains(part), "{part} isn't in {text}");
        }
        assert!(text.lines().last().unwrap().starts_with("the host"), "{text}");
    }

    #[test]
    fn show_has_it_in_a_line_and_only_what_is_known() {
        let text = in_short(&busy(), None);
        assert!(text.starts_with("uses 0.50 CPUs, throttled 12 %, 84.5 MiB of memory, 1.0 GiB available"), "{text}");
        assert_eq!(in_short(&view(json!({}), json!({})), None), "");
    }

    #[test]
    fn one_is_shown_with_the_time_that_its_rate_is_of() {
        let text = one(&busy(), None);
        assert!(text.contains("mean of 1.0 s") && text.contains("61.5 s") && text.contains("0.3 s in all"), "{text}");
    }
}
