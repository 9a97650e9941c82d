//! One look of `ctl top` as lines, or as one JSON document: for what is no terminal, and for who asks for it.

use std::thread;
use std::time::Duration;

use jiff::Zoned;

use super::Options;
use super::model::{Model, Row};
use super::source::{Sample, Source};
use crate::error::Failure;
use crate::render::bar;
use crate::render::table::{self, Stand, lay};
use crate::render::{Report, Screen};

/// A rate needs two looks. Where agentd had none before this one, another follows after this time.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// Looks once, and prints it.
pub(super) fn report(source: &Source, screen: &Screen, options: &Options) -> Result<Report, Failure> {
    let mut answers = source.ask()?;
    let mut sample = answers.sample()?;
    if lacks_rates(&sample) {
        thread::sleep(SECOND_LOOK.min(options.interval));
        answers = source.ask()?;
        sample = answers.sample()?;
    }
    let err = table::unavailable(&sample.unavailable, "what it has is as it was last seen, or missing");
    let model = Model::new(sample, Zoned::now(), options.sort);
    Ok(screen.success(&answers.document()?, lines(&model, screen.out_width), err))
}

/// Whether a rate is unknown that another look may tell.
fn lacks_rates(sample: &Sample) -> bool {
    sample.host.cpus.is_none()
        || sample
            .instances
            .iter()
            .flat_map(|(_, usage)| usage)
            .any(|usage| usage.cpu.rate.is_none() && usage.cpu.total_ms.is_some())
}

/// The host in two lines, and the columns of the screen without its sparklines.
fn lines(model: &Model, width: Option<usize>) -> String {
    use Stand::{Left, Right, Wrap};
    let sample = model.sample();
    let host = bar::plain(&bar::gauges(&sample.capacity.cpus, &sample.capacity.memory, &sample.host));
    let row = |row: Row<'_>| {
        let notes = row.notes(&model.at).join(", ");
        vec![row.reference(), row.state(), row.cpu(), row.memory(), row.throttled(), row.lag(), notes]
    };
    let header = ["REF", "STATE", "CPU/LIMIT", "MEM/LIMIT", "THROTTLED", "BALLOON LAG", ""];
    let stands = [Left, Left, Right, Right, Right, Right, Wrap];
    host + "\n" + &lay(&header, &stands, model.rows().into_iter().map(row).collect(), width)
}
