//! Who may do what: rights, callers by their ids, and the one decision over the `[[access]]` rules. Knows neither sockets
//! nor the names behind uids and gids; those are resolved before a rule comes here.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::pattern::Pattern;

/// A user or group id.
pub type Id = u32;

/// One thing that a rule can allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Right {
    /// List, show, usage, capacity, sizes, events, own operations.
    Read,
    /// The instance's log lines.
    Logs,
    /// Resize, prepare, undo.
    Resize,
    /// Start, stop, restart, suspend, resume.
    Power,
    /// Clear a hold, all history, other people's operations.
    Admin,
}

impl Right {
    /// Every right.
    pub const ALL: [Self; 5] = [Self::Read, Self::Logs, Self::Resize, Self::Power, Self::Admin];

    /// The word for it in the config file and in messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Logs => "logs",
            Self::Resize => "resize",
            Self::Power => "power",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A word that is no right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown right {0}: there are read, logs, resize, power and admin")]
pub struct UnknownRight(pub String);

impl FromStr for Right {
    type Err = UnknownRight;

    fn from_str(text: &str) -> Result<Self, UnknownRight> {
        let known = Self::ALL.into_iter().find(|right| right.as_str() == text);
        known.ok_or_else(|| UnknownRight(crate::units::quote(text)))
    }
}

/// A set of rights.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rights(u8);

impl Rights {
    /// No right.
    pub const NONE: Self = Self(0);
    /// Every right.
    pub const ALL: Self = Self(0b1_1111);

    /// Whether this right is in the set.
    #[must_use]
    pub const fn contains(self, right: Right) -> bool {
        self.0 & Self::bit(right) != 0
    }

    /// The rights in the set, in the order of [`Right::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Right> {
        Right::ALL.into_iter().filter(move |right| self.contains(*right))
    }

    const fn bit(right: Right) -> u8 {
        1 << right as u8
    }
}

impl FromIterator<Right> for Rights {
    fn from_iter<I: IntoIterator<Item = Right>>(rights: I) -> Self {
        rights.into_iter().fold(Self::NONE, |set, right| Self(set.0 | Self::bit(right)))
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.iter().map(Right::as_str).collect::<Vec<_>>().join(", "))
    }
}

impl fmt::Debug for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Who asks: the ids from the peer credentials and the supplementary groups of that uid.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Caller {
    /// User id.
    pub uid: Id,
    /// Primary group id, as the connecting process had it.
    pub gid: Id,
    /// Supplementary group ids.
    pub groups: Vec<Id>,
}

/// Whom a rule is about, by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResolvedPrincipal {
    /// The user of this id.
    Uid(Id),
    /// Whoever is in the group of this id.
    Gid(Id),
}

impl ResolvedPrincipal {
    fn is(self, caller: &Caller) -> bool {
        match self {
            Self::Uid(uid) => caller.uid == uid,
            Self::Gid(gid) => caller.gid == gid || caller.groups.contains(&gid),
        }
    }
}

/// An `[[access]]` rule whose user or group has been looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedRule {
    /// Which rule it is, for the record: `[[access]] 2 (group agentd)`.
    pub description: String,
    /// Whom it is about.
    pub principal: ResolvedPrincipal,
    /// What it allows.
    pub rights: Rights,
    /// For which instances.
    pub pattern: Pattern,
}

/// The answer to "may this caller do that".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Yes, and by which rule.
    Allowed {
        /// `root`, `agentd's own uid`, or the description of the first rule that allows it.
        rule: String,
    },
    /// No rule at all names this caller: `forbidden`, before anything is looked up.
    NoRule,
    /// Rules name the caller, none of them this instance: it is `not-found` for them.
    NoMatch,
    /// Rules let the caller do something here, but not this: `forbidden`.
    Lacks(Right),
}

impl fmt::Display for Decision {
    /// For the record: the answer and why.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed { rule } => write!(f, "allowed by {rule}"),
            Self::NoRule => f.write_str("not allowed: no access rule names the caller"),
            Self::NoMatch => f.write_str("not allowed: no access rule of the caller matches"),
            Self::Lacks(right) => write!(f, "not allowed: no access rule of the caller that matches gives `{right}`"),
        }
    }
}

impl Decision {
    /// Whether the answer is yes.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        matches!(self, Self::Allowed { .. })
    }
}

/// All rules of the config, ready to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessTable {
    rules: Vec<ResolvedRule>,
    own_uid: Id,
}

impl AccessTable {
    /// The table of these rules, in the order of the file. `own_uid` is the uid that agentd runs as.
    #[must_use]
    pub const fn new(rules: Vec<ResolvedRule>, own_uid: Id) -> Self {
        Self { rules, own_uid }
    }

