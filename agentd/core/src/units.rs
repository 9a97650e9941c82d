//! Amounts with their units: bytes and CPUs as integers, never floats, and what a request can say about them
//! ("none", "+1"). Knows how people write them and how JSON carries them; knows no backend's own units.

mod amount;
mod bytes;
mod cpus;
mod ratio;

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{Deserializer, Error, Visitor};

pub use amount::{Amount, Limit};
pub use bytes::ByteCount;
pub use cpus::Cpus;
pub use ratio::Ratio;

/// Why a text or a number is no amount. Each message says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// Nothing was written.
    #[error("the value is empty: write {expected}")]
    Empty {
        /// What could be written instead.
        expected: &'static str,
    },
    /// The text is not an amount at all.
    #[error("{text} is not an amount: write {expected}")]
    NotAnAmount {
        /// The text, quoted and shortened.
        text: String,
        /// What could be written instead.
        expected: &'static str,
    },
    /// Bytes with a fraction.
    #[error("{text} has a fraction: {hint}")]
    Fraction {
        /// The text, quoted and shortened.
        text: String,
        /// The same amount without a fraction, where there is one.
        hint: String,
    },
    /// A unit that some read as powers of 1000 and others as powers of 1024.
    #[error("{text}: {unit} means powers of 1000 to some: write {hint}, powers of 1024")]
    DecimalUnit {
        /// The text, quoted and shortened.
        text: String,
        /// The unit, in upper case.
        unit: String,
        /// What to write instead.
        hint: String,
    },
    /// A unit that is none of bytes, K, M, G, T, P, E.
    #[error("{text}: unknown unit {unit}: write bytes, or K, M, G or T (powers of 1024)")]
    UnknownUnit {
        /// The text, quoted and shortened.
        text: String,
        /// The unit, quoted and shortened.
        unit: String,
    },
    /// Less than nothing.
    #[error("{text} is negative: write {expected}")]
    Negative {
        /// The text, quoted and shortened.
        text: String,
        /// What could be written instead.
        expected: &'static str,
    },
    /// A leading `+` where only absolute values make sense.
    #[error("{text} is relative, and only an absolute value has a meaning here: write it without the `+`")]
    Signed {
        /// The text, quoted and shortened.
        text: String,
    },
    /// More than the type can hold.
    #[error("{text} is too large: the most is {most}")]
    TooLarge {
        /// The text, quoted and shortened.
        text: String,
        /// The greatest value.
        most: String,
    },
    /// Finer than thousandths.
    #[error("{text} is finer than thousandths: write at most three decimals")]
    TooFine {
        /// The text, quoted and shortened.
        text: String,
    },
    /// A negative JSON number where a relative value was probably meant.
    #[error("{text} as a number is neither absolute nor relative: for a relative value write the string \"{text}\"")]
    RelativeNumber {
        /// The number.
        text: String,
    },
}

/// What can be read from a text and from a JSON or TOML number. One implementation serves config, command line and API,
/// so that they cannot disagree.
pub trait Quantity: Sized + Copy + fmt::Display + FromStr<Err = UnitError> {
    /// What to write, for messages: `bytes such as 4GiB`.
    const EXPECTED: &'static str;

    /// From a whole number.
    ///
    /// # Errors
    /// [`UnitError::TooLarge`].
    fn from_integer(value: u64) -> Result<Self, UnitError>;

    /// From a number below zero, which is an error everywhere; the error says which.
    ///
    /// # Errors
    /// Always.
    fn from_negative(value: i64) -> Result<Self, UnitError> {
        Err(UnitError::Negative { text: value.to_string(), expected: Self::EXPECTED })
    }

    /// From a floating-point number.
    ///
    /// # Errors
    /// Where the type takes none, or the number is not exactly one of its values.
    fn from_float(value: f64) -> Result<Self, UnitError>;
}

/// A [`Quantity`] that can be added and taken away.
pub trait Magnitude: Quantity {
    /// The sum, or None where it is more than the type can hold.
    fn plus(self, other: Self) -> Option<Self>;
    /// The difference, or None where it is below zero.
    fn minus(self, other: Self) -> Option<Self>;
}

/// Reads any [`Quantity`] through serde.
fn deserialize<'de, T: Quantity, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    deserializer.deserialize_any(QuantityVisitor(PhantomData))
}

struct QuantityVisitor<T>(PhantomData<T>);

impl<T: Quantity> Visitor<'_> for QuantityVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<T, E> {
        T::from_integer(value).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        match u64::try_from(value) {
            Ok(value) => T::from_integer(value),
            Err(_) => T::from_negative(value),
        }
        .map_err(E::custom)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<T, E> {
        T::from_float(value).map_err(E::custom)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<T, E> {
        value.parse().map_err(E::custom)
    }
}

/// A text of a stranger for a message: in quotes, control characters escaped, not longer than a line.
pub(crate) fn quote(text: &str) -> String {
    const MOST: usize = 60;
    match text.char_indices().nth(MOST) {
        None => format!("`{}`", text.escape_debug()),
        Some((end, _)) => format!("`{}…`", text.get(..end).unwrap_or_default().escape_debug()),
    }
}

/// Reads a decimal number with at most three decimals as thousandths: no sign, no exponent, digits on both sides of the
/// point.
fn parse_thousandths(text: &str, expected: &'static str, most: u64) -> Result<u64, UnitError> {
    let not_an_amount = || UnitError::NotAnAmount { text: quote(text), expected };
    if text.is_empty() {
        return Err(UnitError::Empty { expected });
    }
    if text.starts_with('+') {
        return Err(UnitError::Signed { text: quote(text) });
    }
    let (negative, number) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, decimals) = match number.split_once('.') {
        Some((whole, decimals)) => (whole, Some(decimals)),
        None => (number, None),
    };
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !decimals.is_none_or(is_number) {
        return Err(not_an_amount());
    }
    if negative {
        return Err(UnitError::Negative { text: quote(text), expected });
    }
    let decimals = decimals.unwrap_or("0");
    if decimals.len() > 3 {
        return Err(UnitError::TooFine { text: quote(text) });
    }
    let too_large = || UnitError::TooLarge { text: quote(text), most: Thousandths(most).to_string() };
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let decimals: u64 = format!("{decimals:0<3}").parse().map_err(|_| not_an_amount())?;
    whole
        .checked_mul(1000)
        .and_then(|millis| millis.checked_add(decimals))
        .filter(|millis| *millis <= most)
        .ok_or_else(too_large)
}

/// Reads a float as thousandths by way of its shortest text, which no binary fraction can blur: 1.1 is 1100, and
/// 0.1 + 0.2 is refused.
fn thousandths_of_float(value: f64, expected: &'static str, most: u64) -> Result<u64, UnitError> {
    parse_thousandths(&value.to_string(), expected, most)
}

/// A number of thousandths, shown as the shortest decimal number.
struct Thousandths(u64);

impl fmt::Display for Thousandths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, decimals) = (self.0 / 1000, self.0 % 1000);
        if decimals == 0 {
            return f.pad(&whole.to_string());
        }
        f.pad(format!("{whole}.{decimals:03}").trim_end_matches('0'))
    }
}
