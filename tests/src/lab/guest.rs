//! One guest in the lab's libvirt: how it is defined, what it prints, which threads its QEMU has.
//! What the guest prints is the proof that a resize is real.

use std::{collections::BTreeSet, fmt::Write as _, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};

use super::{GuestImage, Libvirt, wait_until};

/// How a domain of the lab is to look. Sizes are MiB; the defaults are a small guest that obeys everything.
#[derive(Debug, Clone)]
pub struct Domain {
    name: String,
    vcpus: (u32, u32),
    memory: (u32, u32),
    balloon: bool,
    stats_period: Option<u32>,
    autodeflate: bool,
    virtio_mem: Option<(u32, u32)>,
    extra: (String, String),
    flags: Vec<String>,
}

impl Domain {
    /// A domain with 1 of 4 vCPUs and 256 MiB; names are letters, digits, `-`, `_` and `.`.
    pub fn new(name: &str) -> Self {
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)), "a name that needs no escaping");
        Self {
            name: name.to_owned(),
            vcpus: (1, 4),
            memory: (256, 256),
            balloon: true,
            stats_period: Some(1),
            autodeflate: false,
            virtio_mem: None,
            extra: Default::default(),
            flags: Vec::new(),
        }
    }

    /// vCPUs at boot, and the most it can have.
    #[must_use]
    pub fn vcpus(mut self, current: u32, max: u32) -> Self {
        self.vcpus = (current, max);
        self
    }

    /// Memory in MiB: the balloon's target at boot, and the boot maximum.
    #[must_use]
    pub fn memory(mut self, current_mib: u32, max_mib: u32) -> Self {
        self.memory = (current_mib, max_mib);
        self
    }

    /// Whether there is a balloon device (`<memballoon model='virtio'/>` or `none`).
    #[must_use]
    pub fn balloon(mut self, device: bool) -> Self {
        self.balloon = device;
        self
    }

    /// Leaves `<stats period='1'/>` out of the balloon device.
    #[must_use]
    pub fn without_stats_period(mut self) -> Self {
        self.stats_period = None;
        self
    }

    /// Sets `autodeflate='on'`: the guest's MemTotal then doesn't follow the balloon.
    #[must_use]
    pub fn autodeflate(mut self) -> Self {
        self.autodeflate = true;
        self
    }

    /// Gives it a virtio-mem device: its size and how much of it is requested at boot, in MiB.
    #[must_use]
    pub fn virtio_mem(mut self, size_mib: u32, requested_mib: u32) -> Self {
        self.virtio_mem = Some((size_mib, requested_mib));
        self
    }

    /// Gives it QEMU's guest agent.
    #[must_use]
    pub fn agent(mut self) -> Self {
        self.extra.1.push_str("<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>");
        self.flag("agent")
    }

    /// More of its definition: elements of the domain itself and of its devices.
    #[must_use]
    pub fn with(mut self, domain: &str, devices: &str) -> Self {
        self.extra.0.push_str(domain);
        self.extra.1.push_str(devices);
        self
    }

    /// A word for the guest's init (see `assets/init.sh`): `burn`, `noballoon`, `sticky`, `passive`, `agent`,
    /// `acpid`, or one for its kernel.
    #[must_use]
    pub fn flag(mut self, word: &str) -> Self {
        self.flags.push(word.to_owned());
        self
    }

    /// The domain's XML.
    pub fn xml(&self, image: &GuestImage) -> String {
        let Self { name, vcpus: (vcpus, max_vcpus), memory: (current, max), .. } = self;
        let (more, devices) = &self.extra;
        let mut xml = format!(
            "<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{name}</name>{more}"
        );
        // A virtio-mem device needs a NUMA node to belong to; without one, the plain form is the more usual.
        if let Some((size, _)) = self.virtio_mem {
            let total = max + size;
            let _ = write!(xml, "<maxMemory slots='4' unit='MiB'>{total}</maxMemory>");
        }
        let _ = write!(
            xml,
            "<memory unit='MiB'>{max}</memory><currentMemory unit='MiB'>{current}</currentMemory>\
             <vcpu current='{vcpus}'>{max_vcpus}</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd>\
             <cmdline>console=ttyS0 quiet panic=-1 mitigations=off {}</cmdline></os><features><acpi/></features>",
            image.kernel.display(),
            image.initrd.display(),
            self.flags.join(" "),
        );
        if self.virtio_mem.is_some() {
            let last = max_vcpus - 1;
            let _ = write!(xml, "<cpu><numa><cell id='0' cpus='0-{last}' memory='{max}' unit='MiB'/></numa></cpu>");
        }
        let _ = write!(
            xml,
            "<on_reboot>restart</on_reboot><on_crash>destroy</on_crash><devices>\
             <controller type='usb' model='none'/><serial type='file'><source path='{}'/></serial>",
            self.console_inside().display()
        );
        if self.balloon {
            let autodeflate = if self.autodeflate { " autodeflate='on'" } else { "" };
            let stats = self.stats_period.map(|period| format!("<stats period='{period}'/>")).unwrap_or_default();
            let _ = write!(xml, "<memballoon model='virtio'{autodeflate}>{stats}</memballoon>");
        } else {
            xml.push_str("<memballoon model='none'/>");
        }
        if let Some((size, requested)) = self.virtio_mem {
            let _ = write!(
                xml,
                "<memory model='virtio-mem'><target><size unit='MiB'>{size}</size><node>0</node>\
                 <block unit='MiB'>2</block><requested unit='MiB'>{requested}</requested></target></memory>"
            );
        }
        let _ = write!(xml, "{devices}</devices></domain>");
        xml
    }

    fn console_inside(&self) -> PathBuf {
        PathBuf::from("/var/log/libvirt/qemu").join(format!("{}-console.log", self.name))
    }

    /// Defines the domain without starting it.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn define<'a>(&self, libvirt: &'a Libvirt) -> Result<Guest<'a>> {
        let file = libvirt.lab().dir().join(format!("{}.xml", self.name));
        fs::write(&file, self.xml(&GuestImage::get()?))?;
        libvirt.virsh(&["define", &file.to_string_lossy()])?;
        let console = libvirt.lab().outside(self.console_inside());
        Ok(Guest { libvirt, name: self.name.clone(), console })
    }

    /// Defines and starts it, and waits until the guest has printed its first line.
    ///
    /// # Errors
    /// What libvirt says, or a guest that doesn't boot; the message has its console.
    pub fn define_and_start<'a>(&self, libvirt: &'a Libvirt) -> Result<Guest<'a>> {
        let guest = self.define(libvirt)?;
        guest.start()?;
        Ok(guest)
    }
}

