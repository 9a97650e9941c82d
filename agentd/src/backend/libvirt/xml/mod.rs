//! Reads the few facts that matter from a domain's definition, and changes the one number of a memory device that agentd
//! changes; all else of it stays as it was written, byte for byte.

pub(super) mod tree;

use std::ops::Range;

use super::ffi::Bandwidth;
use agentd_core::units::ByteCount;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// The name of a guest agent's channel.
const AGENT: &str = "org.qemu.guest_agent.0";

/// What a definition says. Memory in KiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Definition {
    /// `<vcpus>`: those of the present vCPUs that are not hotpluggable; `None` where none is listed.
    pub(super) fixed_vcpus: Option<u32>,
    /// `<memory>`: the boot memory, memory devices included.
    pub(super) memory: u64,
    /// `<currentMemory>`: live, where the balloon is now (not its target); saved, what the next start asks of it.
    pub(super) current_memory: u64,
    /// `<vcpu>`: the most vCPUs.
    pub(super) max_vcpus: u32,
    /// `<vcpu current=…>`: present vCPUs.
    pub(super) vcpus: u32,
    /// `<cputune>`: the whole VM's CPU bandwidth.
    pub(super) bandwidth: Bandwidth,
    /// Whether it has ACPI.
    pub(super) acpi: bool,
    /// Whether there is a balloon device at all.
    pub(super) balloon: bool,
    /// `<memballoon><stats period=…>` in seconds; 0 where the driver isn't asked.
    pub(super) stats_period: u32,
    /// Why memory that a guest gives back would not come back to the host.
    pub(super) pinned: Option<&'static str>,
    /// The sizes of all memory devices (virtio-mem, DIMMs): part of `memory`, not of the balloon's range.
    pub(super) device_size: u64,
    /// What the guest has of them now: part of the live `current_memory`, not of what the balloon reports.
    pub(super) device_current: u64,
    /// What the guest is to have of them.
    pub(super) device_requested: u64,
    /// Whether a guest agent has its end of its channel open.
    pub(super) agent: bool,
    /// The virtio-mem devices.
    pub(super) plugs: Vec<Plug>,
}

impl Definition {
    /// What its only virtio-mem device is asked to give; 0 where there is none or more than one.
    pub(super) fn plugged(&self) -> u64 {
        if let [plug] = &self.plugs[..] { plug.requested } else { 0 }
    }
}

/// A virtio-mem device: memory that is plugged and unplugged in blocks. In KiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Plug {
    /// The most that it gives.
    pub(super) size: u64,
    /// What it gives is a multiple of this.
    pub(super) block: u64,
    /// What it is asked to give.
    pub(super) requested: u64,
    /// Where in the definition the device is.
    device: Range<usize>,
    /// Where in the definition the number is that it is asked for, which is in the unit that goes with it.
    number: Range<usize>,
    unit: Option<String>,
}

impl Plug {
    /// The device of this definition, asked for that many KiB: what libvirt is told to change it.
    pub(super) fn asked_for(&self, xml: &str, kib: u64) -> Option<String> {
        let bytes = kib.checked_mul(1 << 10)?;
        let unit = bytes_of(self.unit.as_deref().unwrap_or("KiB"))?;
        let (before, after) =
            (xml.get(self.device.start..self.number.start)?, xml.get(self.number.end..self.device.end)?);
        (bytes % unit == 0).then(|| format!("{before}{}{after}", bytes / unit))
    }
}

