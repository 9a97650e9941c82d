//! What a benchmark came to: rows with their goals, as a table, as JSON, as a picture, and compared with an earlier run.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// How much worse a ratio may be than the one that is kept.
const WORSE: f64 = 1.3;

/// In what a row is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Ours as a part of the rival's.
    Ratio,
    /// Milliseconds.
    Milliseconds,
    /// Megabytes (10^6 bytes).
    Megabytes,
    /// Per second.
    PerSecond,
    /// Of one processor.
    Percent,
}

impl Unit {
    const ALL: [(Unit, &'static str); 5] = [
        (Unit::Ratio, ""),
        (Unit::Milliseconds, "ms"),
        (Unit::Megabytes, "MB"),
        (Unit::PerSecond, "/s"),
        (Unit::Percent, "%"),
    ];

    fn word(self) -> &'static str {
        Unit::ALL.iter().find(|(unit, _)| *unit == self).map_or("", |(_, word)| word)
    }
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What is compared; no two rows share it.
    pub what: String,
    /// Our side.
    pub ours: String,
    /// The other side; empty where there is none.
    pub rival: String,
    /// In what it is told.
    pub unit: Unit,
    /// What came out.
    pub value: f64,
    /// The middle half.
    pub spread: (f64, f64),
    /// What is to be reached: at most this, or at least where it is per second. None of what is measured as a limit.
    pub goal: Option<f64>,
    /// How often it was measured.
    pub samples: usize,
    /// Our side's time in milliseconds.
    pub ours_ms: Option<f64>,
    /// The rival's.
    pub rival_ms: Option<f64>,
}

impl Row {
    /// What has no other side.
    pub fn alone(what: &str, ours: &str, unit: Unit, values: &[f64], goal: impl Into<Option<f64>>) -> Self {
        let at = |percent| super::percentile(values, percent);
        Row {
            what: what.to_owned(),
            ours: ours.to_owned(),
            rival: String::new(),
            unit,
            value: at(50),
            spread: (at(25), at(75)),
            goal: goal.into(),
            samples: values.len(),
            ours_ms: None,
            rival_ms: None,
        }
    }

    /// Whether the goal is reached, where there is one.
    pub fn is_met(&self) -> bool {
        let least = self.unit == Unit::PerSecond;
        self.goal.is_none_or(|goal| if least { self.value >= goal } else { self.value <= goal })
    }

    fn told(&self, value: f64) -> String {
        let digits = match value.abs() {
            large if large >= 100.0 => 0,
            small if small < 0.1 => 3,
            _ => 2,
        };
        let word = self.unit.word();
        let space = if word.len() > 1 && !word.starts_with('/') { " " } else { "" };
        format!("{value:.digits$}{space}{word}")
    }

    fn goal(&self) -> String {
        let sign = if self.unit == Unit::PerSecond { '≥' } else { '≤' };
        self.goal.map_or_else(|| "–".to_owned(), |goal| format!("{sign} {}", self.told(goal)))
    }

    fn json(&self) -> Value {
        json!({
            "what": self.what,
            "ours": self.ours,
            "rival": self.rival,
            "unit": self.unit.word(),
            "value": round(self.value),
            "middle_half": [round(self.spread.0), round(self.spread.1)],
            "goal": self.goal,
            "met": self.is_met(),
            "samples": self.samples,
            "ours_ms": self.ours_ms.map(round),
            "rival_ms": self.rival_ms.map(round),
        })
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (low, high) = (self.told(self.spread.0), self.told(self.spread.1));
        let (value, goal) = (self.told(self.value), self.goal());
        write!(out, "  {}: {value} ({low} … {high}), goal {goal}", self.what)?;
        if let (Some(ours), Some(rival)) = (self.ours_ms, self.rival_ms) {
            write!(out, "; {ours:.2} ms beside {rival:.2} ms")?;
        }
        if self.is_met() { Ok(()) } else { write!(out, ": missed") }
    }
}

/// All rows of one run on one machine.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The machine and what runs on it.
    pub facts: Vec<(String, String)>,
    /// What was measured.
    pub rows: Vec<Row>,
}

impl Report {
    /// As a table in Markdown, with the machine below it.
    pub fn markdown(&self) -> String {
        let mut text = String::from("| what | beside | goal | measured | middle half |\n|---|---|---|---|---|\n");
        for row in &self.rows {
            let (low, high) = (row.told(row.spread.0), row.told(row.spread.1));
            let (value, missed) = (row.told(row.value), if row.is_met() { "" } else { " (missed)" });
            let rival = if row.rival.is_empty() { "–" } else { &row.rival };
            // Writing to a String cannot fail.
            let _ = writeln!(
                text,
                "| {}: {} | {rival} | {} | **{value}**{missed} | {low} … {high} |",
                row.what,
                row.ours,
                row.goal()
            );
        }
        let facts: Vec<String> = self.facts.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let _ = writeln!(text, "\nMeasured on: {}.", facts.join("; "));
        text
    }

