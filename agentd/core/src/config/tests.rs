//! What a config file means and which faults are told, seen from outside: text in, config or faults out.

use proptest::prelude::*;

use super::*;
use crate::access::Right;

fn parse(text: &str) -> Config {
    Config::parse("a.toml", text).unwrap_or_else(|faults| panic!("{faults:#?}"))
}

/// Every fault of a text, as it is shown.
fn faults(text: &str) -> Vec<String> {
    Config::parse("a.toml", text).unwrap_err().iter().map(ToString::to_string).collect()
}

/// The one fault of a text.
fn fault(text: &str) -> String {
    let faults = faults(text);
    assert_eq!(faults.len(), 1, "{faults:#?}");
    faults.into_iter().next().unwrap()
}

const EVERY_KEY: &str = r#"
[server]
socket = "/tmp/a.sock"
state_dir = "/tmp/state"
read_only = true
history_retention = "7d"
[libvirt]
uri = "test:///default"
[docker]
socket = "/run/docker.sock"
[units]
allow = ["batch-*.service", "ci.slice"]
[units.cgroups]
batch = "/batch/one"
[capacity]
cpus = 32
memory = "64G"
reserved_cpus = 2.5
reserved_memory = "2GiB"
cpu_overcommit = 2
memory_overcommit = 1.25
vm_overhead = 0
vm_memory = "maximum"
[scaling]
max_cpus = 16
max_memory = "32GiB"
[sizes.standard-2]
cpus = 2
memory = "4GiB"
[sizes.small]
cpus = 0.5
cpu_limit = 1.5
[[limit]]
match = "vm/ci-*"
min_memory = "256MiB"
max_cpus = 4
max_memory = "16GiB"
total_cpus = 16
total_memory = "64GiB"
live = false
unlimited = true
shrink = "always"
shrink_margin = "1M"
stop_timeout = "5m"
repair_drift = true
[[access]]
group = "agentd"
allow = ["read", "resize", "power"]
match = "*"
[[access]]
user = "deploy"
allow = ["admin"]
match = "label:team=a"
"#;

#[test]
fn every_key_arrives() {
    let config = parse(EVERY_KEY);
    assert_eq!(config.server.socket, PathBuf::from("/tmp/a.sock"));
    assert_eq!(config.server.state_dir, PathBuf::from("/tmp/state"));
    assert!(config.server.read_only);
    assert_eq!(config.server.history_retention, Duration::from_secs(7 * 86_400));
    assert_eq!(config.libvirt.unwrap().uri, "test:///default");
    assert_eq!(config.docker.unwrap().socket, PathBuf::from("/run/docker.sock"));
    let units = config.units.unwrap();
    assert!(units.allows("batch-1.service") && units.allows("ci.slice") && !units.allows("ssh.service"));
    assert_eq!(units.cgroups, BTreeMap::from([("batch".to_owned(), "/batch/one".to_owned())]));
    let capacity = Capacity {
        cpus: AutoOr::At(Cpus::whole(32)),
        memory: AutoOr::At(ByteCount::gib(64)),
        reserved_cpus: Cpus::from_millis(2500),
        reserved_memory: ByteCount::gib(2),
        cpu_overcommit: "2.0".parse().unwrap(),
        memory_overcommit: "1.25".parse().unwrap(),
        vm_overhead: ByteCount::ZERO,
        vm_memory: VmMemory::Maximum,
    };
    assert_eq!(config.capacity, capacity);
    let scaling = Scaling { max_cpus: AutoOr::At(Cpus::whole(16)), max_memory: AutoOr::At(ByteCount::gib(32)) };
    assert_eq!(config.scaling, scaling);
    let standard = Size { cpus: Some(Cpus::whole(2)), memory: Some(ByteCount::gib(4)), cpu_limit: Limit::Unlimited };
    assert_eq!(config.sizes["standard-2"], standard);
    let small =
        Size { cpus: Some(Cpus::from_millis(500)), memory: None, cpu_limit: Limit::At(Cpus::from_millis(1500)) };
    assert_eq!(config.sizes["small"], small);
    let limit = LimitRule {
        pattern: Pattern::parse("vm/ci-*").unwrap(),
        min_memory: Some(ByteCount::mib(256)),
        max_cpus: Some(Cpus::whole(4)),
        max_memory: Some(ByteCount::gib(16)),
        total_cpus: Some(Cpus::whole(16)),
        total_memory: Some(ByteCount::gib(64)),
        live: Some(false),
        unlimited: Some(true),
        shrink: Some(Shrink::Always),
        shrink_margin: Some(ByteCount::mib(1)),
        stop_timeout: Some(Duration::from_secs(300)),
        repair_drift: Some(true),
    };
    assert_eq!(config.limits, [limit]);
    assert_eq!(config.access[0].describe(0), "[[access]] 1 (group agentd)");
    assert_eq!(config.access[0].allow, [Right::Read, Right::Resize, Right::Power].into_iter().collect());
    assert_eq!(config.access[1].principal, Principal::User("deploy".to_owned()));
    assert_eq!(config.access[1].pattern.as_str(), "label:team=a");
}