/// Reads a definition, or says what is wrong with it.
pub(super) fn definition(xml: &str) -> Result<Definition, String> {
    let mut reader = Reader::from_str(xml);
    let mut found = Definition::default();
    let mut current_memory = None;
    let mut vcpus = None;
    let mut path: Vec<String> = Vec::new();
    let mut unit = None;
    let mut plug: Option<Plug> = None;
    loop {
        let begin = usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
        let event = reader.read_event().map_err(|error| format!("its definition can't be read: {error}"))?;
        match &event {
            Event::Start(tag) | Event::Empty(tag) => {
                path.push(tag.local_name().as_ref().to_owned());
                match inner(&path).as_str() {
                    "memory" | "currentMemory" => unit = attribute(tag, "unit"),
                    "vcpu" => vcpus = attribute(tag, "current").and_then(|count| count.parse().ok()),
                    "vcpus/vcpu" => {
                        let is = |name: &str, word: &str| attribute(tag, name).as_deref() == Some(word);
                        let fixed = is("enabled", "yes") && is("hotpluggable", "no");
                        *found.fixed_vcpus.get_or_insert(0) += u32::from(fixed);
                    }
                    "features/acpi" => found.acpi = true,
                    "memoryBacking/locked" => found.pinned = Some("locked in the host's memory"),
                    "memoryBacking/hugepages" => found.pinned = Some("in huge pages"),
                    "devices/hostdev" if pins_memory(tag) => found.pinned = Some("pinned for a host device (VFIO)"),
                    "devices/interface" if attribute(tag, "type").as_deref() == Some("hostdev") => {
                        found.pinned = Some("pinned for a host device (VFIO)");
                    }
                    "devices/memory" => {
                        let device = begin..begin;
                        plug = (attribute(tag, "model").as_deref() == Some("virtio-mem"))
                            .then(|| Plug { device, ..Plug::default() });
                    }
                    "devices/memory/target/size"
                    | "devices/memory/target/current"
                    | "devices/memory/target/requested"
                    | "devices/memory/target/block" => unit = attribute(tag, "unit"),
                    "devices/channel/target" if attribute(tag, "name").as_deref() == Some(AGENT) => {
                        found.agent = attribute(tag, "state").as_deref() == Some("connected");
                    }
                    "devices/memballoon" => found.balloon = attribute(tag, "model").as_deref() != Some("none"),
                    "devices/memballoon/stats" => {
                        found.stats_period = attribute(tag, "period").and_then(|p| p.parse().ok()).unwrap_or(0);
                    }
                    _ => {}
                }
                if matches!(event, Event::Empty(_)) {
                    path.pop();
                }
            }
            Event::Text(text) => {
                let text = text.trim();
                match inner(&path).as_str() {
                    "memory" => found.memory = kib(text, unit.as_deref())?,
                    "currentMemory" => current_memory = Some(kib(text, unit.as_deref())?),
                    "devices/memory/target/size" => {
                        let size = kib(text, unit.as_deref())?;
                        found.device_size = found.device_size.saturating_add(size);
                        // A DIMM is there whole; of virtio-mem the guest has what <current> says.
                        match &mut plug {
                            Some(plug) => plug.size = size,
                            None => {
                                found.device_current = found.device_current.saturating_add(size);
                                found.device_requested = found.device_requested.saturating_add(size);
                            }
                        }
                    }
                    "devices/memory/target/requested" => {
                        let requested = kib(text, unit.as_deref())?;
                        found.device_requested = found.device_requested.saturating_add(requested);
                        if let Some(plug) = &mut plug {
                            let end = usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
                            (plug.requested, plug.number, plug.unit) = (requested, begin..end, unit.clone());
                        }
                    }
                    "devices/memory/target/block" => {
                        if let Some(plug) = &mut plug {
                            plug.block = kib(text, unit.as_deref())?;
                        }
                    }
                    "devices/memory/target/current" => {
                        found.device_current = found.device_current.saturating_add(kib(text, unit.as_deref())?);
                    }
                    "cputune/global_period" => found.bandwidth.period = text.parse().unwrap_or_default(),
                    "cputune/global_quota" => found.bandwidth.quota = text.parse().unwrap_or_default(),
                    "vcpu" => found.max_vcpus = text.parse().map_err(|_| format!("its <vcpu> is {text:?}"))?,
                    _ => {}
                }
            }
            Event::End(_) => {
                if inner(&path) == "devices/memory"
                    && let Some(mut plug) = plug.take()
                {
                    plug.device.end = usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
                    found.plugs.push(plug);
                }
                path.pop();
            }
            Event::Eof => break,
            _ => {}
        }
    }
    found.current_memory = current_memory.unwrap_or(found.memory);
    found.vcpus = vcpus.unwrap_or(found.max_vcpus);
    if found.memory == 0 || found.max_vcpus == 0 {
        return Err("its definition names no memory or no vCPUs".into());
    }
    Ok(found)
}

/// The path below `<domain>`.
fn inner(path: &[String]) -> String {
    path.get(1..).unwrap_or_default().join("/")
}

fn attribute(tag: &BytesStart<'_>, name: &str) -> Option<String> {
    let attribute = tag.try_get_attribute(name).ok()??;
    Some(attribute.value.into_owned())
}

/// PCI and mediated devices reach the guest's memory by themselves, so all of it is pinned; USB and SCSI ones don't.
fn pins_memory(tag: &BytesStart<'_>) -> bool {
    matches!(attribute(tag, "type").as_deref(), Some("pci" | "mdev"))
}

/// libvirt writes KiB; other units are those of its documentation (formatdomain, "unit").
pub(super) fn kib(text: &str, unit: Option<&str>) -> Result<u64, String> {
    let wrong = || format!("its memory is {text:?} {}", unit.unwrap_or("KiB"));
    let number: u64 = text.parse().map_err(|_| wrong())?;
    let bytes = bytes_of(unit.unwrap_or("KiB")).ok_or_else(wrong)?;
    // libvirt rounds up to its own KiB.
    let bytes = number.checked_mul(bytes).and_then(ByteCount::new).ok_or_else(wrong)?;
    Ok(bytes.bytes().div_ceil(1 << 10))
}

