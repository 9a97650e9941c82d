//! Between agentd and a real Docker: passes everything on, and for the requests that it was told of it lies, stalls or breaks off.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};

/// What is done with a request.
#[derive(Debug, Clone)]
pub enum Lie {
    /// This status and body in place of the engine's, which hears nothing.
    Instead(u16, Vec<u8>),
    /// A status line and so many bytes of JSON that never ends, in chunks.
    Endless(usize),
    /// The first half of the engine's own answer.
    Half,
    /// The engine does it, and its answer is lost.
    Lost,
    /// The connection is taken and nothing comes.
    Never,
    /// It is closed without a word, and the engine hears nothing.
    Closed,
    /// Bytes that are not HTTP.
    Noise,
}

#[derive(Debug, Default)]
struct Told {
    /// To requests whose first line contains this.
    lie: Option<(String, Lie)>,
    /// Connections that wait for ever.
    waiting: Vec<UnixStream>,
    /// Connections that announcements are passed on over.
    announcing: Vec<UnixStream>,
}

/// A socket that speaks for the engine behind it; gone when dropped.
#[derive(Debug)]
pub struct Liar {
    socket: PathBuf,
    told: Arc<Mutex<Told>>,
    lied: Arc<AtomicUsize>,
}

impl Liar {
    /// Listens at `socket` for the engine at `engine`.
    ///
    /// # Errors
    /// It can't be bound.
    pub fn start(socket: &Path, engine: &Path) -> Result<Liar> {
        let listener = UnixListener::bind(socket).with_context(|| socket.display().to_string())?;
        let (told, lied) = (Arc::<Mutex<Told>>::default(), Arc::<AtomicUsize>::default());
        let liar = Liar { socket: socket.to_owned(), told: Arc::clone(&told), lied: Arc::clone(&lied) };
        let engine = engine.to_owned();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), told, lied, engine) = (stream, Arc::clone(&told), Arc::clone(&lied), engine.clone())
                else {
                    return;
                };
                // What breaks off is what this is for.
                thread::spawn(move || drop(answer(stream, &engine, &told, &lied)));
            }
        });
        Ok(liar)
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// From here on it lies to requests whose first line contains `about`.
    pub fn lie(&self, about: &str, lie: Lie) {
        lock(&self.told).lie = Some((about.to_owned(), lie));
    }

    /// Breaks off what it passes on of announcements, so that all has to be listed anew.
    pub fn hang_up(&self) {
        for stream in lock(&self.told).announcing.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// How often it has lied since it was honest last.
    pub fn lied(&self) -> usize {
        self.lied.load(Ordering::Relaxed)
    }

    /// From here on it passes everything on, and who still waits is hung up on. Tells how often it has lied.
    pub fn be_honest(&self) -> usize {
        let mut told = lock(&self.told);
        told.lie = None;
        for stream in told.waiting.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.lied.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.be_honest();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn lock(told: &Mutex<Told>) -> std::sync::MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One request on one connection: a client of Docker's that keeps none makes another one for the next.
fn answer(mut stream: UnixStream, engine: &Path, told: &Mutex<Told>, lied: &AtomicUsize) -> io::Result<()> {
    let mut from = BufReader::new(stream.try_clone()?);
    let (mut request, mut length) = (Vec::new(), 0);
    loop {
        let begin = request.len();
        if from.read_until(b'\n', &mut request)? == 0 {
            return Ok(());
        }
        let line = String::from_utf8_lossy(&request[begin..]).to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    request.extend(body);
    let first = String::from_utf8_lossy(request.split(|byte| *byte == b'\r').next().unwrap_or_default()).into_owned();
    let lie = {
        let mut told = lock(told);
        let lie = told.lie.clone().filter(|(about, _)| first.contains(about)).map(|(_, lie)| lie);
        // Under the same lock: who is made to wait now is hung up on by the next honest word.
        if matches!(lie, Some(Lie::Never)) {
            told.waiting.push(stream.try_clone()?);
        }
        lie
    };
    if lie.is_some() {
        lied.fetch_add(1, Ordering::Relaxed);
    }
    let ask = || -> io::Result<UnixStream> {
        let mut behind = UnixStream::connect(engine)?;
        behind.write_all(&request)?;
        Ok(behind)
    };
    match lie {
        None => {
            let mut behind = ask()?;
            if first.contains("/events") {
                lock(told).announcing.push(stream.try_clone()?);
            }
            let (mut client, mut server) = (stream.try_clone()?, behind.try_clone()?);
            // A client that goes away ends what follows.
            let gone = thread::spawn(move || {
                let _ = io::copy(&mut client, &mut server);
                let _ = server.shutdown(Shutdown::Both);
            });
            let passed = io::copy(&mut behind, &mut stream);
            let _ = stream.shutdown(Shutdown::Both);
            let _ = gone.join();
            passed.map(drop)
        }
        Some(Lie::Instead(status, body)) => {
            let head = format!(
                "HTTP/1.1 {status} Lie\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes())?;
            stream.write_all(&body)
        }
        Some(Lie::Endless(length)) => {
            stream.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            let chunk = [&b"10000\r\n"[..], &[b' '; 1 << 16], b"\r\n"].concat();
            (0..length >> 16).try_for_each(|_| stream.write_all(&chunk))?;
            stream.write_all(b"0\r\n\r\n")
        }
        Some(Lie::Half) => {
            let mut behind = ask()?;
            behind.shutdown(Shutdown::Write)?;
            let mut whole = Vec::new();
            let _ = behind.set_read_timeout(Some(std::time::Duration::from_secs(1)));
            let _ = behind.read_to_end(&mut whole);
            stream.write_all(&whole[..whole.len() / 2])
        }
        Some(Lie::Lost) => {
            let mut behind = ask()?;
            let _ = behind.read(&mut [0; 64])?;
            Ok(())
        }
        Some(Lie::Never) => stream.read(&mut [0; 1]).map(drop),
        Some(Lie::Closed) => Ok(()),
        Some(Lie::Noise) => stream.write_all(&(0..=255).cycle().take(1 << 16).collect::<Vec<u8>>()),
    }
}
