//! The tiny guest: Debian's cloud kernel and an initramfs of busybox, QEMU's guest agent, a few modules and `assets/init.sh`.
//! Built once and kept under `tests/.cache`, by kernel version, modules and the content of the init.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use super::stdout_of;

const INIT: &str = include_str!("../../assets/init.sh");

/// The modules that the init loads; what the kernel has built in isn't there as a file.
const MODULES: [&str; 10] = [
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "virtio/virtio_balloon",
    "virtio/virtio_mem",
    "char/virtio_console",
    "acpi/button",
    "input/evdev",
];

/// QEMU's guest agent, as its package has it.
const AGENT: &str = "/usr/sbin/qemu-ga";

/// The file of a module: where it is below the kernel's drivers, and what it is called.
fn modules() -> impl Iterator<Item = (PathBuf, String)> {
    MODULES.into_iter().map(|path| {
        let file = PathBuf::from(format!("{path}.ko"));
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (file, name)
    })
}

/// Kernel and initramfs of the lab's guest, as files to boot directly.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl GuestImage {
    /// The guest, built where the cache doesn't have it (half a minute at most, and a download of 26 MB).
    ///
    /// # Errors
    /// No network on the first time, or one of apt-get, dpkg, cpio and busybox-static missing.
    pub fn get() -> Result<Self> {
        let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache");
        fs::create_dir_all(&cache)?;
        let lock = File::create(cache.join("lock"))?;
        lock.lock()?; // test binaries run side by side; released with the file
        let kernel = kernel_package(&cache)?;
        let mut hasher = DefaultHasher::new();
        (INIT, MODULES).hash(&mut hasher);
        let folder = cache.join(&kernel);
        let vmlinuz = folder.join("vmlinuz");
        let fetched = fs::read_to_string(folder.join("modules")).unwrap_or_default();
        if !vmlinuz.exists() || fetched != MODULES.join("\n") {
            fetch_kernel(&kernel, &folder).with_context(|| format!("cannot fetch {kernel}"))?;
        }
        let initrd = folder.join(format!("initrd-{:016x}", hasher.finish()));
        if !initrd.exists() {
            build_initrd(&folder, &initrd).context("cannot build the initramfs")?;
        }
        Ok(Self { kernel: vmlinuz, initrd })
    }
}

/// The package behind `linux-image-cloud-amd64`; without package lists, the newest in the cache.
fn kernel_package(cache: &Path) -> Result<String> {
    let depends = stdout_of(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]));
    let depends = depends.unwrap_or_default();
    if let Some(name) = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: ")) {
        return Ok(name.to_owned());
    }
    let mut cached: Vec<String> = fs::read_dir(cache)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("linux-image-"))
        .collect();
    cached.sort();
    cached.pop().context("apt knows no linux-image-cloud-amd64: run `apt-get update`")
}

/// Downloads the kernel package and keeps the kernel and the modules of it; nothing is installed.
fn fetch_kernel(package: &str, folder: &Path) -> Result<()> {
    let temp = tempfile::tempdir_in(folder.parent().context("the cache is a folder")?)?;
    let _ = fs::remove_dir_all(folder);
    let debs = temp.path().join("debs");
    let tree = temp.path().join("tree");
    let done = temp.path().join("done");
    for new in [&debs, &done] {
        fs::create_dir(new)?;
    }
    // As root apt-get drops to its own user, who cannot write here, and says so on standard error; it works.
    stdout_of(Command::new("apt-get").args(["-q", "download", package]).current_dir(&debs))?;
    let deb = fs::read_dir(&debs)?.next().context("apt-get downloaded nothing")??.path();
    stdout_of(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;
    let release = package.trim_start_matches("linux-image-");
    fs::copy(tree.join("boot").join(format!("vmlinuz-{release}")), done.join("vmlinuz"))?;
    let drivers = tree.join("lib/modules").join(release).join("kernel/drivers");
    for (module, name) in modules() {
        let file = drivers.join(module);
        if file.exists() {
            fs::copy(file, done.join(name))?;
        }
    }
    fs::write(done.join("modules"), MODULES.join("\n"))?;
    fs::rename(&done, folder)?; // whole or not at all
    Ok(())
}

/// Packs busybox, the guest agent with its libraries, the modules and the init.
fn build_initrd(folder: &Path, initrd: &Path) -> Result<()> {
    let temp = tempfile::tempdir_in(folder)?;
    let root = temp.path().join("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::create_dir(root.join("modules"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox-static is not installed")?;
    symlink("busybox", root.join("bin/sh"))?;
    for (_, name) in modules() {
        let file = folder.join(&name);
        if file.exists() {
            fs::copy(file, root.join("modules").join(name))?;
        }
    }
    let needed = stdout_of(Command::new("ldd").arg(AGENT)).context("qemu-guest-agent is not installed")?;
    let libraries = needed.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain([AGENT]) {
        let to = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a file in a folder")?)?;
        fs::copy(file, to)?;
    }
    fs::write(root.join("init"), INIT)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let packed = temp.path().join("initrd");
    let script = "find . | cpio --quiet -o -H newc -R 0:0 >\"$1\"";
    stdout_of(Command::new("sh").args(["-c", script, "pack"]).arg(&packed).current_dir(&root))?;
    fs::rename(&packed, initrd)?;
    Ok(())
}
