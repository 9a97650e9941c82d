//! What can be typed: options and commands, as text. What a value means is decided by the command that uses it, so that a
//! wrong unit reads the same here and from the server.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Change the CPU and memory of virtual machines, containers and units while they run.
#[derive(Debug, Parser)]
#[command(
    name = "ctl",
    version,
    max_term_width = 100,
    propagate_version = false,
    disable_help_subcommand = true,
    after_help = "Exit codes: 0 done or already so · 1 failed, everything is as it was · 2 usage · 3 agentd or a backend is \
unreachable · 4 refused by capacity or limits · 5 not permitted · 6 not found or ambiguous · 7 partial, or the outcome is \
unknown · 8 accepted, the guest has not obeyed yet · 9 not possible live, or not supported · 10 busy, held, in the wrong \
state, or changed meanwhile"
)]
pub(crate) struct Args {
    /// What applies to every command.
    #[command(flatten)]
    pub(crate) global: Global,
    /// The command.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, ClapArgs)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// agentd's socket
    #[arg(long, global = true, env = "AGENTD_SOCKET", value_name = "PATH", default_value = "/run/agentd/agentd.sock")]
    pub(crate) socket: PathBuf,
    /// The agentd of another host, by ssh: ssh://user@host; --socket is the path there
    #[arg(long, global = true, env = "AGENTD_HOST", value_name = "ADDRESS")]
    pub(crate) host: Option<String>,
    /// What to print: text for people, or the API's own JSON
    #[arg(short, long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Format,
    /// Print nothing on success
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// What to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    // No doc comments: clap would show them, and turn the help into its long form.
    Text,
    Json,
}

/// A shell that can complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List instances
    #[command(after_help = "Examples:\n  ctl list --kind vm --state running\n  ctl list --match 'vm/ci-*' -o json")]
    List(List),
    /// Show one instance: every value of every field, notes and holds
    #[command(after_help = "Examples:\n  ctl show web\n  ctl show container/db -o json")]
    Show(Reference),
    /// Change CPUs and memory of one instance, as one change
    #[command(after_help = RESIZE_HELP)]
    Resize(Resize),
    /// Put headroom into a VM's saved definition, for growth without a restart after its next boot
    #[command(after_help = PREPARE_HELP)]
    Prepare(Prepare),
    /// Take the last change of an instance back, or the change of one operation; only the fields that it touched
    #[command(after_help = UNDO_HELP)]
    Undo(Undo),
    /// Stop an instance: gracefully, then, only with --force, hard
    #[command(after_help = "Examples:\n  ctl stop web --timeout 60s\n  ctl stop vm/web --timeout 2m --force")]
    Stop(Stop),
    /// Start an instance, where the host's caps allow it
    #[command(after_help = "Examples:\n  ctl start web\n  ctl start container/db --dry-run")]
    Start(Start),
    /// Restart an instance: down gracefully, then, only with --force, hard, and up again; its share stays its own meanwhile
    #[command(after_help = "Examples:\n  ctl restart web --timeout 2m\n  ctl restart vm/web --timeout 30s --force")]
    Restart(Stop),
    /// Pause an instance and hold it, so that nothing but stop and resume is done to it
    #[command(
        after_help = "Examples:\n  ctl suspend web --reason \"backup of its disk\"\n  ctl suspend container/db --reason \"debugging\" --dry-run"
    )]
    Suspend(Suspend),
    /// Lift the hold of a suspended instance and put back the state of before
    #[command(after_help = "Examples:\n  ctl resume web\n  ctl resume container/db --dry-run")]
    Resume(Start),
    /// Show what was changed, refused or drifted, by whom, newest first
    #[command(after_help = HISTORY_HELP)]
    History(History),
    /// Show what an instance logs: a container's output, a unit's journal, a VM's serial console where a file has it
    #[command(after_help = LOGS_HELP)]
    Logs(Logs),
    /// Show what the host has, what is promised and what is free
    #[command(after_help = "Examples:\n  ctl capacity\n  ctl capacity -o json")]
    Capacity,
    /// Show the host and what each instance uses, on the whole screen, again and again
    #[command(after_help = TOP_HELP)]
    Top(Top),
    /// Show what instances use: CPUs, memory, what limits hold back; of all that are up, or one in detail
    #[command(after_help = USAGE_HELP)]
    Usage(Usage),
    /// Print agentd's metrics in Prometheus' text format, or write them for node_exporter's textfile collector
    #[command(after_help = METRICS_HELP)]
    Metrics(Metrics),
    /// Show the sizes of the config file
    #[command(after_help = "Examples:\n  ctl sizes\n  ctl resize web --size standard-2")]
    Sizes,
    /// Show whether agentd and its backends are well; exits with 3 where something is not
    #[command(after_help = "Examples:\n  ctl health\n  ctl health -q && echo well")]
    Health,
    /// Lift the hold after a change that ended partial, once you have looked
    #[command(after_help = "Examples:\n  ctl show vm/web\n  ctl clear-hold vm/web")]
    ClearHold(Reference),
    /// Check a config file and tell everything that is wrong with it; agentd need not run
    #[command(after_help = "Examples:\n  ctl check-config\n  ctl check-config ./agentd.toml")]
    CheckConfig(CheckConfig),
    /// Write what makes a shell complete commands, options and the names of instances; the packages have it
    #[command(after_help = "Examples:\n  source <(ctl completions bash)\n  ctl completions fish | source")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