    /// As JSON.
    pub fn json(&self) -> Value {
        let facts: Map<String, Value> =
            self.facts.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
        json!({ "facts": facts, "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>() })
    }

    /// The ratios as a picture: a bar to each, on a logarithmic scale, with the rival at 1 and the goal as a mark.
    pub fn svg(&self) -> String {
        const LEFT: f64 = 330.0;
        const WIDTH: f64 = 420.0;
        const LINE: f64 = 26.0;
        let rows: Vec<&Row> = self.rows.iter().filter(|row| row.unit == Unit::Ratio && row.value > 0.0).collect();
        // From a hundredth of the rival's to four times as much.
        let x = |value: f64| LEFT + WIDTH * ((value.clamp(0.01, 4.0).log10() + 2.0) / (4.0_f64.log10() + 2.0));
        let (mut body, mut y) = (String::new(), 34.0);
        for row in &rows {
            let goal = row.goal.map(|goal| {
                format!("<path d=\"M{:.1} {:.1}v18\" stroke=\"#222\" stroke-dasharray=\"3 2\"/>", x(goal), y - 2.0)
            });
            let color = if row.is_met() { "#4f9d69" } else { "#c8553d" };
            let text = row.what.replace('&', "&amp;").replace('<', "&lt;");
            let _ = writeln!(
                body,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>\
                 <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"{color}\"/>\
                 <path d=\"M{:.1} {:.1}H{:.1}\" stroke=\"#222\" stroke-width=\"2\"/>\
                 {}<text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                LEFT - 8.0,
                y + 11.5,
                y,
                x(row.value) - LEFT,
                x(row.spread.0),
                y + 7.0,
                x(row.spread.1),
                goal.unwrap_or_default(),
                LEFT + WIDTH + 10.0,
                y + 11.5,
                row.told(row.value),
            );
            y += LINE;
        }
        let one = x(1.0);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 820 {height:.0}\" width=\"820\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"{LEFT}\" y=\"18\">ours ÷ the other’s time (logarithmic); solid: the other; dashed: the goal</text>\n\
             <path d=\"M{one:.1} 26V{foot:.1}\" stroke=\"#222\"/>\n{body}</svg>\n",
            height = y + 10.0,
            foot = y,
        )
    }

    /// What has become worse than in an earlier run, by ratios only: times are the machine's. A row that is gone is worse.
    ///
    /// # Errors
    /// The earlier run's JSON isn't one of a report.
    pub fn worse_than(&self, kept: &Value) -> Result<Vec<String>> {
        let mut worse = Vec::new();
        for row in kept["rows"].as_array().context("the kept figures have no rows")? {
            let what = row["what"].as_str().context("a row without a name")?;
            if row["unit"] != Unit::Ratio.word() {
                continue;
            }
            let before = row["value"].as_f64().with_context(|| format!("{what} has no value"))?;
            match self.rows.iter().find(|now| now.what == what) {
                None => worse.push(format!("{what}: was not measured")),
                Some(now) if now.value > before * WORSE => {
                    worse.push(format!("{what}: {:.2}, and {before:.2} is kept", now.value));
                }
                Some(_) => {}
            }
        }
        Ok(worse)
    }
}

/// To four digits after the point.
fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(value: f64) -> Report {
        let row = Row { unit: Unit::Ratio, rival: "r".into(), ..Row::alone("w", "o", Unit::Ratio, &[value], 0.5) };
        let times = Row::alone("t", "o", Unit::Milliseconds, &[value * 100.0], 1.0);
        Report { facts: vec![("cores".into(), "2".into())], rows: vec![row, times] }
    }

    #[test]
    fn a_goal_is_reached_or_missed_and_the_table_says_which() {
        let text = report(0.4).markdown();
        assert!(text.contains("| w: o | r | ≤ 0.50 | **0.40** | 0.40 … 0.40 |"), "{text}");
        assert!(text.contains("**40.00 ms** (missed)") && text.contains("Measured on: cores 2."), "{text}");
        let rate = Row::alone("c", "o", Unit::PerSecond, &[2500.0], 2000.0);
        assert!(rate.is_met() && rate.goal() == "≥ 2000/s", "{}", rate.goal());
        let limit = Row::alone("l", "o", Unit::Ratio, &[9.0], None);
        assert!(limit.is_met() && limit.goal() == "–", "{}", limit.goal());
    }

    #[test]
    fn only_ratios_are_compared_and_none_may_be_missing() {
        let kept = report(0.4).json();
        assert!(report(0.5).worse_than(&kept).unwrap().is_empty());
        assert_eq!(report(0.6).worse_than(&kept).unwrap(), ["w: 0.60, and 0.40 is kept"]);
        assert_eq!(Report::default().worse_than(&kept).unwrap(), ["w: was not measured"]);
        assert!(report(0.4).worse_than(&json!({})).is_err());
    }

    #[test]
    fn the_picture_has_a_bar_for_each_ratio() {
        let picture = report(0.4).svg();
        assert_eq!(picture.matches("<rect").count(), 2, "{picture}");
    }
}