#[test]
fn an_empty_file_is_all_defaults_with_every_kind_off() {
    let config = parse("");
    assert_eq!(config, Config::default());
    assert!(config.libvirt.is_none() && config.docker.is_none() && config.units.is_none());
    let on = parse("[libvirt]\n[docker]\n[units]");
    assert_eq!(
        (on.libvirt, on.docker, on.units),
        (Some(Libvirt::default()), Some(Docker::default()), Some(Units::default()))
    );
}

/// A file with one key of the table of keys set to a TOML value, and what its section needs besides.
fn file_with(key: &KeyDoc, value: &str) -> String {
    let name = if key.key == "NAME" { "batch" } else { key.key };
    let line = format!("{name} = {value}\n");
    match key.section {
        "limit" if key.key == "match" => format!("[[limit]]\n{line}"),
        "limit" => format!("[[limit]]\nmatch = \"*\"\n{line}"),
        "access" => {
            let rest = [("group", "\"a\""), ("allow", "[\"read\"]"), ("match", "\"*\"")];
            let rest =
                rest.into_iter().filter(|(other, _)| *other != key.key && !(*other == "group" && key.key == "user"));
            format!("[[access]]\n{line}{}", rest.map(|(key, value)| format!("{key} = {value}\n")).collect::<String>())
        }
        "sizes.NAME" if key.key == "cpus" => format!("[sizes.a]\n{line}memory = 1\n"),
        "sizes.NAME" => format!("[sizes.a]\n{line}cpus = 1\n"),
        section => format!("[{section}]\n{line}"),
    }
}

#[test]
fn every_documented_key_is_read() {
    for key in KEYS {
        let said = fault(&file_with(key, "1979-05-27"));
        let name = if key.key == "NAME" { "batch" } else { key.key };
        assert!(said.contains(&format!(" {name}: must be")), "{}.{}: {said}", key.section, key.key);
    }
}

#[test]
fn every_documented_default_is_the_default() {
    for key in KEYS {
        let Some(default) = key.default else { continue };
        let stated = parse(&file_with(key, default));
        if key.section == "limit" {
            let with_rule = stated.rules_for("vm/a", &BTreeMap::new());
            assert_eq!(with_rule, Rules { matching: vec![0], ..Rules::default() }, "{}", key.key);
            continue;
        }
        let absent = parse(&file_with(key, default).replace(&format!("{} = {default}\n", key.key), ""));
        assert_eq!(stated, absent, "{}.{}", key.section, key.key);
    }
}

#[test]
fn all_faults_are_told_at_once_in_the_order_of_the_file() {
    let text = "[server]\nsocket = \"run/a.sock\"\nhistory_retention = \"90\"\n[capacity]\nreserved_memory = \"1GB\"\n\
                cpu_overcomit = 2.0\n[[limit]]\nmin_memory = \"2G\"\nmax_memory = \"1G\"\n[sizes.x]\n";
    let places: Vec<_> = Config::parse("a.toml", text).unwrap_err();
    let places: Vec<_> = places.iter().map(|f| (f.line, f.column, f.key.as_str())).collect();
    let expected = [
        (2, 10, "[server] socket"),
        (3, 21, "[server] history_retention"),
        (5, 19, "[capacity] reserved_memory"),
        (6, 1, "[capacity] cpu_overcomit"),
        (7, 1, "[[limit]] 1 match"),
        (8, 14, "[[limit]] 1 min_memory"),
        (10, 8, "[sizes.x]"),
    ];
    assert_eq!(places, expected);
}

