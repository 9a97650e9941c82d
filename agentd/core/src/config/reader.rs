//! A small typed reader over a parsed TOML document: takes keys, keeps every fault with its place, and at the end reports
//! the keys that nobody took. Knows how values are written; not which keys there are.

use std::cell::RefCell;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::{AutoOr, Fault, keys};
use crate::units::{Quantity, UnitError, quote};

type Key<'a> = toml::Spanned<std::borrow::Cow<'a, str>>;
type Value<'a> = toml::Spanned<DeValue<'a>>;

/// The file's text and what has been found wrong with it.
pub(super) struct Source<'a> {
    file: &'a str,
    text: &'a str,
    faults: RefCell<Vec<Fault>>,
    /// Whether the syntax is broken somewhere, so that what seems absent may only be unreadable.
    broken: bool,
}

impl<'a> Source<'a> {
    pub(super) fn new(file: &'a str, text: &'a str, broken: bool) -> Self {
        Self { file, text, faults: RefCell::default(), broken }
    }

    /// Whether what seems absent may only be unreadable.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Keeps a fault at a byte offset of the text.
    pub(super) fn fault(&self, at: usize, key: impl Into<String>, message: impl Into<String>) {
        let (line, column) = self.place(at);
        let fault = Fault { file: self.file.to_owned(), line, column, key: key.into(), message: message.into() };
        self.faults.borrow_mut().push(fault);
    }

    /// Line and column of a byte offset, both from 1, the column in characters.
    pub(super) fn place(&self, at: usize) -> (usize, usize) {
        let before = self.text.get(..self.text.floor_char_boundary(at)).unwrap_or_default();
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }

    /// Every fault so far.
    pub(super) fn into_faults(self) -> Vec<Fault> {
        self.faults.into_inner()
    }
}

/// One table of the document, with the names that messages and the table of keys have for it.
pub(super) struct Section<'a> {
    pub(super) source: &'a Source<'a>,
    /// As the file writes it: `[capacity]`, `[[limit]] 2`; empty for the document itself.
    heading: String,
    /// As [`keys::KEYS`] has it; empty for the document itself.
    name: &'static str,
    table: &'a DeTable<'a>,
    /// Where the section begins in the text.
    at: usize,
}

impl<'a> Section<'a> {
    pub(super) fn root(source: &'a Source<'a>, table: &'a DeTable<'a>) -> Self {
        Self { source, heading: String::new(), name: "", table, at: 0 }
    }

    /// The table under a key, read as the section `name`; None where it is absent or no table.
    pub(super) fn table(&self, key: &str, heading: String, name: &'static str) -> Option<Self> {
        let (found, value) = self.table.get_key_value(key)?;
        self.as_table(found.span(), value, heading, name)
    }

    fn as_table(&self, at: Range<usize>, value: &'a Value<'a>, heading: String, name: &'static str) -> Option<Self> {
        match value.get_ref() {
            DeValue::Table(table) => Some(Self { source: self.source, heading, name, table, at: at.start }),
            other => {
                let hint = if other.is_array() {
                    format!("write {heading} once, in single brackets")
                } else {
                    "write it as a table".to_owned()
                };
                self.source.fault(at.start, heading, format!("must be a table, not {}: {hint}", article(other)));
                None
            }
        }
    }

    /// The tables of a `[[name]]`, each under a heading with its number.
    pub(super) fn tables(&self, name: &'static str) -> Vec<Self> {
        let Some((key, value)) = self.table.get_key_value(name) else { return Vec::new() };
        let DeValue::Array(items) = value.get_ref() else {
            let message = format!("must be a list of tables, not {}: write [[{name}]]", article(value.get_ref()));
            self.source.fault(key.span().start, format!("[[{name}]]"), message);
            return Vec::new();
        };
        let numbered = items.iter().enumerate();
        numbered
            .filter_map(|(index, item)| self.as_table(item.span(), item, format!("[[{name}]] {}", index + 1), name))
            .collect()
    }

