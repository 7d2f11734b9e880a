//! What the upstream is told to do with a request, and what it answers: a function of script and serial number alone, so
//! that every answer can be compared byte for byte with nothing kept.

use crate::random::Random;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    /// 201 after so many milliseconds: 0, or more than `response_timeout`, but within the late window.
    After(u64),
    /// 500: final, too.
    Failed,
    /// 201 with a body over `max_recorded_body`.
    Large,
    /// Executed, and no answer within the late window.
    Lost,
    /// Executed, and the connection is reset.
    Reset,
    /// Executed, and the answer is cut off.
    Cut,
    /// 502: nobody knows.
    BadGateway,
    /// 429, nothing executed.
    Throttled,
    /// 503 with `Retry-After`, nothing executed.
    Busy,
}

impl Script {
    /// One that is not simply 201 at once.
    pub(crate) fn faulty(random: &mut Random) -> Self {
        match random.below(10) {
            0 | 1 => Self::After(1300 + random.below(1900)),
            2 => Self::Lost,
            3 => Self::Large,
            4 => Self::Reset,
            5 => Self::Cut,
            6 => Self::BadGateway,
            7 => Self::Throttled,
            8 => Self::Busy,
            _ => Self::Failed,
        }
    }

    pub(crate) fn text(self) -> String {
        match self {
            Self::After(ms) => format!("after-{ms}"),
            other => format!("{other:?}").to_lowercase(),
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        if let Some(ms) = text.strip_prefix("after-") {
            return ms.parse().ok().map(Self::After);
        }
        let all = [
            Self::Failed,
            Self::Large,
            Self::Lost,
            Self::Reset,
            Self::Cut,
            Self::BadGateway,
            Self::Throttled,
            Self::Busy,
        ];
        all.into_iter().find(|script| script.text() == text)
    }

    /// The gateway may take its answer for final.
    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::After(_) | Self::Failed | Self::Large)
    }

    /// It is turned away: nothing is executed.
    pub(crate) fn refuses(self) -> bool {
        matches!(self, Self::Throttled | Self::Busy)
    }

    /// The caller's answer comes too late.
    pub(crate) fn is_slow(self) -> bool {
        matches!(self, Self::After(1000..) | Self::Lost)
    }

    /// It ends the connection instead of an answer.
    pub(crate) fn breaks(self) -> bool {
        matches!(self, Self::Reset | Self::Cut)
    }

    pub(crate) fn delay(self) -> Duration {
        match self {
            Self::After(ms) => Duration::from_millis(ms),
            Self::Lost => Duration::from_secs(6),
            _ => Duration::ZERO,
        }
    }
}

/// An answer, apart from the fields that the gateway adds.
#[derive(PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) location: String,
    pub(crate) content_type: String,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn of(script: Script, serial: u64) -> Self {
        let status = match script {
            Script::Failed => 500,
            Script::BadGateway => 502,
            Script::Throttled => 429,
            Script::Busy => 503,
            _ => 201,
        };
        let len = if script == Script::Large { 300 << 10 } else { 100 + serial.wrapping_mul(7919) as usize % 1900 };
        let content_type = if serial.is_multiple_of(2) { "application/json" } else { "text/plain; charset=utf-8" };
        Self {
            status,
            location: format!("/posts/{serial}"),
            content_type: content_type.to_owned(),
            body: text(serial, len),
        }
    }

    pub(crate) fn head(&self, script: Script, serial: u64) -> String {
        let retry_after = if script == Script::Busy { "Retry-After: 1\r\n" } else { "" };
        format!(
            "HTTP/1.1 {} Scripted\r\nX-Serial: {serial}\r\nLocation: {}\r\nContent-Type: {}\r\n{retry_after}\
             Set-Cookie: a=b\r\nContent-Length: {}\r\n\r\n",
            self.status,
            self.location,
            self.content_type,
            self.body.len()
        )
    }
}

/// A JSON text that no other number has.
pub(crate) fn text(number: u64, len: usize) -> Vec<u8> {
    let mut body = format!("{{\"number\":{number},\"text\":\"").into_bytes();
    let letters = (0..).map(|at: u64| b'a' + (number.wrapping_add(at.wrapping_mul(31)) % 26) as u8);
    let missing = len.saturating_sub(body.len() + 2);
    body.extend(letters.take(missing));
    body.extend(b"\"}");
    body
}
