//! What a request can say about an amount: a limit or none ([`Limit`]), absolute or relative ([`Amount`]).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Magnitude, Quantity, UnitError, quote};

/// A limit, or the statement that there is none. No limit is greater than every limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit<T> {
    /// At most this.
    At(T),
    /// No limit: `none`.
    Unlimited,
}

impl<T> Limit<T> {
    /// The limit where there is one.
    pub fn at(self) -> Option<T> {
        match self {
            Self::At(value) => Some(value),
            Self::Unlimited => None,
        }
    }

    /// Whether there is no limit.
    pub const fn is_unlimited(&self) -> bool {
        matches!(self, Self::Unlimited)
    }

    /// The same limit of another kind.
    pub fn map<U>(self, convert: impl FnOnce(T) -> U) -> Limit<U> {
        match self {
            Self::At(value) => Limit::At(convert(value)),
            Self::Unlimited => Limit::Unlimited,
        }
    }
}

impl<T: fmt::Display> fmt::Display for Limit<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(value) => value.fmt(f),
            Self::Unlimited => f.pad("none"),
        }
    }
}

/// `none`, or what `T` reads.
impl<T: Quantity> FromStr for Limit<T> {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        if text.eq_ignore_ascii_case("none") { Ok(Self::Unlimited) } else { text.parse().map(Self::At) }
    }
}

impl<T: Quantity> Quantity for Limit<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn from_integer(value: u64) -> Result<Self, UnitError> {
        T::from_integer(value).map(Self::At)
    }

    fn from_negative(value: i64) -> Result<Self, UnitError> {
        T::from_negative(value).map(Self::At)
    }

    fn from_float(value: f64) -> Result<Self, UnitError> {
        T::from_float(value).map(Self::At)
    }
}

/// As the value, or the string `none`.
impl<T: Serialize> Serialize for Limit<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::At(value) => value.serialize(serializer),
            Self::Unlimited => serializer.serialize_str("none"),
        }
    }
}

/// From a value, or the string `none`. What null means is for the holder of the field to say.
impl<'de, T: Quantity> Deserialize<'de> for Limit<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::deserialize(deserializer)
    }
}

/// An amount as a request states it: absolute, or relative to the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Amount<T> {
    /// To this value: `4`.
    To(T),
    /// More by this: `+1`.
    Plus(T),
    /// Less by this: `-512M`.
    Minus(T),
}

impl<T: Magnitude> Amount<T> {
    /// The absolute amount that this means beside a present one, or None where that is below zero or more than `T` holds.
    pub fn against(self, present: T) -> Option<T> {
        match self {
            Self::To(value) => Some(value),
            Self::Plus(value) => present.plus(value),
            Self::Minus(value) => present.minus(value),
        }
    }
}

impl<T> Amount<T> {
    /// Whether this needs a present amount to mean something.
    pub const fn is_relative(&self) -> bool {
        !matches!(self, Self::To(_))
    }
}

impl<T: fmt::Display> fmt::Display for Amount<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(value) => value.fmt(f),
            Self::Plus(value) => f.pad(&format!("+{value}")),
            Self::Minus(value) => f.pad(&format!("-{value}")),
        }
    }
}

/// What `T` reads, relative with a leading `+` or `-`.
impl<T: Magnitude> FromStr for Amount<T> {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let unsigned = |rest: &str| {
            if rest.starts_with(['+', '-']) {
                return Err(UnitError::NotAnAmount { text: quote(text), expected: Self::EXPECTED });
            }
            rest.parse()
        };
        match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(rest), _) => unsigned(rest).map(Self::Plus),
            (_, Some(rest)) => unsigned(rest).map(Self::Minus),
            _ => text.parse().map(Self::To),
        }
    }
}

impl<T: Magnitude> Quantity for Amount<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn from_integer(value: u64) -> Result<Self, UnitError> {
        T::from_integer(value).map(Self::To)
    }

    fn from_negative(value: i64) -> Result<Self, UnitError> {
        Err(UnitError::RelativeNumber { text: value.to_string() })
    }

    fn from_float(value: f64) -> Result<Self, UnitError> {
        if value < 0.0 {
            return Err(UnitError::RelativeNumber { text: value.to_string() });
        }
        T::from_float(value).map(Self::To)
    }
}