#[test]
fn a_fault_shows_file_line_column_and_key() {
    assert_eq!(
        fault("[capacity]\n  memory = \"8GB\""),
        "a.toml:2:12: [capacity] memory: `8GB`: GB means powers of 1000 to some: write 8G or 8GiB, powers of 1024 \
         (0 and \"auto\" are the host's own)"
    );
    assert!(fault("[server]\nstate_dir = \"/ü\u{1}\"").starts_with("a.toml:2:16: "), "a column is in characters");
}

#[test]
fn unknown_keys_are_told_with_what_was_probably_meant() {
    assert_eq!(fault("[server]\nsokcet = 1"), "a.toml:2:1: [server] sokcet: unknown key: did you mean `socket`?");
    assert_eq!(fault("[capacty]"), "a.toml:1:2: capacty: unknown section or key: did you mean `capacity`?");
    assert_eq!(fault("socket = 1"), "a.toml:1:1: socket: unknown section or key: it belongs in [server]");
    assert_eq!(fault("[units]\ncolour = 1"), "a.toml:2:1: [units] colour: unknown key");
    assert!(fault("[docker]\n\"a\\nb\" = 1").contains("[docker] a\\nb: unknown key"));
}

#[test]
fn syntax_errors_do_not_hide_other_faults() {
    let faults = faults("[capacity]\nmemory = 8GiB\ncpus = \"four\"\n[docker]\nsocket = \"x\"\n");
    assert!(faults.iter().any(|f| f.starts_with("a.toml:2:")), "{faults:#?}");
    assert!(faults.iter().any(|f| f.starts_with("a.toml:3:8: [capacity] cpus")), "{faults:#?}");
    assert!(faults.iter().any(|f| f.starts_with("a.toml:5:10: [docker] socket")), "{faults:#?}");
    assert_eq!(faults.len(), 3, "{faults:#?}");
}

#[test]
fn a_broken_heading_blames_no_key_below_it() {
    let faults = faults("[docker]\n[server\nread_only = true\n");
    assert!(faults.iter().all(|f| !f.contains("read_only")), "{faults:#?}");
    assert!(faults[0].starts_with("a.toml:2:"), "{faults:#?}");
}

#[test]
fn a_missing_key_is_not_claimed_where_its_line_could_not_be_read() {
    for (text, line) in [
        ("[[limit]]\nmatch \"vm/*\"\n", 2),
        ("[sizes.a]\n\"cpus = 2\n", 2),
        ("[[access]]\nuser \"a\"\nallow = [\"read\"]\nmatch = \"*\"\n", 2),
        ("[capacity]\nmemory = \"1G\"\nreserved_memory \"512M\"\n", 3),
    ] {
        let at = format!("a.toml:{line}:");
        assert!(faults(text).iter().all(|fault| fault.starts_with(&at)), "{:#?}", faults(text));
    }
}

#[test]
fn a_duplicate_key_is_a_fault() {
    assert!(fault("[server]\nread_only = true\nread_only = false").starts_with("a.toml:3:"));
    let twice = faults("[docker]\n[server]\n[server]\n[capacity]\ncpus = \"x\"");
    assert!(twice[0].starts_with("a.toml:3:") && twice[1].starts_with("a.toml:5:"), "{twice:#?}");
}

#[test]
fn a_section_of_the_wrong_shape_is_told() {
    assert!(fault("server = 3").contains("[server]: must be a table, not an integer"));
    assert!(fault("[[server]]").contains("single brackets"));
    assert!(fault("[limit]\nmatch = \"*\"").contains("write [[limit]]"));
    assert!(fault("[sizes]\na = 3").contains("[sizes.a]: must be a table"));
    assert!(fault("limit = [3]").contains("[[limit]] 1: must be a table"));
    assert!(fault("[units]\ncgroups = 3").contains("[units.cgroups]: must be a table"));
}

#[test]
fn contradictions_are_faults() {
    let limit = |keys: &str| fault(&format!("[[limit]]\nmatch = \"*\"\n{keys}"));
    assert!(limit("min_memory = \"2G\"\nmax_memory = \"1G\"").contains("is 2 GiB, more than max_memory (1 GiB)"));
    assert!(limit("max_memory = \"2G\"\ntotal_memory = \"1G\"").contains("more than total_memory"));
    assert!(limit("min_memory = \"2G\"\ntotal_memory = \"1G\"").contains("more than total_memory"));
    assert!(limit("max_cpus = 2.5\ntotal_cpus = 2").contains("is 2.5, more than total_cpus (2)"));
    assert!(limit("max_cpus = 0").contains("more than 0"));
    let capacity = |keys: &str| fault(&format!("[capacity]\n{keys}"));
    assert!(
        capacity("cpus = 2\nreserved_cpus = 2").starts_with("a.toml:3:17: [capacity] reserved_cpus: leaves nothing")
    );
    assert!(capacity("memory = \"4G\"\nreserved_memory = \"5G\"").contains("leaves nothing"));
    assert!(capacity("memory = \"1G\"").contains("reserved_memory is 1 GiB, the default"));
    parse("[[limit]]\nmatch = \"*\"\nmin_memory = \"1G\"\nmax_memory = \"1G\"\ntotal_memory = \"1G\"");
    parse("[capacity]\nreserved_cpus = 4096");
}

