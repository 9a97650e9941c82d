//! `ctl top`: the host and its instances, looked at again and again. One loop takes what three threads tell it (keys, samples,
//! signals), changes the model and draws it; on what is no terminal it prints one look as lines. What is shown is in
//! `model.rs`, how in `view.rs`.
//!
//! ```text
//!   keys ────┐
//!   samples ─┼──► model ──► view ──► terminal
//!   signals ─┘
//! ```

mod model;
mod plain;
mod source;
mod terminal;
#[cfg(test)]
mod testing;
mod view;

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use anstream::ColorChoice;
use jiff::Zoned;
use ratatui::crossterm::event::{self, Event, KeyEvent};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::SortKey;
use crate::client::Client;
use crate::error::Failure;
use crate::progress;
use crate::render::bar::Glyphs;
use crate::render::{Report, Screen};
use model::Model;
use source::{Answers, Sample, Source};
use terminal::Terminal;
use view::Look;

pub(crate) use terminal::restore;

/// How `ctl top` was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) sort: SortKey,
    /// Only instances that match.
    pub(crate) pattern: Option<String>,
    /// Between two looks.
    pub(crate) interval: Duration,
    /// One look, as lines.
    pub(crate) once: bool,
    /// Of which host this is, where it isn't this one.
    pub(crate) address: Option<String>,
}

/// What the loop is told.
enum Told {
    Key(KeyEvent),
    /// The window has another size, or came back.
    Redraw,
    Sample(Box<Result<Sample, Failure>>),
    /// By its number.
    Signal(i32),
    /// A thread is no more.
    Lost(&'static str),
}

/// Shows it until somebody has seen enough.
pub(crate) fn run(client: Client, screen: &Screen, options: &Options) -> Result<Report, Failure> {
    let source = Source::new(client, options.pattern.clone());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if options.once || screen.json || screen.quiet || screen.out_width.is_none() || dumb {
        return plain::report(&source, screen, options);
    }
    // Before the screen is taken: what is wrong from the start is an error like any other command's.
    let first = look(&source, screen)?.sample()?;
    let failed = |error: std::io::Error| Failure::internal(format!("the terminal can't be used: {error}"));
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let (tell, told) = mpsc::channel();
    let mut terminal = Terminal::take().map_err(failed)?;
    spawn("signals", &tell, move |tell| {
        signals.forever().try_for_each(|signal| tell.send(Told::Signal(signal)).map_err(drop)).ok();
    })
    .and_then(|()| spawn("keys", &tell, |tell| while keys(tell).is_ok() {}))
    .and_then(|()| {
        let interval = options.interval;
        spawn("looks", &tell, move |tell| {
            thread::sleep(interval);
            while tell.send(Told::Sample(Box::new(source.ask().and_then(|answers| answers.sample())))).is_ok() {
                thread::sleep(interval);
            }
        })
    })
    .map_err(failed)?;
    let mut model = Model::new(first, Zoned::now(), options.sort);
    show(&mut terminal, &told, &mut model, options)
}

/// The first look; on a terminal it says what it waits for, as every command does.
fn look(source: &Source, screen: &Screen) -> Result<Answers, Failure> {
    if screen.quiet || screen.err_width.is_none() {
        return source.ask();
    }
    let source = source.clone();
    progress::watch("waiting for agentd".into(), None, move || source.ask())
}

/// Draws, takes what it is told, and draws again.
fn show(
    terminal: &mut Terminal,
    told: &Receiver<Told>,
    model: &mut Model,
    options: &Options,
) -> Result<Report, Failure> {
    let colors = anstream::AutoStream::choice(&std::io::stdout()) != ColorChoice::Never;
    let look = Look { glyphs: Glyphs::of_locale(), colors };
    loop {
        let drawn = terminal.0.draw(|frame| {
            model.set_page(view::page(frame.area().height));
            view::draw(frame.area(), frame.buffer_mut(), model, options.address.as_deref(), look);
        });
        drawn.map_err(|error| Failure::internal(format!("the terminal can't be drawn on: {error}")))?;
        // All that is there before it is drawn again: a key that is held down shall not lag behind.
        let mut next = told.recv().ok();
        while let Some(what) = next {
            match what {
                Told::Key(key) => {
                    if !model.press(key) {
                        return Ok(Report::default());
                    }
                }
                Told::Redraw => {}
                Told::Sample(sample) => model.take(*sample, Zoned::now()),
                // As a shell tells of a command that a signal has ended.
                Told::Signal(signal) => {
                    let exit = u8::try_from(128 + signal).unwrap_or(u8::MAX);
                    return Ok(Report { exit, ..Report::default() });
                }
                Told::Lost(what) => return Err(Failure::internal(format!("ctl's thread for {what} has ended"))),
            }
            next = told.try_recv().ok();
        }
    }
}

/// Waits for what the keyboard or the window does, and tells it.
fn keys(tell: &Sender<Told>) -> Result<(), ()> {
    let what = match event::read().map_err(drop)? {
        Event::Key(key) => Told::Key(key),
        _ => Told::Redraw,
    };
    tell.send(what).map_err(drop)
}

/// Runs a thread that tells what it sees until nobody listens; its end is told, too.
fn spawn(
    name: &'static str,
    tell: &Sender<Told>,
    run: impl FnOnce(&Sender<Told>) + Send + 'static,
) -> std::io::Result<()> {
    struct Last(Sender<Told>, &'static str);
    impl Drop for Last {
        fn drop(&mut self) {
            let _ = self.0.send(Told::Lost(self.1));
        }
    }
    let tell = Last(tell.clone(), name);
    // It ends with the process.
    thread::Builder::new().name(name.into()).spawn(move || run(&tell.0)).map(drop)
}
