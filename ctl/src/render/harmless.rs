//! Bytes of unknown origin for a terminal: what it might obey is written out, but for line ends, tabs and colours. They come
//! in pieces, cut anywhere. Knows not where they come from.

use super::text::is_dangerous;

/// The start of a control sequence that may become a colour.
const ESCAPE: char = '\u{1b}';
/// The longest that a colour is.
const LONGEST: usize = 32;

/// One stream of bytes on its way to a terminal.
#[derive(Debug, Default)]
pub(crate) struct Harmless {
    /// The beginning of a character whose end has not come yet.
    bytes: Vec<u8>,
    /// What may become a colour or a line's end with the next character.
    open: String,
    /// Whether colours pass.
    colours: bool,
    /// Whether a colour has passed and may still be on.
    coloured: bool,
}

impl Harmless {
    pub(crate) fn new(colours: bool) -> Self {
        Harmless { colours, ..Harmless::default() }
    }

    /// What of this can be shown by now.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> String {
        self.bytes.extend_from_slice(bytes);
        let mut out = String::with_capacity(bytes.len());
        let all = std::mem::take(&mut self.bytes);
        for chunk in all.utf8_chunks() {
            chunk.valid().chars().for_each(|c| self.character(c, &mut out));
            match chunk.invalid() {
                [] => {}
                // Only the end of all can be a character that goes on.
                cut if is_begun(cut) && std::ptr::eq(cut.as_ptr_range().end, all.as_ptr_range().end) => {
                    self.bytes = cut.to_vec();
                }
                _ => self.character(char::REPLACEMENT_CHARACTER, &mut out),
            }
        }
        out
    }

    /// What is left at the end, and the end of every colour.
    pub(crate) fn end(&mut self) -> String {
        let mut out = String::new();
        if !std::mem::take(&mut self.bytes).is_empty() {
            self.character(char::REPLACEMENT_CHARACTER, &mut out);
        }
        self.write_out(&mut out);
        if std::mem::take(&mut self.coloured) {
            out.push_str("\u{1b}[0m");
        }
        out
    }

    fn character(&mut self, c: char, out: &mut String) {
        let colour = self.open.starts_with(ESCAPE);
        match c {
            // A terminal's line end; by itself it would go back and write over what is there.
            '\n' if self.open == "\r" => {
                self.open.clear();
                out.push_str("\r\n");
            }
            '[' if self.open.len() == 1 && colour => self.open.push(c),
            // ECMA-48, SGR: numbers between `ESC [` and `m`.
            '0'..='9' | ';' | ':' if colour && self.open.len() >= 2 && self.open.len() < LONGEST => self.open.push(c),
            'm' if colour && self.open.len() >= 2 => {
                self.open.push(c);
                let colour = std::mem::take(&mut self.open);
                if self.colours {
                    self.coloured = true;
                    out.push_str(&colour);
                }
            }
            _ => {
                self.write_out(out);
                match c {
                    ESCAPE | '\r' => self.open.push(c),
                    '\n' | '\t' => out.push(c),
                    c if is_dangerous(c) => out.extend(c.escape_default()),
                    c => out.push(c),
                }
            }
        }
    }

    /// What was begun and became nothing.
    fn write_out(&mut self, out: &mut String) {
        for c in std::mem::take(&mut self.open).chars() {
            if is_dangerous(c) { out.extend(c.escape_default()) } else { out.push(c) }
        }
    }
}

/// Whether this is the beginning of a character and not just wrong.
fn is_begun(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pieces: &[&[u8]]) -> String {
        let mut harmless = Harmless::new(true);
        let mut out: String = pieces.iter().map(|piece| harmless.take(piece)).collect();
        out += &harmless.end();
        out
    }

    #[test]
    fn text_lines_tabs_and_colours_pass() {
        let text = "a\tb\r\nc é\n\u{1b}[1;31mred\u{1b}[0m \u{1b}[38:5:9mx\u{1b}[m\n";
        assert_eq!(shown(&[text.as_bytes()]), format!("{text}\u{1b}[0m"));
        let mut plain = Harmless::new(false);
        assert_eq!(plain.take(text.as_bytes()) + &plain.end(), "a\tb\r\nc é\nred x\n");
    }

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        for (text, expected) in [
            ("\u{1b}[2Jx", "\\u{1b}[2Jx"),
            ("\u{1b}]0;title\u{7}x", "\\u{1b}]0;title\\u{7}x"),
            ("\u{1b}[?1049h", "\\u{1b}[?1049h"),
            ("\u{1b}[6n", "\\u{1b}[6n"),
            ("\u{1b}\u{1b}[31mx", "\\u{1b}\u{1b}[31mx\u{1b}[0m"),
            ("\u{1b}c", "\\u{1b}c"),
            ("over\rwritten", "over\\rwritten"),
            ("a\r\r\nb\r", "a\\r\r\nb\\r"),
            ("\u{9b}31m\u{202e}\u{8}", "\\u{9b}31m\\u{202e}\\u{8}"),
            ("cut\u{1b}[3", "cut\\u{1b}[3"),
        ] {
            assert_eq!(shown(&[text.as_bytes()]), expected, "{text:?}");
        }
        let long = format!("\u{1b}[{}m", "1;".repeat(40));
        assert!(shown(&[long.as_bytes()]).starts_with("\\u{1b}[1;1"));
    }

    #[test]
    fn where_it_is_cut_makes_no_difference() {
        let text = "é\u{1f600}\u{1b}[1;32mgreen\u{1b}[0m\r\nover\rx\u{1b}[2J".as_bytes();
        let whole = shown(&[text]);
        for at in 0..text.len() {
            assert_eq!(shown(&[&text[..at], &text[at..]]), whole, "{at}");
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(shown(&bytes), whole);
    }

    #[test]
    fn what_is_no_text_is_replaced() {
        assert_eq!(shown(&[b"a\xff\xfeb", b"\xe2\x82"]), "a\u{fffd}\u{fffd}b\u{fffd}");
        assert_eq!(shown(&[b"\xe2", b"x"]), "\u{fffd}x");
    }
}
