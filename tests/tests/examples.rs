//! Every example of every `--help` is typed as it stands, against an agentd on the fake engine: none is a usage error, and each
//! finds its agentd. Which commands there are is read from `ctl --help`, so that a new one is in by itself.

use std::process::{Command, Stdio};

use agentd_tests::lab::{Agentd, binary};
use anyhow::{Context, Result};
use serde_json::json;

/// Examples that follow something never end by themselves.
const SECONDS: &str = "3";
/// As timeout(1) ends where it had to end a command.
const TIMED_OUT: i32 = 124;

fn help(agentd: &Agentd, of: &[&str]) -> String {
    let output = agentd.ctl(&[of, &["--help"]].concat());
    assert_eq!(output.code, Some(0), "{of:?}: {output:?}");
    output.stdout
}

/// The commands' names, from the list below `Commands:`.
fn commands(help: &str) -> Vec<String> {
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // What goes on in the next line stands further to the right.
    let names = list.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// What there is of ctl in each example: without what a shell does with its output.
fn examples(help: &str) -> Vec<&str> {
    let lines = help.lines().skip_while(|line| !line.starts_with("Examples:")).skip(1);
    let lines = lines.take_while(|line| line.starts_with("  "));
    lines
        .filter_map(|line| line.find("ctl ").map(|at| &line[at..]))
        .map(|line| {
            [" | ", " && ", " >", " 2>", ")"]
                .iter()
                .filter_map(|end| line.find(end))
                .min()
                .map_or(line, |at| &line[..at])
        })
        .collect()
}

#[test]
fn every_example_of_every_help_works_as_it_stands() -> Result<()> {
    let spec = json!({"instances": [
        {"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"}]});
    let config = "[capacity]\ncpus = 64\n[sizes.standard-2]\ncpus = 2\nmemory = \"2GiB\"\n";
    let agentd = Agentd::with_config(config).fake(spec).start()?;
    let ctl = binary("CTL_BIN", "ctl")?;
    let path = format!("{}:{}", ctl.parent().context("a folder")?.display(), std::env::var("PATH")?);
    let commands = commands(&help(&agentd, &[]));
    assert!(commands.len() > 15 && commands.iter().any(|name| name == "resize"), "{commands:?}");
    for command in commands {
        let help = help(&agentd, &[&command]);
        let examples = examples(&help);
        assert!(examples.len() >= 2, "{command}: {examples:?}");
        for example in examples {
            // What one writes is to be in the test's own folder.
            let example = &example.replace("/var/lib/", &format!("{}/", agentd.folder().display()));
            let output = Command::new("timeout")
                .args([SECONDS, "sh", "-c", example])
                .env("PATH", &path)
                .env("AGENTD_SOCKET", agentd.socket())
                .env("LC_ALL", "C")
                // `./agentd.toml` is in an example, too.
                .current_dir(agentd.folder())
                .stdin(Stdio::null())
                .output()?;
            let (code, told) = (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
            assert!(!told.contains("For more information"), "{example}: {told}");
            assert!(!told.contains("can't connect"), "{example}: {told}");
            // The host of the test need not have an /etc/agentd/agentd.toml.
            assert!(code != Some(2) || command == "check-config", "{example}: {told}");
            assert!(code.is_some_and(|code| code <= 10 || code == TIMED_OUT), "{example}: {code:?}: {told}");
        }
    }
    Ok(())
}
