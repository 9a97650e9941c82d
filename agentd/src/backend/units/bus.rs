//! systemd's manager over D-Bus: each call with a deadline, each error in the words of [`BackendError`]. The connection is
//! made when it is needed and made anew when it is lost.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio::time::timeout;
use zbus::connection::Builder;
use zbus::message::Type;
use zbus::zvariant::{DynamicType, OwnedObjectPath, OwnedValue, Value};
use zbus::{Connection, Error, MatchRule, MessageStream};

use crate::backend::{BackendError, Notice};

const SYSTEMD: &str = "org.freedesktop.systemd1";
const ROOT: &str = "/org/freedesktop/systemd1";
const UNITS: &str = "/org/freedesktop/systemd1/unit";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// How long a look may take; systemd answers within milliseconds, and while it reads its units anew not at all.
const LOOK: Duration = Duration::from_secs(10);
/// How long a change may take.
const CHANGE: Duration = Duration::from_secs(30);
/// How many signals may wait.
const SIGNALS: usize = 1024;

/// The properties of one unit, by their names (org.freedesktop.systemd1(5)).
pub(super) type Properties = HashMap<String, OwnedValue>;

/// The way to systemd.
#[derive(Debug)]
pub(super) struct Bus {
    /// An address of D-Bus; the system's own where there is none.
    address: Option<String>,
    connection: tokio::sync::Mutex<Option<Connection>>,
    /// How many changes of each unit are under way.
    changing: Arc<Mutex<HashMap<String, usize>>>,
}

