//! Logs from real engines: what comes out is what was written, to the byte, however much it is; and whoever goes away, nothing
//! is left behind and nothing grows.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agentd_tests::lab::{Agentd, Docker, Domain, Lab, Libvirt, Tmux, wait_until};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
/// How much each big log has, where `AGENTD_LOG_MIB` says nothing else.
const MIB: u32 = 64;
/// What the daemon may grow by, in KiB, whatever the size of the logs and the number of their readers.
const GROWTH: u64 = 32 * 1024;
/// A user without any rights of its own.
const NOBODY: u32 = 65534;

/// The size of each big log in MiB.
fn size() -> u32 {
    std::env::var("AGENTD_LOG_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(MIB)
}

fn config(docker: &Docker) -> String {
    format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display())
}

/// Lines of all lengths, up to one longer than the 16 KiB after which Docker cuts; not all of them ASCII.
fn text(mark: char, bytes: usize) -> Vec<u8> {
    let filling = "0123456789 abcdefghijklmnopqrstuvwxyz é€ ".repeat(1000);
    let mut text = Vec::with_capacity(bytes + filling.len());
    for number in 0_usize.. {
        if text.len() >= bytes {
            break;
        }
        // Not among the last: of what it has cut, Docker counts each part as a line of a tail.
        let long = number % 500 == 499 && text.len() < bytes / 2;
        let length = if long { 40_000 } else { number * 37 % 3000 };
        text.extend(format!("{mark} {number} ").bytes());
        text.extend(&filling.as_bytes()[..filling.floor_char_boundary(length)]);
        text.push(b'\n');
    }
    text
}

/// The last lines of a text.
fn tail(text: &[u8], lines: usize) -> &[u8] {
    let ends = text.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    &text[ends.clone().nth(lines).unwrap_or(0)..]
}

fn same(what: &str, got: &[u8], expected: &[u8]) -> Result<()> {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    ensure!(
        got == expected,
        "{what}: {} bytes came and {} were written; they differ from byte {} on",
        got.len(),
        expected.len(),
        differs.unwrap_or(got.len().min(expected.len()))
    );
    Ok(())
}

/// `ctl logs …` with its two streams in files.
struct Reader {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Reader {
    fn start(agentd: &Agentd, name: &str, args: &[&str]) -> Result<Self> {
        let [out, err] = ["out", "err"].map(|end| agentd.folder().join(format!("{name}.{end}")));
        let mut command = agentd.ctl_command()?;
        command.arg("logs").args(args).stdout(File::create(&out)?).stderr(File::create(&err)?);
        Ok(Reader { child: command.spawn()?, out, err })
    }

    /// What it has printed once it has ended.
    fn end(mut self) -> Result<(Option<i32>, Vec<u8>, Vec<u8>)> {
        let status = wait_until("ctl's end", LIMIT * size().div_ceil(MIB), || Ok(self.child.try_wait()?))?;
        Ok((status.code(), fs::read(&self.out)?, fs::read(&self.err)?))
    }

    /// Waits until it has printed this.
    fn has(&self, text: &str) -> Result<()> {
        let printed = || Ok(String::from_utf8_lossy(&fs::read(&self.out)?).contains(text).then_some(()));
        wait_until(&format!("{text:?} in {}", self.out.display()), LIMIT, printed)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn mounted(folder: &Path) -> String {
    format!("{}:/log", folder.display())
}

#[test]
fn containers_logs_are_right_to_the_byte_and_the_daemon_does_not_grow() -> Result<()> {
    let bytes = (size() as usize) << 20;
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker)).start()?;
    let folder = lab.dir().join("texts");
    fs::create_dir(&folder)?;
    let (out, err) = (text('o', bytes / 2), text('e', bytes / 2));
    fs::write(folder.join("out"), &out)?;
    fs::write(folder.join("err"), &err)?;
    let begin = "while [ ! -e /log/go ]; do sleep 0.05; done; ";
    let (mount, plain) = (mounted(&folder), format!("{begin} cat /log/out & {begin} cat /log/err >&2; wait"));
    docker.run_command("plain", &["-v", &mount], &["sh", "-c", &plain])?;
    docker.run_command("tty", &["-t", "-v", &mount], &["sh", "-c", &format!("{begin} cat /log/out /log/err")])?;
    // A terminal ends its lines so.
    let terminals: Vec<u8> = [&out[..], &err].concat().split_inclusive(|byte| *byte == b'\n').fold(
        Vec::with_capacity(bytes + bytes / 50),
        |mut all, line| {
            all.extend(&line[..line.len() - 1]);
            all.extend(b"\r\n");
            all
        },
    );
    agentd.status("VmHWM")?;
    let before = agentd.status("VmRSS")?;

