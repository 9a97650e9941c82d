//! `agentd-pages DIR` writes agentd.8, agentd.toml.5, ctl.1 and a page for each command of ctl into a folder. Options come
//! from the definitions that the programs parse with, keys from the table that the config is checked by: what is there is
//! documented, and nothing else is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use agentd_core::config::KEYS;
use anyhow::Context;
use clap::CommandFactory as _;
use clap_mangen::Man;
use roff::{Roff, bold, italic, roman};

#[allow(dead_code, unreachable_pub, reason = "the program's own file; only its definition is used here")]
#[path = "../../../agentd/src/args.rs"]
mod agentd;
#[allow(dead_code, unreachable_pub, reason = "the program's own file; only its definition is used here")]
#[path = "../../../ctl/src/args.rs"]
mod ctl;

fn main() -> anyhow::Result<()> {
    let folder = PathBuf::from(std::env::args_os().nth(1).context("usage: agentd-pages DIR")?);
    fs::create_dir_all(&folder)?;
    clap_mangen::generate_to(ctl::Args::command(), &folder)?;
    daemon(&folder)?;
    config(&folder)
}

/// agentd.8
fn daemon(folder: &Path) -> anyhow::Result<()> {
    let man = Man::new(agentd::Args::command()).section("8").manual("System Administration");
    let mut page = File::create(folder.join("agentd.8"))?;
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    let mut text = Roff::new();
    section(
        &mut text,
        "DESCRIPTION",
        &[
            "agentd changes the CPU and memory of what runs on this host while it runs: virtual machines through libvirt, \
         containers through Docker. It never lets the host promise more than its config file allows, and it reports what \
         was observed, not what was asked. ctl(1) drives it; both speak an HTTP API on a Unix socket, whose description \
         is at /v1/openapi.json.",
            "It is started by systemd: agentd.socket makes the socket, agentd.service serves it. What it is doing is in \
         `systemctl status agentd`, what it did in `ctl history` and in the journal.",
        ],
    );
    text.to_writer(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut text = Roff::new();
    terms(
        &mut text,
        "SIGNALS",
        &[
            (
                "SIGHUP",
                "Reads the config file again (`systemctl reload agentd`). A valid one is taken whole. An invalid one, or \
          one that changes [server] but for read_only, [libvirt] or [docker], changes nothing and is said in the journal \
          and in `ctl health`.",
            ),
            (
                "SIGTERM, SIGINT",
                "Ends it once requests and changes under way have ended, after 75 seconds at the latest. What was not \
          ended by then, or by SIGKILL at any instant, is completed or taken back at the next start.",
            ),
        ],
    );
    terms(
        &mut text,
        "ENVIRONMENT",
        &[
            (
                "AGENTD_LOG",
                "Which messages are logged: error, warn, info (the default), debug or trace, or a list of \
          module=level. With debug each decision about a reader's rights is logged, too.",
            ),
            ("LISTEN_FDS, NOTIFY_SOCKET, WATCHDOG_USEC, JOURNAL_STREAM", "Are systemd's."),
        ],
    );
    terms(
        &mut text,
        "FILES",
        &[
            ("/etc/agentd/agentd.toml", "The config file, agentd.toml(5)."),
            (
                "/run/agentd/agentd.sock",
                "The socket. Members of the group agentd may connect; what they may do there is up to \
          the [[access]] rules of the config file.",
            ),
            (
                "/var/lib/agentd/agentd.db",
                "The record: operations, holds, what was accepted for each instance, the history. \
          Lost or damaged it is never taken for an empty one: put it back, or remove the folder to begin anew.",
            ),
        ],
    );
    terms(
        &mut text,
        "JOURNAL FIELDS",
        &[
            (
                "AGENTD_OPERATION, AGENTD_INSTANCE",
                "The operation's id and the instance's reference: `journalctl \
          AGENTD_INSTANCE=vm/web`.",
            ),
            ("AGENTD_UID, AGENTD_PID, AGENTD_RULE", "Who asked, and the access rule that let them."),
            (
                "AGENTD_VERB, AGENTD_OUTCOME, AGENTD_CODE",
                "What was asked, how it ended, and the error code where it ended \
          badly.",
            ),
        ],
    );
    section(
        &mut text,
        "EXIT STATUS",
        &[
            "0 after SIGTERM or SIGINT, and where --check finds no fault; 2 where the command line makes no sense; 1 otherwise.",
        ],
    );
    section(
        &mut text,
        "SEE ALSO",
        &["ctl(1), agentd.toml(5), virsh(1), docker-update(1), systemd.resource-control(5)"],
    );
    text.to_writer(&mut page)?;
    Ok(())
}

/// agentd.toml.5
fn config(folder: &Path) -> anyhow::Result<()> {
    let mut page = Roff::new();
    page.control("TH", ["agentd.toml", "5", "", concat!("agentd ", env!("CARGO_PKG_VERSION")), "File Formats"]);
    section(&mut page, "NAME", &["agentd.toml - the config file of agentd"]);
    section(&mut page, "SYNOPSIS", &["/etc/agentd/agentd.toml"]);
    section(
        &mut page,
        "DESCRIPTION",
        &[
            "The file is TOML. Unknown keys, wrong units and contradictions are errors, all told at once with line and column \
         (`ctl check-config`, `agentd --check`). It must belong to root or to the user that agentd runs as, and not be \
         writable by others. `systemctl reload agentd` takes a valid new file whole.",
            "Bytes are numbers, or text such as \"512MiB\", \"8G\" and \"8GiB\": powers of 1024; \"8GB\" and fractions are \
         refused. CPUs are numbers such as 4 and 1.5. Times are text such as \"60s\", \"5m\" and \"90d\".",
        ],
    );
    let mut last = "";
    for key in KEYS {
        if key.section != last {
            last = key.section;
            let many = matches!(last, "limit" | "access");
            let heading = if many { format!("[[{last}]]") } else { format!("[{last}]") };
            page.control("SH", [heading.as_str()]);
            if let Some(about) = about(last) {
                page.text([roman(about)]);
            }
        }
        page.control("TP", []);
        let mut name = vec![bold(key.key)];
        if let Some(default) = key.default {
            name.extend([roman(" = "), italic(default)]);
        }
        page.text(name);
        page.text([roman(key.doc)]);
    }
    section(&mut page, "SEE ALSO", &["agentd(8), ctl(1)"]);
    page.to_writer(&mut File::create(folder.join("agentd.toml.5"))?)?;
    Ok(())
}

/// What a section is for, where its keys don't say it.
fn about(section: &str) -> Option<&'static str> {
    Some(match section {
        "server" => "Where agentd listens and keeps its state. Only read_only may change with a reload.",
        "libvirt" => "Virtual machines; without this section that kind is off. Changes take a restart.",
        "docker" => "Containers; without this section that kind is off. Changes take a restart.",
        "capacity" => "What the host may promise to all instances together: (capacity - reserved) x overcommit.",
        "sizes.NAME" => "Any number of sizes, each under a name of its own: `ctl resize web --size NAME`.",
        "limit" => {
            "Any number of blocks. The bounds of all that match an instance apply; of live, unlimited, shrink, \
             shrink_margin, stop_timeout and repair_drift the last one that matches wins."
        }
        "access" => {
            "Any number of blocks, by the caller's user as the kernel tells it and the groups that the user database gives \
             it at that moment. Root may do everything; whom no block names may do nothing."
        }
        _ => return None,
    })
}

fn section(page: &mut Roff, heading: &str, paragraphs: &[&str]) {
    page.control("SH", [heading]);
    for (place, paragraph) in paragraphs.iter().enumerate() {
        if place > 0 {
            page.control("PP", []);
        }
        page.text([roman(*paragraph)]);
    }
}

fn terms(page: &mut Roff, heading: &str, terms: &[(&str, &str)]) {
    page.control("SH", [heading]);
    for (term, text) in terms {
        page.control("TP", []);
        page.text([bold(*term)]);
        page.text([roman(*text)]);
    }
}
