//! `ctl`, the command that drives agentd: reads its arguments, runs one command, prints what came of it. Everything else
//! is in the modules; none of them prints.

#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod complete;
mod error;
mod progress;
mod remote;
mod render;
#[cfg(test)]
mod testing;
mod top;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    complete::answer();
    let args = args::Args::parse();
    let report = commands::run(&args);
    ExitCode::from(render::print(report))
}
