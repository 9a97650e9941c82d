//! [`ByteCount`]: an amount of memory. Knows powers of 1024 only; pages and blocks are the backends' business.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Magnitude, Quantity, UnitError, quote};

/// Bytes of memory, never more than `i64::MAX`, because the engines behind take signed 64-bit numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteCount(u64);

/// The units of 1024, largest first: the letter and the power of two.
const UNITS: [(char, u32); 6] = [('E', 60), ('P', 50), ('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl ByteCount {
    /// No bytes.
    pub const ZERO: Self = Self(0);
    /// The greatest value: `i64::MAX` bytes.
    pub const MAX: Self = Self(i64::MAX.unsigned_abs());

    /// From a number of bytes.
    ///
    /// # Errors
    /// [`UnitError::TooLarge`] above [`ByteCount::MAX`].
    pub fn from_bytes(bytes: u64) -> Result<Self, UnitError> {
        match Self::new(bytes) {
            Some(count) => Ok(count),
            None => Err(UnitError::TooLarge { text: bytes.to_string(), most: Self::MAX.to_string() }),
        }
    }

    /// From a number of bytes, or None above [`ByteCount::MAX`]; for constants.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes <= Self::MAX.0 { Some(Self(bytes)) } else { None }
    }

    /// From a number of mebibytes (1024 × 1024 bytes).
    #[must_use]
    pub const fn mib(mebibytes: u32) -> Self {
        Self((mebibytes as u64) << 20) // 2^32 · 2^20 is below i64::MAX
    }

    /// From a number of gibibytes (1024 × 1024 × 1024 bytes).
    #[must_use]
    pub const fn gib(gibibytes: u32) -> Self {
        Self((gibibytes as u64) << 30) // 2^32 · 2^30 is below i64::MAX
    }

    /// The number of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Whether this is no memory at all.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The sum, or None above [`ByteCount::MAX`].
    #[must_use]
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Self::new(sum),
            None => None,
        }
    }

    /// The difference, or None below zero.
    #[must_use]
    pub const fn checked_sub(self, other: Self) -> Option<Self> {
        match self.0.checked_sub(other.0) {
            Some(difference) => Some(Self(difference)),
            None => None,
        }
    }

    /// The sum, at most [`ByteCount::MAX`].
    #[must_use]
    pub const fn saturating_add(self, other: Self) -> Self {
        match self.checked_add(other) {
            Some(sum) => sum,
            None => Self::MAX,
        }
    }

    /// The difference, at least zero.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The least multiple of `grain` that is not below this, or None above [`ByteCount::MAX`]. A grain of zero changes
    /// nothing.
    #[must_use]
    pub const fn round_up_to(self, grain: Self) -> Option<Self> {
        if grain.0 == 0 {
            return Some(self);
        }
        match self.0.checked_next_multiple_of(grain.0) {
            Some(rounded) => Self::new(rounded),
            None => None,
        }
    }

    /// The greatest multiple of `grain` that is not above this. A grain of zero changes nothing.
    #[must_use]
    pub const fn round_down_to(self, grain: Self) -> Self {
        match self.0.checked_rem(grain.0) {
            Some(rest) => Self(self.0 - rest),
            None => self,
        }
    }
}

/// Exact: the largest unit of 1024 that divides the number, so `4 GiB`, `4296 MiB` or `1234 bytes`.
impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, power)| self.0 != 0 && self.0.trailing_zeros() >= *power);
        f.pad(&match unit {
            Some((letter, power)) => format!("{} {letter}iB", self.0 >> power),
            None if self.0 == 1 => "1 byte".to_owned(),
            None => format!("{} bytes", self.0),
        })
    }
}

