//! Any bytes on the socket, of a whole daemon on the fake engine: each answer is one of HTTP's with a status that the API has,
//! and at the end of it all no cap is passed.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use agentd::backend::fake::Fake;
use agentd::engine::Engine;
use agentd::store::Store;
use agentd::{http, settings};
use agentd_core::config::Config;
use tokio::net::UnixListener;
use tokio::sync::watch;

/// How long an answer may let nothing be heard; streams that follow something do.
const SILENCE: Duration = Duration::from_millis(100);
/// The longest answer that is read.
const LONGEST: u64 = 1 << 20;

/// A daemon within this process, until that ends.
struct Daemon {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    asked: u64,
}

/// Whether anything has panicked.
static PANICKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static DAEMON: RefCell<Option<Daemon>> = const { RefCell::new(None) };
}

async fn serve(folder: PathBuf, ready: Sender<()>) {
    let instance = |number: usize| {
        serde_json::json!({
            "name": format!("vm-{number}"), "cpus": 1, "memory": "512MiB", "max_cpus": 4, "max_memory": "2GiB",
        })
    };
    let instances: Vec<_> = (0..4).map(instance).collect();
    let spec = serde_json::from_value(serde_json::json!({ "instances": instances })).expect("a fake engine");
    let config = Config::parse("agentd.toml", "[capacity]\ncpus = 6\nmemory = \"4GiB\"\nreserved_memory = 0\n")
        .expect("a config");
    let settings = settings::resolve(config).expect("settings");
    let engine = Engine::new(vec![Arc::new(Fake::new(spec))], settings, Store::new(&folder), "fuzz".into());
    engine.restore().await.expect("a new record");
    engine.keep_fresh(Duration::from_secs(1));
    let listener = UnixListener::bind(folder.join("socket")).expect("a socket");
    ready.send(()).expect("somebody waits");
    let (_stop, stopped) = watch::channel(false);
    http::serve(listener, engine, stopped).await.expect("it serves for ever");
}

impl Daemon {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_owned();
        let socket = path.join("socket");
        let (ready, is_ready) = channel();
        std::thread::spawn(move || {
            // What breaks one request is caught, and told to its caller only.
            let told = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                PANICKED.store(true, Ordering::Relaxed);
                told(panic);
            }));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serve(path, ready));
        });
        is_ready.recv().expect("it starts");
        Daemon { _folder: folder, socket, asked: 0 }
    }

    /// Sends this; `ends` says that nothing comes after it, which cuts a request short that is under way.
    fn ask(&self, request: &[u8], ends: bool, silence: Duration) -> Vec<u8> {
        let mut stream = UnixStream::connect(&self.socket).expect("it listens");
        stream.set_read_timeout(Some(silence)).expect("a timeout");
        // It may have heard enough before the end.
        let _ = stream.write_all(request);
        if ends {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut answer = Vec::new();
        let _ = stream.take(LONGEST).read_to_end(&mut answer);
        answer
    }
}

/// What is sent over one connection, until its end.
pub fn http(data: &[u8]) {
    DAEMON.with_borrow_mut(|daemon| {
        let daemon = daemon.get_or_insert_with(Daemon::start);
        let answer = daemon.ask(data, true, SILENCE);
        assert!(!PANICKED.load(Ordering::Relaxed), "the daemon panicked");
        let answer = answer.strip_prefix(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&answer);
        if !answer.is_empty() {
            let head = answer.get(..12).and_then(|head| std::str::from_utf8(head).ok()).unwrap_or_default();
            let status = head.strip_prefix("HTTP/1.1 ").or_else(|| head.strip_prefix("HTTP/1.0 "));
            let status: u16 = status.and_then(|status| status.parse().ok()).unwrap_or_default();
            assert!((200..500).contains(&status) || status == 503, "{:?}", String::from_utf8_lossy(answer));
        }
        daemon.asked += 1;
        if daemon.asked % 256 == 0 {
            let request = b"GET /v1/capacity HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
            let answer = daemon.ask(request, false, Duration::from_secs(60));
            let answer = String::from_utf8_lossy(&answer);
            assert!(
                answer.starts_with("HTTP/1.1 200") && !answer.contains("\"over\":true"),
                "a cap is passed: {answer}"
            );
        }
    });
}
