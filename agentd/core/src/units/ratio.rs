//! [`Ratio`]: an overcommit, in thousandths, and how it scales an amount.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ByteCount, Cpus, Quantity, UnitError, parse_thousandths, thousandths_of_float};

/// How much may be promised for each unit there is, in thousandths: 2.0 promises twice the host. Above 0, at most 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ratio(u64);

impl Ratio {
    /// One for one: no overcommit.
    pub const ONE: Self = Self(1000);
    /// The greatest value: a thousand for one.
    pub const MAX: Self = Self(1_000_000);

    /// From thousandths, or None for zero and for more than [`Ratio::MAX`].
    #[must_use]
    pub const fn from_millis(millis: u64) -> Option<Self> {
        if millis == 0 || millis > Self::MAX.0 { None } else { Some(Self(millis)) }
    }

    /// Thousandths.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// The bytes that may be promised for so many bytes, rounded down, at most [`ByteCount::MAX`].
    #[must_use]
    pub fn apply(self, bytes: ByteCount) -> ByteCount {
        u64::try_from(self.scale(bytes.bytes())).ok().and_then(ByteCount::new).unwrap_or(ByteCount::MAX)
    }

    /// The CPUs that may be promised for so many CPUs, rounded down to a thousandth, at most [`Cpus::MAX`].
    #[must_use]
    pub fn apply_cpus(self, cpus: Cpus) -> Cpus {
        u64::try_from(self.scale(cpus.millis())).map_or(Cpus::MAX, Cpus::from_millis)
    }

    fn scale(self, amount: u64) -> u128 {
        u128::from(amount) * u128::from(self.0) / 1000
    }

    fn checked(millis: u64) -> Result<Self, UnitError> {
        Self::from_millis(millis).ok_or_else(|| UnitError::NotAnAmount {
            text: format!("`{}`", Cpus::from_millis(millis)),
            expected: Self::EXPECTED,
        })
    }
}

impl Default for Ratio {
    fn default() -> Self {
        Self::ONE
    }
}

/// The shortest exact decimal number with at least one decimal: `2.0`, `1.25`.
impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        let shortest = text.trim_end_matches('0');
        f.pad(&if shortest.ends_with('.') { format!("{shortest}0") } else { shortest.to_owned() })
    }
}

/// `2`, `1.5`: digits with at most three decimals, more than zero.
impl FromStr for Ratio {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_thousandths(text, Self::EXPECTED, Self::MAX.0).and_then(Self::checked)
    }
}

impl Quantity for Ratio {
    const EXPECTED: &'static str = "a ratio above 0 such as 1.0 or 2.5";

    fn from_integer(value: u64) -> Result<Self, UnitError> {
        value.to_string().parse()
    }

    fn from_float(value: f64) -> Result<Self, UnitError> {
        thousandths_of_float(value, Self::EXPECTED, Self::MAX.0).and_then(Self::checked)
    }
}

/// As a number such as 2.0.
impl Serialize for Ratio {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0 as f64 / 1000.0) // at most 10^6, which a float holds exactly
    }
}

/// From a number that is exact to thousandths, or a string.
impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_ratio_scales_and_rounds_down() {
        let ratio: Ratio = "1.5".parse().unwrap();
        assert_eq!(ratio.apply_cpus(Cpus::whole(30)), Cpus::whole(45));
        assert_eq!(ratio.apply_cpus(Cpus::from_millis(1)), Cpus::from_millis(1));
        assert_eq!(ratio.apply(ByteCount::new(3).unwrap()).bytes(), 4);
        assert_eq!(Ratio::MAX.apply(ByteCount::MAX), ByteCount::MAX);
        assert_eq!(Ratio::MAX.apply_cpus(Cpus::MAX), Cpus::MAX);
    }

    #[test]
    fn zero_negative_and_not_a_number_are_refused() {
        for text in ["0", "0.0", "-1", "NaN", "inf", "1.0001", "1000.001", ""] {
            assert!(text.parse::<Ratio>().is_err(), "{text}");
        }
        for float in [0.0, -1.0, f64::NAN, f64::INFINITY, 1.0001] {
            assert!(Ratio::from_float(float).is_err(), "{float}");
        }
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_back(millis in 1..=Ratio::MAX.millis()) {
            let ratio = Ratio::from_millis(millis).unwrap();
            prop_assert_eq!(ratio.to_string().parse(), Ok(ratio));
            prop_assert!(ratio.to_string().contains('.'));
            let json = serde_json::to_string(&ratio).unwrap();
            prop_assert_eq!(serde_json::from_str::<Ratio>(&json).unwrap(), ratio);
        }

        #[test]
        fn one_for_one_changes_nothing(bytes in 0..=ByteCount::MAX.bytes()) {
            let bytes = ByteCount::new(bytes).unwrap();
            prop_assert_eq!(Ratio::ONE.apply(bytes), bytes);
        }
    }
}
