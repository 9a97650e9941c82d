//! Measuring two things against each other: turns taken one after the other, medians, their ratio and its spread. Knows
//! nothing of what is measured.

mod kept;
mod report;

use std::{
    io::Seek as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

pub use kept::Kept;
pub use report::{Report, Row, Unit};

/// Rounds that are run first and not counted: caches fill, and what is made at first use is made.
const WARM_UP: usize = 2;
/// Of so many pairs in a row, a 99th percentile is told at the least.
const BLOCK: usize = 100;

/// Which of two states a turn is to lead to. Rounds alternate, so that every side always has something to change.
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

/// What is timed.
type Turn<'a> = Box<dyn Fn(Level) -> Result<Duration> + 'a>;

/// One side of a comparison.
pub struct Contender<'a> {
    name: String,
    turn: Turn<'a>,
}

impl<'a> Contender<'a> {
    /// These commands, one after the other, each of which must end with exit code 0, or with one of `fine`.
    pub fn commands(name: &str, fine: &'static [i32], commands: impl Fn(Level) -> Result<Vec<Command>> + 'a) -> Self {
        Self { name: name.to_owned(), turn: Box::new(move |level| run(commands(level)?, fine)) }
    }

    /// A call of this process.
    pub fn call(name: &str, call: impl Fn(Level) -> Result<()> + 'a) -> Self {
        Self::timed(name, move |level| {
            let begun = Instant::now();
            call(level)?;
            Ok(begun.elapsed())
        })
    }

    /// What tells its own time.
    pub fn timed(name: &str, turn: impl Fn(Level) -> Result<Duration> + 'a) -> Self {
        Self { name: name.to_owned(), turn: Box::new(turn) }
    }
}

/// Runs commands, spawned directly from this process; gives the time from the first spawn to the last end. Their output goes
/// through a pipe as a script would read it; what they say on standard error is kept in a file, for the case that one fails.
fn run(mut commands: Vec<Command>, fine: &[i32]) -> Result<Duration> {
    let mut said = tempfile::tempfile()?;
    for command in &mut commands {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said.try_clone()?);
    }
    let begun = Instant::now();
    for command in &mut commands {
        let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
        if !output.status.code().is_some_and(|code| code == 0 || fine.contains(&code)) {
            said.rewind()?;
            let said = std::io::read_to_string(said)?;
            bail!("{command:?} ended with {}: {}", output.status, said.trim_end());
        }
    }
    Ok(begun.elapsed())
}

/// A comparison.
pub struct Match<'a> {
    what: String,
    ours: Contender<'a>,
    rival: Contender<'a>,
    settled: Option<Box<dyn Fn(Level) -> Result<()> + 'a>>,
}

impl<'a> Match<'a> {
    /// Compares `ours` to `rival`.
    pub fn new(what: &str, ours: Contender<'a>, rival: Contender<'a>) -> Self {
        Self { what: what.to_owned(), ours, rival, settled: None }
    }

    /// Waits, outside the measured time, until the state is seen to be that of the level: after each turn, which proves that
    /// the side did its work, and before each turn after a reset to the other level by the rival. So both sides make the very
    /// same change from the very same state.
    #[must_use]
    pub fn settled(mut self, wait: impl Fn(Level) -> Result<()> + 'a) -> Self {
        self.settled = Some(Box::new(wait));
        self
    }

    /// Runs `pairs` counted pairs, ours and the rival in turn.
    ///
    /// # Errors
    /// A turn that failed, or a state that did not come about.
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
        let Some(settled) = &self.settled else { return (contender.turn)(level).with_context(told) };
        (self.rival.turn)(level.other())
            .and_then(|_| settled(level.other()))
            .context("the reset")
            .with_context(told)?;
        let time = (contender.turn)(level).with_context(told)?;
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
    /// Pairs that were measured elsewhere.
    pub fn new(what: &str, ours: &str, rival: &str, times: Vec<(Duration, Duration)>) -> Self {
        Self { what: what.to_owned(), ours: ours.to_owned(), rival: rival.to_owned(), times }
    }

    fn sides(&self) -> (Vec<f64>, Vec<f64>) {
        self.times.iter().map(|(ours, rival)| (milliseconds(*ours), milliseconds(*rival))).unzip()
    }

    fn row(&self, unit: Unit, value: f64, spread: (f64, f64), goal: impl Into<Option<f64>>) -> Row {
        let (ours, rival) = self.sides();
        Row {
            what: self.what.clone(),
            ours: self.ours.clone(),
            rival: self.rival.clone(),
            unit,
            value,
            spread,
            goal: goal.into(),
            samples: self.times.len(),
            ours_ms: Some(percentile(&ours, 50)),
            rival_ms: Some(percentile(&rival, 50)),
        }
    }

