//! Headroom in a saved definition, for growth without a restart after the next one: a higher maximum of vCPUs, with the
//! topology and NUMA cells that go with it, and a virtio-mem device that gives nothing yet. Changes only what it says and
//! refuses what it does not understand. Pure: a text and a wish in, a text and words out.

use super::xml::tree::{Edits, Element, parse};
use super::xml::{self, Definition};

/// virtio-mem gives memory in blocks of that many KiB: the size of a transparent huge page.
const BLOCK_KIB: u64 = 2 << 10;
/// Slots for memory devices where a definition names none.
const SLOTS: u32 = 16;
/// The most vCPUs of an x86 machine without an IOMMU that remaps interrupts.
const MOST_VCPUS: u32 = 255;

/// How far a VM is to be able to grow without a restart; `None` leaves that as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Wish {
    /// vCPUs.
    pub(super) vcpus: Option<u32>,
    /// Memory in KiB.
    pub(super) memory: Option<u64>,
}

/// A definition with headroom.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Prepared {
    /// The definition.
    pub(super) xml: String,
    /// What was changed, in words.
    pub(super) changes: Vec<String>,
    /// What a person should know.
    pub(super) notes: Vec<String>,
}

/// Puts headroom into a definition, or says why that can't be done. `most_vcpus` is what the machine type takes.
pub(super) fn prepare(xml: &str, wish: Wish, most_vcpus: Option<u32>) -> Result<Prepared, String> {
    let root = parse(xml)?;
    let mut work = Work::new(xml, &root)?;
    let vcpus = match wish.vcpus {
        Some(wanted) => work.vcpus(wanted, most_vcpus)?,
        None => work.now.max_vcpus,
    };
    if let Some(wanted) = wish.memory {
        work.memory(wanted, vcpus)?;
    }
    work.done()
}

/// Makes a definition boot with that much memory, what memory devices are to give at once included, and lets it have at
/// least so many vCPUs; or says why that can't be done.
pub(super) fn boot_with(xml: &str, wish: Wish, most_vcpus: Option<u32>) -> Result<Prepared, String> {
    let root = parse(xml)?;
    let mut work = Work::new(xml, &root)?;
    if let Some(wanted) = wish.vcpus {
        let whole = work.whole_sockets(wanted)?;
        work.vcpus(whole, most_vcpus)?;
    }
    if let Some(wanted) = wish.memory {
        work.boot_memory(wanted)?;
    }
    work.done()
}

struct Work<'a> {
    xml: &'a str,
    root: &'a Element,
    now: Definition,
    edits: Edits,
    changes: Vec<String>,
    notes: Vec<String>,
}

impl<'a> Work<'a> {
    fn new(xml: &'a str, root: &'a Element) -> Result<Self, String> {
        if root.name != "domain" {
            return Err(format!("its definition is a <{}>", root.name));
        }
        let kind = root.attribute(xml, "type").unwrap_or_default();
        if !matches!(kind, "kvm" | "qemu") {
            return Err(format!("it is a domain of type {kind:?}; only those of QEMU are understood"));
        }
        let now = xml::definition(xml)?;
        Ok(Work { xml, root, now, edits: Edits::default(), changes: Vec::new(), notes: Vec::new() })
    }

    /// The definition, where it can be read as one.
    fn done(self) -> Result<Prepared, String> {
        let xml = self.edits.apply(self.xml);
        xml::definition(&xml).map_err(|why| format!("it would get a definition that can't be read: {why}"))?;
        Ok(Prepared { xml, changes: self.changes, notes: self.notes })
    }