    /// All keys with their values, for sections whose keys the file chooses.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a Key<'a>, &'a Value<'a>)> {
        self.table.iter()
    }

    /// Whether the file states this key, readable or not.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The value of a key; None where it is absent or, after a fault, not what `read` reads.
    pub(super) fn get<T>(&self, key: &str, read: impl Fn(&DeValue<'_>) -> Result<T, String>) -> Option<T> {
        let value = self.table.get(key)?;
        self.check(value.span().start, key, read(value.get_ref()))
    }

    /// The value of a key that has to be there.
    pub(super) fn required<T>(&self, key: &str, read: impl Fn(&DeValue<'_>) -> Result<T, String>) -> Option<T> {
        if !self.has(key) {
            self.absent(key, "is required");
        }
        self.get(key, read)
    }

    /// The items of a list that can be read; each of the others is a fault of its own.
    pub(super) fn list<T>(&self, key: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<Vec<T>> {
        let value = self.table.get(key)?;
        let DeValue::Array(items) = value.get_ref() else {
            self.fault(key, format!("must be a list such as [\"…\"], not {}", article(value.get_ref())));
            return None;
        };
        let item =
            |item: &Value<'_>| self.check(item.span().start, key, string(item.get_ref()).and_then(|text| read(&text)));
        Some(items.iter().filter_map(item).collect())
    }

    /// Whether a key is a list with nothing in it.
    pub(super) fn is_empty_list(&self, key: &str) -> bool {
        self.table.get(key).and_then(|value| value.get_ref().as_array()).is_some_and(|items| items.is_empty())
    }

    /// Reports a key that is missing, unless broken syntax may have hidden it.
    pub(super) fn absent(&self, key: &str, message: &str) {
        if !self.source.broken {
            self.source.fault(self.at, self.path(key), message);
        }
    }

    /// Reports a fault at a key's value, or at the section's heading where the key is absent.
    pub(super) fn fault(&self, key: &str, message: impl Into<String>) {
        let at = self.table.get(key).map_or(self.at, |value| value.span().start);
        self.source.fault(at, self.path(key), message);
    }

    /// Keeps the error of a value that stands at `at`.
    pub(super) fn check<T>(&self, at: usize, key: &str, value: Result<T, String>) -> Option<T> {
        value.map_err(|message| self.source.fault(at, self.path(key), message)).ok()
    }

    /// Reports every key that the section does not have.
    pub(super) fn refuse_unknown(&self) {
        let known = || -> Box<dyn Iterator<Item = &'static str>> {
            match self.name {
                "" => Box::new(keys::TOP.into_iter()),
                "units" => Box::new(keys::of("units").chain(["cgroups"])),
                name => Box::new(keys::of(name)),
            }
        };
        for (key, _) in self.table {
            let name = key.get_ref().as_ref();
            if known().any(|known| known == name) {
                continue;
            }
            let what = if self.name.is_empty() { "unknown section or key" } else { "unknown key" };
            let hint = keys::did_you_mean(name, known()).map(|hint| format!(": {hint}")).unwrap_or_default();
            self.source.fault(key.span().start, self.path(&printable(name)), format!("{what}{hint}"));
        }
    }

    fn path(&self, key: &str) -> String {
        if self.heading.is_empty() || key.is_empty() {
            return format!("{}{key}", self.heading);
        }
        format!("{} {key}", self.heading)
    }
}

/// A name of the file's own choice for a message: escaped and not longer than a line.
pub(super) fn printable(name: &str) -> String {
    quote(name).trim_matches('`').to_owned()
}

/// "a string", "an integer".
fn article(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i']) { "an" } else { "a" };
    format!("{article} {kind}")
}

pub(super) fn string(value: &DeValue<'_>) -> Result<String, String> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(format!("must be a string, not {}", article(value))),
    }
}

pub(super) fn boolean(value: &DeValue<'_>) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| format!("must be true or false, not {}", article(value)))
}

/// A string that `T` reads.
pub(super) fn text<T>(value: &DeValue<'_>) -> Result<T, String>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    string(value)?.parse().map_err(|error: T::Err| error.to_string())
}

/// One of a few words.
pub(super) fn word<T: Copy>(value: &DeValue<'_>, words: &[(&str, T)]) -> Result<T, String> {
    let found = string(value)?;
    if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == found) {
        return Ok(*meaning);
    }
    let choices: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
    Err(format!("{} is not one of {}", quote(&found), choices.join(", ")))
}

/// An amount, written as a number or a string.
pub(super) fn quantity<T: Quantity>(value: &DeValue<'_>) -> Result<T, String> {
    let read = match value {
        DeValue::String(text) => text.parse(),
        DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
            Ok(number) => u64::try_from(number).map_or_else(|_| T::from_negative(number), T::from_integer),
            Err(_) => return Err(format!("{} is too large", quote(integer.as_str()))),
        },
        DeValue::Float(float) => read_float(float.as_str()),
        other => return Err(format!("must be {}, not {}", T::EXPECTED, article(other))),
    };
    read.map_err(|error| error.to_string())
}

/// A float by its text, because reading it as binary would round away what is finer than a float.
fn read_float<T: Quantity>(text: &str) -> Result<T, UnitError> {
    let float = text.parse().map_err(|_| UnitError::NotAnAmount { text: quote(text), expected: T::EXPECTED })?;
    let value = T::from_float(float)?;
    let decimals = text.split_once('.').map_or("", |(_, decimals)| decimals.trim_end_matches('0'));
    if decimals.len() > 3 && decimals.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(UnitError::TooFine { text: quote(text) });
    }
    Ok(value)
}

/// An amount above zero.
pub(super) fn positive<T: Quantity + Default + PartialEq>(value: &DeValue<'_>) -> Result<T, String> {
    let amount = quantity::<T>(value)?;
    if amount == T::default() {
        return Err("must be more than 0".to_owned());
    }
    Ok(amount)
}

/// An amount, or the host's own: `"auto"` or 0.
pub(super) fn auto_or<T: Quantity + Default + PartialEq>(value: &DeValue<'_>) -> Result<AutoOr<T>, String> {
    if value.as_str() == Some("auto") {
        return Ok(AutoOr::Auto);
    }
    let amount = quantity::<T>(value).map_err(|message| format!("{message} (0 and \"auto\" are the host's own)"))?;
    Ok(if amount == T::default() { AutoOr::Auto } else { AutoOr::At(amount) })
}

/// As [`auto_or`], and a number below zero is the host's own too.
pub(super) fn auto_below_zero<T: Quantity + Default + PartialEq>(value: &DeValue<'_>) -> Result<AutoOr<T>, String> {
    let is_negative = match value {
        DeValue::Integer(integer) => integer.as_str().starts_with('-'),
        DeValue::Float(float) => float.as_str().parse::<f64>().is_ok_and(|number| number < 0.0),
        DeValue::String(text) => text.strip_prefix('-').is_some_and(|rest| rest.parse::<T>().is_ok()),
        _ => false,
    };
    if is_negative { Ok(AutoOr::Auto) } else { auto_or(value) }
}
