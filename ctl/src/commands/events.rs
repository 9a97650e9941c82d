//! `ctl events`: what happens, as it happens, one line an event; over a restart of agentd, too, where it follows.

use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::thread::sleep;
use std::time::Duration;

use agentd_core::api::{HistoryEntry, LostEvents};
use agentd_core::instance::Kind;

use super::Context;
use crate::args::Events;
use crate::client::{Client, encode};
use crate::error::Failure;
use crate::render::live::{Live, json_line, unwritten};
use crate::render::{Report, history, text};

/// How many are shown where it doesn't follow and nobody says.
const TAIL: usize = 100;
/// The pause before an agentd that went away is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// The longest line of an event that is taken; agentd's are a few KiB.
const LONGEST_LINE: u64 = 1 << 20;

/// One server-sent event.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sent {
    id: Option<u64>,
    event: String,
    data: String,
}

/// How the reading of events ended.
enum End {
    /// There are no more.
    Whole,
    /// The connection broke, or agentd has let go.
    Broken(io::Error),
    /// agentd has let go of a reader that was too slow, or can't go on, and why.
    Dropped(String),
    /// What came could not be written.
    Unwritten(io::Error),
}

/// Shows what happens.
pub(super) fn events(context: &Context, args: &Events) -> Result<Report, Failure> {
    let kind = args.kind.as_deref().map(str::parse::<Kind>).transpose()?;
    let mut query = vec![format!("follow={}", args.follow)];
    query.extend(kind.map(|kind| format!("kind={kind}")));
    query.extend(args.pattern.as_deref().map(|pattern| format!("match={}", encode(pattern))));
    query.extend(args.types.as_deref().map(|types| format!("type={}", encode(types))));
    let path = format!("/v1/events?{}", query.join("&"));
    let tail = args.tail.unwrap_or(if args.follow { 0 } else { TAIL });
    let first = if args.after.is_some() { path.clone() } else { format!("{path}&tail={tail}") };
    let mut out = Screen {
        live: Live::stdout(),
        json: context.screen.json,
        quiet: context.screen.quiet,
        local: history::Local::new(),
    };

    let (client, after) = (context.client.clone(), args.after);
    let mut reply: Box<dyn Read> = Box::new(context.watch(None, move || client.stream_after(&first, after))?);
    let mut place = args.after;
    loop {
        let why = match copy(reply, &mut place, &mut out) {
            End::Unwritten(error) => return Ok(unwritten(&error)),
            End::Whole if !args.follow => return Ok(Report::default()),
            End::Dropped(why) if place.is_none() => return Err(context.client.broke_off(&io::Error::other(why))),
            End::Dropped(why) => {
                out.note(&format!("agentd let go ({why}); taking it up again"));
                reply = again(&context.client, &path, place)?;
                continue;
            }
            End::Broken(why) if !args.follow => return Err(context.client.broke_off(&why)),
            End::Whole => "it has ended the stream".to_owned(),
            End::Broken(why) => why.to_string(),
        };
        // Without a place nothing can be asked for again without a gap.
        out.note(&format!("agentd went away ({why}); trying again"));
        reply = again(&context.client, &path, place)?;
    }
}

/// Asks until agentd is back. A refusal is final.
fn again(client: &Client, path: &str, place: Option<u64>) -> Result<Box<dyn Read>, Failure> {
    loop {
        sleep(AGAIN);
        match client.stream_after(path, place) {
            Ok(reply) => return Ok(Box::new(reply)),
            Err(failure) if failure.may_pass() => {}
            Err(failure) => return Err(failure),
        }
    }
}