    fn at(&self, path: &[&str]) -> Option<&'a Element> {
        path.iter().try_fold(self.root, |element, name| element.child(name))
    }

    fn architecture(&self) -> &'a str {
        self.at(&["os", "type"]).and_then(|os| os.attribute(self.xml, "arch")).unwrap_or_default()
    }

    fn machine(&self) -> &'a str {
        self.at(&["os", "type"]).and_then(|os| os.attribute(self.xml, "machine")).unwrap_or_default()
    }

    /// Its CPU topology, with the vCPUs of one socket.
    fn topology(&self) -> Result<Option<(&'a Element, u32)>, String> {
        let Some(topology) = self.at(&["cpu", "topology"]) else { return Ok(None) };
        let mut socket = 1_u32;
        for name in ["dies", "clusters", "cores", "threads"] {
            let part = topology.attribute(self.xml, name).map_or(Ok(1), str::parse::<u32>);
            let whole = part.ok().filter(|part| *part > 0).and_then(|part| socket.checked_mul(part));
            socket = whole.ok_or("its CPU topology can't be read")?;
        }
        Ok(Some((topology, socket)))
    }

    /// The next number of vCPUs that fills its sockets.
    fn whole_sockets(&self, vcpus: u32) -> Result<u32, String> {
        let socket = self.topology()?.map_or(1, |(_, socket)| socket);
        vcpus.checked_next_multiple_of(socket).ok_or_else(|| format!("{vcpus} vCPUs are more than any machine has"))
    }

    /// Changes what it boots with. Its memory devices stay as they are.
    fn boot_memory(&mut self, wanted: u64) -> Result<(), String> {
        let (xml, now) = (self.xml, &self.now);
        let base = wanted
            .checked_sub(now.device_requested)
            .filter(|base| *base > 0)
            .ok_or_else(|| format!("its memory devices alone give it {} MiB", now.device_requested >> 10))?;
        let (old, total) = (now.memory.saturating_sub(now.device_size), base.saturating_add(now.device_size));
        // What the balloon leaves; the devices come on top.
        let current = base;
        if let Some(numa) = self.at(&["cpu", "numa"]) {
            let cells: Vec<&Element> = numa.all("cell").collect();
            let [cell] = &cells[..] else {
                return Err(format!(
                    "its memory is in {} NUMA cells, and which of them is to change is not known",
                    cells.len()
                ));
            };
            self.edits.set_attribute(cell, "memory", &base.to_string());
            self.edits.set_attribute(cell, "unit", "KiB");
            self.changes.push(format!("<cell>: {} → {} MiB", old >> 10, base >> 10));
        }
        let all = self.at(&["memory"]).ok_or("it names no memory")?;
        self.edits.set_text(xml, all, &total.to_string());
        self.edits.set_attribute(all, "unit", "KiB");
        match self.at(&["currentMemory"]) {
            Some(element) => {
                self.edits.set_text(xml, element, &current.to_string());
                self.edits.set_attribute(element, "unit", "KiB");
            }
            None => {
                self.edits.insert_after(xml, all, &format!("<currentMemory unit='KiB'>{current}</currentMemory>"));
            }
        }
        self.changes.push(format!("<memory>: {} → {} MiB", old >> 10, base >> 10));
        if let Some(room) = self.at(&["maxMemory"])
            && xml::kib(room.text(xml), room.attribute(xml, "unit"))? < total
        {
            self.edits.set_text(xml, room, &total.to_string());
            self.edits.set_attribute(room, "unit", "KiB");
            self.changes.push(format!("<maxMemory>: {} MiB", total >> 10));
        }
        Ok(())
    }

    /// Raises the maximum of vCPUs; those that the next start has stay as they are.
    fn vcpus(&mut self, wanted: u32, most: Option<u32>) -> Result<u32, String> {
        let (xml, now) = (self.xml, self.now.max_vcpus);
        let most = most.unwrap_or(MOST_VCPUS);
        let mut max = wanted.min(most);
        if max < wanted {
            self.notes.push(format!("{wanted} vCPUs are more than its machine type takes: {most}"));
        }
        if let Some((topology, socket)) = self.topology()? {
            let whole = max - max % socket;
            if whole != max && whole > now {
                self.notes.push(format!("{max} vCPUs don't fill its sockets of {socket}: {whole} do"));
            }
            max = whole;
            if max > now {
                self.edits.set_attribute(topology, "sockets", &(max / socket).to_string());
                self.changes.push(format!("<topology>: {} sockets", max / socket));
            }
        }
        if max <= now {
            return Ok(now);
        }
        if self.architecture() == "x86_64" && self.at(&["features", "acpi"]).is_none() {
            // A virtio-mem device needs none: seen with QEMU 7.2.
            self.notes.push("without <acpi/> its vCPUs can't be added or taken while it runs".into());
        }
        let vcpu = self.at(&["vcpu"]).ok_or("its definition names no vCPUs")?;
        self.edits.set_text(xml, vcpu, &max.to_string());
        if vcpu.attribute(xml, "current").is_none() {
            self.edits.set_attribute(vcpu, "current", &self.now.vcpus.to_string());
        }
        self.changes.push(format!("<vcpu>: {} of {now} → {} of {max}", self.now.vcpus, self.now.vcpus));
        if let Some(list) = self.at(&["vcpus"]) {
            let more: Vec<String> =
                (now..max).map(|id| format!("<vcpu id='{id}' enabled='no' hotpluggable='yes'/>")).collect();
            self.edits.append(xml, list, &more.join(""));
            self.changes.push(format!("<vcpus>: {now} to {} added, off", max - 1));
        }
        // Each vCPU is in a NUMA cell, where there are any.
        let last = self.at(&["cpu", "numa"]).and_then(|numa| numa.all("cell").last());
        if let Some((cell, cpus)) = last.and_then(|cell| Some((cell, cell.attribute(xml, "cpus")?))) {
            let more = if now == max - 1 { now.to_string() } else { format!("{now}-{}", max - 1) };
            self.edits.set_attribute(cell, "cpus", &joined(cpus, now, max).unwrap_or_else(|| format!("{cpus},{more}")));
            self.changes.push(format!("<cell>: vCPUs {more} added to the last one"));
        }
        Ok(max)
    }

    /// Adds a virtio-mem device that gives nothing yet, or makes the one that there is larger.
    fn memory(&mut self, wanted: u64, vcpus: u32) -> Result<(), String> {
        let xml = self.xml;
        if self.now.memory >= wanted {
            return Ok(());
        }
        self.refuse_memory()?;
        let devices = self.at(&["devices"]).ok_or("its definition has no <devices>")?;
        let plugged = devices.all("memory").filter(|device| device.attribute(xml, "model") == Some("virtio-mem"));
        let plugged: Vec<&Element> = plugged.collect();
        let own = self.now.plugs.iter().fold(0_u64, |sum, plug| sum.saturating_add(plug.size));
        let rest = self.now.memory.checked_sub(own).ok_or("its memory devices are more than its memory")?;
        let size = wanted - rest;
        let size = size - size % BLOCK_KIB;
        let total = rest + size;
        match (&plugged[..], &self.now.plugs[..]) {
            ([], _) if size == 0 => return Ok(()),
            ([], _) => {
                self.edits.append(
                    xml,
                    devices,
                    &format!(
                        "<memory model='virtio-mem'><target><size unit='KiB'>{size}</size><node>0</node>\
                         <block unit='KiB'>{BLOCK_KIB}</block><requested unit='KiB'>0</requested></target></memory>"
                    ),
                );
                self.changes
                    .push(format!("<memory model='virtio-mem'>: added, up to {} MiB, gives nothing yet", size >> 10));
            }
            ([device], [plug]) if size > plug.size && plug.block > 0 && size.is_multiple_of(plug.block) => {
                let element = device.child("target").and_then(|target| target.child("size"));
                let element = element.ok_or("its virtio-mem device names no size")?;
                self.edits.set_text(xml, element, &size.to_string());
                self.edits.set_attribute(element, "unit", "KiB");
                self.changes.push(format!("<memory model='virtio-mem'>: {} → {} MiB", plug.size >> 10, size >> 10));
            }
            ([_], _) => return Ok(()),
            _ => return Err("it has more than one virtio-mem device".into()),
        }
        self.room_for(total, vcpus)
    }

    /// The address space and the NUMA cell that a memory device needs.
    fn room_for(&mut self, total: u64, vcpus: u32) -> Result<(), String> {
        let xml = self.xml;
        // As libvirt itself writes it: the devices are part of it.
        let all = self.at(&["memory"]).ok_or("it names no memory")?;
        self.edits.set_text(xml, all, &total.to_string());
        self.edits.set_attribute(all, "unit", "KiB");
        if self.at(&["currentMemory"]).is_none() {
            // Left out it is all there is, which is more by now.
            let now = self.now.current_memory;
            self.edits.insert_after(xml, all, &format!("<currentMemory unit='KiB'>{now}</currentMemory>"));
        }
        let devices =
            u32::try_from(self.at(&["devices"]).map_or(0, |devices| devices.all("memory").count())).unwrap_or(u32::MAX);
        match self.at(&["maxMemory"]) {
            Some(room) => {
                let slots = room.attribute(xml, "slots").and_then(|slots| slots.parse::<u32>().ok()).unwrap_or(0);
                if slots <= devices {
                    self.edits.set_attribute(room, "slots", &(devices + 1).to_string());
                    self.changes.push(format!("<maxMemory>: {} slots", devices + 1));
                }
                let now = xml::kib(room.text(xml), room.attribute(xml, "unit"))?;
                if now < total {
                    self.edits.set_text(xml, room, &total.to_string());
                    self.edits.set_attribute(room, "unit", "KiB");
                    self.changes.push(format!("<maxMemory>: {} → {} MiB", now >> 10, total >> 10));
                }
            }
            None => {
                let before = self.at(&["currentMemory"]).unwrap_or(all);
                let slots = SLOTS.max(devices + 1);
                self.edits.insert_after(
                    xml,
                    before,
                    &format!("<maxMemory slots='{slots}' unit='KiB'>{total}</maxMemory>"),
                );
                self.changes.push(format!("<maxMemory>: {} MiB, {slots} slots", total >> 10));
            }
        }
        if self.at(&["cpu", "numa"]).is_some_and(|numa| numa.child("cell").is_some()) {
            return Ok(());
        }
        if self.now.device_size > 0 {
            return Err("it has memory devices and no NUMA cell".into());
        }
        let cell = format!(
            "<numa><cell id='0' cpus='0-{}' memory='{}' unit='KiB'/></numa>",
            vcpus.saturating_sub(1),
            self.now.memory
        );
        match (self.at(&["cpu", "numa"]), self.at(&["cpu"])) {
            (Some(_), _) => return Err("its <numa> has no cell".into()),
            (None, Some(cpu)) => self.edits.append(xml, cpu, &cell),
            (None, None) => {
                let after = ["features", "os"].iter().find_map(|name| self.at(&[name])).ok_or("it has no <os>")?;
                self.edits.insert_after(xml, after, &format!("<cpu>{cell}</cpu>"));
            }
        }
        self.changes.push(format!(
            "<numa>: one cell with all {} MiB and all vCPUs, which a memory device needs",
            self.now.memory >> 10
        ));
        Ok(())
    }

    /// What a memory device does not go with, as far as it is known.
    fn refuse_memory(&self) -> Result<(), String> {
        let (architecture, machine) = (self.architecture(), self.machine());
        if architecture != "x86_64" {
            return Err(format!("memory devices are only put into x86_64 machines, not into {architecture:?}"));
        }
        if !(machine.starts_with("pc") || machine == "q35" || machine.is_empty()) {
            return Err(format!("memory devices are not put into a machine of type {machine:?}"));
        }
        if let Some(how) = self.now.pinned {
            return Err(format!("its memory is {how}: what it gave back would not come back to the host"));
        }
        if self.at(&["launchSecurity"]).is_some() {
            return Err("its memory is encrypted (<launchSecurity>), and is all there from its start".into());
        }
        Ok(())
    }
}

