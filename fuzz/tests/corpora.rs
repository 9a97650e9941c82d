//! Each target with each input of its corpus, and with inputs made of those by chance: what `make fuzz` does with a
//! compiler's help and for as long as it is told, a little of it with any compiler.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agentd_fuzz::{TARGETS, Target};

/// How long each target gets made-up inputs. Not a bound: a slower machine tries fewer.
const A_WHILE: Duration = Duration::from_secs(2);

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpora")
}

fn inputs(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = corpora().join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).expect("an input"))).collect()
}

/// xorshift64*: the same inputs in each run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).expect("31 bits") % end.max(1)
    }

    /// One input with some bytes of it changed, or with a part of another one in it.
    fn made_of(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut made = inputs[self.below(inputs.len())].clone();
        for _ in 0..=self.below(4) {
            let (at, byte) = (self.below(made.len() + 1), u8::try_from(self.below(256)).expect("a byte"));
            match self.below(5) {
                0 if at < made.len() => made[at] = byte,
                1 if at < made.len() => made[at] ^= 1 << (byte & 7),
                2 if at < made.len() => drop(made.drain(at..(at + self.below(16)).min(made.len()))),
                3 => made.insert(at, byte),
                _ => {
                    let other = &inputs[self.below(inputs.len())];
                    let from = self.below(other.len() + 1);
                    let part = &other[from..(from + self.below(64)).min(other.len())];
                    made.splice(at..at, part.iter().copied());
                }
            }
        }
        made
    }
}

/// Says which input it was, for a corpus, where a target panics.
struct Trying<'a>(&'a str, &'a [u8]);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} panicked on {}", self.0, self.1.escape_ascii());
        }
    }
}

fn try_out(name: &str, target: Target) -> u64 {
    let kept = inputs(name);
    assert!(!kept.is_empty(), "corpora/{name} is empty");
    for (path, input) in &kept {
        let path = path.display().to_string();
        let _trying = Trying(&path, input);
        target(input);
    }
    let inputs: Vec<Vec<u8>> = kept.into_iter().map(|(_, input)| input).collect();
    let (mut chance, mut count, begun) = (Chance(0x9e37_79b9_7f4a_7c15), 0, Instant::now());
    while begun.elapsed() < A_WHILE {
        let made = chance.made_of(&inputs);
        let _trying = Trying(name, &made);
        target(&made);
        count += 1;
    }
    count
}

#[test]
fn no_target_breaks_on_its_corpus_or_on_what_is_made_of_it() {
    for (name, target) in TARGETS {
        println!("{name}: {} inputs", try_out(name, target));
    }
}

#[test]
fn each_target_has_its_fuzzer_and_each_corpus_its_target() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("path = \"targets/{name}.rs\"")), "{name} has no fuzzer");
    }
    for folder in fs::read_dir(corpora()).unwrap() {
        let name = folder.unwrap().file_name().into_string().unwrap();
        assert!(TARGETS.iter().any(|(target, _)| *target == name), "corpora/{name} is nobody's");
    }
}