/// `4G`, `4Gi`, `4GiB` (all powers of 1024, in any case), `1048576`, `1048576 bytes`; one space may stand before the unit.
impl FromStr for ByteCount {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let not_an_amount = || UnitError::NotAnAmount { text: quote(text), expected: Self::EXPECTED };
        if text.is_empty() {
            return Err(UnitError::Empty { expected: Self::EXPECTED });
        }
        if text.starts_with('-') {
            return Err(UnitError::Negative { text: quote(text), expected: Self::EXPECTED });
        }
        if text.starts_with('+') {
            return Err(UnitError::Signed { text: quote(text) });
        }
        let (digits, rest) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
        if digits.is_empty() {
            return Err(not_an_amount());
        }
        if let Some(fraction) = rest.strip_prefix(['.', ',']) {
            return Err(UnitError::Fraction { text: quote(text), hint: without_fraction(digits, fraction) });
        }
        let unit = rest.strip_prefix(' ').unwrap_or(rest);
        if unit.is_empty() && !rest.is_empty() {
            return Err(not_an_amount());
        }
        let Some(power) = power_of(unit) else {
            return Err(unit_error(text, digits, unit));
        };
        let too_large = || UnitError::TooLarge { text: quote(text), most: Self::MAX.to_string() };
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << power).and_then(Self::new).ok_or_else(too_large)
    }
}

/// The power of two that a unit stands for.
fn power_of(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_lowercase();
    if matches!(unit.as_str(), "" | "b" | "byte" | "bytes") {
        return Some(0);
    }
    let mut letters = unit.chars();
    let letter = letters.next()?.to_ascii_uppercase();
    let (_, power) = UNITS.iter().find(|(known, _)| *known == letter)?;
    matches!(letters.as_str(), "" | "i" | "ib").then_some(*power)
}

/// What is wrong with a unit that [`power_of`] does not know.
fn unit_error(text: &str, digits: &str, unit: &str) -> UnitError {
    let upper = unit.to_ascii_uppercase();
    let mut letters = upper.chars();
    match (letters.next(), letters.as_str()) {
        (Some(letter), "B") if UNITS.iter().any(|(known, _)| *known == letter) => UnitError::DecimalUnit {
            text: quote(text),
            hint: format!("{digits:.20}{letter} or {digits:.20}{letter}iB"),
            unit: upper,
        },
        _ => UnitError::UnknownUnit { text: quote(text), unit: quote(unit) },
    }
}

/// The hint for `1.5GiB`: the same amount as a whole number of a smaller unit, where there is one.
fn without_fraction(whole: &str, fraction: &str) -> String {
    let exact = || -> Option<ByteCount> {
        let (decimals, unit) = fraction.split_at(fraction.bytes().take_while(u8::is_ascii_digit).count());
        let power = power_of(unit.strip_prefix(' ').unwrap_or(unit))?;
        let scale = 10_u128.checked_pow(u32::try_from(decimals.len()).ok()?)?;
        let number: u128 = format!("{whole}{decimals}").parse().ok()?;
        let scaled = number.checked_mul(1 << power)?;
        (scaled % scale == 0).then(|| u64::try_from(scaled / scale).ok()).flatten().and_then(ByteCount::new)
    };
    match exact() {
        Some(bytes) => format!("write {}", bytes.to_string().replace(' ', "")),
        None => "write a whole number of a smaller unit, such as 1536MiB".to_owned(),
    }
}

impl Quantity for ByteCount {
    const EXPECTED: &'static str = "bytes such as 4GiB, 512MiB or 1048576";

    fn from_integer(value: u64) -> Result<Self, UnitError> {
        Self::from_bytes(value)
    }

    fn from_float(value: f64) -> Result<Self, UnitError> {
        let hint = "write a whole number of bytes, or a string such as \"1536MiB\"".to_owned();
        Err(UnitError::Fraction { text: quote(&format!("{value:?}")), hint })
    }
}

impl Magnitude for ByteCount {
    fn plus(self, other: Self) -> Option<Self> {
        self.checked_add(other)
    }

    fn minus(self, other: Self) -> Option<Self> {
        self.checked_sub(other)
    }
}

/// As a whole number of bytes.
impl Serialize for ByteCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