    let followers = [
        Reader::start(&agentd, "follow-plain", &["container/plain", "-f"])?,
        Reader::start(&agentd, "follow-tty", &["tty", "--follow"])?,
    ];
    fs::write(folder.join("go"), "")?;
    let [plain, tty] = followers.map(Reader::end);
    let (code, got_out, got_err) = plain?;
    assert_eq!(code, Some(0));
    same("stdout, followed", &got_out, &out)?;
    same("stderr, followed", &got_err, &err)?;
    let (code, got, none) = tty?;
    assert_eq!((code, none.len()), (Some(0), 0), "{}", String::from_utf8_lossy(&none));
    same("the terminal, followed", &got, &terminals)?;

    // Readers that stop reading, of as much again, while others read all.
    let stalled: Vec<_> = (0..4).map(|_| stall(&agentd, "plain")).collect::<Result<_>>()?;
    let (_, got_out, got_err) = Reader::start(&agentd, "plain", &["container/plain"])?.end()?;
    same("stdout", &got_out, &out)?;
    same("stderr", &got_err, &err)?;
    let (_, got, _) = Reader::start(&agentd, "tty", &["container/tty"])?.end()?;
    same("the terminal", &got, &terminals)?;
    let (_, got, _) = Reader::start(&agentd, "tail", &["container/tty", "--tail", "1000"])?.end()?;
    same("the terminal's tail", &got, tail(&terminals, 1000))?;
    let (_, got_out, got_err) = Reader::start(&agentd, "tails", &["container/plain", "--tail", "1000"])?.end()?;
    let lines = |text: &[u8]| text.iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(lines(&got_out) + lines(&got_err), 1000);
    assert!(out.ends_with(&got_out) && err.ends_with(&got_err), "the last lines of each");

    let most = agentd.status("VmHWM")?;
    eprintln!("agentd had {before} KiB before {} MiB of logs, and {most} KiB at most", bytes >> 20);
    assert!(most < before + GROWTH, "agentd grew from {before} KiB to {most} KiB");

    // Those who don't read don't hold up its end either.
    assert_eq!(agentd.stop()?, Some(0));
    assert!(!agentd.log().contains("requests were still under way"), "{}", agentd.log());
    drop(stalled);
    Ok(())
}

/// A connection that asks for a log, reads its beginning, and then nothing.
fn stall(agentd: &Agentd, name: &str) -> Result<std::os::unix::net::UnixStream> {
    let mut stream = agentd.connect()?;
    write!(stream, "GET /v1/instances/container/{name}/logs HTTP/1.1\r\nHost: agentd\r\n\r\n")?;
    let mut begin = [0; 4096];
    stream.read_exact(&mut begin)?;
    assert!(begin.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&begin));
    Ok(stream)
}

#[test]
fn a_follower_ends_with_its_container_and_leaves_nothing_behind_when_it_goes() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker)).start()?;
    let ticks = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done";
    docker.run_command("ticker", &[], &["sh", "-c", ticks])?;
    let idle = agentd.descriptors()?;

    // Killed outright, and by Ctrl-C. Several, so that a connection that agentd had for a moment makes no difference.
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let start = |number| Reader::start(&agentd, &format!("killed-{number}"), &["container/ticker", "-f"]);
        let readers: Vec<Reader> = (0..5).map(start).collect::<Result<_>>()?;
        for reader in &readers {
            reader.has("tick 1\n")?;
        }
        assert!(agentd.descriptors()? >= idle + readers.len(), "one to ctl and one to the engine, each");
        for reader in readers {
            kill(Pid::from_raw(reader.child.id().cast_signed()), signal)?;
            assert_eq!(reader.end()?.0, None, "a signal ends it as it ends others");
        }
        wait_until("agentd to let go", LIMIT, || Ok((agentd.descriptors()? <= idle).then_some(())))?;
    }

    // A reader that has read enough.
    let mut command = agentd.ctl_command()?;
    let mut head = command.args(["logs", "ticker", "-f", "-o", "json"]).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(head.stdout.take().context("a pipe")?).lines();
    let first: Value = serde_json::from_str(&lines.next().context("a line")??)?;
    assert_eq!(first, json!({"stream": "stdout", "line": "tick 1"}));
    drop(lines);
    assert_eq!(wait_until("ctl's end", LIMIT, || Ok(head.try_wait()?))?.code(), Some(0));

    // As the route is documented.
    let reply = agentd.get("/v1/instances/container/ticker/logs?tail=1")?;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/vnd.agentd.logs")));
    assert_eq!(reply.body[..7], [1, 0, 0, 0, 0, 0, 0]);

    // An engine that goes away, and then the daemon itself: neither passes for the end of the log.
    let mut docker = docker;
    let reader = Reader::start(&agentd, "engine", &["container/ticker", "-f"])?;
    reader.has("tick 1\n")?;
    docker.kill()?;
    let (code, _, err) = reader.end()?;
    let err = String::from_utf8(err)?;
    assert!(code == Some(3) && err.contains("backend-unavailable"), "{code:?} {err}");
    docker.start_again()?;
    let reader = Reader::start(&agentd, "daemon", &["container/ticker", "-f"])?;
    reader.has("tick 1\n")?;
    assert_eq!(agentd.stop()?, Some(0));
    assert!(!agentd.log().contains("requests were still under way"));
    let (code, _, err) = reader.end()?;
    let err = String::from_utf8(err)?;
    assert!(code == Some(3) && err.contains("broke before the reply had ended"), "{code:?} {err}");

    // And one that does.
    agentd.start_again()?;
    let reader = Reader::start(&agentd, "ended", &["container/ticker", "-f", "--tail", "0"])?;
    reader.has("tick ")?;
    docker.docker(&["stop", "-t", "0", "ticker"])?;
    assert_eq!(reader.end()?.0, Some(0));
    Ok(())
}

