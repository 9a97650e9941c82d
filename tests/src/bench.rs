//! Measuring commands against each other: turns taken one after the other, medians, their ratio and its spread. Knows
//! nothing of what the commands do.

use std::{
    fmt::Write as _,
    io::Seek as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Rounds that are run first and not counted: caches fill, and what is made at first use is made.
const WARM_UP: usize = 2;

/// Which of two states a turn is to lead to. Rounds alternate, so that every command always has something to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// The smaller values.
    Low,
    /// The larger values.
    High,
}

impl Level {
    fn other(self) -> Self {
        match self {
            Level::Low => Level::High,
            Level::High => Level::Low,
        }
    }
}

/// One side of a comparison.
pub struct Contender<'a> {
    name: String,
    commands: Box<dyn Fn(Level) -> Result<Vec<Command>> + 'a>,
    fine: &'static [i32],
}

impl<'a> Contender<'a> {
    /// What is timed: these commands, one after the other, each of which must end with exit code 0.
    pub fn new(name: &str, commands: impl Fn(Level) -> Result<Vec<Command>> + 'a) -> Self {
        Self { name: name.to_owned(), commands: Box::new(commands), fine: &[0] }
    }

    /// Takes these exit codes for success.
    #[must_use]
    pub fn fine(mut self, codes: &'static [i32]) -> Self {
        self.fine = codes;
        self
    }

    /// Runs the commands, spawned directly from this process; gives the time from the first spawn to the last end. Their
    /// output is discarded; what they say on standard error is kept in a file, for the case that one fails.
    fn run(&self, level: Level) -> Result<Duration> {
        let mut commands = (self.commands)(level)?;
        let mut said = tempfile::tempfile()?;
        for command in &mut commands {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?);
        }
        let begun = Instant::now();
        for command in &mut commands {
            let status = command.status().with_context(|| format!("cannot run {command:?}"))?;
            if !status.code().is_some_and(|code| self.fine.contains(&code)) {
                said.rewind()?;
                bail!("{command:?} ended with {status}: {}", std::io::read_to_string(said)?.trim_end());
            }
        }
        Ok(begun.elapsed())
    }
}

/// A comparison of two commands.
pub struct Match<'a> {
    what: String,
    ours: Contender<'a>,
    rival: Contender<'a>,
    settled: Option<Box<dyn Fn(Level) -> Result<()> + 'a>>,
    quiet: Duration,
}

impl<'a> Match<'a> {
    /// Compares `ours` to `rival`.
    pub fn new(what: &str, ours: Contender<'a>, rival: Contender<'a>) -> Self {
        Self { what: what.to_owned(), ours, rival, settled: None, quiet: Duration::ZERO }
    }

    /// Waits, outside the measured time, until the state is seen to be that of the level: after each turn, which proves that
    /// the command did its work, and before each turn after a reset to the other level by the rival's commands. So both
    /// sides make the very same change from the very same state.
    #[must_use]
    pub fn settled(mut self, wait: impl Fn(Level) -> Result<()> + 'a) -> Self {
        self.settled = Some(Box::new(wait));
        self
    }

    /// Leaves everything alone for this long before each turn, as a command finds it that is typed now and then.
    #[must_use]
    pub fn after_quiet(mut self, time: Duration) -> Self {
        self.quiet = time;
        self
    }

    /// Runs `pairs` counted pairs, ours and the rival in turn.
    ///
    /// # Errors
    /// A command that failed, or a state that did not come about.
    pub fn run(&self, pairs: usize) -> Result<Figures> {
        eprintln!("measuring: {} …", self.what);
        let mut times = Vec::with_capacity(pairs);
        let mut level = Level::Low;
        for round in 0..WARM_UP + pairs {
            level = level.other();
            let pair = (self.turn(&self.ours, level)?, self.turn(&self.rival, level)?);
            if round >= WARM_UP {
                times.push(pair);
            }
        }
        Ok(Figures { what: self.what.clone(), ours: self.ours.name.clone(), rival: self.rival.name.clone(), times })
    }

    fn turn(&self, contender: &Contender<'_>, level: Level) -> Result<Duration> {
        let told = || format!("{}, {}, to the level {level:?}", self.what, contender.name);
        let Some(settled) = &self.settled else { return contender.run(level).with_context(told) };
        self.rival.run(level.other()).and_then(|_| settled(level.other())).context("the reset").with_context(told)?;
        std::thread::sleep(self.quiet);
        let time = contender.run(level).with_context(told)?;
        settled(level).with_context(told)?;
        Ok(time)
    }
}

/// What was measured of one match.
#[derive(Debug, Clone)]
pub struct Figures {
    what: String,
    ours: String,
    rival: String,
    times: Vec<(Duration, Duration)>,
}

impl Figures {
    fn milliseconds(&self, side: impl Fn(&(Duration, Duration)) -> Duration) -> Quartiles {
        Quartiles::of(self.times.iter().map(|pair| side(pair).as_secs_f64() * 1e3).collect())
    }

    fn ours(&self) -> Quartiles {
        self.milliseconds(|pair| pair.0)
    }

    fn rival(&self) -> Quartiles {
        self.milliseconds(|pair| pair.1)
    }

