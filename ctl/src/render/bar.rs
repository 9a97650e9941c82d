//! The host as a bar: what is in use, what is promised beyond that, and what can still be promised, with the numbers. Pieces
//! of text that say which part they are of, so that `ctl capacity` and `ctl top` draw the same. Knows no terminal; what a part
//! means is told by its sign, a colour only repeats it.

use agentd_core::api::{CapacityOf, HostUse};
use agentd_core::units::{ByteCount, Cpus};
use clap::builder::styling::{AnsiColor, Style};

/// With less room than this there is no bar.
const SHORTEST: usize = 8;
/// With less room than this the numbers are told without words.
const COMFORTABLE: usize = 12;

/// The signs that are drawn with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Glyphs {
    used: char,
    committed: char,
    free: char,
    /// Where the promised ends, below what is in use.
    mark: char,
    /// From nothing to all of it; what is unknown is a blank.
    pub(crate) spark: [char; 8],
    /// What was cut off.
    pub(crate) more: char,
}

/// For a terminal that has them.
pub(crate) static UNICODE: Glyphs = Glyphs {
    used: '█',
    committed: '▒',
    free: '·',
    mark: '│',
    spark: ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'],
    more: '…',
};

/// For one that has ASCII only.
pub(crate) static ASCII: Glyphs = Glyphs {
    used: '#',
    committed: '=',
    free: '.',
    mark: '|',
    spark: ['.', ':', '-', '=', '+', '*', '%', '#'],
    more: '~',
};

impl Glyphs {
    /// Those of the present locale: locale(7) has the order of the variables.
    pub(crate) fn of_locale() -> &'static Glyphs {
        Self::of(|name| std::env::var(name).ok())
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> &'static Glyphs {
        let named =
            ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(|name| variable(name).filter(|v| !v.is_empty()));
        let name = named.unwrap_or_default().to_ascii_lowercase();
        if name.contains("utf-8") || name.contains("utf8") { &UNICODE } else { &ASCII }
    }
}

/// A part of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// In use, by whatever runs on the host.
    Used,
    /// Promised to instances and not in use.
    Committed,
    /// What can still be promised.
    Free,
    /// More is promised than allowed.
    Over,
}

impl Part {
    /// Its colour, on a terminal that has some.
    pub(crate) const fn color(self) -> Option<AnsiColor> {
        match self {
            Part::Used => Some(AnsiColor::Green),
            Part::Committed => Some(AnsiColor::Cyan),
            Part::Free => None,
            Part::Over => Some(AnsiColor::Red),
        }
    }
}

/// A text, and which part it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) part: Option<Part>,
    pub(crate) text: String,
}

fn piece(part: impl Into<Option<Part>>, text: impl Into<String>) -> Piece {
    Piece { part: part.into(), text: text.into() }
}

/// One resource of the host, in the unit that it is told in.
#[derive(Debug, Clone)]
pub(crate) struct Gauge {
    name: &'static str,
    unit: &'static str,
    used: Option<f64>,
    committed: f64,
    free: f64,
    allowed: f64,
    over: bool,
    tell: fn(f64) -> String,
}

/// CPUs and memory of the host.
pub(crate) fn gauges(cpus: &CapacityOf<Cpus>, memory: &CapacityOf<ByteCount>, used: &HostUse) -> [Gauge; 2] {
    [Gauge::cpus(cpus, used.cpus), Gauge::memory(memory, used.memory)]
}

impl Gauge {
    #[allow(clippy::cast_precision_loss, reason = "thousandths of a CPU, for people")]
    fn cpus(of: &CapacityOf<Cpus>, used: Option<f64>) -> Self {
        let number = |cpus: Cpus| cpus.millis() as f64 / 1000.0;
        let (committed, free, allowed) = (number(of.committed), number(of.free), number(of.allowed));
        Gauge { name: "CPU", unit: "CPUs", used, committed, free, allowed, over: of.over, tell: hundredths }
    }

    #[allow(clippy::cast_precision_loss, reason = "a tenth of a GiB is all that is told")]
    fn memory(of: &CapacityOf<ByteCount>, used: Option<ByteCount>) -> Self {
        // A small host's in MiB, so that a tenth of a GiB hides nothing.
        let small = of.allowed.max(of.committed) < ByteCount::gib(4);
        let (unit, size): (_, u64) = if small { ("MiB", 1 << 20) } else { ("GiB", 1 << 30) };
        let number = |bytes: ByteCount| bytes.bytes() as f64 / size as f64;
        Gauge {
            name: "MEM",
            unit,
            used: used.map(number),
            committed: number(of.committed),
            free: number(of.free),
            allowed: number(of.allowed),
            over: of.over,
            tell: if small { |value| format!("{value:.0}") } else { |value| format!("{value:.1}") },
        }
    }