const RESIZE_HELP: &str = "\
Bytes are in powers of 1024: 8G, 8GiB and 8192M are the same. A value with + or - is relative to the present one; \
`none` takes a limit away where there can be none.

Examples:
  ctl resize web --cpus 4 --memory 8GiB
  ctl resize container/db --cpus +0.5 --memory -512M --dry-run
  ctl resize web --memory +4GiB --for 2h
  ctl resize web --cpus 16 --restart if-needed";

const PREPARE_HELP: &str = "\
With neither maximum it goes as far as [scaling] of the config lets every VM grow; with one, the other stays. Nothing of what \
runs is changed, and nothing is taken from the host before it is used.

Examples:
  ctl prepare web --dry-run
  ctl prepare web --max-cpus 16 --max-memory 32GiB";

const UNDO_HELP: &str = "\
What has been taken back already is passed over, so that doing it again goes one change further back. To put back what an \
undo took away, undo that undo: ctl undo OPERATION, with the operation that it named. A value that somebody has changed \
since is left alone, and the undo refused.

Examples:
  ctl undo web --dry-run
  ctl undo 01J9ZQ6Y3F8V4T7N2K5M0X1ABC";

const USAGE_HELP: &str = "\
CPUs in use are the mean since somebody asked before, or of 0.4 s where nobody did within the last minute. What can't be \
known is —, never 0: memory inside of a VM is known where its balloon driver reports it.

Examples:
  ctl usage --match 'vm/ci-*'
  ctl usage container/db -o json";

const METRICS_HELP: &str = "\
The file is replaced whole, and left as it was where agentd doesn't answer: its age tells. A timer and a service that write \
it, alerts and a dashboard are in /usr/share/doc/agentd/prometheus.

Examples:
  ctl metrics | grep agentd_capacity
  ctl metrics --textfile /var/lib/prometheus/node-exporter/agentd.prom";

const HISTORY_HELP: &str = "\
Times are of the local time zone. Of one instance, each entry names its operation, which `ctl undo` takes; -o json has \
all of it, with times in UTC.

Examples:
  ctl history web
  ctl history vm/web --limit 100 --before 4711 -o json";

const LOGS_HELP: &str = "\
What was written to standard error goes to standard error, every byte as it was; on a terminal, what that might obey is \
written out, colours excepted. With -o json each line is one line of JSON.

Examples:
  ctl logs web -f --tail 20
  ctl logs container/db --since 10m 2>errors.log";

const TOP_HELP: &str = "\
Keys: c m n t l sort, r turns the order about, / filters, arrows and PgUp PgDn move, ? tells the keys, q quits. Where standard \
output is no terminal it prints one look as lines, with -o json as one document.

Examples:
  ctl top --sort memory --match 'vm/*'
  ctl top --once -o json";

/// Which instance.
#[derive(Debug, ClapArgs)]
pub(crate) struct Reference {
    /// vm/web, container/db, unit/batch.service, or a bare name that only one instance has
    #[arg(value_name = "REF")]
    pub(crate) reference: String,
}

/// `ctl list`
#[derive(Debug, ClapArgs)]
pub(crate) struct List {
    /// Only this kind: vm, container or unit
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// Only references that match this glob (`*` crosses `/`), or label:KEY=VALUE
    #[arg(long = "match", value_name = "PATTERN")]
    pub(crate) pattern: Option<String>,
    /// Only in this state: running, paused, stopped, starting, stopping, crashed or unknown
    #[arg(long)]
    pub(crate) state: Option<String>,
    /// Only those whose next start has other values than what runs
    #[arg(long)]
    pub(crate) next_boot: bool,
    /// Only VMs that can't grow without a restart, and why
    #[arg(long)]
    pub(crate) unprepared: bool,
}

