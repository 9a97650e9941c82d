//! [`Pattern`]: which instances a rule is about, by reference (`vm/ci-*`) or by a container's label. Knows the grammar of
//! patterns only; which rule uses one, and what follows from it, is elsewhere.

use std::collections::BTreeMap;
use std::fmt;

use globset::{GlobBuilder, GlobMatcher};

use crate::units::quote;

/// What references begin with, each followed by a `/` and a name.
const KINDS: [&str; 3] = ["vm", "container", "unit"];

/// The longest glob in bytes: room for a list of names.
const LONGEST: usize = 4096;
/// The most opening braces of a glob. Each may stand in another one, and globset panics where the regular expression that it
/// makes of them is nested deeper than 250.
const MOST_BRACES: usize = 64;

/// A glob over references in which `*` crosses `/`, or `label:KEY=VALUE`, which only containers have. Keeps the text it was
/// written as; two patterns are equal where their texts are.
#[derive(Clone)]
pub struct Pattern {
    source: String,
    matcher: Matcher,
}

#[derive(Clone)]
enum Matcher {
    Glob(GlobMatcher),
    Label { key: String, value: String },
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// Nothing was written.
    #[error("the pattern is empty: write `*` for everything")]
    Empty,
    /// `label:` without a key or without `=`.
    #[error("{text} is no label pattern: write label:KEY=VALUE")]
    Label {
        /// The text, quoted and shortened.
        text: String,
    },
    /// The glob cannot be read.
    #[error("{text} is no pattern: {reason}")]
    Glob {
        /// The text, quoted and shortened.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No reference begins like this, so nothing would ever match.
    #[error("{text} can match nothing: references begin with vm/, container/ or unit/ (write */NAME for any kind)")]
    NoKind {
        /// The text, quoted and shortened.
        text: String,
    },
    /// A label where only a glob has a meaning.
    #[error("{text}: units have no labels: write a glob of their names")]
    NoLabels {
        /// The text, quoted and shortened.
        text: String,
    },
}

impl Pattern {
    /// Reads a pattern over references: a glob, or `label:KEY=VALUE`.
    ///
    /// # Errors
    /// Where the text is no pattern, and where it could never match a reference.
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        if let Some(label) = text.strip_prefix("label:") {
            return match label.split_once('=') {
                Some((key, value)) if !key.is_empty() => Ok(Self {
                    source: text.to_owned(),
                    matcher: Matcher::Label { key: key.to_owned(), value: value.to_owned() },
                }),
                _ => Err(PatternError::Label { text: quote(text) }),
            };
        }
        let pattern = Self::glob(text)?;
        if can_match_a_reference(text) { Ok(pattern) } else { Err(PatternError::NoKind { text: quote(text) }) }
    }

    /// Reads a glob over bare names, such as `batch-*.service`; then [`Pattern::matches`] takes a name for a reference.
    ///
    /// # Errors
    /// Where the text is no glob.
    pub fn parse_name(text: &str) -> Result<Self, PatternError> {
        if text.starts_with("label:") {
            return Err(PatternError::NoLabels { text: quote(text) });
        }
        Self::glob(text)
    }

    fn glob(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() {
            return Err(PatternError::Empty);
        }
        let refused = |reason: String| PatternError::Glob { text: quote(text), reason };
        if text.len() > LONGEST {
            return Err(refused(format!("it has {} bytes, of which {LONGEST} are the most", text.len())));
        }
        let braces = text.bytes().filter(|byte| *byte == b'{').count();
        if braces > MOST_BRACES {
            return Err(refused(format!("it has {braces} opening braces, of which {MOST_BRACES} are the most")));
        }
        let glob = GlobBuilder::new(text)
            .literal_separator(false)
            .backslash_escape(true)
            .build()
            .map_err(|error| refused(error.kind().to_string()))?;
        Ok(Self { source: text.to_owned(), matcher: Matcher::Glob(glob.compile_matcher()) })
    }

    /// Whether an instance of this reference and these labels is meant. Instances without labels give an empty map.
    #[must_use]
    pub fn matches(&self, reference: &str, labels: &BTreeMap<String, String>) -> bool {
        match &self.matcher {
            Matcher::Glob(glob) => glob.is_match(reference),
            Matcher::Label { key, value } => {
                reference.starts_with("container/") && labels.get(key).is_some_and(|found| found == value)
            }
        }
    }

    /// The text as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.source
    }
}

/// Whether the literal beginning of a glob fits any kind of reference.
fn can_match_a_reference(glob: &str) -> bool {
    let literal = glob.split(['*', '?', '[', '{', '\\']).next().unwrap_or_default();
    let is_whole = literal.len() == glob.len();
    KINDS.iter().any(|kind| {
        let begins = format!("{kind}/");
        literal.starts_with(&begins) || (!is_whole && begins.starts_with(literal))
    })
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Pattern {}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({:?})", self.source)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.source)
    }
}