    /// `█ 1.2 used  ▒ 6 committed  · 2 free of 8 CPUs`, or without the words.
    fn numbers(&self, words: bool, glyphs: &Glyphs) -> Vec<Piece> {
        let word = |word: &str| if words { format!(" {word}") } else { String::new() };
        let used = self.used.map_or_else(|| "-".into(), self.tell);
        let mut pieces = vec![
            piece(Part::Used, glyphs.used),
            piece(None, format!(" {used}{}  ", word("used"))),
            piece(Part::Committed, glyphs.committed),
            piece(None, format!(" {}{}  ", (self.tell)(self.committed), word("committed"))),
            piece(Part::Free, glyphs.free),
        ];
        let (free, of, allowed) = ((self.tell)(self.free), if words { " of " } else { "/" }, (self.tell)(self.allowed));
        pieces.push(piece(None, format!(" {free}{}{of}{allowed} {}", word("free"), self.unit)));
        if self.over {
            pieces.push(piece(Part::Over, " OVER"));
        }
        pieces
    }

    fn bar(&self, width: usize, glyphs: &Glyphs) -> Vec<Piece> {
        let most = self.allowed.max(self.committed).max(self.used.unwrap_or(0.0));
        let (used, committed) = (cells(self.used.unwrap_or(0.0), most, width), cells(self.committed, most, width));
        let mut pieces: Vec<Piece> = Vec::new();
        for cell in 0..width {
            let (part, glyph) = match cell {
                _ if cell < used && cell + 1 == committed && committed < used => (Part::Committed, glyphs.mark),
                _ if cell < used => (Part::Used, glyphs.used),
                _ if cell < committed => (Part::Committed, glyphs.committed),
                _ => (Part::Free, glyphs.free),
            };
            match pieces.last_mut() {
                Some(last) if last.part == Some(part) => last.text.push(glyph),
                _ => pieces.push(piece(part, glyph)),
            }
        }
        pieces
    }
}

/// How many cells of `width` a value takes: what is there is seen, however little.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "0 to width")]
fn cells(value: f64, most: f64, width: usize) -> usize {
    // Also what is no number.
    if !(value > 0.0 && most > 0.0) {
        return 0;
    }
    ((value / most * width as f64).round() as usize).clamp(1, width)
}

