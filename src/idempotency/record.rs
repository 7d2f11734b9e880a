//! What the gateway knows of one (tenant, key): the record. Absence of a record is the fourth state.

use bytes::Bytes;

/// Milliseconds since the Unix epoch, as told by the gateway's clock (never read here: time is an argument).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub u64);

impl Millis {
    /// The instant `ms` milliseconds later; saturates instead of wrapping.
    #[must_use]
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// How many milliseconds have gone by since `earlier`; 0 if it lies in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// The fencing token of one claim: 128 random bits. Whoever holds it may settle that claim, nobody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimToken(pub [u8; 16]);

/// What was asked for, and by which settings it was condensed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// Identifies the settings (mode, ignored pointers, headers, version of the algorithm).
    pub settings: u64,
    /// Digest of the payload under those settings.
    pub digest: [u8; 32],
}

impl Fingerprint {
    /// Whether the two certainly belong to different payloads. Payloads condensed under different
    /// settings are not compared: that is never a conflict.
    #[must_use]
    pub fn conflicts_with(&self, other: &Self) -> bool {
        self.settings == other.settings && self.digest != other.digest
    }
}

/// Where a record comes from. It stays with the record through all its states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The key as the client meant it: decoded, 1–255 characters of ASCII.
    pub key: Bytes,
    /// The header value that went upstream with the first send, byte for byte; a re-send repeats it.
    pub key_header: Bytes,
    /// The normalised path, for people.
    pub path: Bytes,
    /// The pattern of the route, as configured.
    pub route: Bytes,
    /// When the first claim was made.
    pub claimed_at: Millis,
    /// How often the request was claimed for sending: 1 at first; more only under `unknown_outcome = "forward"`.
    pub attempts: u32,
}

/// A response as it is replayed: status, end-to-end headers in their order, body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(Bytes, Bytes)>,
    pub body: Bytes,
}

/// What a completed record remembers of the response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    Full(Response),
    /// The body was larger than `max_recorded_body`: it was executed, but cannot be replayed.
    Omitted {
        status: u16,
        location: Option<Bytes>,
    },
}

impl Recorded {
    /// What is left of it without header fields and body; `None`: nothing less.
    #[must_use]
    pub fn omitted(&self) -> Option<Self> {
        let Self::Full(Response { status, headers, .. }) = self else { return None };
        let location = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(b"location"));
        Some(Self::Omitted { status: *status, location: location.map(|(_, value)| value.clone()) })
    }
}

/// Why an outcome is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Why {
    /// The connection to the upstream broke after the request was sent.
    Reset,
    /// No complete response within `response_timeout` and `late_window`.
    Timeout,
    /// The response was malformed or cut off.
    Malformed,
    /// The response's status (or its `Idempotency-Outcome`) says that the outcome is unknown.
    Status(u16),
    /// The gateway that held the claim died.
    Crash,
    /// The claim's owner could not renew its lease.
    Lease,
    /// The task that held the claim ended without settling it.
    Abandoned,
    /// The gateway was stopped while the request was under way.
    Shutdown,
    /// A re-send was not executed, but an earlier send may have been.
    EarlierSend,
}

/// The state of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Somebody may be sending it right now. A claim has no expiry: it only ever turns into something else.
    Claimed {
        /// Only in shared stores; an embedded store's claims live as long as their gateway.
        lease_until: Option<Millis>,
    },
    /// Executed; every retry gets this answer until `expires_at`.
    Completed { response: Recorded, completed_at: Millis, expires_at: Millis },
    /// It may have been executed. The holder of the token may still settle it.
    Unknown { why: Why, since: Millis, expires_at: Millis },
}

/// One record: what the store keeps under a record's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub origin: Origin,
    pub fingerprint: Fingerprint,
    /// The token of the latest claim.
    pub token: ClaimToken,
    pub state: State,
}

impl Record {
    /// When the record may be forgotten; a claim never.
    #[must_use]
    pub fn expires_at(&self) -> Option<Millis> {
        match self.state {
            State::Claimed { .. } => None,
            State::Completed { expires_at, .. } | State::Unknown { expires_at, .. } => Some(expires_at),
        }
    }

    /// Whether the record's time is over: it then counts as absent, whether or not it was swept.
    #[must_use]
    pub fn expired(&self, now: Millis) -> bool {
        self.expires_at().is_some_and(|at| at <= now)
    }
}
