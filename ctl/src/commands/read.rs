//! The commands that ask and change nothing: `list`, `show`, `history`, `capacity`, `sizes`, `health`.

use agentd_core::api::{Capacity, Health, HistoryList, Instance, InstanceList, SizeList, UsageList};
use agentd_core::instance::{Kind, State};

use super::Context;
use crate::args::{History, List};
use crate::client::{GLANCE_TIME, all_pages, encode};
use crate::error::Failure;
use crate::render::{Report, bar, history as rendered, table, text};

/// The exit code where agentd is there and something behind it isn't well.
const UNWELL_EXIT: u8 = 3;

/// Lists instances, every page.
pub(super) fn list(context: &Context, args: &List) -> Result<Report, Failure> {
    let kind = args.kind.as_deref().map(str::parse::<Kind>).transpose()?;
    let state = args.state.as_deref().map(str::parse::<State>).transpose()?;
    let mut query = Vec::new();
    query.extend(kind.map(|kind| format!("kind={kind}")));
    query.extend(args.pattern.as_deref().map(|pattern| format!("match={}", encode(pattern))));
    query.extend(state.map(|state| format!("state={state}")));
    query.extend(args.next_boot.then(|| "next_boot=true".to_owned()));
    query.extend(args.unprepared.then(|| "unprepared=true".to_owned()));
    let reply = all_pages("/v1/instances", &query, |path| context.get(path))?;
    let list: InstanceList = reply.read()?;
    let mut err = table::unavailable(&list.unavailable, "what it has is as it was last seen, or missing");
    if list.items.is_empty() {
        err += if query.is_empty() { "there are no instances that you may see\n" } else { "no instance matches\n" };
    }
    let out = if list.items.is_empty() {
        String::new()
    } else {
        table::list(&list.items, args.unprepared, context.screen.out_width)
    };
    Ok(context.screen.success(&reply.body, out, err))
}

/// Shows one instance.
pub(super) fn show(context: &Context, typed: &str) -> Result<Report, Failure> {
    let (client, text) = (context.client.clone(), typed.to_owned());
    let reply = context.watch(None, move || client.look_up(&text))?;
    let instance: Instance = reply.read()?;
    let out = table::show(&instance, context.screen.out_width) + &super::usage::in_short(context, &instance);
    Ok(context.screen.success(&reply.body, out, String::new()))
}

/// Shows what happened, newest first.
pub(super) fn history(context: &Context, args: &History) -> Result<Report, Failure> {
    let reference = args.reference.as_deref().map(|typed| context.client.resolve(typed)).transpose()?;
    let mut query = Vec::new();
    query.extend(reference.as_ref().map(|reference| format!("ref={}", encode(reference.as_str()))));
    query.extend(args.limit.map(|limit| format!("limit={limit}")));
    query.extend(args.before.map(|seq| format!("before={seq}")));
    let question = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
    let reply = context.get(&format!("/v1/history{question}"))?;
    let list: HistoryList = reply.read()?;
    let of = reference.as_ref().map(|reference| format!(" of {}", text::clean(reference.as_str()))).unwrap_or_default();
    if list.items.is_empty() {
        let older = if args.before.is_some() { " before that" } else { "" };
        return Ok(context.screen.success(&reply.body, String::new(), format!("nothing is on record{of}{older}\n")));
    }
    let out = rendered::history(&list.items, reference.is_some(), &rendered::Local::new(), context.screen.out_width);
    let older = list.next.map(|seq| format!("there is more{of}: --before {seq}\n")).unwrap_or_default();
    Ok(context.screen.success(&reply.body, out, older))
}

/// Shows the host; on a terminal with bars, for which it is asked what is in use of it, too.
pub(super) fn capacity(context: &Context) -> Result<Report, Failure> {
    let reply = context.get("/v1/capacity")?;
    let capacity: Capacity = reply.read()?;
    let err = table::unavailable(&capacity.unavailable, "its last known charge stands");
    let mut out = String::new();
    if let (Some(width), false) = (context.screen.out_width, context.screen.json || context.screen.quiet) {
        // What is in use is beside the point here: where it can't be told, the bars go without it.
        let client = context.client.clone();
        let told = context.watch(None, move || client.get_within("/v1/usage", GLANCE_TIME));
        let usage: Option<UsageList> = told.ok().and_then(|reply| reply.read().ok());
        let gauges = bar::gauges(&capacity.cpus, &capacity.memory, &usage.map(|usage| usage.host).unwrap_or_default());
        out = bar::text(&bar::lines(&gauges, width, bar::Glyphs::of_locale())) + "\n";
    }
    out += &table::capacity(&capacity, context.screen.out_width);
    Ok(context.screen.success(&reply.body, out, err))
}

/// Shows the sizes.
pub(super) fn sizes(context: &Context) -> Result<Report, Failure> {
    let reply = context.get("/v1/sizes")?;
    let sizes: SizeList = reply.read()?;
    let (out, err) = if sizes.items.is_empty() {
        (String::new(), "the config file has no [sizes]\n".to_owned())
    } else {
        (table::sizes(&sizes, context.screen.out_width), String::new())
    };
    Ok(context.screen.success(&reply.body, out, err))
}

/// Shows whether all is well.
pub(super) fn health(context: &Context) -> Result<Report, Failure> {
    let reply = context.get("/v1/health")?;
    let health: Health = reply.read()?;
    let mut screen = context.screen;
    screen.quiet &= health.ok;
    let mut report = screen.success(&reply.body, table::health(&health, screen.out_width), String::new());
    report.exit = if health.ok { 0 } else { UNWELL_EXIT };
    Ok(report)
}