/// What a change is asked to set: a property of systemd and its value.
pub(super) type Setting = (&'static str, u64);

impl Bus {
    pub(super) fn new(address: Option<String>) -> Self {
        Bus { address, connection: tokio::sync::Mutex::default(), changing: Arc::default() }
    }

    /// systemd's version.
    pub(super) async fn version(&self) -> Result<String, BackendError> {
        let body: OwnedValue = self.look(ROOT, PROPERTIES, "Get", &(MANAGER, "Version")).await?;
        Ok(String::try_from(body).unwrap_or_else(|_| "unknown".into()))
    }

    /// The names, among those that these globs let pass, of the units that systemd has in memory and of those that it has
    /// files of. With patterns, because without them it reads every file there is, and does nothing else meanwhile.
    pub(super) async fn names(&self, patterns: &[String]) -> Result<Vec<String>, BackendError> {
        type Unit = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);
        let none: &[&str] = &[];
        let units: Vec<Unit> = self.look(ROOT, MANAGER, "ListUnitsByPatterns", &(none, patterns)).await?;
        let files: Vec<(String, String)> =
            self.look(ROOT, MANAGER, "ListUnitFilesByPatterns", &(none, patterns)).await?;
        let of_files = files.into_iter().filter_map(|(path, _)| Some(path.rsplit_once('/')?.1.to_owned()));
        Ok(units.into_iter().map(|unit| unit.0).chain(of_files).collect())
    }

    /// All properties of a unit, which systemd reads from its files where it doesn't have it in memory.
    pub(super) async fn properties(&self, unit: &str) -> Result<Properties, BackendError> {
        let path: OwnedObjectPath = self.look(ROOT, MANAGER, "LoadUnit", &unit).await?;
        // Those of every interface.
        self.look(path.as_str(), PROPERTIES, "GetAll", &"").await
    }

    /// Sets properties; for good, or until the host's next boot.
    pub(super) async fn set(&self, unit: &str, settings: &[Setting], runtime: bool) -> Result<(), BackendError> {
        let values: Vec<(&str, Value<'_>)> = settings.iter().map(|(name, value)| (*name, Value::U64(*value))).collect();
        self.change(unit, "SetUnitProperties", (unit.to_owned(), runtime, owned(values)?)).await
    }

    /// Queues a start.
    pub(super) async fn start(&self, unit: &str) -> Result<(), BackendError> {
        self.change(unit, "StartUnit", (unit.to_owned(), "replace")).await
    }

    /// Queues a stop, which systemd carries out as the unit says: it kills by itself after the unit's TimeoutStopSec.
    pub(super) async fn stop(&self, unit: &str) -> Result<(), BackendError> {
        self.change(unit, "StopUnit", (unit.to_owned(), "replace")).await
    }

    /// Queues a restart, and the starts of what goes down with it.
    pub(super) async fn restart(&self, unit: &str) -> Result<(), BackendError> {
        self.change(unit, "RestartUnit", (unit.to_owned(), "replace")).await
    }

    /// Freezes all its processes.
    pub(super) async fn freeze(&self, unit: &str) -> Result<(), BackendError> {
        self.change(unit, "FreezeUnit", unit.to_owned()).await
    }

    /// Lets its processes run on.
    pub(super) async fn thaw(&self, unit: &str) -> Result<(), BackendError> {
        self.change(unit, "ThawUnit", unit.to_owned()).await
    }

    /// Sends SIGKILL to all its processes.
    pub(super) async fn kill(&self, unit: &str) -> Result<(), BackendError> {
        self.change(unit, "KillUnit", (unit.to_owned(), "all", 9_i32)).await
    }

    /// Whether a change of this unit has not returned yet.
    pub(super) fn is_changing(&self, unit: &str) -> bool {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner).contains_key(unit)
    }

    /// Sends what systemd announces of units whose names `ours` knows, until the connection is lost.
    pub(super) async fn watch(&self, notices: &mpsc::Sender<Notice>, ours: impl Fn(&str) -> bool) -> BackendError {
        match self.listen(notices, ours).await {
            Ok(()) => BackendError::Unavailable("the connection to D-Bus has ended".into()),
            Err(error) => error,
        }
    }

    async fn listen(&self, notices: &mpsc::Sender<Notice>, ours: impl Fn(&str) -> bool) -> Result<(), BackendError> {
        let connection = self.connected().await?;
        let rule = |interface, member| {
            MatchRule::builder().msg_type(Type::Signal).sender(SYSTEMD)?.interface(interface)?.member(member)
        };
        let rules = [
            rule(PROPERTIES, "PropertiesChanged").and_then(|rule| rule.path_namespace(UNITS)),
            rule(MANAGER, "UnitNew"),
            rule(MANAGER, "UnitRemoved"),
        ];
        let mut streams = Vec::new();
        for rule in rules {
            let rule = rule.map_err(told)?.build();
            streams.push(MessageStream::for_match_rule(rule, &connection, Some(SIGNALS)).await.map_err(told)?);
        }
        // Without a subscriber systemd sends no signals. It forgets us when our connection ends.
        let () = self.look(ROOT, MANAGER, "Subscribe", &()).await.or_else(|error| match error {
            BackendError::Failed(why) if why.contains("AlreadySubscribed") => Ok(()),
            error => Err(error),
        })?;
        // What was before was not announced; nobody listens any more when the daemon ends.
        let _ = notices.send(Notice::All).await;
        let mut signals = stream::select_all(streams);
        while let Some(signal) = signals.next().await {
            let signal = signal.map_err(told)?;
            let header = signal.header();
            let path = match header.member().map(|member| member.as_str()) {
                Some("PropertiesChanged") => header.path().map(|path| path.as_str().to_owned()),
                _ => signal.body().deserialize::<(String, OwnedObjectPath)>().ok().map(|(_, path)| path.to_string()),
            };
            if let Some(unit) = path.as_deref().and_then(unit_of).filter(|unit| ours(unit)) {
                let _ = notices.send(Notice::Instance(unit)).await;
            }
        }
        Ok(())
    }

    async fn connected(&self) -> Result<Connection, BackendError> {
        let mut connection = self.connection.lock().await;
        if let Some(connection) = &*connection {
            return Ok(connection.clone());
        }
        let connect = async {
            match &self.address {
                Some(address) => Builder::address(address.as_str())?,
                None => Builder::system()?,
            }
            .build()
            .await
        };
        let made = timeout(LOOK, connect).await;
        let made = made.map_err(|_| BackendError::Unavailable("D-Bus does not answer".into()))?.map_err(|error| {
            BackendError::Unavailable(format!("systemd can't be reached, since D-Bus can't be: {error}"))
        })?;
        *connection = Some(made.clone());
        Ok(made)
    }

    /// A call that changes nothing.
    async fn look<B, R>(&self, path: &str, interface: &str, method: &str, body: &B) -> Result<R, BackendError>
    where
        B: serde::Serialize + DynamicType + Sync,
        R: serde::de::DeserializeOwned + zbus::zvariant::Type,
    {
        let connection = self.connected().await?;
        let call = connection.call_method(Some(SYSTEMD), path, Some(interface), method, body);
        let answer = match timeout(LOOK, call).await {
            Ok(answer) => answer,
            Err(_) => {
                let why = format!("systemd has not answered {method} within {} s", LOOK.as_secs());
                return Err(BackendError::Unavailable(why));
            }
        };
        if let Err(Error::InputOutput(_)) = &answer {
            self.forget().await;
        }
        answer.map_err(told)?.body().deserialize().map_err(told)
    }

    /// A call that changes something. It runs to its end, whether or not somebody waits.
    async fn change<B>(&self, unit: &str, method: &'static str, body: B) -> Result<(), BackendError>
    where
        B: serde::Serialize + DynamicType + Send + Sync + 'static,
    {
        let connection = self.connected().await?;
        let under_way = UnderWay::new(&self.changing, unit);
        let call = tokio::spawn(async move {
            let _under_way = under_way;
            connection.call_method(Some(SYSTEMD), ROOT, Some(MANAGER), method, &body).await
        });
        let answer = match timeout(CHANGE, call).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => return Err(BackendError::Timeout(format!("{method} of {unit} broke off"))),
            Err(_) => {
                let why = format!("systemd has not answered {method} of {unit} within {} s", CHANGE.as_secs());
                return Err(BackendError::Timeout(why));
            }
        };
        match answer {
            Ok(_) => Ok(()),
            Err(Error::InputOutput(error)) => {
                self.forget().await;
                Err(BackendError::Timeout(format!("the connection to D-Bus broke during {method} of {unit}: {error}")))
            }
            Err(error) => Err(told(error)),
        }
    }

    async fn forget(&self) {
        *self.connection.lock().await = None;
    }
}

