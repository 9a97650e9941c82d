//! The history as a table, newest first: when, of which instance, by whom, what moved and how it ended. Local times and
//! users' names come in from outside.

use std::collections::HashMap;
use std::fmt::Display;

use agentd_core::api::{Happening, HistoryEntry, Move, MoveOf};
use agentd_core::operation::Who;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::table::{NOTHING, Stand, lay};
use super::text::clean;

/// What of this host the table needs.
pub(crate) struct Local {
    zone: TimeZone,
    users: HashMap<u32, String>,
}

impl Local {
    /// This process's time zone, and the users that /etc/passwd has. Others are told by their number: a directory of users
    /// may be slow or away, and the record is wanted when things are down.
    pub(crate) fn new() -> Self {
        let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
        Local { zone: TimeZone::system(), users: users(&String::from_utf8_lossy(&passwd)) }
    }

    fn time(&self, at: &str) -> String {
        let time = at.parse::<Timestamp>().map(|time| time.to_zoned(self.zone.clone()));
        time.map_or_else(|_| clean(at), |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
    }

    /// `alice ctl[4711]`
    fn who(&self, who: &Who) -> String {
        let user = self.users.get(&who.uid).map_or_else(|| who.uid.to_string(), |name| clean(name));
        format!("{user} {}[{}]", clean(&who.command), who.pid)
    }
}

fn users(passwd: &str) -> HashMap<u32, String> {
    let user = |line: &str| {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next()?, fields.nth(1)?);
        Some((uid.parse().ok()?, name.to_owned()))
    };
    passwd.lines().filter_map(user).collect()
}

/// The table. Of one instance, its name makes room for the operations, which `ctl undo` takes; they stand in the column
/// that wraps, because one of their own would leave a terminal of 80 columns no room for anything else.
pub(crate) fn history(entries: &[HistoryEntry], of_one: bool, local: &Local, width: Option<usize>) -> String {
    use Stand::{Left, Wrap};
    let row = |entry: &HistoryEntry| {
        let who = entry.who.as_ref().map_or_else(|| NOTHING.to_owned(), |who| local.who(who));
        let mut row = vec![local.time(&entry.at), who, what(entry), end(entry)];
        if !of_one {
            row.insert(1, clean(&entry.reference));
        } else if let (Some(operation), Some(end)) = (&entry.operation, row.last_mut()) {
            *end += &format!(" ({})", clean(operation));
        }
        row
    };
    let rows = entries.iter().map(row).collect();
    if of_one {
        lay(&["TIME", "WHO", "WHAT", "OUTCOME"], &[Left, Left, Left, Wrap], rows, width)
    } else {
        lay(&["TIME", "INSTANCE", "WHO", "WHAT", "OUTCOME"], &[Left, Left, Left, Left, Wrap], rows, width)
    }
}

/// The verb, or what happened by itself.
fn what(entry: &HistoryEntry) -> String {
    match (entry.happening, entry.verb.as_deref()) {
        (Happening::Drift | Happening::Settled, _) => entry.happening.as_str().to_owned(),
        (_, Some(verb)) => clean(verb),
        (happening, None) => happening.as_str().to_owned(),
    }
}

/// How it ended, what moved, and where it ended badly the code and the reason.
fn end(entry: &HistoryEntry) -> String {
    let outcome = entry.outcome.map(|outcome| outcome.as_str().to_owned());
    let moves = Some(moves(&entry.moves)).filter(|moves| !moves.is_empty());
    let code = entry.code.map(|code| code.as_str().to_owned());
    let parts: Vec<String> = [outcome, moves, code, entry.detail.as_deref().map(clean)].into_iter().flatten().collect();
    if parts.is_empty() { NOTHING.to_owned() } else { parts.join(": ") }
}

/// `cpus 2 → 4, memory 4 GiB → 8 GiB (saved)`: a saved value that moved as the live one did is not said twice.
fn moves(moves: &[Move]) -> String {
    fn tell<T: Display + PartialEq>(name: &str, of: &MoveOf<T>, all: &[&MoveOf<T>]) -> Option<String> {
        let alike = |other: &&MoveOf<T>| !other.saved && other.before == of.before && other.after == of.after;
        if of.saved && all.iter().any(alike) {
            return None;
        }
        let value = |value: &Option<_>| value.as_ref().map_or_else(|| "unknown".to_owned(), ToString::to_string);
        let saved = if of.saved { " (saved)" } else { "" };
        Some(format!("{name} {} → {}{saved}", value(&of.before), value(&of.after)))
    }
    let (mut states, mut cpus, mut limits, mut memory) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for moved in moves {
        match moved {
            Move::Cpus(of) => cpus.push(of),
            Move::CpuLimit(of) => limits.push(of),
            Move::Memory(of) => memory.push(of),
            Move::State { .. } => states.push(moved.to_string()),
        }
    }
    let told = states.into_iter().chain(cpus.iter().filter_map(|of| tell("cpus", of, &cpus)));
    let told = told.chain(limits.iter().filter_map(|of| tell("cpu_limit", of, &limits)));
    let told = told.chain(memory.iter().filter_map(|of| tell("memory", of, &memory)));
    told.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
