//! Reads each section of the config file into its type. Knows the keys and what a single value may be; what two values
//! may not be together is in `check`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::reader::{
    Section, Source, auto_below_zero, auto_or, boolean, positive, printable, quantity, string, text, word,
};
use super::{
    AccessRule, Capacity, Config, Docker, Fault, Libvirt, LimitRule, Principal, Scaling, Server, Shrink, Size, Units,
    VmMemory, check, parse_duration,
};
use crate::access::Right;
use crate::pattern::Pattern;
use crate::units::Limit;

/// Reads a whole file.
pub(super) fn parse(file: &str, text: &str) -> Result<Config, Vec<Fault>> {
    let (root, errors) = DeTable::parse_recoverable(text);
    let source = Source::new(file, text, !errors.is_empty());
    let config = read(&Section::root(&source, root.get_ref()));

    let mut unread = Vec::new();
    let syntax = Source::new(file, text, true);
    let mut lost = false;
    for error in &errors {
        let at = error.span().map_or(0, |span| span.start);
        syntax.fault(at, "", error.message().trim());
        let (line, _) = syntax.place(at);
        unread.push(line);
        // Below a heading that cannot be read, nobody can say to which section a key belongs.
        let heading = text.lines().nth(line - 1).is_some_and(|line| line.trim_start().starts_with('['));
        lost |= heading && !error.message().contains("duplicate");
    }
    let mut faults = source.into_faults();
    faults.retain(|fault| !lost && !unread.contains(&fault.line));
    faults.extend(syntax.into_faults());
    faults.sort_by_key(|fault| (fault.line, fault.column));
    if faults.is_empty() { Ok(config) } else { Err(faults) }
}

fn read(root: &Section<'_>) -> Config {
    root.refuse_unknown();
    let section = |name: &'static str| root.table(name, format!("[{name}]"), name);
    Config {
        server: section("server").map(|section| server(&section)).unwrap_or_default(),
        libvirt: section("libvirt").map(|section| libvirt(&section)),
        docker: section("docker").map(|section| docker(&section)),
        units: section("units").map(|section| units(&section)),
        capacity: section("capacity").map(|section| capacity(&section)).unwrap_or_default(),
        scaling: section("scaling").map(|section| scaling(&section)).unwrap_or_default(),
        sizes: section("sizes").map(|section| sizes(&section)).unwrap_or_default(),
        limits: root.tables("limit").iter().filter_map(limit).collect(),
        access: root.tables("access").iter().filter_map(access).collect(),
    }
}

fn server(section: &Section<'_>) -> Server {
    let default = Server::default();
    let retention = |value: &DeValue<'_>| match duration(value)? {
        Duration::ZERO => Err("must be more than 0".to_owned()),
        duration => Ok(duration),
    };
    section.refuse_unknown();
    Server {
        socket: section.get("socket", socket_path).unwrap_or(default.socket),
        state_dir: section.get("state_dir", absolute_path).unwrap_or(default.state_dir),
        read_only: section.get("read_only", boolean).unwrap_or(default.read_only),
        history_retention: section.get("history_retention", retention).unwrap_or(default.history_retention),
    }
}

fn libvirt(section: &Section<'_>) -> Libvirt {
    let uri = |value: &DeValue<'_>| {
        let uri = string(value)?;
        if uri.contains("://") && !uri.contains(char::is_control) {
            return Ok(uri);
        }
        Err("is no libvirt URI: write one such as \"qemu:///system\"".to_owned())
    };
    section.refuse_unknown();
    Libvirt { uri: section.get("uri", uri).unwrap_or_else(|| Libvirt::default().uri) }
}

fn docker(section: &Section<'_>) -> Docker {
    section.refuse_unknown();
    Docker { socket: section.get("socket", socket_path).unwrap_or_else(|| Docker::default().socket) }
}

fn units(section: &Section<'_>) -> Units {
    section.refuse_unknown();
    let unit_glob = |text: &str| {
        if text.starts_with("unit/") {
            return Err(format!(
                "write the unit's name without `unit/`: \"{}\"",
                printable(text.trim_start_matches("unit/"))
            ));
        }
        Pattern::parse_name(text).map_err(|error| error.to_string())
    };
    let allow = section.list("allow", unit_glob).unwrap_or_default();
    let cgroups = section.table("cgroups", "[units.cgroups]".to_owned(), "units.cgroups");
    Units { allow, cgroups: cgroups.map(|section| named_cgroups(&section)).unwrap_or_default() }
}

fn named_cgroups(section: &Section<'_>) -> BTreeMap<String, String> {
    let mut cgroups: BTreeMap<String, String> = BTreeMap::new();
    for (key, value) in section.entries() {
        let name = key.get_ref().as_ref();
        let shown = printable(name);
        if section.check(key.span().start, &shown, check::cgroup_name(name)).is_none() {
            continue;
        }
        let path = string(value.get_ref()).and_then(|path| check::cgroup_path(&path).map(|()| path));
        let Some(path) = section.check(value.span().start, &shown, path) else { continue };
        if let Some((other, _)) = cgroups.iter().find(|(_, present)| **present == path) {
            section.source.fault(
                value.span().start,
                format!("[units.cgroups] {shown}"),
                format!("has the path of `{other}`"),
            );
        }
        cgroups.insert(name.to_owned(), path);
    }
    cgroups
}

