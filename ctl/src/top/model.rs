//! What `ctl top` knows: the last sample, the samples before it, and how it is to be shown. Changed by samples and keys, read
//! by the drawing; knows neither agentd nor a terminal.

mod row;

use std::collections::{HashMap, HashSet, VecDeque};

use agentd_core::pattern::Pattern;
use jiff::Zoned;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::source::Sample;
use crate::args::SortKey;
use crate::error::Failure;
use crate::render::text::clean;

pub(super) use row::Row;

/// How many samples are kept: what the widest sparkline shows.
pub(super) const KEPT: usize = 32;

/// A value at each sample, the newest last; None where it was unknown.
pub(super) type Trail = VecDeque<Option<f64>>;

/// What one instance has used.
#[derive(Debug, Default)]
struct Trails {
    cpu: Trail,
    memory: Trail,
}

/// Which line is edited.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    Looking,
    /// The filter is typed; this one comes back with Esc.
    Filtering { before: String },
}

/// What is shown, and how.
#[derive(Debug)]
pub(crate) struct Model {
    sample: Sample,
    /// When the last sample came.
    pub(super) at: Zoned,
    /// By kind and id: a name may go to another instance.
    trails: HashMap<String, Trails>,
    /// Why there is no newer sample.
    pub(super) trouble: Option<String>,
    pub(super) sort: SortKey,
    pub(super) reverse: bool,
    filter: String,
    mode: Mode,
    pub(super) help: bool,
    /// The first row that is shown.
    offset: usize,
    /// How many rows are shown.
    page: usize,
}

impl Model {
    /// With the first sample, taken at this time.
    pub(super) fn new(sample: Sample, at: Zoned, sort: SortKey) -> Self {
        let mut model = Model {
            sample: sample.clone(),
            at: at.clone(),
            trails: HashMap::new(),
            trouble: None,
            sort,
            reverse: false,
            filter: String::new(),
            mode: Mode::Looking,
            help: false,
            offset: 0,
            page: 1,
        };
        model.take(Ok(sample), at);
        model
    }

    /// Takes a sample, or why there is none: then the last one stays, and the time in between is unknown.
    pub(super) fn take(&mut self, sample: Result<Sample, Failure>, at: Zoned) {
        match sample {
            Ok(sample) => {
                self.trouble = None;
                self.at = at;
                let there: HashSet<String> = sample.instances.iter().map(|(instance, _)| row::key(instance)).collect();
                self.trails.retain(|key, _| there.contains(key));
                for (instance, usage) in &sample.instances {
                    let trails = self.trails.entry(row::key(instance)).or_default();
                    push(&mut trails.cpu, usage.as_ref().and_then(|usage| usage.cpu.rate));
                    push(&mut trails.memory, usage.as_ref().and_then(row::memory_used));
                }
                self.sample = sample;
            }
            Err(failure) => {
                let why = clean(&failure.detail);
                self.trouble = Some(if failure.code == Failure::UNREACHABLE {
                    format!("agentd does not answer: {why}, trying again")
                } else {
                    format!("{}: {why}, trying again", clean(&failure.code))
                });
                for trails in self.trails.values_mut() {
                    push(&mut trails.cpu, None);
                    push(&mut trails.memory, None);
                }
            }
        }
        self.scroll(0);
    }

    /// The last sample.
    pub(super) fn sample(&self) -> &Sample {
        &self.sample
    }

    /// What the table has room for.
    pub(super) fn set_page(&mut self, rows: usize) {
        self.page = rows.max(1);
        self.scroll(0);
    }

    /// The filter, and whether it is being typed.
    pub(super) fn filter(&self) -> (&str, bool) {
        (&self.filter, self.mode != Mode::Looking)
    }