#[test]
fn an_access_rule_names_one_principal_some_rights_and_a_match() {
    let access = |keys: &str| fault(&format!("[[access]]\n{keys}"));
    let rest = "allow = [\"read\"]\nmatch = \"*\"";
    assert!(access(rest).contains("[[access]] 1: names nobody"));
    assert!(access(&format!("user = \"a\"\ngroup = \"b\"\n{rest}")).contains("both a user and a group"));
    assert!(access(&format!("user = \"\"\n{rest}")).contains("is no name of a user or group"));
    assert!(access("user = \"a\"\nallow = []\nmatch = \"*\"").contains("allows nothing"));
    assert!(access("user = \"a\"\nmatch = \"*\"").contains("allow: is required"));
    assert!(access("user = \"a\"\nallow = [\"read\"]").contains("match: is required"));
    let unknown = access("user = \"a\"\nallow = [\"read\", \"rezise\"]\nmatch = \"*\"");
    assert!(unknown.starts_with("a.toml:3:18: [[access]] 1 allow: unknown right `rezise`"), "{unknown}");
}

#[test]
fn overcommit_is_above_zero_and_exact_to_thousandths() {
    for value in
        ["0", "0.0", "-1", "-0.5", "nan", "-nan", "inf", "1.0001", "1.00000000000000000000001", "\"x\"", "true", "1e9"]
    {
        let said = fault(&format!("[capacity]\ncpu_overcommit = {value}"));
        assert!(said.starts_with("a.toml:2:18: [capacity] cpu_overcommit: "), "{said}");
    }
    for (value, shown) in [("2", "2.0"), ("1.5000", "1.5"), ("\"1.25\"", "1.25"), ("+1.0", "1.0"), ("1e1", "10.0")] {
        let config = parse(&format!("[capacity]\ncpu_overcommit = {value}"));
        assert_eq!(config.capacity.cpu_overcommit.to_string(), shown, "{value}");
    }
}

#[test]
fn zero_and_auto_are_the_hosts_own() {
    for value in ["0", "\"auto\"", "0.0", "\"0\""] {
        assert_eq!(parse(&format!("[capacity]\ncpus = {value}")).capacity.cpus, AutoOr::Auto, "{value}");
    }
    assert_eq!(parse("[capacity]\nmemory = \"0G\"").capacity.memory, AutoOr::Auto);
    for value in ["-1", "-4.5", "\"-1\"", "0", "\"auto\""] {
        assert_eq!(parse(&format!("[scaling]\nmax_cpus = {value}")).scaling.max_cpus, AutoOr::Auto, "{value}");
    }
    assert_eq!(AutoOr::Auto.or_host(3), 3);
    for text in [
        "[capacity]\ncpus = -1",
        "[capacity]\ncpus = \"Auto\"",
        "[scaling]\nmax_cpus = -nan",
        "[scaling]\nmax_memory = 1.5",
    ] {
        fault(text);
    }
}

#[test]
fn paths_outside_their_grammar_are_refused() {
    for path in ["batch", "/", "/a/../b", "/..", "/a//b", "/a/", "/./a", ""] {
        let said = fault(&format!("[units.cgroups]\nbatch = \"{path}\""));
        assert!(said.starts_with("a.toml:2:9: [units.cgroups] batch: "), "{said}");
    }
    for name in ["a.service", "a.slice", "a.scope", "a/b", "", "-a"] {
        assert!(fault(&format!("[units.cgroups]\n\"{name}\" = \"/a\"")).starts_with("a.toml:2:1: "), "{name}");
    }
    assert!(fault("[units.cgroups]\na = \"/x\"\nb = \"/x\"").contains("has the path of `a`"));
    assert!(fault("[docker]\nsocket = \"unix:///var/run/docker.sock\"").contains("absolute path"));
    assert!(fault(&format!("[server]\nsocket = \"/{}\"", "a".repeat(107))).contains("107 bytes"));
    parse(&format!("[server]\nsocket = \"/{}\"", "a".repeat(106)));
    assert!(fault("[libvirt]\nuri = \"\"").contains("qemu:///system"));
    assert!(fault("[units]\nallow = [\"unit/a.service\"]").contains("\"a.service\""));
}

