//! Which `[[limit]]` rules hold for one instance, merged: of bounds the tightest, of the rest the last that says something.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Config, LimitRule, Shrink};
use crate::units::{ByteCount, Cpus};

/// A bound and the rule that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound<T> {
    /// The bound itself.
    pub value: T,
    /// The place of its rule in [`Config::limits`].
    pub rule: usize,
}

/// What the config says about one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Least memory: the largest `min_memory` of the rules that match.
    pub min_memory: Option<Bound<ByteCount>>,
    /// Most CPUs: the smallest `max_cpus` of the rules that match.
    pub max_cpus: Option<Bound<Cpus>>,
    /// Most memory: the smallest `max_memory` of the rules that match.
    pub max_memory: Option<Bound<ByteCount>>,
    /// Whether live changes are allowed.
    pub live: bool,
    /// Whether a limit may be taken away.
    pub unlimited: bool,
    /// When memory may be taken away.
    pub shrink: Shrink,
    /// Memory kept above what is in use, where a rule states it; see [`Rules::margin`].
    pub shrink_margin: Option<ByteCount>,
    /// How long a graceful stop may take.
    pub stop_timeout: Duration,
    /// Whether drift is put back.
    pub repair_drift: bool,
    /// The places in [`Config::limits`] of all rules that match, whose totals apply too.
    pub matching: Vec<usize>,
}

/// What holds where no rule says anything.
impl Default for Rules {
    fn default() -> Self {
        Self {
            min_memory: None,
            max_cpus: None,
            max_memory: None,
            live: true,
            unlimited: false,
            shrink: Shrink::IfUnused,
            shrink_margin: None,
            stop_timeout: Duration::from_secs(60),
            repair_drift: false,
            matching: Vec::new(),
        }
    }
}

/// The margin where no rule states one.
const SHRINK_MARGIN: ByteCount = ByteCount::mib(64);

impl Rules {
    /// Memory kept above what is in use when an instance that has `now` shrinks: what a rule states, else 64 MiB and no more
    /// than a quarter of what it has, since containers of 64 MiB that use one are common.
    pub fn margin(&self, now: Option<ByteCount>) -> ByteCount {
        let quarter = now.and_then(|now| ByteCount::new(now.bytes() / 4));
        self.shrink_margin.unwrap_or(quarter.map_or(SHRINK_MARGIN, |quarter| quarter.min(SHRINK_MARGIN)))
    }

    fn add(&mut self, index: usize, rule: &LimitRule) {
        tighten(&mut self.min_memory, rule.min_memory, index, |new, old| new > old);
        tighten(&mut self.max_cpus, rule.max_cpus, index, |new, old| new < old);
        tighten(&mut self.max_memory, rule.max_memory, index, |new, old| new < old);
        self.live = rule.live.unwrap_or(self.live);
        self.unlimited = rule.unlimited.unwrap_or(self.unlimited);
        self.shrink = rule.shrink.unwrap_or(self.shrink);
        self.shrink_margin = rule.shrink_margin.or(self.shrink_margin);
        self.stop_timeout = rule.stop_timeout.unwrap_or(self.stop_timeout);
        self.repair_drift = rule.repair_drift.unwrap_or(self.repair_drift);
        self.matching.push(index);
    }
}

/// Takes the new value where it is tighter, so that of two equal bounds the first is named.
fn tighten<T: Copy>(bound: &mut Option<Bound<T>>, value: Option<T>, rule: usize, tighter: impl Fn(T, T) -> bool) {
    if let Some(value) = value
        && bound.is_none_or(|present| tighter(value, present.value))
    {
        *bound = Some(Bound { value, rule });
    }
}

impl Config {
    /// The rules for an instance of this reference and these labels.
    #[must_use]
    pub fn rules_for(&self, reference: &str, labels: &BTreeMap<String, String>) -> Rules {
        let mut rules = Rules::default();
        for (index, rule) in self.limits.iter().enumerate() {
            if rule.pattern.matches(reference, labels) {
                rules.add(index, rule);
            }
        }
        rules
    }

    /// How a `[[limit]]` key is named in messages, given the rule's place in [`Config::limits`]: `[[limit]] 2 max_cpus`.
    #[must_use]
    pub fn limit_key(index: usize, key: &str) -> String {
        format!("[[limit]] {} {key}", index + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(text: &str, reference: &str) -> Rules {
        Config::parse("test.toml", text).unwrap().rules_for(reference, &BTreeMap::new())
    }

    const TWO: &str = r#"
        [[limit]]
        match = "vm/*"
        min_memory = "1G"
        max_cpus = 8
        max_memory = "16G"
        live = false
        shrink = "never"
        stop_timeout = "5s"
        [[limit]]
        match = "vm/ci-*"
        min_memory = "512M"
        max_cpus = 4
        max_memory = "32G"
        live = true
        repair_drift = true
        [[limit]]
        match = "container/*"
        max_cpus = 1
        unlimited = true
    "#;

    #[test]
    fn of_bounds_the_tightest_applies() {
        let rules = rules(TWO, "vm/ci-1");
        assert_eq!(rules.min_memory, Some(Bound { value: ByteCount::gib(1), rule: 0 }));
        assert_eq!(rules.max_cpus, Some(Bound { value: Cpus::whole(4), rule: 1 }));
        assert_eq!(rules.max_memory, Some(Bound { value: ByteCount::gib(16), rule: 0 }));
        assert_eq!(rules.matching, [0, 1]);
    }

    #[test]
    fn of_the_rest_the_last_that_states_it_wins() {
        let rules = rules(TWO, "vm/ci-1");
        assert!(rules.live && rules.repair_drift && !rules.unlimited);
        assert_eq!((rules.shrink, rules.stop_timeout), (Shrink::Never, Duration::from_secs(5)));
    }

    #[test]
    fn a_rule_that_does_not_match_says_nothing() {
        assert_eq!(rules(TWO, "unit/batch"), Rules::default());
        assert!(!rules(TWO, "vm/web").live);
    }

    proptest! {
        #[test]
        fn a_further_rule_never_loosens_a_bound(maxima in proptest::collection::vec(1_u32..64, 1..6)) {
            let text: String = maxima.iter().map(|max| format!("[[limit]]\nmatch = \"*\"\nmax_cpus = {max}\n")).collect();
            let least = maxima.iter().copied().min().map(Cpus::whole);
            prop_assert_eq!(rules(&text, "vm/a").max_cpus.map(|bound| bound.value), least);
        }
    }
}
