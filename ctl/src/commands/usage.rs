//! `ctl usage`: what instances use; and what `ctl show` tells of it.

use agentd_core::api::{Instance, UsageList, UsageView};
use agentd_core::instance::{Kind, Ref, Target};

use super::Context;
use crate::args::Usage;
use crate::client::{GLANCE_TIME, encode, instance_path};
use crate::error::Failure;
use crate::render::{Report, usage as rendered};

/// Shows what one instance uses, or all.
pub(super) fn usage(context: &Context, args: &Usage) -> Result<Report, Failure> {
    if let Some(typed) = &args.reference {
        let reference = context.client.resolve(typed)?;
        let reply = context.get(&path(&reference))?;
        let view: UsageView = reply.read()?;
        let out = rendered::one(&view, context.screen.out_width);
        return Ok(context.screen.success(&reply.body, out, String::new()));
    }
    let kind = args.kind.as_deref().map(str::parse::<Kind>).transpose()?;
    let mut query = Vec::new();
    query.extend(kind.map(|kind| format!("kind={kind}")));
    query.extend(args.pattern.as_deref().map(|pattern| format!("match={}", encode(pattern))));
    let question = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    let reply = context.get(&format!("/v1/usage{question}"))?;
    let list: UsageList = reply.read()?;
    let what =
        if query.is_empty() { "no instance that you may see is up\n" } else { "no instance that matches is up\n" };
    let err = if list.items.is_empty() { what.to_owned() } else { String::new() };
    Ok(context.screen.success(&reply.body, rendered::all(&list, context.screen.out_width), err))
}

/// What an instance that is shown uses, in a line or two, as far as that can be told at once. It is no part of what was asked for,
/// so that a daemon that doesn't tell is no failure.
pub(super) fn in_short(context: &Context, instance: &Instance) -> String {
    let seen = !context.screen.json && !context.screen.quiet;
    let reference = match instance.reference.parse() {
        Ok(Target::Full(reference)) if seen && instance.state.is_up() => reference,
        _ => return String::new(),
    };
    let reply = context.client.get_within(&format!("{}?now=true", path(&reference)), GLANCE_TIME);
    let view = reply.and_then(|reply| reply.read::<UsageView>());
    view.map(|view| rendered::in_short(&view, context.screen.out_width)).unwrap_or_default()
}

fn path(reference: &Ref) -> String {
    format!("{}/usage", instance_path(reference))
}