fn capacity(section: &Section<'_>) -> Capacity {
    const VM_MEMORY: [(&str, VmMemory); 2] = [("observed", VmMemory::Observed), ("maximum", VmMemory::Maximum)];
    let default = Capacity::default();
    section.refuse_unknown();
    let capacity = Capacity {
        cpus: section.get("cpus", auto_or).unwrap_or(default.cpus),
        memory: section.get("memory", auto_or).unwrap_or(default.memory),
        reserved_cpus: section.get("reserved_cpus", quantity).unwrap_or(default.reserved_cpus),
        reserved_memory: section.get("reserved_memory", quantity).unwrap_or(default.reserved_memory),
        cpu_overcommit: section.get("cpu_overcommit", quantity).unwrap_or(default.cpu_overcommit),
        memory_overcommit: section.get("memory_overcommit", quantity).unwrap_or(default.memory_overcommit),
        vm_overhead: section.get("vm_overhead", quantity).unwrap_or(default.vm_overhead),
        vm_memory: section.get("vm_memory", |value| word(value, &VM_MEMORY)).unwrap_or(default.vm_memory),
    };
    check::capacity(section, &capacity);
    capacity
}

fn scaling(section: &Section<'_>) -> Scaling {
    section.refuse_unknown();
    Scaling {
        max_cpus: section.get("max_cpus", auto_below_zero).unwrap_or_default(),
        max_memory: section.get("max_memory", auto_below_zero).unwrap_or_default(),
    }
}

fn sizes(section: &Section<'_>) -> BTreeMap<String, Size> {
    let mut sizes = BTreeMap::new();
    for (key, _) in section.entries() {
        let name = key.get_ref().as_ref();
        let shown = printable(name);
        let heading = format!("[sizes.{shown}]");
        if let Err(message) = check::size_name(name) {
            section.source.fault(key.span().start, heading.clone(), message);
        }
        let Some(size) = section.table(name, heading, "sizes.NAME") else { continue };
        size.refuse_unknown();
        if !["cpus", "memory", "cpu_limit"].iter().any(|key| size.has(key)) {
            size.absent("", "sets nothing: give it cpus, memory or both");
        }
        let cpu_limit = |value: &DeValue<'_>| match quantity(value)? {
            Limit::At(cpus) if cpus == Default::default() => Err("must be more than 0, or \"none\"".to_owned()),
            limit => Ok(limit),
        };
        let read = Size {
            cpus: size.get("cpus", positive),
            memory: size.get("memory", positive),
            cpu_limit: size.get("cpu_limit", cpu_limit).unwrap_or(Limit::Unlimited),
        };
        sizes.insert(name.to_owned(), read);
    }
    sizes
}

fn limit(section: &Section<'_>) -> Option<LimitRule> {
    const SHRINK: [(&str, Shrink); 3] =
        [("always", Shrink::Always), ("if-unused", Shrink::IfUnused), ("never", Shrink::Never)];
    section.refuse_unknown();
    let pattern = section.required("match", text::<Pattern>);
    // A stand-in keeps a rule without a readable match in the list, so that the rest of it is checked as well.
    let rule = LimitRule {
        pattern: pattern.or_else(|| Pattern::parse("*").ok())?,
        min_memory: section.get("min_memory", quantity),
        max_cpus: section.get("max_cpus", positive),
        max_memory: section.get("max_memory", positive),
        total_cpus: section.get("total_cpus", positive),
        total_memory: section.get("total_memory", positive),
        live: section.get("live", boolean),
        unlimited: section.get("unlimited", boolean),
        shrink: section.get("shrink", |value| word(value, &SHRINK)),
        shrink_margin: section.get("shrink_margin", quantity),
        stop_timeout: section.get("stop_timeout", duration),
        repair_drift: section.get("repair_drift", boolean),
    };
    check::limit(section, &rule);
    Some(rule)
}

fn access(section: &Section<'_>) -> Option<AccessRule> {
    section.refuse_unknown();
    match (section.has("user"), section.has("group")) {
        (false, false) => section.absent("", "names nobody: give it a user or a group"),
        (true, true) => section.fault("user", "has both a user and a group: write one [[access]] for each"),
        _ => {}
    }
    let name = |value: &DeValue<'_>| check::account_name(string(value)?);
    let user = section.get("user", name).map(Principal::User);
    let group = section.get("group", name).map(Principal::Group);
    if !section.has("allow") {
        section.absent("allow", "is required");
    }
    let rights = section.list("allow", |word| word.parse::<Right>().map_err(|error| error.to_string()));
    if section.is_empty_list("allow") {
        section.fault("allow", "allows nothing: name at least one of read, logs, resize, power, admin");
    }
    let pattern = section.required("match", text::<Pattern>);
    Some(AccessRule { principal: user.or(group)?, allow: rights?.into_iter().collect(), pattern: pattern? })
}

fn duration(value: &DeValue<'_>) -> Result<Duration, String> {
    let Some(text) = value.as_str() else {
        return Err(format!("must be a string with a unit, such as \"60s\" or \"90d\", not {}", value.type_str()));
    };
    parse_duration(text).map_err(|error| error.to_string())
}

fn absolute_path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    let path = string(value)?;
    if !path.starts_with('/') {
        return Err("must be an absolute path, beginning with `/`".to_owned());
    }
    if path.contains(char::is_control) {
        return Err("has a control character in it".to_owned());
    }
    Ok(PathBuf::from(path))
}

fn socket_path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    const MOST: usize = 107; // sun_path has 108 bytes, the last one is zero: unix(7)
    let path = absolute_path(value)?;
    if path.as_os_str().len() > MOST {
        return Err(format!("is longer than the {MOST} bytes that a Unix socket's path can have"));
    }
    Ok(path)
}
