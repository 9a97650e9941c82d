//! agentd: changes CPU and memory of running VMs, containers and units, live, under one set of host caps. This file reads
//! the command line, wires the parts together and follows signals; what they do is in their modules.

mod args;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use agentd::backend::units::Units;
use agentd::backend::{self, Backend};
use agentd::engine::{Engine, Settings};
use agentd::socket::Socket;
use agentd::store::{Store, StoreError};
use agentd::{http, memory, settings};
use agentd_core::config::Config;
use anyhow::Context;
use args::Args;
use clap::Parser;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How often the whole inventory is listed while nobody asks.
const LISTING: Duration = Duration::from_secs(30);

/// How often the service manager is told what is going on, where that has changed.
const STATUS: Duration = Duration::from_secs(2);

/// How often memory that is free is given back to the host: after each listing.
const GIVEN_BACK: Duration = LISTING;

/// How long changes may take to end when the daemon stops; with the connections' own time, less than systemd waits.
const CHANGES_END: Duration = Duration::from_secs(45);

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agentd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let config = settings::read(&args.config)?;
    if args.check {
        let warnings = config.warnings();
        for warning in warnings.into_iter().chain(settings::resolve(config)?.notes) {
            eprintln!("warning: {warning}");
        }
        println!("{}: no faults", args.config.display());
        return Ok(());
    }
    memory::in_one_place();
    agentd::log::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("the runtime can't be started")?;
    let served = runtime.block_on(serve(args, config));
    // A look-up in a user database that hangs would hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

async fn serve(args: &Args, config: Config) -> anyhow::Result<()> {
    let state_dir = args.state_dir.clone().unwrap_or_else(|| config.server.state_dir.clone());
    let store = Store::new(&state_dir);
    let path = args.socket.clone().unwrap_or_else(|| config.server.socket.clone());
    let units = config.units.clone().map(|units| Arc::new(Units::new(units, None)));
    let backends = backends(args, &config, units.clone())?;
    let settings = settings::resolve(config)?;
    warn_of(&settings);
    let engine = Engine::new(backends, settings, store, epoch());
    match engine.restore().await {
        Ok(()) => {}
        // Two would promise the same capacity twice.
        Err(error @ StoreError::InUse(_)) => return Err(error.into()),
        Err(_) => {
            // It is told where it happens; reads go on, and so does trying.
            let later = engine.clone();
            tokio::spawn(async move { later.restore_when_possible().await });
        }
    }
    let (listener, _leftover) = Socket::open(&path)?.split();
    engine.keep_fresh(LISTING);
    let reloads = engine.clone();
    tokio::spawn(async move { reloads.follow_reloads().await });

    let (stop, stopped) = watch::channel(false);
    tokio::spawn(follow_signals(engine.clone(), units, args.config.clone(), stop));
    tracing::info!("agentd {} serves {}", env!("CARGO_PKG_VERSION"), path.display());
    notify(&[NotifyState::Ready, NotifyState::Status(&engine.status())]);
    tokio::spawn(tell_status(engine.clone()));
    tokio::spawn(give_memory_back(engine.clone()));
    http::serve(listener, engine.clone(), stopped).await.context("the socket can't be served any more")?;
    // Also those whose callers have gone: cut in the middle, nobody would take them back.
    if tokio::time::timeout(CHANGES_END, engine.idle()).await.is_err() {
        tracing::error!("changes were still under way after {} s and are left as they are", CHANGES_END.as_secs());
    }
    engine.end_record().await;
    tracing::info!("stopped");
    Ok(())
}

/// What of a config that is in force is hardly meant.
fn warn_of(settings: &Settings) {
    for warning in settings.config.warnings().iter().chain(&settings.notes) {
        tracing::warn!("{warning}");
    }
}