/// A list of CPUs that ends where the new ones begin, made longer: `0-3` and 4 to 7 are `0-7`.
fn joined(cpus: &str, from: u32, to: u32) -> Option<String> {
    let (before, last) = cpus.rsplit_once(',').map_or((None, cpus), |(before, last)| (Some(before), last));
    let (first, end) = last.split_once('-').unwrap_or((last, last));
    let (first, end): (u32, u32) = (first.trim().parse().ok()?, end.trim().parse().ok()?);
    (end + 1 == from).then(|| {
        let range = format!("{first}-{}", to - 1);
        before.map_or_else(|| range.clone(), |before| format!("{before},{range}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <metadata><x:y xmlns:x='u' z='>'/></metadata>
  <memory unit='KiB'>1048576</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
  </devices>
  <qemu:commandline><qemu:arg value='-x'/></qemu:commandline>
</domain>
";

    fn done(xml: &str, vcpus: u32, mib: u64) -> Prepared {
        prepare(xml, Wish { vcpus: Some(vcpus), memory: Some(mib << 10) }, None).unwrap()
    }

    #[test]
    fn headroom_is_all_that_is_added() {
        let prepared = done(PLAIN, 8, 4096);
        let expected = PLAIN
            .replace("<memory unit='KiB'>1048576<", "<memory unit='KiB'>4194304<")
            .replace("<vcpu placement='static'>2<", "<vcpu current='2' placement='static'>8<")
            .replace(
                "</currentMemory>",
                "</currentMemory>\n  <maxMemory slots='16' unit='KiB'>4194304</maxMemory>",
            )
            .replace(
                "<features><acpi/></features>",
                "<features><acpi/></features>\n  <cpu><numa><cell id='0' cpus='0-7' memory='1048576' unit='KiB'/></numa></cpu>",
            )
            .replace(
                "</emulator>",
                "</emulator>\n    <memory model='virtio-mem'><target><size unit='KiB'>3145728</size><node>0</node>\
                 <block unit='KiB'>2048</block><requested unit='KiB'>0</requested></target></memory>",
            );
        assert_eq!(prepared.xml, expected);
        assert_eq!(prepared.changes.len(), 4, "{:?}", prepared.changes);
        // What has it already is left alone.
        let again = done(&prepared.xml, 8, 4096);
        assert_eq!((again.xml, again.changes), (prepared.xml.clone(), Vec::new()));
        let more = done(&prepared.xml, 8, 8192);
        assert!(more.xml.contains(">7340032</size>") && more.xml.contains(">8388608</maxMemory>"), "{}", more.xml);
        let found = xml::definition(&more.xml).unwrap();
        assert_eq!((found.max_vcpus, found.vcpus, found.plugs[0].requested), (8, 2, 0));
    }

    #[test]
    fn topology_and_numa_cells_go_with_the_vcpus() {
        let cpu = "<cpu mode='host-model'><topology sockets='1' dies='1' cores='2' threads='1'/>\
                   <numa><cell id='0' cpus='0' memory='512' unit='MiB'/><cell id='1' cpus='1' memory='512' unit='MiB'/></numa></cpu>";
        let xml = PLAIN.replace(
            "<devices>",
            &format!("{cpu}<vcpus><vcpu id='0' enabled='yes'/><vcpu id='1' enabled='yes'/></vcpus><devices>"),
        );
        let prepared = prepare(&xml, Wish { vcpus: Some(7), memory: None }, None).unwrap();
        for part in ["sockets='3'", ">6</vcpu>", "cpus='1-5'", "<vcpu id='5' enabled='no' hotpluggable='yes'/>"] {
            assert!(prepared.xml.contains(part), "{part}: {}", prepared.xml);
        }
        assert!(!prepared.xml.contains("<vcpu id='6'") && prepared.notes[0].contains("6 do"), "{:?}", prepared.notes);
        let clamped = prepare(PLAIN, Wish { vcpus: Some(500), memory: None }, Some(288)).unwrap();
        assert!(clamped.xml.contains(">288</vcpu>") && clamped.notes[0].contains("288"), "{:?}", clamped.notes);
        let still =
            prepare(&PLAIN.replace("<acpi/>", ""), Wish { vcpus: Some(4), memory: Some(8 << 20) }, None).unwrap();
        assert!(still.notes[0].contains("<acpi/>") && still.xml.contains("virtio-mem"), "{:?}", still.notes);
        // Less than there is now is no headroom.
        assert_eq!(prepare(PLAIN, Wish { vcpus: Some(1), memory: None }, None).unwrap().xml, PLAIN);
    }

    #[test]
    fn what_memory_devices_dont_go_with_is_refused() {
        for (from, to, why) in [
            ("type='kvm'", "type='xen'", "type \"xen\""),
            ("arch='x86_64'", "arch='s390x'", "s390x"),
            ("pc-q35-7.2", "microvm", "microvm"),
            ("<devices>", "<memoryBacking><locked/></memoryBacking><devices>", "locked"),
            ("<devices>", "<launchSecurity type='sev'/><devices>", "encrypted"),
            ("<domain ", "<network ", "network"),
        ] {
            let xml =
                PLAIN.replace(from, to).replace(if from == "<domain " { "</domain>" } else { "\0" }, "</network>");
            let refused = prepare(&xml, Wish { vcpus: Some(4), memory: Some(8 << 20) }, None).unwrap_err();
            assert!(refused.contains(why), "{why}: {refused}");
        }
    }

    fn boots(xml: &str, vcpus: Option<u32>, mib: Option<u64>) -> Result<Prepared, String> {
        boot_with(xml, Wish { vcpus, memory: mib.map(|mib| mib << 10) }, None)
    }

    #[test]
    fn what_it_boots_with_is_all_that_is_changed() {
        let booted = boots(PLAIN, Some(6), Some(3000)).unwrap();
        let expected = PLAIN
            .replace("Memory unit='KiB'>1048576<", "Memory unit='KiB'>3072000<")
            .replace("<memory unit='KiB'>1048576<", "<memory unit='KiB'>3072000<")
            .replace("<vcpu placement='static'>2<", "<vcpu current='2' placement='static'>6<");
        assert_eq!(booted.xml, expected);
        // Also less than before; what is absent stays.
        let less = boots(PLAIN, None, Some(512)).unwrap();
        assert_eq!(less.xml, PLAIN.replace(">1048576<", ">524288<"));
        let sockets = PLAIN.replace("<devices>", "<cpu><topology sockets='1' cores='2' threads='2'/></cpu><devices>");
        let booted = boots(&sockets, Some(5), None).unwrap();
        assert!(booted.xml.contains("sockets='2'") && booted.xml.contains(">8</vcpu>"), "{}", booted.xml);
    }

    #[test]
    fn what_it_boots_with_leaves_its_memory_devices_alone() {
        let with_device = done(PLAIN, 2, 4096).xml.replace("KiB'>0</requested>", "KiB'>1048576</requested>");
        let now = xml::definition(&with_device).unwrap();
        let booted = boots(&with_device, None, Some(3072)).unwrap();
        let after = xml::definition(&booted.xml).unwrap();
        assert_eq!(after.plugs[0].requested, now.plugs[0].requested);
        assert_eq!(after.memory - after.device_size, 2 << 20, "the rest of it: {}", booted.xml);
        assert_eq!(after.current_memory, 2 << 20);
        assert!(booted.xml.contains("memory='2097152' unit='KiB'/></numa>"), "its cell: {}", booted.xml);
        assert!(booted.xml.contains(">5242880</maxMemory>"), "{}", booted.xml);
        let why = boots(&with_device, None, Some(1024)).unwrap_err();
        assert!(why.contains("devices alone give it 1024 MiB"), "{why}");
        let cells = with_device.replace("</numa>", "<cell id='1' memory='1024' unit='KiB'/></numa>");
        assert!(boots(&cells, None, Some(3072)).unwrap_err().contains("2 NUMA cells"));
        assert!(boots(&PLAIN.replace("type='kvm'", "type='xen'"), None, Some(1)).unwrap_err().contains("xen"));
    }

    #[test]
    fn lists_of_cpus_are_made_longer() {
        assert_eq!(joined("0-3", 4, 8).as_deref(), Some("0-7"));
        assert_eq!(joined("0,2-3", 4, 5).as_deref(), Some("0,2-4"));
        assert_eq!(joined("0", 1, 2).as_deref(), Some("0-1"));
        assert_eq!(joined("0-1,^1", 2, 3), None);
        assert_eq!(joined("0-3", 6, 8), None);
    }
}
