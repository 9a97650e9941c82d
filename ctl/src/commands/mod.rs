//! The commands: each reads its arguments for their meaning, asks the daemon, and gives a report. This file has what they
//! share.

mod config;
mod logs;
mod metrics;
mod power;
mod read;
mod resize;
mod top;
mod undo;
mod usage;

use agentd_core::api::OperationView;
use agentd_core::config::parse_duration;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::Ref;
use agentd_core::operation::Outcome;
use serde::Serialize;

use crate::args::{Args, Command, Format, Plan};
use crate::client::{Change, Client, Reply, instance_path};
use crate::complete;
use crate::error::Failure;
use crate::progress;
use crate::remote::Tunnel;
use crate::render::{Report, Screen, outcome};

/// The exit code of what was accepted and has not come about.
const PENDING_EXIT: u8 = 8;

/// What every command works with.
#[derive(Debug, Clone)]
struct Context {
    client: Client,
    screen: Screen,
    /// Whether slow requests say what they wait for.
    watched: bool,
}

/// Runs the command that was typed.
pub(crate) fn run(args: &Args) -> Report {
    let screen = Screen::new(args.global.output == Format::Json, args.global.quiet);
    // These two ask no agentd, wherever it is.
    let local = matches!(args.command, Command::CheckConfig(_) | Command::Completions { .. });
    let host = args.global.host.as_deref().filter(|host| !local && !host.is_empty());
    let tunnel = match host.map(|host| Tunnel::open(host, &args.global.socket)).transpose() {
        Ok(tunnel) => tunnel,
        Err(failure) => return screen.failure(&failure),
    };
    let socket = tunnel.as_ref().map_or_else(|| args.global.socket.clone(), Tunnel::socket);
    let context =
        Context { client: Client::new(&socket), screen, watched: !screen.quiet && screen.err_width.is_some() };
    let report = match &args.command {
        Command::List(list) => read::list(&context, list),
        Command::Show(of) => read::show(&context, &of.reference),
        Command::Capacity => read::capacity(&context),
        Command::Top(args) => top::top(&context, args, host),
        Command::Sizes => read::sizes(&context),
        Command::Usage(args) => usage::usage(&context, args),
        Command::Metrics(args) => metrics::metrics(&context, args),
        Command::Health => read::health(&context),
        Command::Resize(resize) => resize::resize(&context, resize),
        Command::Prepare(prepare) => resize::prepare(&context, prepare),
        Command::Undo(args) => undo::undo(&context, args),
        Command::History(history) => read::history(&context, history),
        Command::Logs(args) => logs::logs(&context, args),
        Command::Stop(stop) => power::stop(&context, stop),
        Command::Start(start) => power::start(&context, start),
        Command::Restart(restart) => power::restart(&context, restart),
        Command::Suspend(suspend) => power::suspend(&context, suspend),
        Command::Resume(resume) => power::resume(&context, resume),
        Command::ClearHold(of) => power::clear_hold(&context, &of.reference),
        Command::CheckConfig(check) => config::check(&context.screen, &check.file),
        Command::Completions { shell } => Ok(Report { out: complete::registration(*shell), ..Report::default() }),
    };
    report.unwrap_or_else(|failure| context.screen.failure(&failure))
}

impl Context {
    /// Asks, and says what it waits for where that takes long.
    fn get(&self, path: &str) -> Result<Reply, Failure> {
        let (client, path) = (self.client.clone(), path.to_owned());
        self.watch(None, move || client.get(&path))
    }

    /// Runs a question, watched where somebody does.
    fn watch<T: Send + 'static>(
        &self,
        glance: Option<Box<dyn Fn() -> Option<String> + Send>>,
        request: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if self.watched { progress::watch("waiting for agentd".into(), glance, request) } else { request() }
    }

    /// Sends a change of the instance that was typed and reports what became of it.
    fn change<B: Serialize>(&self, typed: &str, verb: &str, body: &B, plan: &Plan) -> Result<Report, Failure> {
        let if_version = plan.if_version.as_deref().map(version).transpose()?;
        let reference = self.client.resolve(typed)?;
        let path = format!("{}/{verb}", instance_path(&reference));
        self.report(path, reference, body, if_version, plan.dry_run)
    }

    /// Sends a change, of which the reply is an operation, and reports what became of it.
    fn report<B: Serialize>(
        &self,
        path: String,
        reference: Ref,
        body: &B,
        if_version: Option<String>,
        dry_run: bool,
    ) -> Result<Report, Failure> {
        let reply = self.send(path, reference, body, if_version, dry_run)?;
        let view: OperationView = reply.read().map_err(|failure| unreadable(failure, dry_run))?;
        let pending = view.outcome == Outcome::Pending;
        // What is pending is no success, so `-q` doesn't hide it.
        let screen = Screen { quiet: self.screen.quiet && !pending, ..self.screen };
        let mut report = screen.success(&reply.body, outcome::operation(&view, screen.out_width), String::new());
        report.exit = if pending { PENDING_EXIT } else { 0 };
        report.keep_exit = !dry_run;
        Ok(report)
    }

    /// Sends a change of an instance.
    fn send<B: Serialize>(
        &self,
        path: String,
        reference: Ref,
        body: &B,
        if_version: Option<String>,
        dry_run: bool,
    ) -> Result<Reply, Failure> {
        let change = Change {
            path,
            body: serde_json::to_string(body)
                .map_err(|error| Failure::internal(format!("the request can't be written: {error}")))?,
            if_version,
            reference: reference.to_string(),
        };
        let (client, other) = (self.client.clone(), self.client.clone());
        let glance: Box<dyn Fn() -> Option<String> + Send> = Box::new(move || progress::glance_at(&other, &reference));
        self.watch((!dry_run).then_some(glance), move || client.change(&change))
    }
}

/// The reply to a change that was carried out can't be read: whatever became of it, it isn't "as it was".
fn unreadable(failure: Failure, dry_run: bool) -> Failure {
    if dry_run {
        return failure;
    }
    let hint = failure.hint.clone().unwrap_or_default();
    Failure::outcome_unknown(format!("the change was answered, but {}", failure.detail), hint)
}

/// A version as `ctl show` shows it; quotes, as an ETag has them, are taken off.
fn version(text: &str) -> Result<String, Failure> {
    let bare = text.trim_matches('"');
    if !bare.is_empty() && bare.len() <= 200 && bare.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"') {
        return Ok(bare.to_owned());
    }
    let problem = Problem::new(Code::InvalidRequest, format!("--if-version: {text:?} is no version"));
    Err(problem.hint("use the version that `ctl show` or a dry run tells").into())
}

/// Checks a duration here, so that a typing error needs no daemon; the server reads the text again.
fn duration(option: &str, text: Option<&String>) -> Result<Option<String>, Failure> {
    if let Some(text) = text {
        parse_duration(text).map_err(|error| Problem::new(Code::InvalidRequest, format!("{option}: {error}")))?;
    }
    Ok(text.cloned())
}

#[cfg(test)]
mod tests;