    /// Our median as a part of the rival's: below 1, we are the quicker one. Its spread is that of the middle half of the
    /// single pairs' ratios.
    pub fn ratio(&self, goal: impl Into<Option<f64>>) -> Row {
        let (ours, rival) = self.sides();
        let ratios: Vec<f64> = ours.iter().zip(&rival).map(|(ours, rival)| ours / rival).collect();
        let value = percentile(&ours, 50) / percentile(&rival, 50);
        self.row(Unit::Ratio, value, (percentile(&ratios, 25), percentile(&ratios, 75)), goal)
    }

    /// Our median by itself, in milliseconds.
    pub fn ours(&self, goal: f64) -> Row {
        let (ours, _) = self.sides();
        self.row(Unit::Milliseconds, percentile(&ours, 50), (percentile(&ours, 25), percentile(&ours, 75)), goal)
    }

    /// By how many milliseconds our median is above the rival's.
    pub fn difference(&self, goal: f64) -> Row {
        let (ours, rival) = self.sides();
        let differences: Vec<f64> = ours.iter().zip(&rival).map(|(ours, rival)| ours - rival).collect();
        let value = percentile(&ours, 50) - percentile(&rival, 50);
        self.row(Unit::Milliseconds, value, (percentile(&differences, 25), percentile(&differences, 75)), goal)
    }

    /// Our 99th percentile as a part of the rival's, under a name that says so. Its spread is that of the middle half of the
    /// ratios of blocks of pairs.
    pub fn ratio_of_p99(&self, goal: f64) -> Row {
        let (ours, rival) = self.sides();
        let blocks = ours.chunks_exact(BLOCK).zip(rival.chunks_exact(BLOCK));
        let ratios: Vec<f64> = blocks.map(|(ours, rival)| percentile(ours, 99) / percentile(rival, 99)).collect();
        let value = percentile(&ours, 99) / percentile(&rival, 99);
        let row = self.row(Unit::Ratio, value, (percentile(&ratios, 25), percentile(&ratios, 75)), goal);
        let what = format!("{}, p99", self.what);
        Row { what, ours_ms: Some(percentile(&ours, 99)), rival_ms: Some(percentile(&rival, 99)), ..row }
    }
}

/// A duration in milliseconds.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// By linear interpolation between the two nearest values; not a number where there is none.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::NAN };
    let (below, part) = (last * percent / 100, last * percent % 100);
    let above = (below + 1).min(last);
    #[allow(clippy::cast_precision_loss, reason = "below 100")]
    let part = part as f64 / 100.0;
    values[below] + (values[above] - values[below]) * part
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

    fn near(value: f64, expected: f64) -> bool {
        (value - expected).abs() < 1e-9
    }

    #[test]
    fn percentiles_lie_between_the_nearest_values() {
        let values = [3.0, 1.0, 2.0, 5.0, 4.0];
        assert!(near(percentile(&values, 25), 2.0) && near(percentile(&values, 50), 3.0));
        assert!(near(percentile(&[1.0, 2.0], 75), 1.75) && near(percentile(&[7.0], 99), 7.0));
        assert!(percentile(&[], 50).is_nan());
    }

    #[test]
    fn both_sides_make_the_same_change_from_the_same_state() -> Result<()> {
        let seen = RefCell::new(Vec::new());
        let log = |who: &'static str| {
            let seen = &seen;
            Contender::call(who, move |level| {
                seen.borrow_mut().push((who, level));
                Ok(())
            })
        };
        let figures = Match::new("x", log("ours"), log("rival")).settled(|_| Ok(())).run(2)?;
        assert_eq!(figures.times.len(), 2);
        use Level::{High, Low};
        let up = [("rival", Low), ("ours", High), ("rival", Low), ("rival", High)];
        let down = [("rival", High), ("ours", Low), ("rival", High), ("rival", Low)];
        assert_eq!(*seen.borrow(), [up, down, up, down].concat());
        Ok(())
    }

    #[test]
    fn a_command_that_fails_ends_the_match_unless_its_code_is_fine() {
        assert!(run(vec![shell("exit 8")], &[]).is_err());
        assert!(run(vec![shell("exit 8")], &[8]).is_ok());
        let fails = |code: i32| Contender::commands("c", &[], move |_| Ok(vec![shell(&format!("exit {code}"))]));
        let error = Match::new("x", fails(0), fails(1)).run(1).map(drop).unwrap_err();
        assert!(format!("{error:#}").contains("exit 1"), "{error:#}");
    }

    #[test]
    fn rows_are_made_of_medians_and_percentiles() {
        let ms = Duration::from_millis;
        let figures = Figures::new("w", "o", "r", vec![(ms(1), ms(4)), (ms(2), ms(4)), (ms(9), ms(8))]);
        assert!(near(figures.ratio(1.0).value, 0.5) && near(figures.difference(1.0).value, -2.0));
        let many = (1..=BLOCK as u64).map(|n| (ms(n), ms(2 * n))).collect();
        let row = Figures::new("w", "o", "r", many).ratio_of_p99(1.0);
        assert!(near(row.value, 0.5) && near(row.spread.0, 0.5), "{row:?}");
    }
}
