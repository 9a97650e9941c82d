//! Words that people write: on the command line, in requests, in the config file.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::str::FromStr;

use agentd_core::access::Right;
use agentd_core::config::{Config, display_duration, parse_duration};
use agentd_core::instance::{Kind, Ref, State, Target};
use agentd_core::pattern::Pattern;
use agentd_core::units::{Amount, ByteCount, Cpus, Limit, Ratio};

/// What is read is read again as the same from the way it is told.
fn told<T: FromStr + Display + PartialEq + Debug>(text: &str) -> Option<T> {
    let value = text.parse::<T>().ok()?;
    let shown = value.to_string();
    assert_eq!(shown.parse::<T>().ok().as_ref(), Some(&value), "{text:?} is told as {shown:?}");
    Some(value)
}

/// Sizes, CPUs, ratios, limits, amounts and durations.
pub fn units(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let bytes = text.parse::<ByteCount>().ok();
    told::<Cpus>(text);
    told::<Ratio>(text);
    told::<Limit<Cpus>>(text);
    text.parse::<Limit<ByteCount>>().ok();
    let more = text.parse::<Limit<Amount<ByteCount>>>().ok();
    told::<Amount<Cpus>>(text);
    if let (Some(bytes), Some(Limit::At(amount))) = (bytes, more) {
        assert_eq!(amount, Amount::To(bytes), "{text:?}");
    }
    if let Some(Limit::At(amount)) = more {
        // Whatever it is against: a value or none.
        for present in [0, 1, 4096, (1 << 53) - 1, u64::MAX >> 1].into_iter().filter_map(ByteCount::new) {
            amount.against(present);
        }
    }
    if let Ok(duration) = parse_duration(text) {
        let shown = display_duration(duration);
        assert_eq!(parse_duration(&shown).ok(), Some(duration), "{text:?} is told as {shown:?}");
    }
}

/// Names of instances, and what stands for some of them.
pub fn references(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    told::<Right>(text);
    told::<Kind>(text);
    told::<State>(text);
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.as_str(), text, "a target is what was written");
    }
    for kind in [Kind::Vm, Kind::Container, Kind::Unit] {
        if let Ok(reference) = Ref::new(kind, text) {
            assert_eq!((reference.kind(), reference.name()), (kind, text));
            assert!(!text.contains('\0'), "{text:?} ends before its end in C");
            let again = reference.as_str().parse::<Target>();
            assert!(matches!(again, Ok(Target::Full(same)) if same == reference), "{reference} is no target");
        }
    }
}

/// Patterns, each with a name that it may fit.
pub fn patterns(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (text, name) = text.split_once('\n').unwrap_or((text, text));
    let pattern = if name.contains('/') { Pattern::parse(text) } else { Pattern::parse_name(text) };
    let Ok(pattern) = pattern else { return };
    assert_eq!(pattern.as_str(), text);
    let labels = BTreeMap::from([(name.to_owned(), text.to_owned())]);
    let _ = pattern.matches(name, &labels);
}

/// A config file: valid, or refused with the places of what is wrong.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse("agentd.toml", text) {
        Ok(config) => {
            let _ = config.warnings();
            let _ = config.rules_for("vm/web", &BTreeMap::new());
            assert!(config.same_server(&config), "a config is its own equal");
        }
        Err(faults) => {
            assert!(!faults.is_empty(), "refused without a word");
            for fault in faults {
                assert!(fault.to_string().starts_with("agentd.toml"), "{fault} tells no place");
            }
        }
    }
}
