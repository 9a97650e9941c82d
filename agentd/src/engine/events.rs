//! What happens, as it happens: the history and the states of instances, in the order of their places on record. A reader
//! asks by place, so that it may go away and come back; what it is sent was on the disk before.
//!
//! Each reader has a task of its own that reads the record, and a short queue. Nothing else waits for it: one that takes nothing for
//! too long is dropped, and told where it was.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use agentd_core::access::Decision;
use agentd_core::access::Right;
use agentd_core::api::{Happening, HistoryEntry, LostEvents};
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Kind, Ref, Target};
use agentd_core::pattern::Pattern;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;

use super::{Engine, Peer};
use crate::executor::unrecorded;
use crate::store::{Page, Store, StoreError};

/// How many entries are read of the record at once.
const PAGE: usize = 500;
/// How many are read back at most for what was before.
const MOST_READ: usize = 100_000;
/// How many may wait for one reader.
const QUEUE: usize = 256;
/// How long the queue of a reader may be full.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause before a record that can't be read is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The most that can be asked for of what was before.
pub const LONGEST_TAIL: usize = 10_000;

/// Which events.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// Of this kind of instances.
    pub kind: Option<Kind>,
    /// Of those that match.
    pub pattern: Option<Pattern>,
    /// Of these types; of all where it is empty.
    pub types: Vec<Happening>,
}

/// From where on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// After this place, the last that the reader has seen.
    After(u64),
    /// The newest so many first.
    Tail(usize),
}

/// What a reader is sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Where it begins: what comes next has a higher place.
    Begins(u64),
    /// It happened.
    Happened(Box<HistoryEntry>),
    /// What the reader has missed is not on record any more.
    Lost(LostEvents),
}

/// The events of one reader.
#[derive(Debug)]
pub struct Events {
    /// What comes.
    pub queue: mpsc::Receiver<Event>,
    /// Why nothing more comes after the last of the queue, where that is not its end.
    pub dropped: Arc<OnceLock<String>>,
}

impl Engine {
    /// The events that this caller may see: to all that happens by itself, and what it has asked for; with the right `admin` what
    /// anybody has. Ends with what there is, or goes on for as long as somebody reads.
    pub async fn events(&self, peer: &Peer, filter: EventFilter, from: Begin, follow: bool) -> Result<Events, Problem> {
        let (first, last) = self.store().ends().await.map_err(|error| unrecorded(&error))?;
        let (sender, queue) = mpsc::channel(QUEUE);
        let dropped = Arc::new(OnceLock::new());
        let mut reader =
            Reader { engine: self.clone(), peer: peer.clone(), filter, sender, dropped: Arc::clone(&dropped) };
        let (begin, before) = match from {
            // A place that this record has not come to yet is of another one.
            Begin::After(place) if place > last => {
                (last, vec![Event::Lost(LostEvents { after: place, oldest: last + 1 })])
            }
            Begin::After(place) if first > place + 1 => {
                (place, vec![Event::Lost(LostEvents { after: place, oldest: first })])
            }
            Begin::After(place) => (place, Vec::new()),
            Begin::Tail(count) => {
                (reader.before_newest(last, count).await.map_err(|error| unrecorded(&error))?, Vec::new())
            }
        };
        tokio::spawn(async move { reader.run(begin, before, follow).await });
        Ok(Events { queue, dropped })
    }

    /// Whether a caller may hear of this.
    fn may_hear(&self, peer: &Peer, entry: &HistoryEntry) -> bool {
        if entry.who.is_some() {
            return self.may_see_entry(peer, entry);
        }
        let access = &self.settings().access;
        let labels = self.labels(entry);
        let admin = access.decide(&peer.caller, Right::Admin, Some((&entry.reference, &labels)));
        matches!(admin, Decision::Allowed { .. }) || access.can_see(&peer.caller, &entry.reference, &labels)
    }

