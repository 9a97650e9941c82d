//! `ctl resize` and `ctl prepare`: what was typed as the body of a request. Values go to the server as they are meant, relative ones as
//! such: it alone knows what they are relative to.

use std::str::FromStr;

use agentd_core::api::{Apply, PrepareRequest, ResizeRequest, Restart};
use agentd_core::error::{Code, Problem};
use agentd_core::units::{Amount, Limit, Magnitude, UnitError};

use super::{Context, duration};
use crate::args::{Prepare, Resize, RestartWhen};
use crate::error::Failure;
use crate::render::Report;

/// Changes CPUs and memory.
pub(super) fn resize(context: &Context, args: &Resize) -> Result<Report, Failure> {
    context.change(&args.of.reference, "resize", &request(args)?, &args.plan)
}

/// Puts headroom into what is saved.
pub(super) fn prepare(context: &Context, args: &Prepare) -> Result<Report, Failure> {
    let body = PrepareRequest {
        max_cpus: value("--max-cpus", args.max_cpus.as_deref())?,
        max_memory: value("--max-memory", args.max_memory.as_deref())?,
        dry_run: args.plan.dry_run,
    };
    context.change(&args.of.reference, "prepare", &body, &args.plan)
}

fn value<T: FromStr<Err = UnitError>>(option: &str, text: Option<&str>) -> Result<Option<T>, Failure> {
    let read = |text: &str| {
        T::from_str(text).map_err(|error| Problem::new(Code::InvalidRequest, format!("{option}: {error}")))
    };
    Ok(text.map(read).transpose()?)
}

/// The request that the arguments mean.
pub(super) fn request(args: &Resize) -> Result<ResizeRequest, Failure> {
    Ok(ResizeRequest {
        cpus: amount("--cpus", args.cpus.as_deref())?,
        cpu_limit: amount("--cpu-limit", args.cpu_limit.as_deref())?,
        memory: amount("--memory", args.memory.as_deref())?,
        size: args.size.clone(),
        dry_run: args.plan.dry_run,
        restart: match args.restart {
            Some(RestartWhen::IfNeeded) => Restart::IfNeeded,
            Some(RestartWhen::Never) | None => Restart::Never,
        },
        force: args.force,
        apply: match (args.live_only, args.next_boot) {
            (true, _) => Some(Apply::Live),
            (_, true) => Some(Apply::NextBoot),
            _ => None,
        },
        for_: duration("--for", args.for_.as_ref())?,
        wait: duration("--wait", args.wait.as_ref())?,
    })
}

/// Reads `4`, `+1`, `-512M` or `none`.
fn amount<T: Magnitude>(option: &str, text: Option<&str>) -> Result<Option<Limit<Amount<T>>>, Failure> {
    let read = |text| {
        Limit::<Amount<T>>::from_str(text)
            .map_err(|error: UnitError| Failure::from(Problem::new(Code::InvalidRequest, format!("{option}: {error}"))))
    };
    text.map(read).transpose()
}