/// Shows event after event; `place` is the last that was shown.
fn copy(reply: impl Read, place: &mut Option<u64>, out: &mut Screen) -> End {
    let mut lines = BufReader::new(reply);
    let mut sent = Sent::default();
    loop {
        let mut line = String::new();
        match lines.by_ref().take(LONGEST_LINE).read_line(&mut line) {
            Ok(0) => return End::Whole,
            Ok(_) if !line.ends_with('\n') => return End::Broken(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return End::Broken(error),
        }
        if !sent.take(line.trim_end_matches(['\r', '\n'])) {
            continue;
        }
        let whole = std::mem::take(&mut sent);
        if whole.event == "dropped" {
            let told: Option<serde_json::Value> = serde_json::from_str(&whole.data).ok();
            let why = told.and_then(|told| told["reason"].as_str().map(text::clean));
            return End::Dropped(why.unwrap_or_else(|| "it does not say why".into()));
        }
        if let Err(error) = out.show(&whole) {
            return End::Unwritten(error);
        }
        *place = whole.id.or(*place);
    }
}

impl Sent {
    /// Takes a line; whether that was the last of an event (the HTML standard, "Interpreting an event stream").
    fn take(&mut self, line: &str) -> bool {
        if line.is_empty() {
            return *self != Sent::default();
        }
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "id" => self.id = value.parse().ok(),
            "event" => value.clone_into(&mut self.event),
            "data" => self.data += value,
            _ => {}
        }
        false
    }
}

/// Where events are shown.
struct Screen {
    live: Live,
    json: bool,
    quiet: bool,
    local: history::Local,
}

impl Screen {
    fn show(&mut self, sent: &Sent) -> io::Result<()> {
        match sent.event.as_str() {
            "" => Ok(()),
            "lost" => {
                let lost: Option<LostEvents> = serde_json::from_str(&sent.data).ok();
                let from =
                    lost.map_or_else(String::new, |lost| format!(": after {}, before {}", lost.after, lost.oldest));
                self.note(&format!("what happened before is not on record any more{from}"));
                Ok(())
            }
            _ if self.quiet => Ok(()),
            _ if self.json => match serde_json::from_str::<serde_json::Value>(&sent.data) {
                Ok(value) => self.live.write(json_line(&value).as_bytes()),
                Err(_) => Ok(()),
            },
            _ => match serde_json::from_str::<HistoryEntry>(&sent.data) {
                Ok(entry) => self.live.write(history::line(&entry, &self.local).as_bytes()),
                // One of a newer agentd.
                Err(_) => self.live.write(format!("{}\n", text::clean(&sent.data)).as_bytes()),
            },
        }
    }

    /// Says something that is no event; nowhere is left where standard error fails.
    fn note(&self, note: &str) {
        use std::io::Write as _;
        if !self.quiet {
            let _ = writeln!(anstream::stderr(), "note: {note}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Vec<Sent> {
        let (mut all, mut sent) = (Vec::new(), Sent::default());
        for line in text.split('\n') {
            if sent.take(line) {
                all.push(std::mem::take(&mut sent));
            }
        }
        all
    }

    #[test]
    fn events_are_told_apart_and_comments_mean_nothing() {
        let read = read(":\n\nid: 7\n\n:\n\nid: 8\nevent: drift\ndata: {\"a\":\ndata: 1}\nretry: 5\n\n:\n");
        let drift = Sent { id: Some(8), event: "drift".into(), data: "{\"a\":1}".into() };
        assert_eq!(read, [Sent { id: Some(7), ..Sent::default() }, drift]);
    }

    #[test]
    fn a_stream_that_breaks_off_in_an_event_is_taken_up_before_it() {
        let mut out = Screen { live: Live::stdout(), json: false, quiet: true, local: history::Local::new() };
        let mut place = None;
        let text = "id: 7\nevent: state\ndata: {}\n\nid: 8\nevent: sta";
        assert!(matches!(copy(text.as_bytes(), &mut place, &mut out), End::Broken(_)));
        assert_eq!(place, Some(7));
        assert!(matches!(copy("id: 9\nevent: state\ndata: {}\n\n".as_bytes(), &mut place, &mut out), End::Whole));
        assert_eq!(place, Some(9));
    }
}