    fn fits(&self, filter: &EventFilter, entry: &HistoryEntry) -> bool {
        let reference = match entry.reference.parse() {
            Ok(Target::Full(reference)) => Some(reference),
            _ => None,
        };
        let kind = reference.as_ref().map(Ref::kind);
        let matches = |pattern: &Pattern| pattern.matches(&entry.reference, &self.labels(entry));
        filter.kind.is_none_or(|wanted| kind == Some(wanted))
            && (filter.types.is_empty() || filter.types.contains(&entry.happening))
            && filter.pattern.as_ref().is_none_or(matches)
    }
}

/// The task of one reader.
struct Reader {
    engine: Engine,
    peer: Peer,
    filter: EventFilter,
    sender: mpsc::Sender<Event>,
    dropped: Arc<OnceLock<String>>,
}

impl Reader {
    fn wants(&self, entry: &HistoryEntry) -> bool {
        self.engine.fits(&self.filter, entry) && self.engine.may_hear(&self.peer, entry)
    }

    fn store(&self) -> &Store {
        self.engine.store()
    }

    /// The place before the newest `count` up to this one that it wants; not further back than a bound.
    async fn before_newest(&mut self, last: u64, count: usize) -> Result<u64, StoreError> {
        let (mut before, mut found) = (last.saturating_add(1), 0);
        for _ in 0..MOST_READ / PAGE {
            if found == count {
                break;
            }
            let page = Page { before: Some(before), limit: PAGE, states: true, ..Page::default() };
            let entries = self.store().history(page).await?;
            if entries.is_empty() {
                break;
            }
            for entry in &entries {
                if found == count {
                    break;
                }
                before = entry.seq;
                found += usize::from(self.wants(entry));
            }
        }
        Ok(before.saturating_sub(1))
    }

    /// Sends what was before and then what comes after `place`.
    async fn run(&mut self, mut place: u64, before: Vec<Event>, follow: bool) {
        let mut told = self.store().told();
        for event in before.into_iter().chain([Event::Begins(place)]) {
            if !self.send(event, place).await {
                return;
            }
        }
        loop {
            told.borrow_and_update();
            let entries = match self.store().after(place, PAGE).await {
                Ok(entries) => entries,
                Err(error) if follow => {
                    tracing::debug!(%error, "events can't be read now");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
                Err(error) => {
                    let _ = self.dropped.set(error.to_string());
                    return;
                }
            };
            let whole = entries.len() == PAGE;
            // One that is sent nothing must not come back for what is long gone.
            let passed = place;
            for entry in entries {
                let next = entry.seq;
                if self.wants(&entry) && !self.send(Event::Happened(Box::new(entry)), place).await {
                    return;
                }
                place = next;
            }
            if place > passed && !self.send(Event::Begins(place), place).await {
                return;
            }
            if whole {
                continue;
            }
            if !follow {
                return;
            }
            tokio::select! {
                changed = told.changed() => if changed.is_err() { return },
                () = self.sender.closed() => return,
            }
        }
    }

    /// Whether somebody still reads.
    async fn send(&self, event: Event, place: u64) -> bool {
        match self.sender.send_timeout(event, PATIENCE).await {
            Ok(()) => true,
            Err(SendTimeoutError::Closed(_)) => false,
            Err(SendTimeoutError::Timeout(_)) => {
                let uid = self.peer.who.uid;
                let note = format!("nothing of {QUEUE} waiting events was taken for {} s", PATIENCE.as_secs());
                tracing::warn!(uid, place, "a reader of events was dropped (uid {uid}): {note}");
                let _ = self.dropped.set(note);
                false
            }
        }
    }
}

/// Reads the names of types of events: `drift,state`.
pub fn types(text: &str) -> Result<Vec<Happening>, Problem> {
    let one = |name: &str| {
        let known = Happening::ALL.into_iter().find(|happening| happening.as_str() == name.trim());
        known.ok_or_else(|| {
            let names: Vec<&str> = Happening::ALL.iter().map(|happening| happening.as_str()).collect();
            Problem::new(Code::InvalidRequest, format!("{:?} is no type of event", name.trim()))
                .hint(format!("types are {}", names.join(", ")))
        })
    };
    text.split(',').map(one).collect()
}
