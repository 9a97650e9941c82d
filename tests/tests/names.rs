//! Names, labels, texts and paths that others choose, on real engines: each means one instance, no path and no option, and what
//! ctl shows of it is characters.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agentd_tests::lab::{Agentd, Docker, Lab, Libvirt, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Names of domains, as they are and as XML: what a shell, a terminal, a URL, a pattern or ctl itself would take for something else.
const DOMAINS: [(&str, &str); 12] = [
    ("--help", "--help"),
    ("-rf", "-rf"),
    ("a b", "a b"),
    ("$(reboot);`reboot`", "$(reboot);`reboot`"),
    ("...", "..."),
    ("%2e%2e%00", "%2e%2e%00"),
    ("<memory>1<memory>&", "&lt;memory&gt;1&lt;memory&gt;&amp;"),
    ("]]>'\"\\", "]]&gt;'\"\\"),
    ("*", "*"),
    ("[a-z]?{x,y}", "[a-z]?{x,y}"),
    ("naïve\u{202e}gnp", "naïve\u{202e}gnp"),
    ("vm:resize?cpus=9#x", "vm:resize?cpus=9#x"),
];
/// Names that libvirt takes and no reference can have: such a domain goes by its UUID, since it counts all the same.
const UNSPEAKABLE: [(&str, &str); 3] = [("a\u{85}b", "a\u{85}b"), (" web ", " web "), ("\u{9b}31mred", "\u{9b}31mred")];
/// What whoever defines a domain may write into it.
const TEXTS: &str = "<title>x]]&gt;&lt;/title&gt;&lt;memory&gt;1&lt;/memory&gt;\u{9b}31m</title>\
    <description>&lt;vcpu&gt;999&lt;/vcpu&gt; &#x202e; &amp;amp;</description>\
    <metadata><evil:domain xmlns:evil='urn:evil'><evil:memory unit='KiB'>1</evil:memory><memory xmlns='urn:x'>1</memory>\
    <evil:currentMemory><![CDATA[</currentMemory><vcpu>999</vcpu>]]></evil:currentMemory></evil:domain></metadata>";
/// Names that Docker takes, and that mean something where a name stands in an address, a command or a request.
const CONTAINERS: [&str; 8] = ["json", "v1.43", "update", "vm", "none", "all", "a..", "create-exec-start"];
/// Labels and variables of those who make containers.
const LABELS: [&str; 5] = [
    "evil=\u{1b}[2J\u{1b}]0;owned\u{7}",
    "\u{1b}[31mkey\r\n=x",
    "com.docker.compose.project=../../etc",
    "json={\"memory\": 1}",
    "turn=\u{202e}gnp.exe\u{9b}31m",
];

/// All that ctl can show of them.
const SHOWN: [&[&str]; 8] = [
    &["list"],
    &["list", "-o", "json"],
    &["capacity"],
    &["usage"],
    &["history"],
    &["events"],
    &["metrics"],
    &["health"],
];

