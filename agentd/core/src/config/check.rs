//! What may not stand in a config file although each value is readable: contradictions, and names and paths outside
//! their grammar.

use std::fmt::Display;

use super::reader::Section;
use super::{AutoOr, Capacity, LimitRule};

/// The reserve must leave something.
pub(super) fn capacity(section: &Section<'_>, capacity: &Capacity) {
    reserve(section, ("cpus", capacity.cpus), ("reserved_cpus", capacity.reserved_cpus));
    reserve(section, ("memory", capacity.memory), ("reserved_memory", capacity.reserved_memory));
}

fn reserve<T: PartialOrd + Display>(section: &Section<'_>, total: (&str, AutoOr<T>), reserved: (&str, T)) {
    let AutoOr::At(there_is) = total.1 else { return };
    let stated = section.has(reserved.0);
    if reserved.1 < there_is || (!stated && section.source.is_broken()) {
        return;
    }
    let (key, by_default) = if stated { (reserved.0, "") } else { (total.0, ", the default") };
    let message = format!("leaves nothing: {} is {there_is} and {} is {}{by_default}", total.0, reserved.0, reserved.1);
    section.fault(key, message);
}

/// Bounds of one rule must leave a value between them.
pub(super) fn limit(section: &Section<'_>, rule: &LimitRule) {
    ordered(section, ("min_memory", rule.min_memory), ("max_memory", rule.max_memory));
    ordered(section, ("min_memory", rule.min_memory), ("total_memory", rule.total_memory));
    ordered(section, ("max_memory", rule.max_memory), ("total_memory", rule.total_memory));
    ordered(section, ("max_cpus", rule.max_cpus), ("total_cpus", rule.total_cpus));
}

fn ordered<T: PartialOrd + Display>(section: &Section<'_>, least: (&str, Option<T>), most: (&str, Option<T>)) {
    if let (Some(low), Some(high)) = (least.1, most.1)
        && low > high
    {
        section.fault(least.0, format!("is {low}, more than {} ({high})", most.0));
    }
}

/// The name of a size: what can be typed without quotes.
pub(super) fn size_name(name: &str) -> Result<(), String> {
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')) {
        return Ok(());
    }
    Err("is no name of a size: letters, digits, `.`, `_` and `-`, at most 64, a letter or digit first".to_owned())
}

/// The name of a cgroup as an instance: that of a unit, without a unit's suffix, so that it can never hide a real one.
pub(super) fn cgroup_name(name: &str) -> Result<(), String> {
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | ':');
    if !begins || name.len() > 255 || !name.chars().all(fits) {
        return Err("is no name: letters, digits and `._-@:`, at most 255, a letter or digit first".to_owned());
    }
    if [".service", ".scope", ".slice"].iter().any(|suffix| name.ends_with(suffix)) {
        return Err("reads as a systemd unit: name units in [units] allow, and give a cgroup another name".to_owned());
    }
    Ok(())
}

/// A path below the cgroup root, with nothing in it that could lead elsewhere.
pub(super) fn cgroup_path(path: &str) -> Result<(), String> {
    let Some(below) = path.strip_prefix('/') else {
        return Err("must begin with `/`, the cgroup root".to_owned());
    };
    if below.is_empty() {
        return Err("is the cgroup root itself, which cannot be limited".to_owned());
    }
    if below.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("has an empty part, `.` or `..` in it".to_owned());
    }
    if below.contains(char::is_control) || path.len() > 4095 {
        return Err("is no path: too long, or with a control character in it".to_owned());
    }
    Ok(())
}

/// The name of a user or group; whether there is one is looked up elsewhere.
pub(super) fn account_name(name: String) -> Result<String, String> {
    if name.is_empty() || name.len() > 255 || name.contains(|c: char| c.is_control() || matches!(c, ':' | '/')) {
        return Err("is no name of a user or group".to_owned());
    }
    Ok(name)
}
