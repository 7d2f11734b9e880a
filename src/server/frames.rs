//! Follows the frames that come in over an HTTP/2 connection (RFC 9113 §4.1), as far as its limits are concerned: the HTTP
//! library tells nobody that a head has begun but not ended, or how many frames that ask for nothing it has swallowed.

use tokio::time::Instant;

/// What a client that knows HTTP/2 says first (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const HEADER_BYTES: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// How many frames that carry no request may come at once: PING, SETTINGS, PRIORITY, empty or unknown ones.
const BURST: u32 = 1000;
/// And how many a second from then on.
const PER_SECOND: u32 = 100;

/// The client floods the connection with frames that carry no request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flood;

pub(super) struct Frames {
    /// Of the preface, still to come.
    preface_left: usize,
    header: [u8; HEADER_BYTES],
    /// How much of `header` has come.
    have: usize,
    /// Of the payload of the frame whose header is complete, still to come.
    payload_left: usize,
    /// A head has begun and not ended, or the preface, whose end is the first SETTINGS frame.
    in_head: bool,
    /// How many heads have ended.
    heads: u64,
    /// Frames without a request that may still come.
    allowance: u32,
    /// When the allowance was last added to.
    filled: Instant,
}

impl Frames {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            preface_left: PREFACE.len(),
            header: [0; HEADER_BYTES],
            have: 0,
            payload_left: 0,
            in_head: true,
            heads: 0,
            allowance: BURST,
            filled: now,
        }
    }

    /// The number of the head that is incomplete, if one is; so is a frame of which not even the kind has come.
    pub(super) fn open_head(&self) -> Option<u64> {
        (self.in_head || (1..HEADER_BYTES).contains(&self.have)).then_some(self.heads)
    }

    /// Takes what has come.
    ///
    /// # Errors
    /// [`Flood`]: the connection should end.
    pub(super) fn feed(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Flood> {
        let preface = self.preface_left.min(bytes.len());
        self.preface_left -= preface;
        bytes = bytes.get(preface..).unwrap_or_default();
        while let Some(first) = bytes.first() {
            if let Some(next) = self.header.get_mut(self.have) {
                *next = *first;
                self.have += 1;
                bytes = bytes.get(1..).unwrap_or_default();
                if self.have < HEADER_BYTES {
                    continue;
                }
                self.begin(now)?;
            }
            let payload = self.payload_left.min(bytes.len());
            self.payload_left -= payload;
            bytes = bytes.get(payload..).unwrap_or_default();
            if self.payload_left == 0 {
                self.end();
            }
        }
        Ok(())
    }

    /// A frame's header is here.
    fn begin(&mut self, now: Instant) -> Result<(), Flood> {
        let [high, middle, low, kind, flags, ..] = self.header;
        self.payload_left = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        if matches!(kind, HEADERS | CONTINUATION) {
            self.in_head = true;
        }
        let asks_nothing = match kind {
            DATA => self.payload_left == 0 && flags & END_STREAM == 0,
            // The HTTP library bounds these itself, and resets are judged by what they interrupt.
            HEADERS | CONTINUATION | RST_STREAM => false,
            // A fast download needs many.
            WINDOW_UPDATE => false,
            PING | SETTINGS => flags & ACK == 0,
            _ => true,
        };
        if asks_nothing { self.spend(now) } else { Ok(()) }
    }

    /// A frame's last byte is here.
    fn end(&mut self) {
        self.have = 0;
        let [_, _, _, kind, flags, ..] = self.header;
        let ends = match kind {
            HEADERS | CONTINUATION => flags & END_HEADERS != 0,
            _ => self.in_head,
        };
        if ends {
            self.in_head = false;
            self.heads += 1;
        }
    }

    fn spend(&mut self, now: Instant) -> Result<(), Flood> {
        let seconds = u32::try_from(now.saturating_duration_since(self.filled).as_secs()).unwrap_or(u32::MAX);
        if seconds > 0 {
            self.allowance = self.allowance.saturating_add(seconds.saturating_mul(PER_SECOND)).min(BURST);
            self.filled = now;
        }
        self.allowance = self.allowance.checked_sub(1).ok_or(Flood)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let len = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![len[1], len[2], len[3], kind, flags, 0, 0, 0, 1];
        frame.resize(HEADER_BYTES + payload, 0);
        frame
    }

    /// As after the preface and the first SETTINGS.
    fn settled(now: Instant) -> Frames {
        let mut frames = Frames::new(now);
        frames.feed(PREFACE, now).unwrap();
        assert_eq!(frames.open_head(), Some(0), "the preface ends with SETTINGS");
        frames.feed(&frame(SETTINGS, 0, 6), now).unwrap();
        assert_eq!(frames.open_head(), None);
        frames
    }

    #[test]
    fn a_head_is_open_from_its_first_byte_to_its_last() {
        let now = Instant::now();
        let mut frames = settled(now);
        let head =
            [frame(HEADERS, END_STREAM, 3), frame(CONTINUATION, 0, 0), frame(CONTINUATION, END_HEADERS, 2)].concat();
        for (n, byte) in head.iter().enumerate() {
            frames.feed(&[*byte], now).unwrap();
            assert_eq!(frames.open_head(), (n + 1 < head.len()).then_some(1), "{n}");
        }
        frames.feed(&[frame(DATA, 0, 70_000), frame(HEADERS, END_HEADERS, 0)].concat(), now).unwrap();
        assert_eq!(frames.open_head(), None);
        frames.feed(&[head.clone(), head.get(..5).unwrap().to_vec()].concat(), now).unwrap();
        assert_eq!(frames.open_head(), Some(4), "another one than the one before it");
    }

    #[test]
    fn data_and_its_absence_leave_no_head_open() {
        let now = Instant::now();
        let mut frames = settled(now);
        frames.feed(frame(DATA, 0, 100).get(..50).unwrap(), now).unwrap();
        assert_eq!(frames.open_head(), None);
    }

    #[test]
    fn frames_that_ask_nothing_are_rationed() {
        let now = Instant::now();
        for (kind, flags, payload) in [(PING, 0, 8), (SETTINGS, 0, 0), (2, 0, 5), (DATA, 0, 0), (99, 0, 1)] {
            let mut frames = settled(now);
            let flood = frame(kind, flags, payload);
            // The first SETTINGS has cost one.
            for _ in 1..BURST {
                assert_eq!(frames.feed(&flood, now), Ok(()));
            }
            assert_eq!(frames.feed(&flood, now), Err(Flood), "{kind}");
            assert_eq!(frames.feed(&flood, now + Duration::from_secs(1)), Ok(()), "{kind}");
        }
        let mut frames = settled(now);
        for (kind, flags, payload) in [(PING, ACK, 8), (DATA, 0, 1), (DATA, END_STREAM, 0), (WINDOW_UPDATE, 0, 4)] {
            for _ in 0..2 * BURST {
                assert_eq!(frames.feed(&frame(kind, flags, payload), now), Ok(()), "{kind}");
            }
        }
    }
}
