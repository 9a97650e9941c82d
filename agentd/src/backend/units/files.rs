//! What unit files and their drop-ins say, as far as it concerns limits: what a unit has after the host's next boot.
//! systemd itself only tells what it has now. Pure but for [`read`].
//!
//! Source of the rules: systemd.unit(5), systemd.syntax(7), systemd.resource-control(5).

use std::path::Path;

use super::view::INFINITY;

/// Files below here are gone after the next boot.
const VOLATILE: &str = "/run/";
/// A unit file is small; one that isn't is none.
const LONGEST: u64 = 1024 * 1024;

/// What is saved of a unit, in systemd's numbers; `None` where a file can't be read or understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Saved {
    /// Microseconds of CPU a second.
    pub(super) cpu_quota: Option<u64>,
    /// Bytes.
    pub(super) memory_max: Option<u64>,
}

/// Reads what `fragment` and `drop_ins` say in this section (`Service`, `Slice`, `Scope`).
pub(super) fn read(section: &str, fragment: &str, drop_ins: &[String], host_memory: Option<u64>) -> Saved {
    let texts = in_order(fragment, drop_ins).into_iter().map(text);
    let mut settings =
        Settings { section, host_memory, saved: Saved { cpu_quota: Some(INFINITY), memory_max: Some(INFINITY) } };
    for text in texts {
        match text {
            Some(text) => settings.apply(&text),
            None => return Saved { cpu_quota: None, memory_max: None },
        }
    }
    settings.saved
}

/// The files that outlive a boot, in the order in which systemd reads them: the fragment, then the drop-ins by their names.
fn in_order<'a>(fragment: &'a str, drop_ins: &'a [String]) -> Vec<&'a str> {
    let mut drop_ins: Vec<&str> = drop_ins.iter().map(String::as_str).filter(|path| lasts(path)).collect();
    let name = |path: &str| path.rsplit_once('/').map_or(path, |(_, name)| name).to_owned();
    drop_ins.sort_by_key(|path| name(path));
    let fragment = Some(fragment).filter(|path| !path.is_empty() && lasts(path));
    fragment.into_iter().chain(drop_ins).collect()
}

/// What one file says by itself.
#[cfg(feature = "fake")]
pub(super) fn read_text(section: &str, text: &str, host_memory: Option<u64>) -> Saved {
    let mut settings = Settings { section, host_memory, saved: Saved { cpu_quota: None, memory_max: None } };
    settings.apply(text);
    settings.saved
}

fn lasts(path: &str) -> bool {
    !path.starts_with(VOLATILE)
}

fn text(path: &str) -> Option<String> {
    let path = Path::new(path);
    let length = std::fs::metadata(path).ok()?.len();
    if length > LONGEST {
        return None;
    }
    std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

struct Settings<'a> {
    section: &'a str,
    host_memory: Option<u64>,
    saved: Saved,
}

impl Settings<'_> {
    fn apply(&mut self, text: &str) {
        let mut ours = false;
        for line in logical_lines(text) {
            let line = line.trim();
            if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                ours = section == self.section;
                continue;
            }
            let Some((key, value)) = line.split_once('=').filter(|_| ours) else { continue };
            match key.trim_end() {
                "CPUQuota" => self.saved.cpu_quota = cpu_quota(value.trim()),
                "MemoryMax" => self.saved.memory_max = memory(value.trim(), self.host_memory),
                _ => {}
            }
        }
    }
}

/// Lines without comments, those that end with a backslash joined with the next.
fn logical_lines(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in text.lines() {
        if line.trim_start().starts_with(['#', ';']) {
            continue;
        }
        let (part, more) = match line.strip_suffix('\\') {
            Some(part) => (part, true),
            None => (line, false),
        };
        match lines.last_mut().filter(|_| goes_on) {
            Some(last) => {
                last.push(' ');
                last.push_str(part);
            }
            None => lines.push(part.to_owned()),
        }
        goes_on = more;
    }
    lines
}

/// `30%`, `150.5%`; empty for none.
fn cpu_quota(value: &str) -> Option<u64> {
    if value.is_empty() {
        return Some(INFINITY);
    }
    let hundredths = hundredths(value.strip_suffix('%')?)?;
    // 1 % of a CPU is 10 000 µs a second.
    hundredths.checked_mul(100).filter(|quota| *quota > 0)
}