fn backends(args: &Args, config: &Config, units: Option<Arc<Units>>) -> anyhow::Result<Vec<Arc<dyn Backend>>> {
    let mut backends: Vec<Arc<dyn Backend>> = Vec::new();
    #[cfg(feature = "fake")]
    if let Some(path) = &args.fake {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} can't be read", path.display()))?;
        let spec = serde_json::from_str(&text).with_context(|| format!("{} is no fake engine", path.display()))?;
        backends.push(Arc::new(backend::fake::Fake::new(spec)));
    }
    #[cfg(not(feature = "fake"))]
    let _ = args;
    if let Some(libvirt) = &config.libvirt
        && backends.is_empty()
    {
        backends.push(Arc::new(backend::libvirt::Libvirt::new(libvirt.uri.clone())));
    }
    if let Some(docker) = &config.docker {
        backends.push(Arc::new(backend::docker::Docker::new(docker.socket.clone())));
    }
    backends.extend(units.map(|units| units as Arc<dyn Backend>));
    Ok(backends)
}

/// What keeps versions of two lives of the daemon apart.
fn epoch() -> String {
    ulid::Ulid::new().to_string().to_lowercase()
}

/// SIGTERM and SIGINT end the daemon after what is under way; SIGHUP reads the config file again.
async fn follow_signals(engine: Engine, units: Option<Arc<Units>>, config: PathBuf, stop: watch::Sender<bool>) {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup()));
    let (Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)) = signals else {
        tracing::error!("signals can't be followed");
        return;
    };
    loop {
        tokio::select! {
            // The names of users and groups are looked up, which may take as long as a directory service likes.
            _ = hangup.recv() => tokio::task::block_in_place(|| reload(&engine, units.as_deref(), &config)),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    tracing::info!("stopping");
    notify(&[NotifyState::Stopping, NotifyState::Status("letting changes under way end")]);
    // The server ends once nobody listens to this any more, too.
    let _ = stop.send(true);
}

/// Tells the service manager what is going on, and that agentd is not stuck: to make up the status takes the engine's lock
/// and a turn of the runtime.
async fn tell_status(engine: Engine) {
    let watchdog = sd_notify::watchdog_enabled();
    let pause = watchdog.map_or(STATUS, |deadline| STATUS.min(deadline / 3));
    let mut told = String::new();
    loop {
        engine.tick(pause).await;
        let status = engine.status();
        if watchdog.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
        if status != told {
            notify(&[NotifyState::Status(&status)]);
            told = status;
        }
    }
}

/// Gives back what the start took, then now and then what listings and bursts did.
async fn give_memory_back(engine: Engine) {
    loop {
        // After the listing.
        engine.tick(STATUS).await;
        memory::give_back();
        engine.tick(GIVEN_BACK).await;
    }
}

/// Takes a valid new config file whole; an invalid one, or one that changes `[server]`, changes nothing and is said. The
/// service manager hears when it begins and when it has ended.
fn reload(engine: &Engine, units: Option<&Units>, path: &Path) {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "the service manager could not be told of a reload"),
    }
    take_config(engine, units, path);
    notify(&[NotifyState::Ready, NotifyState::Status(&engine.status())]);
}

fn take_config(engine: &Engine, units: Option<&Units>, path: &Path) {
    let now = engine.settings();
    let rejected = match settings::read(path) {
        Err(error) => error.to_string(),
        Ok(config) if !same_server(&config, &now.config) => "it changes [server], which takes a restart".to_owned(),
        // The engines are connected to when the daemon starts: half of such a file would be in force.
        Ok(config) if (&config.libvirt, &config.docker) != (&now.config.libvirt, &now.config.docker) => {
            "it changes [libvirt] or [docker], which takes a restart".to_owned()
        }
        Ok(config) if config.units.is_some() != units.is_some() => {
            "it switches [units] on or off, which takes a restart".to_owned()
        }
        Ok(config) => match settings::resolve(config) {
            Ok(settings) => {
                tracing::info!("{} is in force", path.display());
                warn_of(&settings);
                if let (Some(units), Some(config)) = (units, &settings.config.units) {
                    units.allow(config.clone());
                }
                engine.set_settings(settings);
                return;
            }
            Err(error) => error.to_string(),
        },
    };
    let line = rejected.replace('\n', "; ");
    tracing::error!("{} was not taken, and what was in force stays: {line}", path.display());
    engine.note(rejected);
}

/// Whether `[server]` is the same but for the kill switch, which is there to be thrown on a running daemon.
fn same_server(new: &Config, now: &Config) -> bool {
    let mut new = new.clone();
    new.server.read_only = now.server.read_only;
    new.same_server(now)
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}