/// One line that the guest prints every second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stat {
    /// CPUs online in the guest.
    pub nproc: u32,
    /// The guest's MemTotal in KiB: below what it was given by what the kernel keeps for itself.
    pub memtotal_kib: u64,
    /// Rounds of the busy loop since the line before; 0 without the flag `burn`.
    pub loops: u64,
    /// Seconds since the guest's boot.
    pub up: f64,
}

impl Stat {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split("STAT ").nth(1)?.split_whitespace();
        let mut field =
            |name: &str| fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
        Some(Self {
            nproc: field("nproc")?.parse().ok()?,
            memtotal_kib: field("memtotal")?.parse().ok()?,
            loops: field("loops")?.parse().ok()?,
            up: field("up")?.parse().ok()?,
        })
    }
}

/// A defined domain of the lab.
pub struct Guest<'a> {
    libvirt: &'a Libvirt,
    name: String,
    console: PathBuf,
}

impl Guest<'_> {
    /// The domain's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts it and waits for its first line.
    ///
    /// # Errors
    /// What libvirt says, or a guest that doesn't boot.
    pub fn start(&self) -> Result<()> {
        let _ = fs::remove_file(&self.console);
        self.libvirt.virsh(&["start", &self.name])?;
        self.wait_for("its first line", Duration::from_secs(120), |_| true).map(drop)
    }

    /// What the guest has printed, all of it.
    pub fn console(&self) -> String {
        fs::read(&self.console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Every whole STAT line so far, oldest first.
    pub fn stats(&self) -> Vec<Stat> {
        let console = self.console();
        let whole = console.rfind('\n').map_or("", |end| &console[..end]);
        whole.lines().filter_map(Stat::parse).collect()
    }

    /// Waits until the newest line is as wanted, and gives it.
    ///
    /// # Errors
    /// Not so within `limit`; the message has the end of the console.
    pub fn wait_for(&self, what: &str, limit: Duration, mut wanted: impl FnMut(Stat) -> bool) -> Result<Stat> {
        wait_until(&format!("{} of {}", what, self.name), limit, || {
            Ok(self.stats().last().copied().filter(|&stat| wanted(stat)))
        })
        .with_context(|| {
            let console = self.console();
            let lines: Vec<&str> = console.lines().collect();
            lines[lines.len().saturating_sub(15)..].join("\n")
        })
    }

    /// Waits for `count` further lines, and gives them: what the guest prints *from now on*.
    ///
    /// # Errors
    /// A guest that has stopped printing.
    pub fn next_stats(&self, count: usize) -> Result<Vec<Stat>> {
        let before = self.stats().len();
        let limit = Duration::from_secs(60) + Duration::from_secs(5) * u32::try_from(count)?;
        wait_until(&format!("{count} further lines of {}", self.name), limit, || {
            Ok(self.stats().get(before..before + count).map(<[Stat]>::to_vec))
        })
    }

    /// The process id of its QEMU.
    ///
    /// # Errors
    /// The domain doesn't run.
    pub fn qemu_pid(&self) -> Result<i32> {
        self.libvirt.qemu_pid(&self.name)
    }

    /// Slows the guest's vCPUs down to a thousandth, or lets them run again.
    ///
    /// While slow, the guest takes far longer than libvirt's 5 s for anything; what it was asked for meanwhile it does
    /// once it is let go. Written to the cgroups beneath libvirt, which then shows it as `vcpu_quota`.
    ///
    /// # Errors
    /// The domain doesn't run, or libvirt gave its vCPUs no cgroups.
    pub fn slow(&self, slow: bool) -> Result<()> {
        let (quota, period) = if slow { ("1000", "1000000") } else { ("-1", "100000") };
        let mut found = false;
        for task in fs::read_dir(format!("/proc/{}/task", self.qemu_pid()?))? {
            let task = task?.path();
            let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
            let Ok(cgroups) = fs::read_to_string(task.join("cgroup")) else { continue };
            if !name.starts_with("CPU ") {
                continue;
            }
            for line in cgroups.lines() {
                let Some((controllers, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':')) else {
                    continue;
                };
                let path = path.trim_start_matches('/');
                let unified = PathBuf::from("/sys/fs/cgroup").join(path);
                if controllers.split(',').any(|controller| controller == "cpu") {
                    let folder = PathBuf::from("/sys/fs/cgroup/cpu").join(path);
                    fs::write(folder.join("cpu.cfs_period_us"), period)?;
                    fs::write(folder.join("cpu.cfs_quota_us"), quota)?;
                    found = true;
                } else if controllers.is_empty() && unified.join("cpu.max").exists() {
                    fs::write(unified.join("cpu.max"), format!("{} {period}", quota.replace("-1", "max")))?;
                    found = true;
                }
            }
        }
        ensure!(found, "the vCPUs of {} have no cgroup with a CPU quota", self.name);
        Ok(())
    }

    /// Runs `virsh COMMAND NAME ARGS…`.
    ///
    /// # Errors
    /// What virsh says.
    pub fn virsh(&self, command: &str, args: &[&str]) -> Result<String> {
        self.libvirt.virsh(&[&[command, &self.name], args].concat())
    }

    /// Destroys and undefines the domain.
    ///
    /// # Errors
    /// What virsh says of the definition; not running is fine.
    pub fn remove(&self) -> Result<()> {
        let _ = self.virsh("destroy", &[]);
        self.virsh("undefine", &[]).map(drop)
    }
}

/// The vCPU numbers that a QEMU process has threads for: the truth about which vCPUs it has.
///
/// # Errors
/// No such process.
pub fn vcpu_threads(qemu_pid: i32) -> Result<BTreeSet<u32>> {
    let mut vcpus = BTreeSet::new();
    for task in fs::read_dir(format!("/proc/{qemu_pid}/task"))? {
        // A thread may end between the listing and the reading.
        let Ok(name) = fs::read_to_string(task?.path().join("comm")) else { continue };
        // Named `CPU 2/TCG` or `CPU 2/KVM`.
        let number = name.strip_prefix("CPU ").and_then(|rest| rest.split('/').next());
        vcpus.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    ensure!(!vcpus.is_empty(), "process {qemu_pid} has no vCPU threads: is it a QEMU that names its threads?");
    Ok(vcpus)
}
