//! libvirt's test driver: a node file with any number of running domains, no daemon and no hypervisor.
//! What it cannot do (scheduler parameters, balloon events, ACPI shutdown) needs the real engine.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

/// The XML of one running domain of the test driver; `name` needs no escaping.
pub fn test_domain(name: &str, vcpus: (u32, u32), memory_mib: (u32, u32)) -> String {
    let ((vcpus, max_vcpus), (current, max)) = (vcpus, memory_mib);
    format!(
        "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'><name>{name}</name>\
         <memory unit='MiB'>{max}</memory><currentMemory unit='MiB'>{current}</currentMemory>\
         <vcpu current='{vcpus}'>{max_vcpus}</vcpu><os><type>hvm</type></os>\
         <test:runstate>1</test:runstate><devices><memballoon model='virtio'/></devices></domain>\n"
    )
}

/// A node file; each connection to its [`uri`](Self::uri) gets a copy of its own.
pub struct TestNode {
    file: PathBuf,
}

impl TestNode {
    /// Writes a node with these domains (see [`test_domain`]) into `folder`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(folder: &Path, domains: &[String]) -> Result<Self> {
        let file = folder.join("node.xml");
        let mut xml =
            String::from("<node><cpu><mhz>2000</mhz><model>x86_64</model><active>64</active><nodes>1</nodes>");
        xml.push_str("<sockets>1</sockets><cores>64</cores><threads>1</threads></cpu><memory>1073741824</memory>\n");
        for domain in domains {
            let _ = write!(xml, "{domain}");
        }
        xml.push_str("</node>\n");
        fs::write(&file, xml)?;
        Ok(Self { file })
    }

    /// A node of `count` running domains called `vm-0`, `vm-1`, …, all of one size.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn uniform(folder: &Path, count: usize, vcpus: (u32, u32), memory_mib: (u32, u32)) -> Result<Self> {
        let domains: Vec<String> = (0..count).map(|i| test_domain(&format!("vm-{i}"), vcpus, memory_mib)).collect();
        Self::write(folder, &domains)
    }

    /// The connection URI.
    pub fn uri(&self) -> String {
        format!("test://{}", self.file.display())
    }
}
