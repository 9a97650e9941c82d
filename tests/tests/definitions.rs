//! Definitions of others, on a real libvirt: what a prepare makes of each of those that libvirt tests itself with.

use std::collections::BTreeMap;
use std::path::PathBuf;

use agentd_tests::lab::{Agentd, Lab, Libvirt};
use anyhow::{Context, Result, ensure};
use serde_json::json;

/// What a prepare may change or add, by the beginning of the line.
const OURS: [&str; 22] = [
    "<memory ",
    "<currentMemory ",
    "<maxMemory ",
    "<vcpu ",
    "<vcpu>",
    "<vcpus>",
    "</vcpus>",
    "<topology ",
    "<cpu>",
    "<cpu ",
    "</cpu>",
    "<numa>",
    "</numa>",
    "<cell ",
    "<target>",
    "</target>",
    "<size ",
    "<node>",
    "<block ",
    "<requested ",
    "</memory>",
    "<address type='dimm' ",
];

/// What libvirt adds for a new device: its place on the PCI bus, and a port for it.
const PLACE: [&str; 5] =
    ["<address type='pci' ", "<controller type='pci' ", "<model name='", "<target chassis=", "</controller>"];

/// A definition of a QEMU machine of this architecture, as one that is emulated here, under a name of its own; and whether it
/// is one with KVM.
fn adapted(xml: &str, name: &str) -> Option<(String, bool)> {
    let domain = xml.find("<domain ")?;
    let tag = &xml[domain..domain + xml[domain..].find('>')?];
    let kvm = tag.contains("type='kvm'");
    if !(kvm || tag.contains("type='qemu'")) || !xml.contains("x86_64") {
        return None;
    }
    let without =
        |xml: String, element: &str| match (xml.find(&format!("<{element}>")), xml.find(&format!("</{element}>"))) {
            (Some(from), Some(to)) if from < to => format!("{}{}", &xml[..from], &xml[to + element.len() + 3..]),
            _ => xml,
        };
    let xml = without(without(xml.replacen("type='kvm'", "type='qemu'", 1), "uuid"), "name");
    let domain = xml.find("<domain ")?;
    let end = domain + xml[domain..].find('>')? + 1;
    Some((format!("{}<name>{name}</name>{}", &xml[..end], &xml[end..]), kvm))
}

/// The lines that only one of them has, with how often.
fn only(of: &str, other: &str) -> Vec<String> {
    let mut count: BTreeMap<&str, i64> = BTreeMap::new();
    of.lines().for_each(|line| *count.entry(line.trim()).or_default() += 1);
    other.lines().for_each(|line| *count.entry(line.trim()).or_default() -= 1);
    count.into_iter().filter(|(_, count)| *count > 0).map(|(line, _)| line.to_owned()).collect()
}

#[test]
#[ignore = "needs the definitions that `make definitions` fetches"]
fn definitions_of_others_are_prepared_as_told_or_refused_with_the_reason() -> Result<()> {
    let folder =
        std::env::var_os("AGENTD_DEFINITIONS").context("AGENTD_DEFINITIONS names the folder of the definitions")?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "xml"));
    files.sort();
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let config =
        format!("[libvirt]\nuri = \"{}\"\n[scaling]\nmax_cpus = 4096\nmax_memory = \"64TiB\"\n", libvirt.uri());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let (mut taken, mut prepared, mut taken_kvm, mut prepared_kvm) = (0, 0, 0, 0);
    let (mut strange, mut refused) = (0, BTreeMap::<String, Vec<String>>::new());
    for file in &files {
        let label = file.file_stem().context("a name")?.to_string_lossy().into_owned();
        let xml = std::fs::read_to_string(file)?;
        let Some((xml, kvm)) = adapted(&xml, "web") else { continue };
        let path = lab.dir().join("web.xml");
        std::fs::write(&path, xml)?;
        if libvirt.virsh(&["define", &path.to_string_lossy()]).is_err() {
            // Devices and machines that this libvirt or this QEMU doesn't have, or definitions that are meant to be wrong.
            strange += 1;
            continue;
        }
        taken += 1;
        taken_kvm += usize::from(kvm);
        let before = libvirt.virsh(&["dumpxml", "--inactive", "web"])?;
        let now = agentd.get("/v1/instances/vm/web")?.json();
        let (cpus, memory) = (now["cpus"]["persistent"].as_u64(), now["memory"]["persistent"].as_u64());
        let most = |text: &str| -> Option<u64> {
            let line = before.lines().find(|line| line.trim_start().starts_with(text))?;
            line.split_once('>')?.1.split('<').next()?.parse().ok()
        };
        let body = json!({"max_cpus": most("<vcpu").context("vCPUs")? * 2, "max_memory": most("<memory").context("memory")? * 2 * 1024});
        let reply = agentd.post("/v1/instances/vm/web/prepare", &body)?;
        let after = libvirt.virsh(&["dumpxml", "--inactive", "web"])?;
        if reply.status == 200 {
            prepared += 1;
            prepared_kvm += usize::from(kvm);
            let is = |line: &str, known: &[&str]| known.iter().any(|known| line.starts_with(known));
            for line in only(&before, &after) {
                // The port beside it is a new one: both share a slot.
                let shared =
                    line.starts_with("<address ") && after.contains(&line.replace("/>", " multifunction='on'/>"));
                ensure!(is(&line, &OURS) || shared, "{label} has lost {line}\n{before}\n{after}");
            }
            for line in only(&after, &before) {
                ensure!(is(&line, &OURS) || is(&line, &PLACE), "{label} has got {line}\n{before}\n{after}");
            }
            let then = agentd.get("/v1/instances/vm/web")?.json();
            ensure!(
                (then["cpus"]["persistent"].as_u64(), then["memory"]["persistent"].as_u64()) == (cpus, memory),
                "{label}"
            );
            let again = agentd.post("/v1/instances/vm/web/prepare", &body)?.json();
            ensure!(again["outcome"] == "unchanged", "{label}: {again}");
        } else {
            ensure!(before == after, "{label} was refused and changed");
            let why = reply.json()["detail"].as_str().unwrap_or_default().to_owned();
            refused.entry(why).or_default().push(if kvm { format!("{label} (KVM)") } else { label });
        }
        libvirt.virsh(&["undefine", "--nvram", "web"])?;
    }
    println!(
        "{taken} definitions taken by this libvirt ({strange} not): {prepared} prepared; of {taken_kvm} with KVM {prepared_kvm}"
    );
    for (why, labels) in &refused {
        println!("refused, {why}: {}", labels.join(", "));
    }
    ensure!(
        taken >= 100 && prepared_kvm * 100 >= taken_kvm * 80,
        "{prepared} of {taken}, {prepared_kvm} of {taken_kvm}"
    );
    Ok(())
}