/// Bytes with a suffix of 1024, a share of the host's memory, `infinity`; empty for none.
fn memory(value: &str, host: Option<u64>) -> Option<u64> {
    if matches!(value, "" | "infinity") {
        return Some(INFINITY);
    }
    if let Some(percent) = value.strip_suffix('%') {
        let share = u128::from(host?) * u128::from(hundredths(percent)?) / 10_000;
        return u64::try_from(share).ok().map(|bytes| bytes / 4096 * 4096);
    }
    const SUFFIXES: [(char, u32); 7] = [('B', 0), ('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];
    let (number, shift) = SUFFIXES
        .iter()
        .find_map(|(suffix, shift)| value.strip_suffix(*suffix).map(|number| (number.trim_end(), *shift)))
        .unwrap_or((value, 0));
    let number: u64 = number.parse().ok()?;
    number.checked_shl(shift).filter(|bytes| bytes >> shift == number)
}

/// A decimal number of two places at most, in hundredths.
fn hundredths(text: &str) -> Option<u64> {
    let (whole, places) = text.trim_end().split_once('.').unwrap_or((text.trim_end(), ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || places.len() > 2 || !digits(whole) || !digits(places) {
        return None;
    }
    let places: u64 = format!("{places:0<2}").parse().ok()?;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(files: &[(&str, &str)], section: &str) -> Saved {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            paths.push(path.to_string_lossy().into_owned());
        }
        read(section, &paths[0], &paths[1..], Some(1 << 30))
    }

    #[test]
    fn the_last_assignment_by_name_of_the_file_holds_and_only_in_the_units_own_section() {
        let unit = "[Unit]\nCPUQuota=1%\n[Service]\nExecStart=/bin/x \\\n  CPUQuota=2%\n# CPUQuota=3%\nCPUQuota=30%\nMemoryMax=64M\n";
        assert_eq!(
            saved(&[("a.service", unit)], "Service"),
            Saved { cpu_quota: Some(300_000), memory_max: Some(64 << 20) }
        );
        assert_eq!(saved(&[("a.slice", unit)], "Slice").cpu_quota, Some(INFINITY));
        let files = [
            ("a.service", unit),
            ("z/10-a.conf", "[Service]\nCPUQuota=50%\nMemoryMax=infinity"),
            ("a/90-b.conf", "[Service]\n CPUQuota = 75.5% \n[service]\nCPUQuota=1%\n"),
            ("b/50-c.conf", "[Service]\nCPUQuota=\n"),
        ];
        assert_eq!(saved(&files, "Service"), Saved { cpu_quota: Some(755_000), memory_max: Some(INFINITY) });
    }

    #[test]
    fn what_a_boot_takes_away_is_not_saved_and_what_cant_be_read_is_unknown() {
        let run = ["/run/systemd/system.control/a.service.d/50-CPUQuota.conf".to_owned()];
        assert_eq!(read("Service", "", &run, None), Saved { cpu_quota: Some(INFINITY), memory_max: Some(INFINITY) });
        assert_eq!(read("Service", "/nowhere/a.service", &[], None), Saved { cpu_quota: None, memory_max: None });
    }

    #[test]
    fn values_are_read_as_systemd_reads_them() {
        for (text, quota) in [("20%", Some(200_000)), ("133.33%", Some(1_333_300)), ("", Some(INFINITY)), ("0%", None)]
        {
            assert_eq!(cpu_quota(text), quota, "{text}");
        }
        for odd in ["20", "-1%", "1.234%", "%", "x%"] {
            assert_eq!(cpu_quota(odd), None, "{odd}");
        }
        let host = Some(1000 * 4096);
        for (text, bytes) in [
            ("infinity", Some(INFINITY)),
            ("", Some(INFINITY)),
            ("1024", Some(1024)),
            ("2K", Some(2048)),
            ("1G", Some(1 << 30)),
            ("50%", Some(500 * 4096)),
            ("99999999999E", None),
            ("x", None),
        ] {
            assert_eq!(memory(text, host), bytes, "{text}");
        }
        assert_eq!(memory("50%", None), None);
    }
}