/// An absolute amount as `T` does it, a relative one as a string.
impl<T: Serialize + fmt::Display> Serialize for Amount<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::To(value) => value.serialize(serializer),
            Self::Plus(_) | Self::Minus(_) => serializer.collect_str(self),
        }
    }
}

/// From a number (always absolute) or a string (relative with a sign).
impl<'de, T: Magnitude> Deserialize<'de> for Amount<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        super::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{ByteCount, Cpus};
    use super::*;

    #[test]
    fn no_limit_is_above_every_limit() {
        assert!(Limit::Unlimited > Limit::At(Cpus::MAX));
        assert!(Limit::At(Cpus::whole(2)) > Limit::At(Cpus::whole(1)));
    }

    #[test]
    fn none_is_the_word_for_no_limit() {
        assert_eq!("none".parse::<Limit<Cpus>>(), Ok(Limit::Unlimited));
        assert_eq!("1.5".parse::<Limit<Cpus>>(), Ok(Limit::At(Cpus::from_millis(1500))));
        assert_eq!(serde_json::to_string(&Limit::<Cpus>::Unlimited).unwrap(), "\"none\"");
        assert_eq!(serde_json::from_str::<Limit<ByteCount>>("\"none\"").unwrap(), Limit::Unlimited);
        assert_eq!(serde_json::from_str::<Limit<ByteCount>>("1024").unwrap().at().unwrap().bytes(), 1024);
        for json in ["null", "\"nothing\"", "\"\"", "-1"] {
            assert!(serde_json::from_str::<Limit<Cpus>>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn a_sign_in_a_string_makes_it_relative() {
        assert_eq!("4".parse(), Ok(Amount::To(Cpus::whole(4))));
        assert_eq!("+1".parse(), Ok(Amount::Plus(Cpus::whole(1))));
        assert_eq!("-512M".parse(), Ok(Amount::Minus(ByteCount::mib(512))));
        for text in ["+-1", "--1", "+", "-", "+ 1", "++1"] {
            assert!(text.parse::<Amount<Cpus>>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_negative_number_is_refused_with_the_string_to_write() {
        for json in ["-1", "-1.5"] {
            let said = serde_json::from_str::<Amount<Cpus>>(json).unwrap_err().to_string();
            assert!(said.contains(&format!("the string \"{json}\"")), "{said}");
        }
        assert_eq!(serde_json::from_str::<Amount<Cpus>>("\"-1\"").unwrap(), Amount::Minus(Cpus::whole(1)));
        let both = serde_json::from_str::<Limit<Amount<ByteCount>>>("\"+1G\"").unwrap();
        assert_eq!(both, Limit::At(Amount::Plus(ByteCount::gib(1))));
    }

    #[test]
    fn a_relative_amount_never_leaves_the_range() {
        let two = Cpus::whole(2);
        assert_eq!(Amount::Plus(two).against(two), Some(Cpus::whole(4)));
        assert_eq!(Amount::Minus(two).against(Cpus::whole(1)), None);
        assert_eq!(Amount::Plus(two).against(Cpus::MAX), None);
        assert_eq!(Amount::To(two).against(Cpus::MAX), Some(two));
    }

    fn amounts() -> impl Strategy<Value = Amount<ByteCount>> {
        (0..=ByteCount::MAX.bytes(), 0_u32..62, 0_u8..3).prop_map(|(bytes, shift, form)| {
            let count = ByteCount::new(bytes >> shift << shift).unwrap();
            match form {
                0 => Amount::To(count),
                1 => Amount::Plus(count),
                _ => Amount::Minus(count),
            }
        })
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_back(amount in amounts(), limited in any::<bool>()) {
            prop_assert_eq!(amount.to_string().parse(), Ok(amount));
            let limit = if limited { Limit::At(amount) } else { Limit::Unlimited };
            prop_assert_eq!(limit.to_string().parse(), Ok(limit));
            let json = serde_json::to_string(&limit).unwrap();
            prop_assert_eq!(serde_json::from_str::<Limit<Amount<ByteCount>>>(&json).unwrap(), limit);
        }
    }
}