#[test]
fn since_drivers_and_rights_are_heeded() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let rules = "[[access]]\nuser = \"nobody\"\nallow = [\"read\"]\nmatch = \"*\"\n\
        [[access]]\nuser = \"nobody\"\nallow = [\"logs\"]\nmatch = \"container/mine\"\n";
    let agentd = Agentd::with_config(&(config(&docker) + rules)).start()?;
    let folder = lab.dir().join("signs");
    fs::create_dir(&folder)?;
    let script = "echo old; while [ ! -e /log/go ]; do sleep 0.05; done; echo new; echo done >&2; sleep 1000";
    docker.run_command("two", &["-v", &mounted(&folder)], &["sh", "-c", script])?;
    wait_until("the first line", LIMIT, || Ok((agentd.ctl(&["logs", "two"]).stdout == "old\n").then_some(())))?;
    let now = Command::new("date").args(["-u", "+%FT%T.%NZ"]).output()?.stdout;
    let since = String::from_utf8(now)?.trim().to_owned();
    fs::write(folder.join("go"), "")?;
    wait_until("the second line", LIMIT, || Ok(agentd.ctl(&["logs", "two"]).stderr.contains("done").then_some(())))?;
    let told = |args: &[&str]| {
        let told = agentd.ctl(&[&["logs", "two"], args].concat());
        (told.code, told.stdout, told.stderr)
    };
    let text = |out: &str, err: &str| (Some(0), out.to_owned(), err.to_owned());
    assert_eq!(told(&["--since", &since]), text("new\n", "done\n"));
    assert_eq!(told(&["--since", "1h"]), text("old\nnew\n", "done\n"));
    assert_eq!(told(&["--tail", "0"]), text("", ""));
    assert_eq!(told(&["-q"]), text("", ""));
    assert_eq!(told(&["--since", "yesterday"]).0, Some(2));

    // Raw bytes, where the driver keeps them; Docker itself takes whole lines, and ends a last one that isn't.
    let bytes: Vec<u8> = (0..=255).chain([b'\n']).collect();
    fs::write(folder.join("bytes"), &bytes)?;
    let args = ["-v", &mounted(&folder), "--log-driver", "local"];
    docker.run_command("mine", &args, &["sh", "-c", "cat /log/bytes; sleep 1000"])?;
    wait_until("every byte", LIMIT, || {
        let (_, out, _) = Reader::start(&agentd, "bytes", &["mine"])?.end()?;
        Ok((out == bytes).then_some(()))
    })?;

    docker.run("silent", &["--log-driver", "none"])?;
    let refused = agentd.ctl(&["logs", "silent"]);
    assert!(refused.code == Some(9) && refused.stderr.contains("\"none\""), "{refused:?}");
    let nowhere = folder.join("syslog");
    let _syslog = std::os::unix::net::UnixDatagram::bind(&nowhere)?;
    let address = format!("syslog-address=unixgram://{}", nowhere.display());
    let driver = ["--log-driver", "syslog", "--log-opt", &address, "--log-opt", "cache-disabled=true"];
    docker.run("elsewhere", &driver)?;
    let refused = agentd.ctl(&["logs", "elsewhere"]);
    assert!(refused.code == Some(9) && refused.stderr.contains("\"syslog\""), "{refused:?}");

    // By curl, which everybody may run, wherever this was built; and the rules decide, not the socket's mode.
    fs::set_permissions(agentd.socket(), fs::Permissions::from_mode(0o666))?;
    let as_nobody = |of: &str| -> Result<String> {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket"]).arg(agentd.socket());
        curl.arg(format!("http://agentd/v1/instances/container/{of}/logs")).uid(NOBODY).gid(NOBODY);
        Ok(String::from_utf8(curl.output()?.stdout)?)
    };
    assert_eq!(as_nobody("mine")?, "200");
    assert_eq!(as_nobody("two")?, "403", "seen, and not to be read");
    agentd
        .write_config(&(config(&docker) + &rules.replace("\"read\"]\nmatch = \"*\"", "\"logs\"]\nmatch = \"vm/*\"")))?;
    agentd.signal(Signal::SIGHUP)?;
    wait_until("not-found", LIMIT, || Ok((as_nobody("two")? == "404").then_some(())))
}