#[test]
fn values_of_the_wrong_kind_are_told_with_what_to_write() {
    assert!(fault("[server]\nread_only = \"yes\"").contains("must be true or false, not a string"));
    assert!(fault("[server]\nhistory_retention = 90").contains("must be a string with a unit"));
    assert!(fault("[server]\nhistory_retention = \"0d\"").contains("more than 0"));
    assert!(fault("[capacity]\nvm_memory = \"max\"").contains("`max` is not one of \"observed\", \"maximum\""));
    assert!(fault("[capacity]\nvm_overhead = 1.5").contains("fraction"));
    assert!(fault("[capacity]\nvm_overhead = 99999999999999999999").contains("too large"));
    assert!(fault("[sizes.\"a b\"]\ncpus = 1").contains("is no name of a size"));
    assert!(fault("[sizes.a]\ncpu_limit = 0").contains("more than 0"));
    assert!(fault("[sizes.a]\ncpus = \"none\"").contains("not an amount"));
    assert!(fault("[[limit]]\nmatch = \"web\"").contains("can match nothing"));
}

#[test]
fn only_the_server_section_decides_whether_the_server_is_the_same() {
    let config = parse(EVERY_KEY);
    assert!(config.same_server(&parse(&EVERY_KEY.replace("cpus = 32", "cpus = 31"))));
    assert!(!config.same_server(&parse(&EVERY_KEY.replace("read_only = true", "read_only = false"))));
}

#[test]
fn values_are_told_in_the_words_of_the_file() {
    assert_eq!((AutoOr::<Cpus>::Auto.to_string(), AutoOr::At(Cpus::whole(3)).to_string()), ("auto".into(), "3".into()));
    for (word, value) in [("observed", VmMemory::Observed), ("maximum", VmMemory::Maximum)] {
        assert_eq!(value.to_string(), word);
        assert_eq!(parse(&format!("[capacity]\nvm_memory = \"{word}\"\n")).capacity.vm_memory, value);
    }
    for (word, value) in [("always", Shrink::Always), ("if-unused", Shrink::IfUnused), ("never", Shrink::Never)] {
        assert_eq!(value.to_string(), word);
        assert_eq!(parse(&format!("[[limit]]\nmatch = \"*\"\nshrink = \"{word}\"\n")).limits[0].shrink, Some(value));
    }
}

#[test]
fn a_config_with_nothing_to_change_is_warned_of() {
    let warned =
        |text: &str| parse(text).warnings().iter().map(|warning| warning.contains("nothing")).collect::<Vec<_>>();
    assert_eq!(warned(""), [true]);
    assert_eq!(warned("[units]\n"), [false], "there are units, and none is allowed");
    let cgroup = "[units.cgroups]\nbatch = \"/batch\"\n";
    for text in ["[libvirt]\n", "[docker]\n", "[units]\nallow = [\"a.service\"]\n", cgroup] {
        assert!(warned(text).is_empty(), "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*") {
        let _ = Config::parse("a.toml", &text);
    }

    #[test]
    fn no_damage_to_a_file_panics_and_each_fault_lies_within_it(at in 0..EVERY_KEY.len(), to in "[\\[\\]\"=.\\n0-9a-zü]{0,3}", cut in 0_usize..6) {
        let end = (at + cut).min(EVERY_KEY.len());
        let text = format!("{}{to}{}", &EVERY_KEY[..at], &EVERY_KEY[end..]);
        if let Err(faults) = Config::parse("a.toml", &text) {
            prop_assert!(!faults.is_empty());
            for fault in faults {
                let lines = text.split('\n').count();
                prop_assert!(fault.line >= 1 && fault.line <= lines, "{} of {}", fault, lines);
                let width = text.split('\n').nth(fault.line - 1).unwrap().chars().count();
                prop_assert!(fault.column >= 1 && fault.column <= width + 1, "{} of {}", fault, width);
            }
        }
    }
}
