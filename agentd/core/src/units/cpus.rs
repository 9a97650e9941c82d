//! [`Cpus`]: an amount of CPU, in thousandths of one CPU. Knows nothing of quotas and periods.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Magnitude, Quantity, Thousandths, UnitError, parse_thousandths, thousandths_of_float};

/// CPUs in thousandths of one: a vm's vCPUs (whole), or CPU time in CPUs (1.5 is 150 %). Never more than a million.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpus(u64);

impl Cpus {
    /// No CPU.
    pub const ZERO: Self = Self(0);
    /// The greatest value: one million CPUs.
    pub const MAX: Self = Self(1_000_000_000);

    /// From thousandths of a CPU; what is above [`Cpus::MAX`] becomes that.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        if millis > Self::MAX.0 { Self::MAX } else { Self(millis) }
    }

    /// From whole CPUs; what is above [`Cpus::MAX`] becomes that.
    #[must_use]
    pub const fn whole(cpus: u32) -> Self {
        Self::from_millis(cpus as u64 * 1000)
    }

    /// Thousandths of a CPU.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }

    /// Whether this is a whole number of CPUs.
    #[must_use]
    pub const fn is_whole(self) -> bool {
        self.0.is_multiple_of(1000)
    }

    /// The number of CPUs where it is whole.
    #[must_use]
    pub const fn as_whole(self) -> Option<u64> {
        if self.is_whole() { Some(self.0 / 1000) } else { None }
    }

    /// Whether this is no CPU at all.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The sum, or None above [`Cpus::MAX`].
    #[must_use]
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) if sum <= Self::MAX.0 => Some(Self(sum)),
            _ => None,
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

    /// The sum, at most [`Cpus::MAX`].
    #[must_use]
    pub const fn saturating_add(self, other: Self) -> Self {
        Self::from_millis(self.0.saturating_add(other.0))
    }

    /// The difference, at least zero.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

/// The shortest exact decimal number: `4`, `1.5`, `0.25`.
impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Thousandths(self.0).fmt(f)
    }
}

/// `4`, `1.5`: digits with at most three decimals.
impl FromStr for Cpus {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse_thousandths(text, Self::EXPECTED, Self::MAX.0).map(Self)
    }
}

impl Quantity for Cpus {
    const EXPECTED: &'static str = "CPUs such as 4 or 1.5";

    fn from_integer(value: u64) -> Result<Self, UnitError> {
        value
            .checked_mul(1000)
            .filter(|millis| *millis <= Self::MAX.0)
            .map(Self)
            .ok_or_else(|| UnitError::TooLarge { text: value.to_string(), most: Self::MAX.to_string() })
    }

    fn from_float(value: f64) -> Result<Self, UnitError> {
        thousandths_of_float(value, Self::EXPECTED, Self::MAX.0).map(Self)
    }
}

impl Magnitude for Cpus {
    fn plus(self, other: Self) -> Option<Self> {
        self.checked_add(other)
    }

    fn minus(self, other: Self) -> Option<Self> {
        self.checked_sub(other)
    }
}

/// As an integer where whole, else as a number such as 1.5.
impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.as_whole() {
            Some(whole) => serializer.serialize_u64(whole),
            // At most 10^9, which a float holds exactly; the quotient is the float nearest to the decimal number.
            None => serializer.serialize_f64(self.0 as f64 / 1000.0),
        }
    }
}

/// From a number that is exact to thousandths, or a string.
impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn thousandths_are_read_and_shown_exactly() {
        for (text, millis) in
            [("4", 4000), ("1.5", 1500), ("0.25", 250), ("0.001", 1), ("0", 0), ("1000000", 1_000_000_000)]
        {
            assert_eq!(text.parse::<Cpus>().unwrap().millis(), millis, "{text}");
            assert_eq!(Cpus::from_millis(millis).to_string(), text);
        }
        assert_eq!("1.50".parse(), Ok(Cpus::from_millis(1500)));
    }

    #[test]
    fn what_is_no_cpu_count_is_refused() {
        let texts =
            ["", "NaN", "nan", "inf", "-inf", "1e3", "1.2345", "-1", "-0.5", "+1", ".5", "1.", "1.5.1", "4 ", "1,5"];
        for text in texts.into_iter().chain(["150%", "0x4", "1000001", "1000000.001", "99999999999999999999999", "-"]) {
            assert!(text.parse::<Cpus>().is_err(), "{text:?}");
        }
        assert!("1.2345".parse::<Cpus>().unwrap_err().to_string().contains("three decimals"));
        assert!("-1".parse::<Cpus>().unwrap_err().to_string().contains("negative"));
        assert!("1000001".parse::<Cpus>().unwrap_err().to_string().contains("1000000"));
    }

    #[test]
    fn json_numbers_are_exact_or_refused() {
        assert_eq!(serde_json::to_string(&Cpus::whole(4)).unwrap(), "4");
        assert_eq!(serde_json::to_string(&Cpus::from_millis(1500)).unwrap(), "1.5");
        for json in ["1.5", "\"1.5\"", "1.50"] {
            assert_eq!(serde_json::from_str::<Cpus>(json).unwrap(), Cpus::from_millis(1500));
        }
        for json in ["1.0005", "0.30000000000000004", "-1", "-1.5", "\"x\"", "true", "null", "1e300", "1000001"] {
            assert!(serde_json::from_str::<Cpus>(json).is_err(), "{json}");
        }
        assert!(Cpus::from_float(f64::NAN).is_err() && Cpus::from_float(f64::INFINITY).is_err());
    }

    #[test]
    fn arithmetic_stays_within_the_bounds() {
        assert_eq!(Cpus::MAX.checked_add(Cpus::from_millis(1)), None);
        assert_eq!(Cpus::MAX.saturating_add(Cpus::whole(1)), Cpus::MAX);
        assert_eq!(Cpus::ZERO.checked_sub(Cpus::from_millis(1)), None);
        assert_eq!(Cpus::ZERO.saturating_sub(Cpus::whole(1)), Cpus::ZERO);
        assert_eq!(Cpus::whole(u32::MAX), Cpus::MAX);
        assert_eq!((Cpus::from_millis(1500).as_whole(), Cpus::whole(3).as_whole()), (None, Some(3)));
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_back(millis in 0..=Cpus::MAX.millis()) {
            let cpus = Cpus::from_millis(millis);
            prop_assert_eq!(cpus.to_string().parse(), Ok(cpus));
            let json = serde_json::to_string(&cpus).unwrap();
            prop_assert_eq!(serde_json::from_str::<Cpus>(&json).unwrap(), cpus);
        }

        #[test]
        fn no_text_and_no_float_panics(text in "\\PC*", float in any::<f64>()) {
            let _ = text.parse::<Cpus>();
            let _ = Cpus::from_float(float);
        }
    }
}
