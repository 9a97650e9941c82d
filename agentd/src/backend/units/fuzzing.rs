//! Any text as a file of a unit, and as words on the bus.

use super::{bus, files, view};

/// Unit files, drop-ins, object paths and names.
pub fn unit_files(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for (section, host) in [("Service", Some(8 << 30)), ("Slice", None)] {
        files::read_text(section, text, host);
    }
    if let Some(unit) = bus::unit_of(text) {
        assert!(!unit.is_empty() || text.ends_with('/'), "{text:?} is the path of no unit");
    }
    view::parent_slice(text);
    super::within(text, "machine.slice");
}
