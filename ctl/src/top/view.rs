//! Draws a [`Model`] into a buffer of cells: the host, the table, a line at the foot. Whatever the size, nothing is wrapped and
//! nothing is written over something else: columns that find no room are left out, the least important first. What a colour
//! says, a word or a sign says too. Knows no terminal.

use clap::builder::styling::AnsiColor;
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Span;

use super::model::{KEPT, Model, Row, Trail};
use crate::render::bar::{self, Glyphs};

/// Lines that are not the table's: title, CPU, memory and the table's header above it, one below.
const AROUND: u16 = 5;

/// What a terminal can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    pub(crate) glyphs: &'static Glyphs,
    pub(crate) colors: bool,
}

impl Look {
    fn style(self, color: Option<AnsiColor>) -> Style {
        let color = color.filter(|_| self.colors).and_then(|color| match color {
            AnsiColor::Green => Some(Color::Green),
            AnsiColor::Cyan => Some(Color::Cyan),
            AnsiColor::Red => Some(Color::Red),
            AnsiColor::Yellow => Some(Color::Yellow),
            AnsiColor::Blue => Some(Color::Blue),
            _ => None,
        });
        color.map_or_else(Style::new, |color| Style::new().fg(color))
    }

    /// A text as this terminal can show it. What is not ASCII is a question mark where there is nothing else: the terminal
    /// would make several characters of it.
    fn shown(self, text: &str) -> String {
        if *self.glyphs == bar::UNICODE {
            return text.to_owned();
        }
        text.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect()
    }
}

/// How many lines of the table a screen of this height has.
pub(super) fn page(height: u16) -> usize {
    usize::from(height.saturating_sub(AROUND))
}

/// A column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Ref,
    State,
    Cpu,
    CpuTrail,
    Memory,
    MemoryTrail,
    Throttled,
    Lag,
    Notes,
}

/// From left to right.
const ORDER: [Column; 9] = [
    Column::Ref,
    Column::State,
    Column::Cpu,
    Column::CpuTrail,
    Column::Memory,
    Column::MemoryTrail,
    Column::Throttled,
    Column::Lag,
    Column::Notes,
];

/// What gets its room first.
const PRIORITY: [Column; 9] = [
    Column::Ref,
    Column::Cpu,
    Column::Memory,
    Column::Notes,
    Column::State,
    Column::CpuTrail,
    Column::Throttled,
    Column::MemoryTrail,
    Column::Lag,
];

impl Column {
    /// Its header: the whole one where there is room.
    const fn titles(self) -> (&'static str, &'static str) {
        match self {
            Column::Ref => ("REF", "REF"),
            Column::State => ("STATE", "STATE"),
            Column::Cpu => ("CPU", "CPU/LIMIT"),
            Column::CpuTrail | Column::MemoryTrail => ("", ""),
            Column::Memory => ("MEM", "MEM/LIMIT"),
            Column::Throttled => ("THR", "THROTTLED"),
            Column::Lag => ("LAG", "BALLOON LAG"),
            Column::Notes => ("", ""),
        }
    }

    const fn to_the_right(self) -> bool {
        matches!(self, Column::Cpu | Column::Memory | Column::Throttled | Column::Lag)
    }

    const fn is_trail(self) -> bool {
        matches!(self, Column::CpuTrail | Column::MemoryTrail)
    }
}

/// One line of the table as text; trails apart.
struct Line<'a> {
    row: Row<'a>,
    notes: String,
}

/// What there is to say beyond the columns.
fn notes(row: &Row<'_>, model: &Model, lag: bool) -> String {
    let mut notes = row.notes(&model.at);
    notes.extend((lag && row.lags()).then(|| format!("lag {}", row.lag())));
    notes.join(", ")
}

impl Line<'_> {
    fn text(&self, column: Column) -> String {
        match column {
            Column::Ref => self.row.reference(),
            Column::State => self.row.state(),
            Column::Cpu => self.row.cpu(),
            Column::Memory => self.row.memory(),
            Column::Throttled => self.row.throttled(),
            Column::Lag => self.row.lag(),
            Column::Notes => self.notes.clone(),
            Column::CpuTrail | Column::MemoryTrail => String::new(),
        }
    }
}

