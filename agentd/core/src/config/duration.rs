//! Durations as people write them in the config file and on the command line: one number, one unit.

use std::time::Duration;

use crate::units::quote;

/// The longest duration: a hundred years, so that adding one to a clock's time never overflows.
const MOST: Duration = Duration::from_secs(36_500 * 24 * 60 * 60);

/// The units, largest first, in milliseconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DurationError {
    /// Not one number with one unit.
    #[error("{text} is no duration: write a whole number with ms, s, m, h or d, such as 500ms, 60s, 10m, 2h or 90d")]
    Malformed {
        /// The text, quoted and shortened.
        text: String,
    },
    /// More than a hundred years.
    #[error("{text} is too long: the most is 36500d")]
    TooLong {
        /// The text, quoted and shortened.
        text: String,
    },
}

/// Reads `500ms`, `60s`, `10m`, `2h`, `90d`, or `0`.
///
/// # Errors
/// Where the text is none of these, or above a hundred years.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let malformed = || DurationError::Malformed { text: quote(text) };
    let too_long = || DurationError::TooLong { text: quote(text) };
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (digits, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
    let (_, millis) = UNITS.iter().find(|(known, _)| *known == unit).ok_or_else(malformed)?;
    if digits.is_empty() {
        return Err(malformed());
    }
    let number: u64 = digits.parse().map_err(|_| too_long())?;
    let duration = number.checked_mul(*millis).map(Duration::from_millis);
    duration.filter(|duration| *duration <= MOST).ok_or_else(too_long)
}

/// The shortest text that [`parse_duration`] reads back; what is below a millisecond is dropped.
#[must_use]
pub fn display_duration(duration: Duration) -> String {
    let total = duration.as_millis();
    if total == 0 {
        return "0s".to_owned();
    }
    let dividing = UNITS.iter().find(|(_, millis)| total.is_multiple_of(u128::from(*millis)));
    dividing.map_or_else(|| format!("{total}ms"), |(unit, millis)| format!("{}{unit}", total / u128::from(*millis)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_unit_means_what_it_says() {
        for (text, millis) in [("500ms", 500), ("60s", 60_000), ("10m", 600_000), ("2h", 7_200_000), ("1d", 86_400_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
    }

    #[test]
    fn what_is_no_duration_is_refused() {
        for text in ["", "60", "s", "-1s", "+1s", "1.5h", "1h30m", "1 s", "1S", "1w", "1min", "٣s", "36501d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert!(parse_duration("99999999999999999999d").is_err() && parse_duration("18446744073709551615d").is_err());
    }

    #[test]
    fn display_takes_the_largest_unit_that_divides() {
        for (millis, shown) in [(0, "0s"), (90_000, "90s"), (120_000, "2m"), (1500, "1500ms"), (7_776_000_000, "90d")] {
            assert_eq!(display_duration(Duration::from_millis(millis)), shown);
        }
    }

    proptest! {
        #[test]
        fn what_is_displayed_parses_back(millis in 0..=3_153_600_000_000_u64) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&display_duration(duration)), Ok(duration));
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = parse_duration(&text);
        }
    }
}
