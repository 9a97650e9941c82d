//! `ctl top`: what was typed, as options of the view.

use std::time::Duration;

use agentd_core::config::parse_duration;
use agentd_core::error::{Code, Problem};

use super::Context;
use crate::args::Top;
use crate::error::Failure;
use crate::render::Report;
use crate::top::{self, Options};

/// A look costs agentd something; more of them show no more.
const SHORTEST: Duration = Duration::from_millis(200);

/// Shows the host and its instances until somebody has seen enough.
pub(super) fn top(context: &Context, args: &Top, host: Option<&str>) -> Result<Report, Failure> {
    let invalid = |detail: String| Problem::new(Code::InvalidRequest, format!("--interval: {detail}"));
    let interval = parse_duration(&args.interval).map_err(|error| invalid(error.to_string()))?;
    if interval < SHORTEST {
        return Err(invalid(format!("{} is too short: the least is 200ms", args.interval)).into());
    }
    let options = Options {
        sort: args.sort,
        pattern: args.pattern.clone(),
        interval,
        once: args.once,
        address: host.map(str::to_owned),
    };
    top::run(context.client.clone(), &context.screen, &options)
}