/// `ctl prepare`
#[derive(Debug, ClapArgs)]
pub(crate) struct Prepare {
    #[command(flatten)]
    pub(crate) of: Reference,
    /// The most vCPUs that it is to be able to have
    #[arg(long, value_name = "CPUS")]
    pub(crate) max_cpus: Option<String>,
    /// The most memory
    #[arg(long, value_name = "BYTES")]
    pub(crate) max_memory: Option<String>,
    #[command(flatten)]
    pub(crate) plan: Plan,
}

/// `ctl resize`
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["cpus", "memory", "cpu_limit", "size"]))]
pub(crate) struct Resize {
    #[command(flatten)]
    pub(crate) of: Reference,
    /// A vm's vCPUs, the CPU limit of anything else: 4, +1, -1, 1.5 or none
    #[arg(long, value_name = "CPUS", allow_hyphen_values = true)]
    pub(crate) cpus: Option<String>,
    /// Memory: 8GiB, +1G, -512M or none
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub(crate) memory: Option<String>,
    /// CPU time that the whole vm may take, in CPUs: 2.5, +1, -0.5 or none
    #[arg(long, value_name = "CPUS", allow_hyphen_values = true)]
    pub(crate) cpu_limit: Option<String>,
    /// A size of the config file, in place of single values
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cpus", "memory", "cpu_limit"])]
    pub(crate) size: Option<String>,
    #[command(flatten)]
    pub(crate) plan: Plan,
    /// How long to wait for the guest: 30s, 5m; 0 doesn't wait [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub(crate) wait: Option<String>,
    /// Change only what runs
    #[arg(long, conflicts_with = "next_boot")]
    pub(crate) live_only: bool,
    /// Change only what the next start will have
    #[arg(long)]
    pub(crate) next_boot: bool,
    /// Allow a restart where the change can't be made live; a VM then gets a definition with a higher maximum, too
    #[arg(long, value_name = "WHEN")]
    pub(crate) restart: Option<RestartWhen>,
    /// With --restart: switch it off hard where it does not shut down within its stop_timeout
    #[arg(long, requires = "restart")]
    pub(crate) force: bool,
    /// Go back by itself after this time: 2h
    #[arg(long = "for", value_name = "TIME")]
    pub(crate) for_: Option<String>,
}

/// When a restart is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestartWhen {
    Never,
    IfNeeded,
}

/// What makes a change exactly the one that was looked at.
#[derive(Debug, ClapArgs)]
pub(crate) struct Plan {
    /// Show the exact steps and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Only if the instance is still at this version
    #[arg(long, value_name = "VERSION")]
    pub(crate) if_version: Option<String>,
}

/// `ctl undo`
#[derive(Debug, ClapArgs)]
pub(crate) struct Undo {
    /// vm/web, container/db, unit/batch.service, or a bare name that only one instance has; or an operation's id
    #[arg(value_name = "REF|OPERATION")]
    pub(crate) what: String,
    #[command(flatten)]
    pub(crate) plan: Plan,
    /// How long to wait for the guest: 30s, 5m; 0 doesn't wait [default: 10s]
    #[arg(long, value_name = "TIME")]
    pub(crate) wait: Option<String>,
}

/// `ctl history`
#[derive(Debug, ClapArgs)]
pub(crate) struct History {
    /// Only of this instance; one that is gone needs its kind: vm/web
    #[arg(value_name = "REF")]
    pub(crate) reference: Option<String>,
    /// At most this many entries [default: agentd's]
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u32>,
    /// Only entries before this one, to see older ones
    #[arg(long, value_name = "SEQ")]
    pub(crate) before: Option<u64>,
}

/// `ctl logs`
#[derive(Debug, ClapArgs)]
pub(crate) struct Logs {
    #[command(flatten)]
    pub(crate) of: Reference,
    /// Go on with what is logged from now on, until the instance ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last so many lines
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<u64>,
    /// Only what was logged since: 10m (ago), or a time such as 2026-01-31T08:00:00Z; not for VMs
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
}

/// `ctl top`
#[derive(Debug, ClapArgs)]
pub(crate) struct Top {
    /// What comes first: the largest of this, or names from A on
    #[arg(long, value_name = "KEY", default_value = "cpu")]
    pub(crate) sort: SortKey,
    /// Only references that match this glob (`*` crosses `/`), or label:KEY=VALUE
    #[arg(long = "match", value_name = "PATTERN")]
    pub(crate) pattern: Option<String>,
    /// How long between two looks: 500ms, 2s
    #[arg(long, value_name = "TIME", default_value = "2s")]
    pub(crate) interval: String,
    /// Print one look as lines, also on a terminal
    #[arg(long)]
    pub(crate) once: bool,
}