/// Each column that is shown, and how wide it is.
fn layout(lines: &[Line<'_>], room: usize) -> Vec<(Column, usize)> {
    let content = |column| lines.iter().map(|line| cells(&line.text(column))).max().unwrap_or(0);
    let (reference, notes) = (content(Column::Ref), content(Column::Notes));
    let least = |column| match column {
        Column::Ref => reference.clamp(8, 20).min(room),
        Column::State => content(Column::State).clamp(5, 8),
        // Not by content: columns shall not move with every sample.
        Column::Cpu | Column::Memory => 9,
        Column::CpuTrail | Column::MemoryTrail => 5,
        Column::Throttled | Column::Lag => 4,
        // `until 14:05`
        Column::Notes => notes.clamp(4, 11),
    };
    let mut left = room;
    let mut widths: Vec<(Column, usize)> = Vec::new();
    for column in PRIORITY {
        let gap = usize::from(!widths.is_empty());
        if let Some(rest) = left.checked_sub(least(column) + gap) {
            left = rest;
            widths.push((column, least(column)));
        }
    }
    widths.sort_by_key(|(column, _)| ORDER.iter().position(|other| other == column));
    // What is left goes to what was cut, then to the headers, then to the past.
    let mut grow = |of: fn(Column) -> bool, to: &dyn Fn(Column) -> usize| {
        for (column, width) in widths.iter_mut().filter(|(column, _)| of(*column)) {
            let more = to(*column).saturating_sub(*width).min(left);
            *width += more;
            left -= more;
        }
    };
    grow(|column| column == Column::Notes, &|_| notes);
    grow(|column| column == Column::Ref, &|_| reference);
    grow(|column| !column.is_trail(), &|column| column.titles().1.len());
    let trails = widths.iter().filter(|(column, _)| column.is_trail()).count();
    let each = left.checked_div(trails).unwrap_or(0);
    for (_, width) in widths.iter_mut().filter(|(column, _)| column.is_trail()) {
        *width = (*width + each).min(KEPT);
    }
    widths
}

fn cells(text: &str) -> usize {
    Span::raw(text).width()
}

/// Draws all of it.
pub(super) fn draw(area: Rect, buffer: &mut Buffer, model: &Model, address: Option<&str>, look: Look) {
    let mut pen = Pen { buffer, area, look };
    let (rows, first, all) = model.visible();
    pen.title(model, address);
    let sample = model.sample();
    let gauges = bar::gauges(&sample.capacity.cpus, &sample.capacity.memory, &sample.host);
    for (line, y) in bar::lines(&gauges, usize::from(area.width), look.glyphs).into_iter().zip(1..) {
        let mut x = 0;
        for piece in line {
            x += pen.put(x, y, usize::MAX, &piece.text, look.style(piece.part.and_then(bar::Part::color)));
        }
    }
    let shown = rows.len();
    pen.table(rows, model);
    let y = area.height.saturating_sub(1);
    if y >= AROUND - 1 {
        pen.foot(y, model, (first, shown, all));
    }
}

struct Pen<'a> {
    buffer: &'a mut Buffer,
    area: Rect,
    look: Look,
}