/// What a terminal may obey, or what turns the order of a line about.
fn is_obeyed(c: char) -> bool {
    (c.is_control() && c != '\n')
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn is_harmless(agentd: &Agentd, args: &[&str]) -> Result<()> {
    let output = agentd.ctl(args);
    let shown = output.stdout.clone() + &output.stderr;
    // JSON writes some of them as they are, as the API does: that is data for programs.
    let obeyed = |c: char| if args.contains(&"json") { c.is_ascii_control() && c != '\n' } else { is_obeyed(c) };
    ensure!(output.code == Some(0) && !shown.chars().any(obeyed), "ctl {args:?}: {output:?}");
    Ok(())
}

/// Each line of a definition but those that a change of memory writes.
fn but_memory(xml: &str) -> Vec<&str> {
    let is_ours = |line: &&str| !line.trim_start().starts_with("<currentMemory ");
    xml.lines().filter(is_ours).collect()
}

#[test]
fn domains_of_any_name_and_text_are_themselves_and_nothing_else() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let domains = || DOMAINS.iter().chain(&UNSPEAKABLE).enumerate();
    for (at, (_, name)) in domains() {
        let file = lab.dir().join("evil.xml");
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>00000000-0000-4000-8000-0000000000{at:02}</uuid>{TEXTS}\
             <memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os>\
             <devices><memballoon model='virtio'/></devices></domain>"
        );
        fs::write(&file, xml)?;
        libvirt.virsh(&["define", file.to_str().context("a path")?])?;
    }
    let config = format!("[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 2\nmemory = \"4GiB\"\n", libvirt.uri());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let list = agentd.get("/v1/instances?kind=vm")?.json();
    assert_eq!(list["total"], domains().count(), "{list}");
    for (at, (name, _)) in domains() {
        let uuid = format!("00000000-0000-4000-8000-0000000000{at:02}");
        let inactive = || libvirt.virsh(&["dumpxml", "--inactive", &uuid]);
        let before = inactive()?;
        let speakable = at < DOMAINS.len();
        let name = if speakable { *name } else { &uuid };
        let reference = format!("vm/{name}");
        // By its name as a word of ctl's, and in the path of a request.
        let output = agentd.ctl(&["resize", "--memory", "48MiB", "--next-boot", "-o", "json", "--", &reference]);
        let reply: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        assert_eq!(
            (output.code, &reply["ref"], &reply["outcome"]),
            (Some(0), &json!(reference), &json!("changed")),
            "{reply}"
        );
        let escaped: String = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let shown = agentd.get(&format!("/v1/instances/vm/{escaped}"))?.json();
        assert_eq!((&shown["ref"], &shown["id"]), (&json!(reference), &json!(uuid)), "{shown}");
        assert_eq!(shown["memory"]["persistent"], 48 * MIB, "{shown}");
        let after = inactive()?;
        assert_eq!(but_memory(&before), but_memory(&after), "{name:?}: more than its memory was changed");
        ensure!(after.contains("<currentMemory unit='KiB'>49152</currentMemory>"), "{after}");
        assert_eq!(speakable, !shown["notes"].to_string().contains("its UUID is its name"), "{shown}");
        is_harmless(&agentd, &["show", "--", &reference])?;
    }
    // None of them is kept out of what is counted once it runs.
    let committed = || Ok::<_, anyhow::Error>(agentd.get("/v1/capacity")?.json()["cpus"]["committed"].clone());
    assert_eq!(committed()?, 0);
    let unspeakable = format!("00000000-0000-4000-8000-0000000000{:02}", DOMAINS.len());
    libvirt.virsh(&["start", "--paused", &unspeakable])?;
    wait_until("it to be charged", Duration::from_secs(60), || Ok((committed()? == 1).then_some(())))?;
    libvirt.virsh(&["destroy", &unspeakable])?;
    // Each was changed once, and none by the name of another.
    let history = agentd.get("/v1/history")?.json();
    let items = history["items"].as_array().context("a list")?.iter().filter(|item| item["verb"] == "resize");
    let changed: std::collections::BTreeSet<_> = items.map(|item| item["ref"].to_string()).collect();
    assert_eq!(changed.len(), domains().count(), "{history}");
    SHOWN.iter().try_for_each(|args| is_harmless(&agentd, args))
}

#[test]
fn containers_of_any_name_and_label_are_themselves_and_nothing_else() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let labels: Vec<&str> = LABELS.iter().flat_map(|label| ["--label", label, "--env", label]).collect();
    let args = [&["--cpus", "0.1", "-m", "16m", "--memory-swap", "32m"], labels.as_slice()].concat();
    for name in CONTAINERS {
        docker.run(name, &args)?;
    }
    // Longer than any reference: it is counted all the same, by its id.
    let long = docker.run(&"a".repeat(300), &args)?;
    let names: Vec<&str> = CONTAINERS.iter().copied().chain([long.as_str()]).collect();
    let socket = docker.socket();
    let config = format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 4\nmemory = \"4GiB\"\n", socket.display());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let cpus = || -> Result<Vec<(String, Value)>> {
        let list = agentd.get("/v1/instances")?.json();
        let items = list["items"].as_array().context("a list")?.iter();
        Ok(items
            .map(|item| (item["name"].as_str().unwrap_or_default().to_owned(), item["cpus"]["observed"].clone()))
            .collect())
    };
    let committed = agentd.get("/v1/capacity")?.json()["memory"]["committed"].clone();
    assert_eq!(committed, (names.len() as u64) << 24, "16 MiB each");
    for &name in &names {
        let before = cpus()?;
        assert_eq!(before.len(), names.len());
        let output = agentd.ctl(&["resize", name, "--cpus", "0.2"]);
        assert_eq!(output.code, Some(0), "{output:?}");
        for ((other, before), (_, now)) in before.into_iter().zip(cpus()?) {
            assert_eq!(now, if other == name { json!(0.2) } else { before }, "{other} after a change of {name}");
        }
        is_harmless(&agentd, &["show", name])?;
    }
    // A name in a request is one step of a path, and never one of Docker's.
    for path in ["..%2f..%2fversion", "json%2f..%2fjson", "json%3fall=1", "%2e%2e", "json%00", "-rm"] {
        let reply = agentd.post(&format!("/v1/instances/container/{path}/resize"), &json!({"cpus": 0.3}))?;
        ensure!(matches!(reply.status, 400 | 404), "{path}: {} {}", reply.status, reply.text());
    }
    ensure!(cpus()?.iter().all(|(_, cpus)| *cpus == json!(0.2)));
    SHOWN.iter().try_for_each(|args| is_harmless(&agentd, args))
}

