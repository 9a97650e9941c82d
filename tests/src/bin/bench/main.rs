//! `make bench`: what agentd costs beside what people would use instead, on engines of its own, all in one run.
//!
//! ```text
//!   bench [GROUP…]     engines | lxd | own | many | idle; all where none is named
//!   bench --keep       a whole run whose figures become those of the README and of docs/
//!   bench --check      all that comes to ratios, which are compared with those that are kept
//! ```

mod bare;
mod engines;
mod lxd;
mod many;
mod own;

use std::{fs, path::Path, process::ExitCode};

use agentd_tests::bench::{Report, Row};
use anyhow::{Context, Result, bail};

/// A group of rows, with the facts about what it ran on.
type Group = fn(&mut Report) -> Result<()>;

/// Each with its name, and whether any of its rows is a ratio.
const GROUPS: [(&str, Group, bool); 5] = [
    ("engines", engines::measure, true),
    ("lxd", lxd::measure, true),
    ("own", own::measure, true),
    ("many", many::measure, true),
    ("idle", many::idle, false),
];
/// Where figures are kept, below the project.
const KEPT: &str = "docs/bench.json";
/// Around the table in the README.
const MARKS: [&str; 2] = ["<!-- make bench -->\n", "<!-- end of make bench -->\n"];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    if cfg!(debug_assertions) {
        bail!("the figures are those of a release build: run `make bench`");
    }
    let (options, names): (Vec<&String>, Vec<&String>) = args.iter().partition(|arg| arg.starts_with("--"));
    let (mut keep, mut check) = (false, false);
    for option in options {
        match option.as_str() {
            "--keep" => keep = true,
            "--check" => check = true,
            other => bail!("{other} is none of --keep and --check"),
        }
    }
    if let Some(unknown) = names.iter().find(|name| GROUPS.iter().all(|(group, ..)| *group != name.as_str())) {
        bail!("{unknown} is none of {}", GROUPS.map(|(group, ..)| group).join(", "));
    }
    if (keep || check) && !names.is_empty() {
        bail!("what is kept or compared is a whole run");
    }
    let mut report = Report { facts: machine()?, rows: Vec::new() };
    for (name, measure, has_ratios) in GROUPS {
        let wanted = if names.is_empty() { has_ratios || !check } else { names.iter().any(|wanted| *wanted == name) };
        if wanted {
            measure(&mut report).with_context(|| format!("the group {name}"))?;
        }
    }
    let table = report.markdown();
    println!("\n{table}");
    let exe = std::env::current_exe()?;
    let folder = exe.ancestors().nth(2).context("a target folder")?.join("bench");
    fs::create_dir_all(&folder)?;
    write(&folder, &report)?;
    println!("{}", folder.display());
    if check {
        let kept = fs::read_to_string(KEPT).with_context(|| format!("{KEPT}: run this in the project's folder"))?;
        let worse = report.worse_than(&serde_json::from_str(&kept)?)?;
        if !worse.is_empty() {
            bail!("more than 30 % worse than what {KEPT} has:\n  {}", worse.join("\n  "));
        }
    }
    if keep {
        write(Path::new("docs"), &report)?;
        let readme = fs::read_to_string("README.md").context("run this in the project's folder")?;
        let [begin, end] = MARKS;
        let (head, rest) = readme.split_once(begin).context("README.md has no place for the table")?;
        let (_, tail) = rest.split_once(end).context("README.md has no end of the table")?;
        fs::write("README.md", format!("{head}{begin}{table}{end}{tail}"))?;
    }
    Ok(())
}

fn write(folder: &Path, report: &Report) -> Result<()> {
    fs::write(folder.join("bench.json"), serde_json::to_string_pretty(&report.json())? + "\n")?;
    fs::write(folder.join("bench.svg"), report.svg())?;
    Ok(())
}

/// The machine: nothing of it is measured.
fn machine() -> Result<Vec<(String, String)>> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let memory = fs::read_to_string("/proc/meminfo")?;
    let kib =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().split(' ').next()?.parse::<u64>().ok());
    let cgroups = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { "v2" } else { "v1" };
    Ok([
        ("processors", std::thread::available_parallelism()?.to_string()),
        ("model", model.trim_start_matches([' ', '\t', ':']).to_owned()),
        ("memory", format!("{} GiB", kib.unwrap_or_default().div_ceil(1 << 20))),
        ("kernel", fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned()),
        ("cgroups", cgroups.to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into())
}

/// Takes rows down, and says each as it comes.
fn tell(report: &mut Report, rows: impl IntoIterator<Item = Row>) {
    for row in rows {
        eprintln!("{row}");
        report.rows.push(row);
    }
}