/// `0.05`, `12.5`, `128`: no more than four digits.
pub(crate) fn hundredths(value: f64) -> String {
    let text = match value {
        _ if value < 9.995 => format!("{value:.2}"),
        _ if value < 99.95 => format!("{value:.1}"),
        _ => return format!("{value:.0}"),
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn width(pieces: &[Piece]) -> usize {
    pieces.iter().map(|piece| piece.text.chars().count()).sum()
}

/// One line for each gauge, none longer than `room`, bars of one length.
pub(crate) fn lines(gauges: &[Gauge], room: usize, glyphs: &Glyphs) -> Vec<Vec<Piece>> {
    let told = |words| gauges.iter().map(|gauge| gauge.numbers(words, glyphs)).collect::<Vec<_>>();
    // The name, a blank on each side of the bar.
    let left = |numbers: &[Vec<Piece>]| room.saturating_sub(5 + numbers.iter().map(|n| width(n)).max().unwrap_or(0));
    let mut numbers = told(true);
    if left(&numbers) < COMFORTABLE {
        numbers = told(false);
    }
    let length = Some(left(&numbers)).filter(|length| *length >= SHORTEST);
    let line = |(gauge, numbers): (&Gauge, Vec<Piece>)| {
        let mut line = vec![piece(None, format!("{} ", gauge.name))];
        if let Some(length) = length {
            line.extend(gauge.bar(length, glyphs));
            line.push(piece(None, " "));
        }
        line.extend(numbers);
        line
    };
    gauges.iter().zip(numbers).map(line).collect()
}

/// Lines as text with colours, which are taken off where there are to be none.
pub(crate) fn text(lines: &[Vec<Piece>]) -> String {
    let mut out = String::new();
    for line in lines {
        for Piece { part, text } in line {
            let style = part.and_then(Part::color).map_or_else(Style::new, AnsiColor::on_default);
            out += &format!("{style}{text}{style:#}");
        }
        out.push('\n');
    }
    out
}

/// One line for each gauge in words, for what is no terminal.
pub(crate) fn plain(gauges: &[Gauge]) -> String {
    let line = |gauge: &Gauge| {
        let used = gauge.used.map_or_else(|| "-".into(), gauge.tell);
        let [committed, free, allowed] = [gauge.committed, gauge.free, gauge.allowed].map(gauge.tell);
        let over = if gauge.over { ", OVER" } else { "" };
        format!("{} {used} used, {committed} committed, {free} free of {allowed} {}{over}\n", gauge.name, gauge.unit)
    };
    gauges.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(committed: f64, used: Option<f64>) -> Gauge {
        let (free, over) = ((60.0 - committed).max(0.0), committed > 60.0);
        Gauge { name: "CPU", unit: "CPUs", used, committed, free, allowed: 60.0, over, tell: hundredths }
    }

    fn drawn(gauge: &Gauge, room: usize, glyphs: &Glyphs) -> String {
        let lines = lines(std::slice::from_ref(gauge), room, glyphs);
        lines[0].iter().map(|piece| piece.text.as_str()).collect()
    }

    #[test]
    fn the_parts_are_as_long_as_they_are_large() {
        assert_eq!(
            drawn(&of(30.0, Some(15.0)), 72, &UNICODE),
            "CPU █████▒▒▒▒▒·········· █ 15 used  ▒ 30 committed  · 30 free of 60 CPUs"
        );
        assert_eq!(
            drawn(&of(30.0, Some(15.0)), 72, &ASCII),
            "CPU #####=====.......... # 15 used  = 30 committed  . 30 free of 60 CPUs"
        );
    }

    #[test]
    fn where_more_is_in_use_than_promised_a_mark_shows_how_much_is_promised() {
        assert!(drawn(&of(15.0, Some(30.0)), 72, &ASCII).starts_with("CPU ####|#####.........."));
    }

    #[test]
    fn what_is_little_is_seen_and_what_is_unknown_is_not_0() {
        assert!(drawn(&of(0.5, Some(0.01)), 75, &ASCII).starts_with("CPU #..."));
        let unknown = drawn(&of(30.0, None), 72, &ASCII);
        assert!(unknown.contains("# - used") && unknown.starts_with("CPU ====="), "{unknown}");
        assert!(plain(&[of(30.0, None)]).contains(" - used, 30 committed"));
        assert!(drawn(&of(30.0, Some(f64::NAN)), 72, &ASCII).starts_with("CPU ==="));
    }

    #[test]
    fn more_than_is_allowed_fills_the_bar_and_is_said() {
        let over = drawn(&of(120.0, Some(60.0)), 80, &ASCII);
        assert!(over.contains("#=") && !over[..24].contains('.') && over.ends_with("0 free of 60 CPUs OVER"), "{over}");
    }

    #[test]
    fn no_line_is_longer_than_its_room_and_short_ones_drop_words_then_the_bar() {
        let gauges = [of(54.25, Some(27.35)), Gauge { name: "MEM", unit: "GiB", ..of(200.0, Some(101.2)) }];
        for room in 40..200 {
            for line in lines(&gauges, room, &UNICODE) {
                assert!(width(&line) <= room, "{room}: {line:?}");
            }
        }
        let short = drawn(&of(54.0, Some(27.3)), 46, &ASCII);
        assert_eq!(short, "CPU #######=======.. # 27.3  = 54  . 6/60 CPUs");
    }

    #[test]
    fn the_locale_says_which_signs_there_are() {
        let of = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> = set.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect();
            Glyphs::of(|name| set.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()))
        };
        assert_eq!(of(&[("LANG", "de_DE.UTF-8")]), &UNICODE);
        assert_eq!(of(&[("LANG", "de_DE.UTF-8"), ("LC_ALL", "C")]), &ASCII);
        assert_eq!(of(&[("LC_ALL", ""), ("LC_CTYPE", "C.utf8")]), &UNICODE);
        assert_eq!(of(&[]), &ASCII);
    }

    #[test]
    fn a_number_has_four_digits_at_most() {
        for (value, text) in
            [(0.0, "0"), (0.05, "0.05"), (0.5, "0.5"), (9.999, "10"), (12.34, "12.3"), (99.97, "100"), (128.0, "128")]
        {
            assert_eq!(hundredths(value), text);
        }
    }
}