    /// Takes a key; false where it ends all this.
    pub(super) fn press(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return true;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        if control && matches!(key.code, KeyCode::Char('c' | 'C')) {
            return false;
        }
        match &self.mode {
            Mode::Filtering { before } => match key.code {
                KeyCode::Enter => self.mode = Mode::Looking,
                KeyCode::Esc => {
                    self.filter = before.clone();
                    self.mode = Mode::Looking;
                }
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char('u') if control => self.filter.clear(),
                KeyCode::Char(typed) if !control => self.filter.push(typed),
                _ => {}
            },
            Mode::Looking => return control || self.command(key.code),
        }
        self.scroll(0);
        true
    }

    fn command(&mut self, code: KeyCode) -> bool {
        let page = isize::try_from(self.page).unwrap_or(isize::MAX);
        match code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') => self.sort_by(SortKey::Cpu),
            KeyCode::Char('m') => self.sort_by(SortKey::Memory),
            KeyCode::Char('n') => self.sort_by(SortKey::Name),
            KeyCode::Char('t') => self.sort_by(SortKey::Throttled),
            KeyCode::Char('l') => self.sort_by(SortKey::Lag),
            KeyCode::Char('r') => self.reverse = !self.reverse,
            KeyCode::Char('?') => self.help = !self.help,
            KeyCode::Char('/') => self.mode = Mode::Filtering { before: self.filter.clone() },
            KeyCode::Up | KeyCode::Char('k') => self.scroll(-1),
            KeyCode::Down | KeyCode::Char('j') => self.scroll(1),
            KeyCode::PageUp => self.scroll(-page),
            KeyCode::PageDown | KeyCode::Char(' ') => self.scroll(page),
            KeyCode::Home => self.offset = 0,
            KeyCode::End => self.scroll(isize::MAX),
            _ => {}
        }
        true
    }

    fn sort_by(&mut self, key: SortKey) {
        self.sort = key;
        self.reverse = false;
        self.offset = 0;
    }

    /// Moves by so many rows, as far as there are any.
    fn scroll(&mut self, by: isize) {
        let last = self.rows().len().saturating_sub(self.page);
        self.offset = self.offset.saturating_add_signed(by).min(last);
    }

    /// All rows that the filter lets through, sorted.
    pub(super) fn rows(&self) -> Vec<Row<'_>> {
        let filter = Filter::new(&self.filter);
        let mut rows: Vec<Row<'_>> = self
            .sample
            .instances
            .iter()
            .filter(|(instance, _)| filter.lets(&instance.reference, instance))
            .map(|(instance, usage)| {
                let trails = self.trails.get(&row::key(instance));
                Row::new(instance, usage.as_ref(), trails.map(|trails| (&trails.cpu, &trails.memory)))
            })
            .collect();
        rows.sort_by(|a, b| a.compare(b, self.sort, self.reverse));
        rows
    }

    /// The rows that are on the screen, the place of the first, and how many there are.
    pub(super) fn visible(&self) -> (Vec<Row<'_>>, usize, usize) {
        let rows = self.rows();
        let all = rows.len();
        (rows.into_iter().skip(self.offset).take(self.page).collect(), self.offset, all)
    }
}

fn push(trail: &mut Trail, value: Option<f64>) {
    if trail.len() == KEPT {
        trail.pop_front();
    }
    trail.push_back(value);
}

/// What was typed after `/`: a pattern where it reads as one, else a part of the reference.
enum Filter {
    Part(String),
    Glob(Pattern),
}

impl Filter {
    fn new(text: &str) -> Self {
        let part = || Filter::Part(text.to_lowercase());
        if !text.contains(['*', '?', '[', '{']) && !text.starts_with("label:") {
            return part();
        }
        // `web*` means a name: a pattern is of references, so of any kind.
        Pattern::parse(text).or_else(|_| Pattern::parse(&format!("*/{text}"))).map_or_else(|_| part(), Filter::Glob)
    }

    fn lets(&self, reference: &str, instance: &agentd_core::api::Instance) -> bool {
        match self {
            Filter::Part(part) => reference.to_lowercase().contains(part),
            Filter::Glob(pattern) => pattern.matches(reference, &instance.labels),
        }
    }
}

#[cfg(test)]
mod tests;