impl std::str::FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, reference: &str) -> bool {
        Pattern::parse(pattern).unwrap().matches(reference, &BTreeMap::new())
    }

    #[test]
    fn a_star_crosses_the_slash() {
        assert!(matches("*", "vm/web"));
        assert!(matches("*web", "unit/web"));
        assert!(
            matches("vm/ci-*", "vm/ci-1") && !matches("vm/ci-*", "vm/web") && !matches("vm/ci-*", "container/ci-1")
        );
        assert!(matches("{vm,unit}/a?", "unit/ab") && !matches("{vm,unit}/a?", "container/ab"));
        assert!(matches("v*", "vm/web"));
        assert!(matches("vm/[ab]", "vm/a") && !matches("vm/[!ab]", "vm/a"));
    }

    #[test]
    fn a_pattern_matches_the_whole_reference() {
        assert!(!matches("vm/web", "vm/web2") && !matches("vm/eb", "vm/web") && !matches("vm/WEB", "vm/web"));
    }

    #[test]
    fn a_label_matches_containers_only() {
        let pattern = Pattern::parse("label:team=a=b").unwrap();
        let labels = BTreeMap::from([("team".to_owned(), "a=b".to_owned())]);
        assert!(pattern.matches("container/db", &labels));
        assert!(!pattern.matches("vm/db", &labels));
        assert!(!pattern.matches("container/db", &BTreeMap::new()));
        assert!(!pattern.matches("container/db", &BTreeMap::from([("team".to_owned(), "a".to_owned())])));
    }

    #[test]
    fn what_could_never_match_is_refused() {
        for text in ["web", "web*", "vms/ci-*", "VM/web", "vm", "/vm/web", "containers/*"] {
            assert!(matches!(Pattern::parse(text), Err(PatternError::NoKind { .. })), "{text}");
        }
        for text in ["", "vm/[", "vm/{a", "label:", "label:team", "label:=a", "vm/[b-a]"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_too_long_or_too_deep_is_refused_and_what_is_almost_is_read() {
        for (inner, outer) in [("", ""), (",", ""), (",a", "b,"), ("[}]", ",[{]")] {
            let nested = |depth: usize| {
                format!("vm/{}a{}", format!("{{{inner}").repeat(depth), format!("{outer}}}").repeat(depth))
            };
            let most = if outer.contains('{') { MOST_BRACES / 2 } else { MOST_BRACES };
            Pattern::parse(&nested(most)).unwrap();
            let refused = Pattern::parse(&nested(most + 1)).unwrap_err().to_string();
            assert!(refused.contains("opening braces, of which 64 are the most"), "{refused}");
        }
        for part in ["?", "*", "[!a-z]", "[a-z]", "*a", "a", "\u{1f980}", "**/"] {
            let text = format!("*{}", part.repeat((LONGEST - 1) / part.len()));
            Pattern::parse(&text).unwrap();
            assert!(Pattern::parse(&format!("{text}{}", "a".repeat(LONGEST))).is_err());
        }
    }

    #[test]
    fn a_name_pattern_needs_no_kind_and_takes_no_label() {
        let pattern = Pattern::parse_name("batch-*.service").unwrap();
        assert!(pattern.matches("batch-1.service", &BTreeMap::new()));
        assert!(Pattern::parse_name("label:a=b").is_err() && Pattern::parse_name("").is_err());
    }

    proptest! {
        #[test]
        fn the_text_is_kept(name in "[a-z*?-]{0,20}") {
            let text = format!("vm/{name}");
            let pattern = Pattern::parse(&text).unwrap();
            prop_assert_eq!(pattern.to_string(), text.clone());
            prop_assert_eq!(Pattern::parse(pattern.as_str()).unwrap(), pattern);
        }

        #[test]
        fn a_prefix_glob_is_starts_with(prefix in "[a-z.]{0,3}", name in "[a-z./]{1,6}") {
            prop_assert_eq!(matches(&format!("vm/{prefix}*"), &format!("vm/{name}")), name.starts_with(&prefix));
        }

        #[test]
        fn what_is_refused_as_matching_nothing_matches_nothing(text in "[vmunit/*?a\\[\\]{},-]{1,6}", name in "[vmunita/-]{0,4}") {
            if let Err(PatternError::NoKind { .. }) = Pattern::parse(&text) {
                let glob = Pattern::parse_name(&text).unwrap();
                for kind in KINDS {
                    let reference = format!("{kind}/{name}a");
                    prop_assert!(!glob.matches(&reference, &BTreeMap::new()), "{} {}", text, reference);
                }
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC*|[{},a\\[\\]!*?\\\\-]{0,300}") {
            let _ = Pattern::parse(&text).map_err(|error| error.to_string());
        }
    }
}