/// What `ctl top` sorts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortKey {
    Cpu,
    Memory,
    Name,
    Throttled,
    Lag,
}

impl SortKey {
    /// As it is typed.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            SortKey::Cpu => "cpu",
            SortKey::Memory => "memory",
            SortKey::Name => "name",
            SortKey::Throttled => "throttled",
            SortKey::Lag => "lag",
        }
    }
}

/// `ctl usage`
#[derive(Debug, ClapArgs)]
pub(crate) struct Usage {
    /// vm/web, container/db, unit/batch.service, or a bare name that only one instance has
    #[arg(value_name = "REF", conflicts_with_all = ["kind", "pattern"])]
    pub(crate) reference: Option<String>,
    /// Only this kind: vm, container or unit
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// Only references that match this glob (`*` crosses `/`), or label:KEY=VALUE
    #[arg(long = "match", value_name = "PATTERN")]
    pub(crate) pattern: Option<String>,
}

/// `ctl metrics`
#[derive(Debug, ClapArgs)]
pub(crate) struct Metrics {
    /// Write them to this file, which must end in .prom for the collector to read it
    #[arg(long, value_name = "PATH")]
    pub(crate) textfile: Option<PathBuf>,
}

/// `ctl stop`, `ctl restart`
#[derive(Debug, ClapArgs)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) of: Reference,
    /// How long it may take to shut down by itself: 60s, 5m [default: the config's stop_timeout]
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<String>,
    /// Switch it off hard when that time is over
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) plan: Plan,
}

/// `ctl suspend`
#[derive(Debug, ClapArgs)]
pub(crate) struct Suspend {
    #[command(flatten)]
    pub(crate) of: Reference,
    /// Why, for those who find it suspended
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: String,
    #[command(flatten)]
    pub(crate) plan: Plan,
}

/// `ctl start`, `ctl resume`
#[derive(Debug, ClapArgs)]
pub(crate) struct Start {
    #[command(flatten)]
    pub(crate) of: Reference,
    #[command(flatten)]
    pub(crate) plan: Plan,
}

/// `ctl check-config`
#[derive(Debug, ClapArgs)]
pub(crate) struct CheckConfig {
    /// The file
    #[arg(value_name = "FILE", default_value = "/etc/agentd/agentd.toml")]
    pub(crate) file: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn resize(line: &str) -> Result<Resize, clap::Error> {
        match Args::try_parse_from(line.split(' '))?.command {
            Command::Resize(resize) => Ok(resize),
            other => panic!("{other:?} is no resize"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn relative_values_and_none_are_values() {
        for (cpus, memory) in [("-1", "-512M"), ("+1", "+1GiB"), ("4", "none"), ("1.5", "8G")] {
            let parsed = resize(&format!("ctl resize web --cpus {cpus} --memory {memory} --cpu-limit -0.5")).unwrap();
            assert_eq!(parsed.cpus.as_deref(), Some(cpus));
            assert_eq!(parsed.memory.as_deref(), Some(memory));
            assert_eq!(parsed.cpu_limit.as_deref(), Some("-0.5"));
        }
        assert_eq!(resize("ctl resize web --memory=-512M").unwrap().memory.as_deref(), Some("-512M"));
    }

    #[test]
    fn what_excludes_each_other_is_refused_with_exit_code_2() {
        for line in [
            "ctl resize web",
            "ctl resize web --size a --cpus 4",
            "ctl resize web --cpus 4 --live-only --next-boot",
            "ctl resize web --cpus 4 --force",
            "ctl resize --cpus 4",
        ] {
            assert_eq!(resize(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn every_command_shows_two_examples() {
        for command in Args::command().get_subcommands_mut() {
            let name = command.get_name().to_owned();
            let help = command.render_help().to_string();
            assert!(help.matches("\n  ctl ").count() + help.matches("\n  source").count() >= 2, "{name}: {help}");
        }
    }

    #[test]
    fn global_options_stand_before_and_after_the_command() {
        for line in ["ctl --socket /s -o json -q capacity", "ctl capacity --socket /s -o json -q"] {
            let global = Args::try_parse_from(line.split(' ')).unwrap().global;
            assert_eq!((global.socket.to_str(), global.output, global.quiet), (Some("/s"), Format::Json, true));
        }
    }
}
