//! The command that needs no daemon: `check-config`.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use agentd_core::config::Config;
use agentd_core::error::{Code, Problem};
use serde_json::json;

use crate::error::Failure;
use crate::render::text::clean;
use crate::render::{Report, Screen};

/// What a file that can't be used makes of the exit code.
const INVALID_EXIT: u8 = 2;

/// Checks a config file. Whether its users and groups are there and its reserves fit the host is `agentd --check`'s question;
/// ctl may be on another machine.
pub(super) fn check(screen: &Screen, file: &Path) -> Result<Report, Failure> {
    let name = file.display().to_string();
    let text = read(file).map_err(|why| {
        Problem::new(Code::InvalidRequest, format!("{name}: {why}")).hint("name the file: ctl check-config FILE")
    })?;
    let mut warnings: Vec<String> = untrusted(file).into_iter().collect();
    let faults = match Config::parse(&name, &text) {
        Ok(config) => {
            warnings.extend(config.warnings());
            Vec::new()
        }
        Err(faults) => faults,
    };
    let told: Vec<_> = faults
        .iter()
        .map(|fault| json!({"line": fault.line, "column": fault.column, "key": fault.key, "message": fault.message}))
        .collect();
    let document = json!({"file": name, "ok": faults.is_empty(), "faults": told, "warnings": warnings}).to_string();
    let warned: String = warnings.iter().map(|warning| format!("warning: {}\n", clean(warning))).collect();
    if faults.is_empty() {
        return Ok(screen.success(&document, format!("{}: ok\n", clean(&name)), warned));
    }
    let failed = Screen { quiet: false, ..*screen };
    let lines = faults.iter().map(|fault| format!("error: {}\n", clean(&fault.to_string())));
    let lines: String = lines.chain([warned]).collect();
    Ok(Report { exit: INVALID_EXIT, ..failed.success(&document, String::new(), lines) })
}

/// Why agentd, run by root, would not take the file as it is.
fn untrusted(file: &Path) -> Option<String> {
    let metadata = fs::metadata(file).ok()?;
    let mode = metadata.mode() & 0o7777;
    if metadata.uid() != 0 {
        return Some(format!("it belongs to uid {}: agentd takes it once it belongs to root", metadata.uid()));
    }
    let writable = mode & 0o022 != 0;
    writable.then(|| format!("it is writable by others (mode {mode:04o}): agentd takes it after chmod go-w"))
}

/// Reads a regular file; a pipe or a device would wait for ever or never end.
fn read(file: &Path) -> Result<String, String> {
    let kind = fs::metadata(file).map_err(|error| error.to_string())?.file_type();
    if !kind.is_file() {
        return Err("is not a regular file".into());
    }
    fs::read_to_string(file).map_err(|error| error.to_string())
}