/// Values that outlive what they were made of.
fn owned(values: Vec<(&str, Value<'_>)>) -> Result<Vec<(String, OwnedValue)>, BackendError> {
    let owned = |(name, value): (&str, Value<'_>)| Ok((name.to_owned(), value.try_into_owned()?));
    values.into_iter().map(owned).collect::<Result<_, zbus::zvariant::Error>>().map_err(|error| told(error.into()))
}

/// Counts a change for as long as it is under way.
struct UnderWay {
    changing: Arc<Mutex<HashMap<String, usize>>>,
    unit: String,
}

impl UnderWay {
    fn new(changing: &Arc<Mutex<HashMap<String, usize>>>, unit: &str) -> Self {
        *changing.lock().unwrap_or_else(PoisonError::into_inner).entry(unit.to_owned()).or_default() += 1;
        UnderWay { changing: Arc::clone(changing), unit: unit.to_owned() }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = changing.get_mut(&self.unit) {
            *count -= 1;
            if *count == 0 {
                changing.remove(&self.unit);
            }
        }
    }
}

/// D-Bus' errors in the backend's words.
fn told(error: Error) -> BackendError {
    match error {
        Error::MethodError(name, words, _) => {
            let words = words.unwrap_or_default();
            match name.as_str() {
                "org.freedesktop.systemd1.NoSuchUnit" | "org.freedesktop.DBus.Error.UnknownObject" => {
                    BackendError::NotFound(words)
                }
                "org.freedesktop.systemd1.UnitMasked" | "org.freedesktop.systemd1.OnlyByDependency" => {
                    BackendError::InvalidState(words)
                }
                "org.freedesktop.DBus.Error.ServiceUnknown"
                | "org.freedesktop.DBus.Error.NameHasNoOwner"
                | "org.freedesktop.DBus.Error.NoReply"
                | "org.freedesktop.DBus.Error.Disconnected" => {
                    BackendError::Unavailable(format!("systemd does not answer on D-Bus: {words}"))
                }
                name if name.starts_with("org.freedesktop.DBus.Error.Spawn") => {
                    BackendError::Unavailable(format!("there is no systemd on D-Bus: {words}"))
                }
                name => BackendError::Failed(format!("systemd: {words} ({name})")),
            }
        }
        Error::InputOutput(error) => BackendError::Unavailable(format!("the connection to D-Bus broke: {error}")),
        error => BackendError::Failed(format!("systemd's answer can't be used: {error}")),
    }
}

/// The unit that an object path is of: its last part, with `_2e` for a dot and so on.
pub(super) fn unit_of(path: &str) -> Option<String> {
    let mut bytes = path.strip_prefix(UNITS)?.strip_prefix('/')?.bytes();
    let mut unit = Vec::new();
    while let Some(byte) = bytes.next() {
        unit.push(match byte {
            b'_' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(unit).ok()
}

#[cfg(test)]
mod tests {
    use super::unit_of;

    #[test]
    fn an_object_path_names_its_unit() {
        let of = |part: &str| unit_of(&format!("/org/freedesktop/systemd1/unit/{part}"));
        assert_eq!(of("batch_2d1_2eservice").as_deref(), Some("batch-1.service"));
        assert_eq!(of("_2d_2eslice").as_deref(), Some("-.slice"));
        assert_eq!(of("a_5cx2db_2eservice").as_deref(), Some("a\\x2db.service"));
        for odd in ["a_", "a_2", "a_zz", "a_ff"] {
            assert_eq!(of(odd), None, "{odd}");
        }
        assert_eq!(unit_of("/org/freedesktop/systemd1/job/1"), None);
    }
}