/// A cgroup of the test's own in each tree, gone with what is below when dropped.
struct Subtree(Vec<PathBuf>);

impl Subtree {
    fn make(name: &str) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let unified = root.join("cgroup.controllers").exists();
        let roots = if unified { vec![root.to_owned()] } else { vec![root.join("cpu"), root.join("memory")] };
        let subtree = Subtree(roots.into_iter().map(|root| root.join(name)).collect());
        subtree.0.iter().try_for_each(fs::create_dir)?;
        Ok(subtree)
    }
}

impl Drop for Subtree {
    fn drop(&mut self) {
        for folder in &self.0 {
            for below in fs::read_dir(folder).into_iter().flatten().flatten() {
                if below.path().is_dir() {
                    let _ = fs::remove_dir(below.path());
                }
            }
            if let Err(error) = fs::remove_dir(folder) {
                println!("{} is left behind: {error}", folder.display());
            }
        }
    }
}

#[test]
fn what_is_below_a_delegated_cgroup_is_its_owners_and_changes_nothing_above() -> Result<()> {
    let name = format!("agentd-names-{}", std::process::id());
    let (subtree, other) = (Subtree::make(&name)?, Subtree::make(&format!("{name}-other"))?);
    for folder in &subtree.0 {
        let names: [&[u8]; 6] =
            [b"--help", b"\x1b[2J\x1b]0;owned\x07", b"a\nb", b"\xff\xfe", "\u{202e}gnp".as_bytes(), b"..."];
        for below in names {
            let below = folder.join(OsStr::from_bytes(below));
            // Version 1 takes no line end.
            if let Err(error) = fs::create_dir(&below) {
                ensure!(below.to_string_lossy().contains('\n'), "{}: {error}", below.display());
            }
        }
        // The kernel makes no links in there, so a path can lead nowhere else; through a mount it could.
        ensure!(std::os::unix::fs::symlink("/", folder.join("link")).is_err());
    }
    let config = format!(
        "[units]\n[units.cgroups]\nbatch = \"/{name}\"\n[capacity]\ncpus = 2\nmemory = \"2GiB\"\nreserved_memory = 0\n"
    );
    let agentd = Agentd::with_config(&config).start()?;
    let reply = agentd.post("/v1/instances/unit/batch/resize", &json!({"cpus": 0.5, "memory": "64MiB"}))?;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let list = agentd.get("/v1/instances")?.json();
    assert_eq!(list["total"], 1, "what is below has no name in the config: {list}");
    // Above, beside and below, nothing was set.
    let file = |folder: &Path| {
        ["memory.max", "memory.limit_in_bytes"].iter().find_map(|name| fs::read_to_string(folder.join(name)).ok())
    };
    let limited = |folder: &Path| file(folder).is_some_and(|text| text.trim() == (64 * MIB).to_string());
    ensure!(subtree.0.iter().any(|folder| limited(folder)) && !other.0.iter().any(|folder| limited(folder)));
    for folder in &subtree.0 {
        for below in fs::read_dir(folder)?.flatten().filter(|below| below.path().is_dir()) {
            ensure!(!limited(&below.path()), "{} was set", below.path().display());
        }
    }
    for path in ["/../etc", "relative", "/a/../b", "/\u{1b}[2J"] {
        let config = format!("[units]\n[units.cgroups]\nbatch = {}\n", json!(path));
        let file = agentd.folder().join("evil.toml");
        fs::write(&file, config)?;
        let output = agentd.ctl(&["check-config", file.to_str().context("a path")?]);
        ensure!(output.code == Some(2) && output.stderr.contains("batch"), "{path:?}: {output:?}");
        ensure!(!output.stderr.chars().any(is_obeyed), "{output:?}");
    }
    SHOWN.iter().try_for_each(|args| is_harmless(&agentd, args))
}