/// From a whole number of bytes or a string with a unit.
impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<ByteCount, UnitError> {
        text.parse()
    }

    fn said(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn every_way_of_writing_four_gib_is_the_same() {
        for text in
            ["4G", "4g", "4GiB", "4gib", "4GIB", "4Gi", "4 GiB", "4 g", "4096M", "4096MiB", "4194304K", "4294967296"]
        {
            assert_eq!(parse(text), Ok(ByteCount::gib(4)), "{text}");
        }
        assert_eq!(parse("1T"), Ok(ByteCount::gib(1024)));
        assert_eq!(parse("12 bytes").unwrap().bytes(), 12);
        assert_eq!(parse("12B").unwrap().bytes(), 12);
    }

    #[test]
    fn decimal_units_are_refused_with_what_to_write() {
        for text in ["8GB", "8gb", "8 GB"] {
            let said = said(text);
            assert!(said.contains("GB means powers of 1000 to some: write 8G or 8GiB, powers of 1024"), "{said}");
        }
        assert!(said("8 GB!").contains("unknown unit `GB!`"));
    }

    #[test]
    fn a_fraction_is_refused_with_the_whole_number_to_write() {
        assert!(said("1.5GiB").ends_with("write 1536MiB"), "{}", said("1.5GiB"));
        assert!(said("0.5 G").ends_with("write 512MiB"));
        assert!(said("0.1GiB").contains("smaller unit"));
        assert!(said("1,5G").ends_with("write 1536MiB"));
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in
            ["", " ", "G", "-1", "-4G", "+4G", " 4G", "4G ", "4  G", "4 ", "0x10", "1_000", "4GiBB", "4iB", "1e9", "٤G"]
        {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(said("-4G").contains("negative"));
        assert!(said("").contains("empty"));
    }

    #[test]
    fn nothing_above_i64_max_is_taken() {
        assert_eq!(parse("9223372036854775807"), Ok(ByteCount::MAX));
        for text in ["9223372036854775808", "8E", "16E", "99999999999999999999999999", "9223372036854775807K"] {
            assert!(said(text).contains("too large"), "{text}");
        }
        assert_eq!(ByteCount::MAX.checked_add(ByteCount::mib(1)), None);
        assert_eq!(ByteCount::MAX.saturating_add(ByteCount::mib(1)), ByteCount::MAX);
        assert_eq!(ByteCount::MAX.round_up_to(ByteCount::mib(1)), None);
    }

    #[test]
    fn display_takes_the_largest_unit_that_divides() {
        for (bytes, shown) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1234, "1234 bytes"),
            (1024, "1 KiB"),
            (4 << 30, "4 GiB"),
            (4296 << 20, "4296 MiB"),
            (1 << 60, "1 EiB"),
        ] {
            assert_eq!(ByteCount::new(bytes).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn json_carries_integers_and_takes_strings_but_no_floats() {
        assert_eq!(serde_json::to_string(&ByteCount::mib(1)).unwrap(), "1048576");
        assert_eq!(serde_json::from_str::<ByteCount>("1048576").unwrap(), ByteCount::mib(1));
        assert_eq!(serde_json::from_str::<ByteCount>("\"1M\"").unwrap(), ByteCount::mib(1));
        for (json, part) in [("1.5", "whole number"), ("1e30", "whole number"), ("-1", "negative"), ("\"1GB\"", "1GiB")]
        {
            let said = serde_json::from_str::<ByteCount>(json).unwrap_err().to_string();
            assert!(said.contains(part), "{said}");
        }
        for json in ["true", "null", "[]", "{}", "9223372036854775808"] {
            assert!(serde_json::from_str::<ByteCount>(json).is_err(), "{json}");
        }
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_back(bytes in 0..=ByteCount::MAX.bytes(), shift in 0_u32..62) {
            let count = ByteCount::new(bytes >> shift << shift).unwrap();
            prop_assert_eq!(parse(&count.to_string()), Ok(count));
            let json = serde_json::to_string(&count).unwrap();
            prop_assert_eq!(serde_json::from_str::<ByteCount>(&json).unwrap(), count);
        }

        #[test]
        fn rounding_stays_within_one_grain(bytes in 0_u64..1 << 50, grain in 0_u64..1 << 30) {
            let (count, grain) = (ByteCount::new(bytes).unwrap(), ByteCount::new(grain).unwrap());
            let (down, up) = (count.round_down_to(grain), count.round_up_to(grain).unwrap());
            prop_assert!(down <= count && count <= up);
            let apart = up.bytes() - down.bytes();
            prop_assert!(apart == 0 || apart == grain.bytes());
            prop_assert!(grain.is_zero() || down.bytes() % grain.bytes() == 0);
        }

        #[test]
        fn no_text_panics(text in "\\PC*", number in "[0-9]{0,30}[.,]?[0-9]{0,30} ?[kmgtpeibKMGB]{0,3}") {
            let _ = parse(&text);
            let _ = parse(&number).map_err(|error| error.to_string());
        }
    }
}
