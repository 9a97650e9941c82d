//! When systemd has read its units anew (`systemctl daemon-reload`). It sets every cgroup of its own to what it believes
//! then, so limits that an engine has changed may be the old ones again, and no engine says so (moby 41233, 51446).

use std::time::Duration;

use futures_util::StreamExt;
use zbus::connection::Builder;

/// How long the bus may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// When the next try is where there is no bus, or no systemd on it; most such hosts will never have one.
const RETRY: Duration = Duration::from_secs(60);

/// Calls `notice` after each reload, for ever; and once whenever it begins to listen, because what was before was not heard.
/// `bus` is an address of D-Bus, the system's own where there is none.
pub async fn reloads(bus: Option<&str>, notice: impl Fn()) {
    keep_listening(bus, RETRY, notice).await
}

async fn keep_listening(bus: Option<&str>, retry: Duration, notice: impl Fn()) {
    loop {
        if let Err(error) = listen(bus, &notice).await {
            tracing::debug!("systemd's reloads are not heard: {error}");
        }
        tokio::time::sleep(retry).await;
    }
}

/// Returns where the bus is lost.
async fn listen(bus: Option<&str>, notice: &impl Fn()) -> zbus::Result<()> {
    let subscribe = async {
        let builder = match bus {
            Some(address) => Builder::address(address)?,
            None => Builder::system()?,
        };
        let systemd = zbus::Proxy::new(
            &builder.build().await?,
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
        )
        .await?;
        let signals = systemd.receive_signal("Reloading").await?;
        // Without a subscriber systemd sends no signals. It forgets us when our connection ends.
        systemd.call_method("Subscribe", &()).await?;
        Ok(signals)
    };
    let late = |_| zbus::Error::InputOutput(std::sync::Arc::new(std::io::ErrorKind::TimedOut.into()));
    let mut signals = tokio::time::timeout(DEADLINE, subscribe).await.unwrap_or_else(|elapsed| Err(late(elapsed)))?;
    notice();
    while let Some(signal) = signals.next().await {
        // True when a reload begins, false when it has ended.
        if signal.body().deserialize() == Ok(false) {
            notice();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    use tokio::sync::mpsc;

    use super::*;

    /// A bus of the test's own, from the package `dbus-daemon`.
    struct Bus {
        daemon: Child,
        address: String,
        _folder: tempfile::TempDir,
    }

    impl Bus {
        fn start() -> Bus {
            let folder = tempfile::tempdir().unwrap();
            let mut child = Command::new("dbus-daemon")
                .args(["--session", "--nofork", "--nopidfile", "--print-address"])
                .arg(format!("--address=unix:path={}/bus", folder.path().display()))
                .stdout(Stdio::piped())
                .spawn()
                .expect("dbus-daemon is installed: packaging/setup.sh check");
            let mut address = String::new();
            BufReader::new(child.stdout.take().unwrap()).read_line(&mut address).unwrap();
            Bus { daemon: child, address: address.trim().to_owned(), _folder: folder }
        }
    }

    impl Drop for Bus {
        fn drop(&mut self) {
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
    }

    /// As much of systemd as is needed here. It tells who subscribed.
    struct Manager(mpsc::UnboundedSender<()>);

    #[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
    impl Manager {
        fn subscribe(&self) {
            let _ = self.0.send(());
        }
    }

    async fn systemd(bus: &Bus) -> (zbus::Connection, mpsc::UnboundedReceiver<()>) {
        let (subscribed, subscriptions) = mpsc::unbounded_channel();
        let builder = Builder::address(bus.address.as_str()).unwrap().name("org.freedesktop.systemd1").unwrap();
        let builder = builder.serve_at("/org/freedesktop/systemd1", Manager(subscribed)).unwrap();
        (builder.build().await.unwrap(), subscriptions)
    }

    async fn emit(systemd: &zbus::Connection, reloading: bool) {
        let (path, interface) = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager");
        systemd.emit_signal(None::<&str>, path, interface, "Reloading", &reloading).await.unwrap();
    }

    #[tokio::test]
    async fn the_end_of_a_reload_is_heard_and_its_begin_is_not() {
        let bus = Bus::start();
        let (systemd, mut subscriptions) = systemd(&bus).await;
        let (send, mut notices) = mpsc::unbounded_channel();
        let story = async {
            subscriptions.recv().await.unwrap();
            notices.recv().await.unwrap();
            emit(&systemd, true).await;
            // In order with what is sent after it: a second notice is the end's.
            emit(&systemd, false).await;
            notices.recv().await.unwrap();
            emit(&systemd, false).await;
            notices.recv().await.unwrap();
            assert!(notices.try_recv().is_err());
        };
        tokio::select! {
            () = story => {}
            () = reloads(Some(&bus.address), || send.send(()).unwrap()) => unreachable!(),
        }
    }

    #[tokio::test]
    async fn without_a_bus_or_without_systemd_on_it_there_is_nothing_to_hear() {
        let bus = Bus::start();
        for address in ["unix:path=/nonexistent/bus", &bus.address] {
            let heard = listen(Some(address), &|| panic!("nothing was to be heard at {address}")).await;
            assert!(heard.is_err(), "{address}");
        }
    }

    #[tokio::test]
    async fn a_systemd_that_comes_later_is_found() {
        let bus = Bus::start();
        let (send, mut notices) = mpsc::unbounded_channel();
        let story = async {
            let pause = Duration::from_millis(20);
            assert!(tokio::time::timeout(pause, notices.recv()).await.is_err());
            let _systemd = systemd(&bus).await;
            notices.recv().await.unwrap();
        };
        tokio::select! {
            () = story => {}
            () = keep_listening(Some(&bus.address), Duration::from_millis(5), || send.send(()).unwrap()) => unreachable!(),
        }
    }

    #[tokio::test]
    async fn a_bus_that_ends_is_noticed() {
        let mut bus = Bus::start();
        let (_systemd, mut subscriptions) = systemd(&bus).await;
        let address = bus.address.clone();
        let listener = listen(Some(&address), &|| {});
        let end = async {
            subscriptions.recv().await.unwrap();
            bus.daemon.kill().unwrap();
            std::future::pending::<()>().await
        };
        tokio::select! {
            _ = listener => {}
            () = end => unreachable!(),
        }
    }
}
