//! One look of `ctl top` as lines, or as one JSON document: for what is no terminal, and for who asks for it.

use jiff::Zoned;

use super::Options;
use super::model::{Model, Row};
use super::source::Source;
use crate::error::Failure;
use crate::render::bar;
use crate::render::table::{self, Stand, lay};
use crate::render::{Report, Screen};

/// Looks once, and prints it.
pub(super) fn report(source: &Source, screen: &Screen, options: &Options) -> Result<Report, Failure> {
    let answers = super::look(source, screen)?;
    let sample = answers.sample()?;
    let err = table::unavailable(&sample.unavailable, "what it has is as it was last seen, or missing");
    let model = Model::new(sample, Zoned::now(), options.sort);
    Ok(screen.success(&answers.document()?, lines(&model, screen.out_width), err))
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
