//! Every way in which a request can end badly: one table gives each code its HTTP status and its exit code, one type
//! carries the code with the sentence, the hint and the numbers. Knows nothing of HTTP bodies or terminals.

use serde::{Deserialize, Serialize};

/// Writes the table once: variant, wire name, HTTP status, exit code of `ctl`.
macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $http:literal, $exit:literal;)*) => {
        /// A stable error code, part of the contract with users.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Code { $($(#[$doc])* #[serde(rename = $name)] $variant,)* }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Code] = &[$(Code::$variant),*];
            /// The name on the wire.
            pub const fn as_str(self) -> &'static str { match self { $(Code::$variant => $name),* } }
            /// The HTTP status of a reply with this code.
            pub const fn http(self) -> u16 { match self { $(Code::$variant => $http),* } }
            /// The exit code of `ctl` for a reply with this code.
            pub const fn exit(self) -> u8 { match self { $(Code::$variant => $exit),* } }
        }
    };
}

codes! {
    /// The request can't be understood, or asks for what can't be meant.
    InvalidRequest = "invalid-request", 400, 2;
    /// The caller may not do this.
    Forbidden = "forbidden", 403, 5;
    /// No such instance, operation, size or route, or none that the caller may see.
    NotFound = "not-found", 404, 6;
    /// The route exists, the method doesn't.
    MethodNotAllowed = "method-not-allowed", 405, 2;
    /// The request did not arrive within the time allowed.
    RequestTimeout = "request-timeout", 408, 2;
    /// A bare name fits several instances.
    Ambiguous = "ambiguous", 409, 6;
    /// Another change of this instance runs and one more waits.
    Busy = "busy", 409, 10;
    /// A hold blocks changes of this instance.
    Held = "held", 409, 10;
    /// The instance is in a state that doesn't allow this.
    InvalidState = "invalid-state", 409, 10;
    /// The guest's balloon driver has never spoken.
    GuestSilent = "guest-silent", 409, 8;
    /// The instance is no longer at the version that the caller named.
    VersionMismatch = "version-mismatch", 412, 10;
    /// The body is over 64 KiB.
    BodyTooLarge = "body-too-large", 413, 2;
    /// The headers are over 16 KiB.
    HeadersTooLarge = "headers-too-large", 431, 2;
    /// The body isn't declared as JSON.
    UnsupportedMediaType = "unsupported-media-type", 415, 2;
    /// Over a bound of the config file.
    LimitExceeded = "limit-exceeded", 422, 4;
    /// Under what the engine, the config or the present use allows.
    BelowMinimum = "below-minimum", 422, 4;
    /// This kind, engine or instance can't do it.
    Unsupported = "unsupported", 422, 9;
    /// Possible, but not while the instance runs.
    RestartRequired = "restart-required", 422, 9;
    /// The same Idempotency-Key came with another body.
    IdempotencyMismatch = "idempotency-mismatch", 422, 2;
    /// The host's caps don't allow it now.
    CapacityExceeded = "capacity-exceeded", 429, 4;
    /// The engine refused or failed; what was done is undone.
    BackendFailed = "backend-failed", 500, 1;
    /// A defect of agentd.
    Internal = "internal", 500, 1;
    /// Some of the change could not be undone; the instance is held.
    Partial = "partial", 500, 7;
    /// The engine that the request needs does not answer.
    BackendUnavailable = "backend-unavailable", 503, 3;
    /// The record of operations can't be written.
    StoreUnavailable = "store-unavailable", 503, 3;
    /// Too much is under way already.
    Overloaded = "overloaded", 503, 3;
    /// A call to the engine did not return in time; its outcome is unknown.
    BackendTimeout = "backend-timeout", 504, 7;
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The numbers behind a refusal. CPUs are JSON numbers, memory is in bytes; `resource` says which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Numbers {
    /// `cpus` or `memory`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
    /// What may be committed in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub allowed: Option<serde_json::Number>,
    /// What the host has, before reserve and overcommit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub capacity: Option<serde_json::Number>,
    /// What is kept back for the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub reserved: Option<serde_json::Number>,
    /// The overcommit factor.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub overcommit: Option<serde_json::Number>,
    /// What is committed now, this instance included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub committed: Option<serde_json::Number>,
    /// How much more than now the request would commit (caps), or the value asked for (bounds).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub requested: Option<serde_json::Number>,
    /// What is in use inside the instance (refused shrinks).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub used: Option<serde_json::Number>,
    /// The largest value that would be admitted now (refused growth).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub largest_feasible: Option<serde_json::Number>,
    /// The smallest value that would be admitted now (refused shrinks).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub smallest_feasible: Option<serde_json::Number>,
    /// The config key that sets the bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_key: Option<String>,
}

/// Why a request ended badly: a code for programs, a sentence for people, a hint for what to do next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Problem {
    /// The stable code.
    pub code: Code,
    /// What happened, to what, with which numbers.
    pub detail: String,
    /// What to do next.
    pub hint: Option<String>,
    /// The numbers behind a refusal. Boxed: most problems have none.
    pub numbers: Option<Box<Numbers>>,
}

impl Problem {
    /// A problem without hint or numbers.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Problem { code, detail: detail.into(), hint: None, numbers: None }
    }

    /// The same with what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with the numbers behind it.
    #[must_use]
    pub fn numbers(mut self, numbers: Numbers) -> Self {
        self.numbers = Some(Box::new(numbers));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_keeps_its_name_on_the_wire() {
        for code in Code::ALL {
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.as_str()));
            assert_eq!(serde_json::from_str::<Code>(&json).unwrap(), *code);
        }
    }

    #[test]
    fn statuses_and_exit_codes_are_in_their_ranges() {
        for code in Code::ALL {
            assert!((400..600).contains(&code.http()), "{code}");
            assert!((1..=10).contains(&code.exit()), "{code}");
        }
    }
}