#[test]
fn a_log_does_to_a_terminal_nothing_but_colours() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker)).start()?;
    // Another title, a cleared screen, the other screen, no cursor, a question that the terminal would type the answer to, an
    // operating system command that writes the clipboard; in seven bits and in eight, some of it in pieces.
    let hostile = "first\n\x1b[31mred\x1b[0m\n\x1b]0;owned\x07\x1b[2J\x1b[H\x1b[?1049h\x1b[?25l\x1b[6n\x1b]52;c;b3duZWQ=\x07\n\
                   \u{9b}2J\u{9d}0;owned\u{9c}\x1bcno line end\rover\x1b[";
    let folder = lab.dir().join("hostile");
    fs::create_dir(&folder)?;
    fs::write(folder.join("text"), hostile)?;
    let script = "cat /log/text; sleep 0.2; printf '?25l'; sleep 0.2; echo; echo last; sleep 1000";
    docker.run_command("evil", &["-v", &mounted(&folder)], &["sh", "-c", script])?;
    let tmux = Tmux::with_ctl(&agentd, (100, 30), &[("LC_ALL", "C.UTF-8")])?;
    tmux.line("ctl logs -f evil")?;
    let screen = tmux.wait_for("the last line", |screen| screen.lines().any(|line| line == "last"))?;
    tmux.keys(&["C-c"])?;
    tmux.wait_for("the prompt", |screen| screen.trim_end().ends_with("ready>"))?;
    for line in ["first", "red"] {
        ensure!(screen.lines().any(|shown| shown == line), "{line:?} is not what is shown: {screen}");
    }
    ensure!(screen.contains("\\u{1b}]0;owned") && screen.contains("no line end\\rover"), "{screen}");
    ensure!(tmux.styled_screen()?.contains("\u{1b}[31mred"), "colours pass");
    let state = tmux.tell("#{alternate_on} #{cursor_flag} #{pane_title}")?;
    ensure!(state.starts_with("0 1 ") && !state.contains("owned"), "{state}");
    // Nothing was typed for the user.
    tmux.line("echo typed=nothing")?;
    tmux.wait_for("an answer", |screen| screen.lines().any(|line| line == "typed=nothing")).map(drop)
}

#[test]
fn a_vms_serial_console_is_its_log() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let config = format!("[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", libvirt.uri());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let guest = Domain::new("g").define_and_start(&libvirt)?;
    let console = || guest.console().into_bytes();

    let follower = Reader::start(&agentd, "vm", &["vm/g", "-f"])?;
    let (code, whole, _) = Reader::start(&agentd, "whole", &["vm/g"])?.end()?;
    assert_eq!(code, Some(0));
    assert!(!whole.is_empty() && console().starts_with(&whole), "{}", String::from_utf8_lossy(&whole));
    let before = console().len();
    guest.next_stats(2)?;
    let caught_up = || Ok((fs::metadata(&follower.out)?.len() > u64::try_from(before)?).then_some(()));
    wait_until("the follower", LIMIT, caught_up)?;
    let since = agentd.ctl(&["logs", "g", "--since", "1m"]);
    assert!(since.code == Some(9) && since.stderr.contains("no times"), "{since:?}");

    guest.virsh("destroy", &[])?;
    let (code, followed, err) = follower.end()?;
    assert_eq!((code, String::from_utf8_lossy(&err).as_ref()), (Some(0), ""));
    same("the console, followed", &followed, &console())?;
    let (code, last, _) = Reader::start(&agentd, "tail", &["vm/g", "--tail", "3", "-f"])?.end()?;
    assert_eq!(code, Some(0), "nobody writes there any more");
    same("the console's tail", &last, tail(&console(), 3))?;

    let xml = libvirt.virsh(&["dumpxml", "g"])?;
    let silent = lab.dir().join("silent.xml");
    let (head, rest) = xml.split_once("<uuid>").context("a uuid")?;
    let rest = rest.split_once("</uuid>").context("a uuid")?.1;
    let xml = format!("{head}{rest}").replace("<name>g</name>", "<name>silent</name>");
    let xml = xml.replace("type='file'", "type='pty'").replace("<source path=", "<source mode=");
    fs::write(&silent, xml)?;
    libvirt.virsh(&["define", &silent.to_string_lossy()])?;
    let refused = agentd.ctl(&["logs", "silent"]);
    assert!(refused.code == Some(9) && refused.stderr.contains("<serial type='file'>"), "{refused:?}");
    Ok(())
}
