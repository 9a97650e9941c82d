//! `ctl stop`, `start`, `restart`, `suspend`, `resume` and `clear-hold`.

use agentd_core::api::{HoldKind, Instance, StartRequest, StopRequest, SuspendRequest};
use agentd_core::error::Code;

use super::{Context, duration, unreadable};
use crate::args::{Start, Stop, Suspend};
use crate::client::instance_path;
use crate::error::Failure;
use crate::render::{Report, table, text};

/// Brings an instance down.
pub(super) fn stop(context: &Context, args: &Stop) -> Result<Report, Failure> {
    down(context, "stop", args)
}

/// Brings an instance down and up again.
pub(super) fn restart(context: &Context, args: &Stop) -> Result<Report, Failure> {
    down(context, "restart", args)
}

fn down(context: &Context, verb: &str, args: &Stop) -> Result<Report, Failure> {
    let timeout = duration("--timeout", args.timeout.as_ref())?;
    let body = StopRequest { timeout, force: args.force, dry_run: args.plan.dry_run };
    context.change(&args.of.reference, verb, &body, &args.plan)
}

/// Pauses an instance and holds it.
pub(super) fn suspend(context: &Context, args: &Suspend) -> Result<Report, Failure> {
    let body = SuspendRequest { reason: args.reason.clone(), dry_run: args.plan.dry_run };
    context.change(&args.of.reference, "suspend", &body, &args.plan)
}

/// Lifts that hold and lets it run on.
pub(super) fn resume(context: &Context, args: &Start) -> Result<Report, Failure> {
    context.change(&args.of.reference, "resume", &StartRequest { dry_run: args.plan.dry_run }, &args.plan)
}

/// Brings an instance up.
pub(super) fn start(context: &Context, args: &Start) -> Result<Report, Failure> {
    context.change(&args.of.reference, "start", &StartRequest { dry_run: args.plan.dry_run }, &args.plan)
}

/// Lifts a hold; the answer is the instance as it is now.
pub(super) fn clear_hold(context: &Context, typed: &str) -> Result<Report, Failure> {
    let reference = context.client.resolve(typed)?;
    let path = format!("{}/clear-hold", instance_path(&reference));
    let reply = context.send(path, reference.clone(), &StartRequest::default(), None, false)?;
    let instance: Instance = reply.read().map_err(|failure| unreadable(failure, false))?;
    let held = if instance.holds.is_empty() { "is not held" } else { "is still held" };
    let mut out = format!("{}  {held}\n", text::clean(&instance.reference));
    out += &table::show(&instance, context.screen.out_width);
    let mut report = context.screen.success(&reply.body, out, String::new());
    report.keep_exit = true;
    if instance.holds.iter().any(|hold| hold.hold == HoldKind::Suspended) {
        report.exit = Code::Held.exit();
        report.err += &format!("error: {reference} is suspended, which only this lifts: ctl resume {reference}\n");
    }
    Ok(report)
}