    /// Whether the caller has a right: on the target, or without a target on anything at all (then what is shown is
    /// filtered instance by instance with [`AccessTable::can_see`]). Root and agentd's own uid have every right.
    #[must_use]
    pub fn decide(&self, caller: &Caller, right: Right, target: Option<(&str, &BTreeMap<String, String>)>) -> Decision {
        if let Some(rule) = self.privileged(caller) {
            return Decision::Allowed { rule: rule.to_owned() };
        }
        let mut of_caller = self.rules_of(caller).peekable();
        if of_caller.peek().is_none() {
            return Decision::NoRule;
        }
        let mut here =
            of_caller.filter(|rule| target.is_none_or(|(name, labels)| rule.pattern.matches(name, labels))).peekable();
        if here.peek().is_none() {
            return Decision::NoMatch;
        }
        match here.find(|rule| rule.rights.contains(right)) {
            Some(rule) => Decision::Allowed { rule: rule.description.clone() },
            None => Decision::Lacks(right),
        }
    }

    /// Whether the caller may know that this instance exists: has `read` on it.
    #[must_use]
    pub fn can_see(&self, caller: &Caller, reference: &str, labels: &BTreeMap<String, String>) -> bool {
        self.privileged(caller).is_some()
            || self
                .rules_of(caller)
                .any(|rule| rule.rights.contains(Right::Read) && rule.pattern.matches(reference, labels))
    }

    /// Whether any rule names the caller, or none is needed.
    #[must_use]
    pub fn knows(&self, caller: &Caller) -> bool {
        self.privileged(caller).is_some() || self.rules_of(caller).next().is_some()
    }

    fn rules_of(&self, caller: &Caller) -> impl Iterator<Item = &ResolvedRule> {
        self.rules.iter().filter(move |rule| rule.principal.is(caller))
    }