fn bytes_of(unit: &str) -> Option<u64> {
    Some(match unit {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "<domain type='qemu' id='3'><name>memory</name><memory unit='KiB'>524288</memory>
        <currentMemory unit='KiB'>393216</currentMemory><vcpu placement='static' current='1'>4</vcpu>
        <devices><memballoon model='virtio'><stats period='5'/></memballoon><hostdev type='usb'/></devices></domain>";

    #[test]
    fn the_facts_are_read() {
        let expected = Definition {
            memory: 524_288,
            current_memory: 393_216,
            max_vcpus: 4,
            vcpus: 1,
            balloon: true,
            stats_period: 5,
            pinned: None,
            ..Definition::default()
        };
        assert_eq!(definition(PLAIN), Ok(expected));
    }

    #[test]
    fn what_is_left_out_is_the_maximum() {
        let found = definition("<domain><memory unit='GiB'>2</memory><vcpu>3</vcpu></domain>").unwrap();
        assert_eq!((found.memory, found.current_memory, found.vcpus), (2 << 20, 2 << 20, 3));
        assert!(!found.balloon);
    }

    #[test]
    fn look_alikes_elsewhere_in_the_tree_are_not_taken() {
        let xml = "<domain><memory>1024</memory><vcpu>2</vcpu><cputune><vcpu current='9'>9</vcpu></cputune>
            <metadata><a:memory xmlns:a='x'>7</a:memory></metadata><title>&lt;memory&gt;5</title></domain>";
        let found = definition(xml).unwrap();
        assert_eq!((found.memory, found.max_vcpus, found.vcpus), (1024, 2, 2));
    }

    #[test]
    fn memory_devices_are_counted_apart() {
        let device = |model: &str, more: &str| {
            format!("<memory model='{model}'><target><size unit='MiB'>256</size>{more}</target></memory>")
        };
        let current = "<requested unit='MiB'>192</requested><current unit='MiB'>128</current>";
        let devices = device("virtio-mem", current) + &device("dimm", "");
        let xml = format!("<domain><memory>1</memory><vcpu>1</vcpu><devices>{devices}</devices></domain>");
        let found = definition(&xml).unwrap();
        assert_eq!((found.memory, found.device_size, found.device_current), (1, 512 << 10, 384 << 10));
    }

    #[test]
    fn pinned_memory_is_seen() {
        for part in [
            "<memoryBacking><locked/></memoryBacking>",
            "<memoryBacking><hugepages/></memoryBacking>",
            "<devices><hostdev mode='subsystem' type='pci'/></devices>",
            "<devices><interface type='hostdev'/></devices>",
        ] {
            let found = definition(&format!("<domain><memory>1</memory><vcpu>1</vcpu>{part}</domain>")).unwrap();
            assert!(found.pinned.is_some(), "{part}");
        }
    }

    #[test]
    fn a_memory_device_is_asked_for_another_number_and_stays_what_it_was() {
        let device = "<memory model='virtio-mem' b='&lt;'><!-- x --><target dynamicMemslots='yes'>
            <size unit='MiB'>512</size><node>0</node><block unit='KiB'>2048</block>
            <requested unit='KiB'>131072</requested><current unit='KiB'>65536</current></target>
            <alias name='ua-plug'/></memory>";
        let dimm = "<memory model='dimm'><target><size unit='MiB'>64</size></target></memory>";
        let xml =
            format!("<domain><memory unit='MiB'>1088</memory><vcpu>1</vcpu><devices>{dimm}{device}</devices></domain>");
        let found = definition(&xml).unwrap();
        assert_eq!(
            (found.device_size, found.device_current, found.device_requested),
            (576 << 10, 128 << 10, 192 << 10)
        );
        let [plug] = &found.plugs[..] else { panic!("{found:?}") };
        assert_eq!((plug.size, plug.block, plug.requested), (512 << 10, 2048, 128 << 10));
        assert_eq!(plug.asked_for(&xml, 256 << 10).unwrap(), device.replace("131072", "262144"));
        let coarse = xml.replace("<requested unit='KiB'>131072", "<requested unit='MiB'>128");
        let plug = definition(&coarse).unwrap().plugs.remove(0);
        assert!(plug.asked_for(&coarse, 256 << 10).unwrap().contains("<requested unit='MiB'>256</requested>"));
        assert_eq!(plug.asked_for(&coarse, 1000), None, "no whole MiB");
    }

    #[test]
    fn a_definition_that_makes_no_sense_is_an_error() {
        for xml in
            ["", "<domain/>", "<domain><memory unit='furlong'>1</memory><vcpu>1</vcpu></domain>", "<domain><memory>"]
        {
            assert!(definition(xml).is_err(), "{xml}");
        }
    }
}
