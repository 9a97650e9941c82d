//! A screen of a terminal, as `tmux capture-pane -e` tells it, as an SVG: text on a dark ground, blocks as rectangles, so that no
//! font puts gaps between them. Knows the escape sequences that a screen is told with, colours and the like (SGR), and no other.

use std::fmt::Write as _;

/// A cell of the terminal, in pixels.
const CELL: (f64, f64) = (8.4, 18.0);
/// Around the screen, in pixels.
const MARGIN: f64 = 14.0;
const GROUND: &str = "#16181d";
const TEXT: &str = "#d6d9e0";
/// The eight colours of a terminal.
const COLORS: [&str; 8] = ["#16181d", "#e06c75", "#8fbf6f", "#e0b861", "#6ea8e8", "#c08be0", "#56b6c2", "#d6d9e0"];

/// How a run of characters looks.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Pen {
    color: Option<usize>,
    bold: bool,
    dim: bool,
    reversed: bool,
}

impl Pen {
    /// What one SGR sequence makes of it (ECMA-48, and 38;5;n for colours).
    fn obey(&mut self, codes: &str) {
        let mut codes = codes.split([';', ':']).map(|code| code.parse::<usize>().unwrap_or(0));
        while let Some(code) = codes.next() {
            match code {
                0 => *self = Pen::default(),
                1 => self.bold = true,
                2 => self.dim = true,
                7 => self.reversed = true,
                22 => (self.bold, self.dim) = (false, false),
                27 => self.reversed = false,
                30..=37 => self.color = Some(code - 30),
                38 => self.color = codes.nth(1).map(|color| color % 8),
                39 => self.color = None,
                _ => {}
            }
        }
    }

    fn ink(self) -> &'static str {
        if self.reversed { GROUND } else { self.color.and_then(|color| COLORS.get(color).copied()).unwrap_or(TEXT) }
    }
}

/// The picture of a screen of so many columns.
pub fn picture(screen: &str, columns: usize) -> String {
    let lines: Vec<&str> = screen.trim_end_matches('\n').split('\n').collect();
    let (width, height) = (x(columns) + MARGIN, y(lines.len()) + MARGIN);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.1} {height:.1}\" width=\"{width:.1}\" \
         font-family=\"ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"14\" shape-rendering=\"crispEdges\">\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{GROUND}\"/>\n"
    );
    let mut pen = Pen::default();
    for (row, line) in lines.iter().enumerate() {
        let mut column = 0;
        for (number, part) in line.split("\u{1b}[").enumerate() {
            let text = match part.split_once('m') {
                Some((codes, rest)) if number > 0 => {
                    pen.obey(codes);
                    rest
                }
                _ => part,
            };
            run(&mut out, text, (column, row), pen);
            column += text.chars().count();
        }
        // tmux leaves blanks at the end of a line out, also where they are seen.
        if pen.reversed {
            run(&mut out, &" ".repeat(columns.saturating_sub(column)), (column, row), pen);
        }
    }
    out + "</svg>\n"
}

/// Characters of one look: text as text, blocks as what they show.
fn run(out: &mut String, text: &str, (column, row): (usize, usize), pen: Pen) {
    let length = text.chars().count();
    if pen.reversed && length > 0 {
        rect(out, (x(column), y(row)), (x(length) - MARGIN, CELL.1), TEXT, 1.0);
    }
    let mut words = String::new();
    for (place, character) in text.chars().enumerate() {
        let left = x(column + place);
        match character {
            // The lower n eighths of a cell, and a shade of it.
            '▁'..='█' => {
                let eighths = f64::from(u32::from(character) - u32::from('▁') + 1);
                let tall = CELL.1 * 0.86 * eighths / 8.0;
                rect(out, (left, y(row) + CELL.1 * 0.93 - tall), (CELL.0, tall), pen.ink(), 1.0);
            }
            '▒' => rect(out, (left, y(row) + CELL.1 * 0.07), (CELL.0, CELL.1 * 0.86), pen.ink(), 0.45),
            _ => {
                words.push(character);
                continue;
            }
        }
        words.push(' ');
    }
    // Each word at its own place: a font that is a little wider moves nothing else.
    let mut place = 0;
    for word in words.split(' ') {
        let length = word.chars().count();
        if length > 0 {
            let bold = if pen.bold { " font-weight=\"bold\"" } else { "" };
            let dim = if pen.dim { " opacity=\"0.6\"" } else { "" };
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{:.1}\" textLength=\"{:.1}\" lengthAdjust=\"spacingAndGlyphs\" fill=\"{}\"{bold}{dim}>{}</text>",
                x(column + place),
                y(row) + 13.5,
                x(length) - MARGIN,
                pen.ink(),
                word.replace('&', "&amp;").replace('<', "&lt;"),
            );
        }
        place += length + 1;
    }
}

fn rect(out: &mut String, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str, opacity: f64) {
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\" opacity=\"{opacity}\"/>"
    );
}

#[allow(clippy::cast_precision_loss, reason = "columns of a screen")]
fn x(column: usize) -> f64 {
    MARGIN + column as f64 * CELL.0
}

#[allow(clippy::cast_precision_loss, reason = "lines of a screen")]
fn y(row: usize) -> f64 {
    MARGIN + row as f64 * CELL.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colors_and_blocks_become_shapes_and_names_stay_data() {
        let svg = picture("\u{1b}[1ma<b&c\u{1b}[0m \u{1b}[38;5;2m█▁\u{1b}[39mx\n\u{1b}[7mREF\n", 10);
        assert!(svg.contains("font-weight=\"bold\">a&lt;b&amp;c</text>"), "{svg}");
        assert_eq!(svg.matches("fill=\"#8fbf6f\"").count(), 2, "two blocks, both green: {svg}");
        assert!(svg.contains(&format!("fill=\"{TEXT}\">x</text>")), "{svg}");
        assert!(svg.contains(&format!("fill=\"{GROUND}\">REF</text>")), "{svg}");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains('\u{1b}'), "{svg}");
    }
}