    fn privileged(&self, caller: &Caller) -> Option<&'static str> {
        match caller.uid {
            0 => Some("root"),
            uid if uid == self.own_uid => Some("agentd's own uid"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: Id = 990;

    fn rule(number: usize, principal: ResolvedPrincipal, rights: &[Right], pattern: &str) -> ResolvedRule {
        ResolvedRule {
            description: format!("[[access]] {number}"),
            principal,
            rights: rights.iter().copied().collect(),
            pattern: Pattern::parse(pattern).unwrap(),
        }
    }

    fn table() -> AccessTable {
        let rules = vec![
            rule(1, ResolvedPrincipal::Gid(100), &[Right::Read], "*"),
            rule(2, ResolvedPrincipal::Uid(1000), &[Right::Resize, Right::Power], "vm/ci-*"),
            rule(3, ResolvedPrincipal::Uid(1001), &[Right::Read], "label:team=a"),
        ];
        AccessTable::new(rules, OWN)
    }

    fn caller(uid: Id, gid: Id, groups: &[Id]) -> Caller {
        Caller { uid, gid, groups: groups.to_vec() }
    }

    fn decide(caller: &Caller, right: Right, reference: &str) -> Decision {
        table().decide(caller, right, Some((reference, &BTreeMap::new())))
    }

    #[test]
    fn root_and_the_own_uid_have_every_right() {
        for (uid, rule) in [(0, "root"), (OWN, "agentd's own uid")] {
            for right in Right::ALL {
                let decision = decide(&caller(uid, 5, &[]), right, "vm/web");
                assert_eq!(decision, Decision::Allowed { rule: rule.to_owned() });
            }
            assert!(table().can_see(&caller(uid, 5, &[]), "vm/web", &BTreeMap::new()));
        }
    }

    #[test]
    fn a_root_group_is_not_root() {
        assert_eq!(decide(&caller(5, 0, &[0]), Right::Read, "vm/web"), Decision::NoRule);
    }

    #[test]
    fn a_caller_without_a_rule_is_told_so_before_any_look_up() {
        let stranger = caller(7, 7, &[8]);
        assert_eq!(decide(&stranger, Right::Read, "vm/web"), Decision::NoRule);
        assert_eq!(table().decide(&stranger, Right::Read, None), Decision::NoRule);
        for (uid, known) in [(7, false), (1000, true), (0, true), (OWN, true)] {
            assert_eq!(table().knows(&caller(uid, 7, &[8])), known, "{uid}");
        }
    }

    #[test]
    fn what_goes_on_record_says_why() {
        for (decision, said) in [
            (Decision::Allowed { rule: "root".into() }, "allowed by root"),
            (Decision::NoRule, "not allowed: no access rule names the caller"),
            (Decision::NoMatch, "not allowed: no access rule of the caller matches"),
            (Decision::Lacks(Right::Logs), "not allowed: no access rule of the caller that matches gives `logs`"),
        ] {
            assert_eq!(decision.to_string(), said);
        }
    }

    #[test]
    fn a_group_counts_as_primary_and_as_supplementary() {
        let allowed = Decision::Allowed { rule: "[[access]] 1".to_owned() };
        assert_eq!(decide(&caller(7, 100, &[]), Right::Read, "vm/web"), allowed);
        assert_eq!(decide(&caller(7, 7, &[5, 100]), Right::Read, "vm/web"), allowed);
        assert_eq!(decide(&caller(100, 7, &[]), Right::Read, "vm/web"), Decision::NoRule, "a uid is no gid");
    }

    #[test]
    fn an_instance_that_no_rule_matches_is_not_found() {
        let deploy = caller(1000, 7, &[]);
        assert_eq!(decide(&deploy, Right::Resize, "vm/web"), Decision::NoMatch);
        assert!(decide(&deploy, Right::Resize, "vm/ci-1").is_allowed());
    }

    #[test]
    fn a_right_that_is_missing_where_others_are_given_is_lacking() {
        let deploy = caller(1000, 7, &[]);
        assert_eq!(decide(&deploy, Right::Logs, "vm/ci-1"), Decision::Lacks(Right::Logs));
        assert_eq!(table().decide(&deploy, Right::Admin, None), Decision::Lacks(Right::Admin));
        assert!(!table().can_see(&deploy, "vm/ci-1", &BTreeMap::new()), "resize alone shows nothing");
    }

    #[test]
    fn without_a_target_a_right_on_anything_is_enough() {
        assert!(table().decide(&caller(1000, 7, &[]), Right::Power, None).is_allowed());
    }

    #[test]
    fn a_label_rule_shows_only_what_carries_the_label() {
        let labels = BTreeMap::from([("team".to_owned(), "a".to_owned())]);
        let caller = caller(1001, 7, &[]);
        assert!(table().can_see(&caller, "container/db", &labels));
        assert!(!table().can_see(&caller, "container/db", &BTreeMap::new()));
    }

    #[test]
    fn the_words_for_rights_are_those_of_the_config_file() {
        for right in Right::ALL {
            assert_eq!(right.as_str().parse(), Ok(right));
            assert_eq!(serde_json::to_string(&right).unwrap(), format!("\"{right}\""));
        }
        assert!("Read".parse::<Right>().is_err() && "write".parse::<Right>().is_err());
        assert_eq!(Right::ALL.into_iter().collect::<Rights>(), Rights::ALL);
        assert_eq!([Right::Power, Right::Read].into_iter().collect::<Rights>().to_string(), "read, power");
        let twice: Rights = [Right::Read, Right::Logs, Right::Read].into_iter().collect();
        assert_eq!(format!("{twice:?}"), "{Read, Logs}");
    }

    fn rights() -> impl Strategy<Value = Vec<Right>> {
        proptest::collection::vec(proptest::sample::select(Right::ALL.to_vec()), 0..4)
    }

    fn rules() -> impl Strategy<Value = Vec<ResolvedRule>> {
        let principal =
            prop_oneof![(1_u32..4).prop_map(ResolvedPrincipal::Uid), (1_u32..4).prop_map(ResolvedPrincipal::Gid)];
        let pattern = proptest::sample::select(vec!["*", "vm/*", "vm/a", "container/*"]);
        proptest::collection::vec((principal, rights(), pattern).prop_map(|(p, r, t)| rule(1, p, &r, t)), 0..5)
    }

    proptest! {
        #[test]
        fn nothing_is_allowed_that_no_single_rule_allows(
            rules in rules(), uid in 1_u32..5, gid in 1_u32..5, right in 0_usize..5,
            reference in proptest::sample::select(vec!["vm/a", "vm/b", "container/a", "unit/x"]),
        ) {
            let (caller, right, labels) = (caller(uid, gid, &[]), Right::ALL[right], BTreeMap::new());
            let mine = |rule: &ResolvedRule| match rule.principal {
                ResolvedPrincipal::Uid(id) => id == uid,
                ResolvedPrincipal::Gid(id) => id == gid,
            };
            let here = |rule: &&ResolvedRule| mine(rule) && rule.pattern.matches(reference, &labels);
            let expected = if !rules.iter().any(mine) {
                Decision::NoRule
            } else if !rules.iter().any(|rule| here(&rule)) {
                Decision::NoMatch
            } else if rules.iter().filter(here).any(|rule| rule.rights.contains(right)) {
                Decision::Allowed { rule: "[[access]] 1".to_owned() }
            } else {
                Decision::Lacks(right)
            };
            let table = AccessTable::new(rules, OWN);
            prop_assert_eq!(table.decide(&caller, right, Some((reference, &labels))), expected.clone());
            if right == Right::Read {
                prop_assert_eq!(table.can_see(&caller, reference, &labels), expected.is_allowed());
            }
        }
    }
}