impl Pen<'_> {
    /// Writes one piece of a line, cut with a sign to `width` cells and to the screen; gives the cells that it took.
    fn put(&mut self, x: usize, y: u16, width: usize, text: &str, style: Style) -> usize {
        let width = width.min(usize::from(self.area.width).saturating_sub(x));
        let (Ok(column), true) = (u16::try_from(x), y < self.area.height) else { return 0 };
        if width == 0 {
            return 0;
        }
        let (x, y) = (self.area.x + column, self.area.y + y);
        let whole = cells(text);
        if whole <= width {
            self.buffer.set_stringn(x, y, text, width, style);
            return whole;
        }
        let (end, _) = self.buffer.set_stringn(x, y, text, width - 1, style);
        // A character of two cells may have left one more.
        self.buffer.set_stringn(end, y, self.look.glyphs.more.to_string(), 1, style);
        width
    }

    fn title(&mut self, model: &Model, address: Option<&str>) {
        let time = model.at.strftime("%H:%M:%S").to_string();
        let instances = &model.sample().instances;
        let up = instances.iter().filter(|(instance, _)| instance.state.is_up()).count();
        let mut title = String::from("ctl top");
        if let Some(address) = address {
            title += &format!("  {address}");
        }
        title += &format!("  {up} of {} instances up, by {}", instances.len(), model.sort.as_str());
        if model.reverse {
            title += " (reverse)";
        }
        if let (filter, false) = model.filter()
            && !filter.is_empty()
        {
            title += &format!(", only {filter:?}");
        }
        let width = usize::from(self.area.width);
        let style = Style::new().add_modifier(Modifier::BOLD);
        let title = self.look.shown(&title);
        if width > time.len() + 30 {
            self.put(0, 0, width - time.len() - 1, &title, style);
            self.put(width - time.len(), 0, time.len(), &time, Style::new());
        } else {
            self.put(0, 0, width, &title, style);
        }
    }

    fn table(&mut self, rows: Vec<Row<'_>>, model: &Model) {
        // The lag of balloons is among the notes where its column finds no room. Two turns, since that depends on the notes.
        let room = usize::from(self.area.width);
        let mut lines: Vec<_> = rows.into_iter().map(|row| Line { notes: notes(&row, model, true), row }).collect();
        let mut widths = layout(&lines, room);
        if widths.iter().any(|(column, _)| *column == Column::Lag) {
            lines.iter_mut().for_each(|line| line.notes = notes(&line.row, model, false));
            widths = layout(&lines, room);
        }
        self.header(&widths);
        for (line, y) in lines.iter().zip(4..) {
            let base = if line.row.is_up() { Style::new() } else { Style::new().add_modifier(Modifier::DIM) };
            let mut x = 0;
            for (column, width) in &widths {
                match column {
                    Column::CpuTrail => self.spark(x, y, *width, line.row.cpu_trail(), AnsiColor::Green),
                    Column::MemoryTrail => self.spark(x, y, *width, line.row.memory_trail(), AnsiColor::Blue),
                    _ => self.cell(x, y, *width, *column, &line.text(*column), base),
                }
                x += width + 1;
            }
        }
    }

    fn header(&mut self, widths: &[(Column, usize)]) {
        let style = Style::new().add_modifier(Modifier::REVERSED);
        if self.area.height > 3 {
            self.buffer.set_style(Rect { y: self.area.y + 3, height: 1, ..self.area }, style);
        }
        let mut x = 0;
        for (column, width) in widths {
            let (short, long) = column.titles();
            self.cell(x, 3, *width, *column, if long.len() <= *width { long } else { short }, style);
            x += width + 1;
        }
    }

    fn cell(&mut self, x: usize, y: u16, width: usize, column: Column, text: &str, base: Style) {
        let text = self.look.shown(text);
        let indent = if column.to_the_right() { width.saturating_sub(cells(&text)) } else { 0 };
        let color = (column == Column::Notes && y > 3).then_some(AnsiColor::Yellow);
        self.put(x + indent, y, width - indent, &text, base.patch(self.look.style(color)));
    }

    /// The newest to the right.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "one of eight steps")]
    fn spark(&mut self, x: usize, y: u16, width: usize, (trail, top): (Option<&Trail>, f64), color: AnsiColor) {
        let Some(trail) = trail else { return };
        let steps = self.look.glyphs.spark;
        let glyph = |value: &Option<f64>| match value {
            Some(value) if top > 0.0 => {
                let step = (value / top).clamp(0.0, 1.0) * (steps.len() - 1) as f64;
                steps.get(step.round() as usize).copied().unwrap_or(' ')
            }
            Some(_) => steps[0],
            None => ' ',
        };
        let line: String = trail.iter().skip(trail.len().saturating_sub(width)).map(glyph).collect();
        let indent = width.saturating_sub(trail.len());
        self.put(x + indent, y, width - indent, &line, self.look.style(Some(color)));
    }

    fn foot(&mut self, y: u16, model: &Model, (first, shown, all): (usize, usize, usize)) {
        let unavailable: Vec<String> = model.sample().unavailable.iter().map(ToString::to_string).collect();
        let warned = Style::new().add_modifier(Modifier::BOLD);
        let (text, style) = match (model.filter(), &model.trouble) {
            ((filter, true), _) => {
                (format!("/{filter}_  (a part of a name, or a pattern; Enter keeps it, Esc drops it)"), warned)
            }
            (_, Some(trouble)) => (trouble.clone(), warned.patch(self.look.style(Some(AnsiColor::Red)))),
            _ if model.help => {
                let keys = "c cpu  m memory  n name  t throttled  l lag  r reverse  / filter  q quit";
                (keys.to_owned(), Style::new())
            }
            _ if !unavailable.is_empty() => {
                let kinds = unavailable.join(", ");
                let text = format!("the backend of kind {kinds} does not answer: what it has is as it was last seen");
                (text, warned.patch(self.look.style(Some(AnsiColor::Yellow))))
            }
            _ if all == 0 => ("no instance matches  ? keys  q quit".to_owned(), Style::new()),
            _ => (format!("{} to {} of {all}  ? keys  q quit", first + 1, first + shown), Style::new()),
        };
        let text = self.look.shown(&text);
        self.put(0, y, usize::MAX, &text, style);
    }
}

#[cfg(test)]
mod tests;
