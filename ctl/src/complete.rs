//! What <TAB> offers: the commands and options as they are defined, and what the agentd that runs knows: instances and sizes.
//! The shell asks ctl itself each time (`_CTL_COMPLETE=bash ctl`), so nothing that is offered can be out of date.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use agentd_core::api::{InstanceList, SizeList};
use clap::{Command, CommandFactory as _};
use clap_complete::env::{Bash, EnvCompleter, Fish, Zsh};
use clap_complete::{ArgValueCandidates, CompleteEnv, CompletionCandidate};

use crate::args::{Args, Shell};
use crate::client::Client;

/// The variable by which a shell asks. A name of our own: one that somebody else sets would turn every command into this.
const VARIABLE: &str = "_CTL_COMPLETE";
/// Nobody waits longer for a <TAB>.
const TIME: Duration = Duration::from_secs(2);

/// Answers a shell that asks, and ends; else returns.
pub(crate) fn answer() {
    CompleteEnv::with_factory(command).var(VARIABLE).complete();
}

/// The script by which a shell asks from now on.
pub(crate) fn registration(shell: Shell) -> String {
    let shell: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut script = Vec::new();
    // Writing to memory doesn't fail.
    let _ = shell.write_registration(VARIABLE, "ctl", "ctl", "ctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The definition, with who knows the values.
fn command() -> Command {
    let mut command = Args::command();
    for (name, argument) in [
        ("show", "reference"),
        ("usage", "reference"),
        ("resize", "reference"),
        ("undo", "what"),
        ("stop", "reference"),
        ("start", "reference"),
        ("restart", "reference"),
        ("suspend", "reference"),
        ("resume", "reference"),
        ("prepare", "reference"),
        ("history", "reference"),
        ("logs", "reference"),
        ("clear-hold", "reference"),
    ] {
        command = command
            .mut_subcommand(name, |of| of.mut_arg(argument, |value| value.add(ArgValueCandidates::new(instances))));
    }
    command.mut_subcommand("resize", |resize| resize.mut_arg("size", |value| value.add(ArgValueCandidates::new(sizes))))
}

fn instances() -> Vec<CompletionCandidate> {
    let list: Option<InstanceList> = ask("/v1/instances");
    let items = list.map(|list| list.items).unwrap_or_default();
    let candidate = |reference: String, state: String| CompletionCandidate::new(reference).help(Some(state.into()));
    items.into_iter().map(|instance| candidate(instance.reference, instance.state.to_string())).collect()
}

fn sizes() -> Vec<CompletionCandidate> {
    let list: Option<SizeList> = ask("/v1/sizes");
    list.map(|list| list.items)
        .unwrap_or_default()
        .into_iter()
        .map(|size| CompletionCandidate::new(size.name))
        .collect()
}

/// Where agentd doesn't answer there is nothing to offer: an error would end up in the line that is being typed.
fn ask<T: serde::de::DeserializeOwned>(path: &str) -> Option<T> {
    // Another host's are not looked up, nobody waits for ssh after a <TAB>; and another socket's are not this one's.
    let elsewhere = |word: &str| ["--host", "--socket"].iter().any(|option| word.starts_with(option));
    if std::env::var_os("AGENTD_HOST").is_some_and(|host| !host.is_empty())
        || std::env::args().any(|word| elsewhere(&word))
    {
        return None;
    }
    let socket = std::env::var_os("AGENTD_SOCKET").unwrap_or_else(|| OsString::from("/run/agentd/agentd.sock"));
    Client::new(&PathBuf::from(socket)).get_within(path, TIME).ok()?.read().ok()
}