    /// Our median as a part of the rival's: below 1, we are the quicker one.
    pub fn ratio(&self) -> f64 {
        self.ours().median / self.rival().median
    }

    /// The quartiles of the single pairs' ratios.
    fn spread(&self) -> Quartiles {
        Quartiles::of(self.times.iter().map(|(ours, rival)| ours.as_secs_f64() / rival.as_secs_f64()).collect())
    }

    /// All of it as JSON, times in milliseconds.
    pub fn json(&self) -> Value {
        let (ours, rival, spread) = (self.ours(), self.rival(), self.spread());
        json!({
            "what": self.what,
            "ours": self.ours,
            "rival": self.rival,
            "pairs": self.times.len(),
            "ratio_of_medians": round(self.ratio()),
            "ratio_quartiles": [round(spread.lower), round(spread.upper)],
            "ours_ms": ours.json(),
            "rival_ms": rival.json(),
            "difference_ms": round(ours.median - rival.median),
        })
    }
}

/// The figures as a table; each match takes a line, and one that tells who was compared with whom.
pub fn table(all: &[Figures]) -> String {
    let mut text = format!(
        "{:<27} {:>6} {:>7} {:>15} {:>11} {:>11} {:>12}\n",
        "ours / rival", "pairs", "ratio", "middle half", "ours, ms", "rival, ms", "differ, ms"
    );
    for figures in all {
        let (ours, rival, spread) = (figures.ours(), figures.rival(), figures.spread());
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<27} {:>6} {:>7.2} {:>15} {:>11.2} {:>11.2} {:>+12.2}\n    {} / {}",
            figures.what,
            figures.times.len(),
            figures.ratio(),
            format!("{:.2} – {:.2}", spread.lower, spread.upper),
            ours.median,
            rival.median,
            ours.median - rival.median,
            figures.ours,
            figures.rival,
        );
    }
    text
}

/// The median and the quartiles around it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Quartiles {
    lower: f64,
    median: f64,
    upper: f64,
}

impl Quartiles {
    /// By linear interpolation between the two nearest values; not a number where there is none.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |quarter: usize| {
            let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
            let (below, part) = (last * quarter / 4, last * quarter % 4);
            let above = (below + 1).min(last);
            values[below] + (values[above] - values[below]) * [0.0, 0.25, 0.5, 0.75][part]
        };
        Self { lower: at(1), median: at(2), upper: at(3) }
    }

    fn json(self) -> Value {
        json!({ "median": round(self.median), "lower_quartile": round(self.lower), "upper_quartile": round(self.upper) })
    }
}

/// To four digits after the point.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn quartiles_lie_between_the_nearest_values() {
        let of = |values: &[f64]| Quartiles::of(values.to_vec());
        assert_eq!(of(&[3.0, 1.0, 2.0, 5.0, 4.0]), Quartiles { lower: 2.0, median: 3.0, upper: 4.0 });
        assert_eq!(of(&[1.0, 2.0]), Quartiles { lower: 1.25, median: 1.5, upper: 1.75 });
        assert_eq!(of(&[7.0]), Quartiles { lower: 7.0, median: 7.0, upper: 7.0 });
        assert!(of(&[]).median.is_nan());
    }

    #[test]
    fn both_sides_make_the_same_change_from_the_same_state() -> Result<()> {
        let seen = RefCell::new(Vec::new());
        let log = |who: &'static str| {
            let seen = &seen;
            move |level: Level| {
                seen.borrow_mut().push((who, level));
                Ok(vec![shell("exit 0")])
            }
        };
        let one = Match::new("x", Contender::new("ours", log("ours")), Contender::new("rival", log("rival")));
        let figures = one.settled(|_| Ok(())).run(2)?;
        assert_eq!(figures.times.len(), 2);
        use Level::{High, Low};
        let up = [("rival", Low), ("ours", High), ("rival", Low), ("rival", High)];
        let down = [("rival", High), ("ours", Low), ("rival", High), ("rival", Low)];
        assert_eq!(*seen.borrow(), [up, down, up, down].concat());
        Ok(())
    }

    #[test]
    fn a_command_that_fails_ends_the_match_unless_its_code_is_fine() {
        let fails = |code: i32| Contender::new("c", move |_| Ok(vec![shell(&format!("exit {code}"))]));
        assert!(fails(8).run(Level::Low).is_err());
        assert!(fails(8).fine(&[0, 8]).run(Level::Low).is_ok());
        let error = Match::new("x", fails(0), fails(1)).run(1).map(drop).unwrap_err();
        assert!(format!("{error:#}").contains("exit 1"), "{error:#}");
    }

    #[test]
    fn the_table_has_the_ratio_of_the_medians() {
        let ms = Duration::from_millis;
        let times = vec![(ms(1), ms(4)), (ms(2), ms(4)), (ms(9), ms(8))];
        let figures = Figures { what: "w".into(), ours: "o".into(), rival: "r".into(), times };
        assert!((figures.ratio() - 0.5).abs() < 1e-9);
        assert_eq!(figures.json()["ratio_of_medians"], 0.5);
        assert!(table(&[figures]).contains("0.50"));
    }
}
