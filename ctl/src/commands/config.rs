//! The command that needs no daemon: `check-config`.

use std::fs;
use std::path::Path;

use agentd_core::config::Config;
use agentd_core::error::{Code, Problem};
use serde_json::json;

use crate::error::Failure;
use crate::render::text::clean;
use crate::render::{Report, Screen};

/// What a file that can't be used makes of the exit code.
const INVALID_EXIT: u8 = 2;

/// Checks a config file. Who may write it is the daemon's question: it knows its own uid.
pub(super) fn check(screen: &Screen, file: &Path) -> Result<Report, Failure> {
    let name = file.display().to_string();
    let text = read(file).map_err(|why| {
        Problem::new(Code::InvalidRequest, format!("{name}: {why}")).hint("name the file: ctl check-config FILE")
    })?;
    let faults = match Config::parse(&name, &text) {
        Ok(_) => Vec::new(),
        Err(faults) => faults,
    };
    let told: Vec<_> = faults
        .iter()
        .map(|fault| json!({"line": fault.line, "column": fault.column, "key": fault.key, "message": fault.message}))
        .collect();
    let document = json!({"file": name, "ok": faults.is_empty(), "faults": told}).to_string();
    if faults.is_empty() {
        return Ok(screen.success(&document, format!("{}: ok\n", clean(&name)), String::new()));
    }
    let failed = Screen { quiet: false, ..*screen };
    let lines: String = faults.iter().map(|fault| format!("error: {}\n", clean(&fault.to_string()))).collect();
    Ok(Report { exit: INVALID_EXIT, ..failed.success(&document, String::new(), lines) })
}

/// Reads a regular file; a pipe or a device would wait for ever or never end.
fn read(file: &Path) -> Result<String, String> {
    let kind = fs::metadata(file).map_err(|error| error.to_string())?.file_type();
    if !kind.is_file() {
        return Err("is not a regular file".into());
    }
    fs::read_to_string(file).map_err(|error| error.to_string())
}
