//! How entries lie in Redis, and the commands and scripts that read and write them.
//!
//! An entry is one string: version (8 bytes, big endian), tag (1), expiry in milliseconds (8; 0: none), and the bytes. Its
//! key is `PREFIX:{bb}:ID`, with `bb` the first two digits of the id: the part that decides the slot in a cluster. Of each
//! such bucket two sorted sets, `PREFIX:{bb}:claimed` and `PREFIX:{bb}:unknown`, hold what bears the tags of [`Listed`], by the
//! time of the write; a member is the expiry and the id. The sets are an index that may hold too much (what has expired
//! since), never too little.

use super::resp::Output;
use super::trust::Trust;
use crate::store::{Entry, OLDEST_TRACKED, RecordId, StoreError, Tag, Value, Version};
use aws_lc_rs::digest;
use bytes::{Buf, Bytes};

/// Before the bytes of an entry.
pub(super) const HEADER: usize = 17;
/// A member of the set of a bucket.
pub(super) const MEMBER: usize = 8 + 32;
/// What stands in the key `PREFIX:{00}:format`.
pub(super) const FORMAT: &str = "1";
/// The answer to a write that came too late.
pub(super) const LATE: &[u8] = b"LATE";
/// Redis takes no later time of expiry.
const EXPIRY_MAX: u64 = i64::MAX as u64;

/// The answer to a creation in a store without the birthmark that was named.
pub(super) const OTHER: &[u8] = b"OTHER";

/// `KEYS`: the entry. `ARGV`: the deadline in microseconds; the entry without its version; its expiry, or nothing; the key of
/// the birthmark and the birthmark, or nothing. An integer is the version of what was written. The tags are those of [`Listed`].
/// The set is no key of the command's, although it is in the same slot: while a slot moves, a node takes no command of which
/// it has but some of the keys.
const CREATE: &str = "if ARGV[4]~='' and redis.call('GET',ARGV[4])~=ARGV[5] then return {ok='OTHER'} end \
local t=redis.call('TIME') local v=t[1]*1000000+t[2] \
if v>ARGV[1]+0 then return redis.call('GET',KEYS[1]) or {ok='LATE'} end \
local b=struct.pack('>I8',v)..ARGV[2] local s \
if ARGV[3]~='' then s=redis.call('SET',KEYS[1],b,'NX','PXAT',ARGV[3]) else s=redis.call('SET',KEYS[1],b,'NX') end \
if not s then return redis.call('GET',KEYS[1]) end \
local z=({[0]='claimed',[2]='unknown'})[string.byte(b,9)] \
if z then redis.pcall('ZADD',string.sub(KEYS[1],1,-33)..z,math.floor(v/1000),string.sub(b,10,17)..string.sub(KEYS[1],-32)) end \
return v";

/// `KEYS`: the entry. `ARGV`: the version expected; the new entry, empty to remove; its expiry, or nothing; whether those who
/// wait are to be told if this ends a claim; the deadline in microseconds; the score in a set. The tags are those of
/// [`Listed`], and tag 0 that of claims. The sets are no keys of the command's: see above.
const UPDATE: &str = "local h=redis.call('GETRANGE',KEYS[1],0,16) \
if string.sub(h,1,8)~=ARGV[1] then return redis.call('GET',KEYS[1]) end \
local t=redis.call('TIME') if t[1]*1000000+t[2]>ARGV[5]+0 then return {ok='LATE'} end \
if ARGV[2]=='' then redis.call('DEL',KEYS[1]) \
elseif ARGV[3]~='' then redis.call('SET',KEYS[1],ARGV[2],'PXAT',ARGV[3]) \
else redis.call('SET',KEYS[1],ARGV[2]) end \
local o,n=string.byte(h,9),string.byte(ARGV[2],9) \
local z={[0]='claimed',[2]='unknown'} local p,i=string.sub(KEYS[1],1,-33),string.sub(KEYS[1],-32) \
if z[o] then redis.pcall('ZREM',p..z[o],string.sub(h,10,17)..i) end \
if n and z[n] then redis.pcall('ZADD',p..z[n],ARGV[6],string.sub(ARGV[2],10,17)..i) end \
if o==0 and ARGV[4]=='1' then redis.pcall('PUBLISH',KEYS[1],'') end return 1";

/// `KEYS`: the setting. `ARGV`: the new value; the expected one, or nothing. The new one in place is as good as written.
const SET: &str = "local c=redis.call('GET',KEYS[1]) if c==ARGV[1] then return 1 end \
if c~=(ARGV[2] or false) then return 0 end redis.call('SET',KEYS[1],ARGV[1]) return 1";

/// `KEYS`: the bucket's set, and entries. `ARGV`: the member of each entry. Drops those whose entry is gone.
const SWEEP: &str = "local n=0 for i=2,#KEYS do if redis.call('EXISTS',KEYS[i])==0 then \
n=n+redis.call('ZREM',KEYS[1],ARGV[i-1]) end end return n";

/// A script, and the digest by which the server knows it.
#[derive(Debug)]
pub(super) struct Script {
    text: &'static str,
    digest: String,
}

impl Script {
    fn new(text: &'static str) -> Self {
        let digest = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
        Self { text, digest: digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect() }
    }

    /// Begins the command; the digest alone if the server may know it.
    fn call(&self, out: &mut Output, by_text: bool, keys: usize, arguments: usize) {
        out.command(3 + keys + arguments);
        if by_text {
            out.argument(b"EVAL");
            out.argument(self.text.as_bytes());
        } else {
            out.argument(b"EVALSHA");
            out.argument(self.digest.as_bytes());
        }
        out.number(keys as u64);
    }
}

#[derive(Debug)]
pub(super) struct Layout {
    prefix: String,
    /// One server has all of it: it can tell the end of a claim on its channel, and look at the birthmark with each claim.
    single: bool,
    create: Script,
    update: Script,
    set: Script,
    sweep: Script,
}

/// What is asked of the server, one reply each.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Get(RecordId),
    Create {
        id: RecordId,
        value: Value,
        deadline_ms: u64,
    },
    Update {
        id: RecordId,
        expected: Version,
        new: Option<(Version, Value)>,
        now_ms: u64,
        deadline_ms: u64,
    },
    SetSetting {
        name: String,
        expected: Option<Bytes>,
        new: Bytes,
    },
    Sweep {
        listed: Listed,
        bucket: u8,
        members: Vec<[u8; MEMBER]>,
    },
    /// A command as it is; about one bucket, if any.
    Plain {
        bucket: u8,
        command: Bytes,
    },
    /// As above, but it writes.
    PlainWrite {
        command: Bytes,
    },
}

impl Request {
    pub(super) fn writes(&self) -> bool {
        !matches!(self, Self::Get(_) | Self::Plain { .. })
    }

    pub(super) fn bucket(&self) -> u8 {
        match self {
            Self::Get(id) | Self::Create { id, .. } | Self::Update { id, .. } => bucket_of(*id),
            Self::Sweep { bucket, .. } | Self::Plain { bucket, .. } => *bucket,
            Self::SetSetting { .. } | Self::PlainWrite { .. } => 0,
        }
    }
}

/// Of what the sets of each bucket are an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Listed {
    Claimed,
    Unknown,
}

impl Listed {
    pub(super) const ALL: [Self; 2] = [Self::Claimed, Self::Unknown];

    pub(super) fn tag(self) -> Tag {
        match self {
            Self::Claimed => Tag(0),
            Self::Unknown => OLDEST_TRACKED,
        }
    }

    pub(super) fn of(tag: Tag) -> Option<Self> {
        Self::ALL.into_iter().find(|listed| listed.tag() == tag)
    }
}

fn hex(nibble: u8) -> u8 {
    nibble + if nibble < 10 { b'0' } else { b'a' - 10 }
}

pub(super) fn hex_digits(byte: u8) -> [u8; 2] {
    [hex(byte >> 4), hex(byte & 15)]
}

fn hex_of(id: RecordId) -> [u8; 32] {
    let mut text = [0; 32];
    for (to, byte) in text.chunks_exact_mut(2).zip(id.0) {
        to.copy_from_slice(&hex_digits(byte));
    }
    text
}

fn unhex(text: &[u8]) -> Option<RecordId> {
    let mut id = [0; 16];
    if text.len() != 32 {
        return None;
    }
    for (to, digits) in id.iter_mut().zip(text.chunks_exact(2)) {
        *to = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(RecordId(id))
}

pub(super) fn bucket_of(id: RecordId) -> u8 {
    let [first, ..] = id.0;
    first
}

/// Expiry and id.
pub(super) fn read_member(mut member: &[u8]) -> Option<(Option<u64>, RecordId)> {
    let expires = member.try_get_u64().ok()?;
    Some((Some(expires).filter(|at| *at != 0), unhex(member)?))
}

fn header(version: Option<Version>, value: &Value) -> ([u8; HEADER], usize) {
    let mut header = [0; HEADER];
    let parts = version.map_or(0, |version| version.0).to_be_bytes().into_iter();
    let parts = parts.chain([value.tag.0]).chain(value.expires_at_ms.unwrap_or(0).to_be_bytes());
    header.iter_mut().zip(parts).for_each(|(to, from)| *to = from);
    (header, if version.is_some() { 0 } else { 8 })
}

impl Layout {
    pub(super) fn new(prefix: &str, single: bool) -> Self {
        Self {
            prefix: prefix.to_owned(),
            single,
            create: Script::new(CREATE),
            update: Script::new(UPDATE),
            set: Script::new(SET),
            sweep: Script::new(SWEEP),
        }
    }

    /// Also the name of the channel on which the end of a claim is told.
    pub(super) fn key(&self, id: RecordId) -> Vec<u8> {
        let mut key = self.of_bucket(bucket_of(id));
        key.extend_from_slice(&hex_of(id));
        key
    }

    fn of_bucket(&self, bucket: u8) -> Vec<u8> {
        let mut key = Vec::with_capacity(self.prefix.len() + 38);
        key.extend_from_slice(self.prefix.as_bytes());
        key.extend_from_slice(b":{");
        key.extend_from_slice(&hex_digits(bucket));
        key.extend_from_slice(b"}:");
        key
    }

    pub(super) fn set(&self, listed: Listed, bucket: u8) -> Vec<u8> {
        let mut key = self.of_bucket(bucket);
        key.extend_from_slice(match listed {
            Listed::Claimed => b"claimed",
            Listed::Unknown => b"unknown",
        });
        key
    }

    pub(super) fn setting(&self, name: &str) -> Vec<u8> {
        self.beside(&format!("setting:{name}"))
    }

    pub(super) fn format(&self) -> Vec<u8> {
        self.beside("format")
    }

    /// See [`super::trust`].
    pub(super) fn birthmark(&self) -> Vec<u8> {
        self.beside("birthmark")
    }

    /// Is written before replicas are waited for.
    pub(super) fn mark(&self) -> Vec<u8> {
        self.beside("mark")
    }

    /// What is not a record stands in the first bucket.
    fn beside(&self, name: &str) -> Vec<u8> {
        let mut key = self.of_bucket(0);
        key.extend_from_slice(name.as_bytes());
        key
    }

    /// For `SCAN … MATCH`: the keys of entries, and few others.
    pub(super) fn pattern(&self) -> Vec<u8> {
        let mut pattern = Vec::new();
        for byte in self.prefix.bytes() {
            if b"*?[]\\^-".contains(&byte) {
                pattern.push(b'\\');
            }
            pattern.push(byte);
        }
        pattern.extend_from_slice(b":{??}:????????????????????????????????");
        pattern
    }

    /// The id of a key, or of a channel.
    pub(super) fn id(&self, key: &[u8]) -> Option<RecordId> {
        let id = unhex(key.get(key.len().checked_sub(32)?..)?)?;
        (self.key(id) == key).then_some(id)
    }

    fn push_key(&self, out: &mut Output, id: RecordId) {
        out.begin(self.prefix.len() + 38);
        out.raw(self.prefix.as_bytes());
        let digits = hex_of(id);
        out.raw(b":{");
        out.raw(digits.first_chunk::<2>().unwrap_or(b"00"));
        out.raw(b"}:");
        out.raw(&digits);
        out.end();
    }

    /// Writes the command. `by_text`: the server has forgotten the scripts.
    pub(super) fn encode(&self, request: &Request, by_text: bool, trust: &Trust, out: &mut Output) {
        match request {
            Request::Get(id) => {
                out.command(2);
                out.argument(b"GET");
                self.push_key(out, *id);
            }
            Request::Create { id, value, deadline_ms } => {
                let birthmark = trust.birthmark().filter(|_| self.single).map(|mark| (trust.key(), &mark[..]));
                self.create(out, by_text, *id, value, *deadline_ms, birthmark.unwrap_or_default());
            }
            Request::Update { id, expected, new, now_ms, deadline_ms } => {
                self.update(out, by_text, *id, *expected, new.as_ref(), [*now_ms, *deadline_ms]);
            }
            Request::SetSetting { name, expected, new } => {
                self.set.call(out, by_text, 1, 1 + usize::from(expected.is_some()));
                out.argument(&self.setting(name));
                out.argument(new);
                if let Some(expected) = expected {
                    out.argument(expected);
                }
            }
            Request::Sweep { listed, bucket, members } => {
                self.sweep.call(out, by_text, 1 + members.len(), members.len());
                out.argument(&self.set(*listed, *bucket));
                let mut key = self.of_bucket(*bucket);
                let len = key.len();
                for member in members {
                    key.truncate(len);
                    key.extend(member.iter().skip(8));
                    out.argument(&key);
                }
                members.iter().for_each(|member| out.argument(member));
            }
            Request::Plain { command, .. } | Request::PlainWrite { command } => out.raw(command),
        }
    }

    fn create(
        &self,
        out: &mut Output,
        by_text: bool,
        id: RecordId,
        value: &Value,
        deadline_ms: u64,
        (birthmark_key, birthmark): (&[u8], &[u8]),
    ) {
        self.create.call(out, by_text, 1, 5);
        self.push_key(out, id);
        out.number(deadline_ms.saturating_mul(1000));
        push_entry(out, None, value);
        push_expiry(out, value.expires_at_ms);
        out.argument(birthmark_key);
        out.argument(birthmark);
    }

    fn update(
        &self,
        out: &mut Output,
        by_text: bool,
        id: RecordId,
        expected: Version,
        new: Option<&(Version, Value)>,
        [now_ms, deadline_ms]: [u64; 2],
    ) {
        self.update.call(out, by_text, 1, 6);
        self.push_key(out, id);
        out.argument(&expected.0.to_be_bytes());
        match new {
            Some((version, value)) => push_entry(out, Some(*version), value),
            None => out.argument(b""),
        }
        push_expiry(out, new.and_then(|(_, value)| value.expires_at_ms));
        // A claim in place of a claim is its renewal.
        let ends = self.single && new.is_none_or(|(_, value)| value.tag != Tag(0));
        out.argument(if ends { b"1" } else { b"" });
        out.number(deadline_ms.saturating_mul(1000));
        out.number(now_ms);
    }

    /// # Errors
    /// [`StoreError::Damaged`]: those bytes are no entry.
    pub(super) fn entry(id: RecordId, bytes: Bytes) -> Result<Entry, StoreError> {
        parse(bytes).map_err(|detail| StoreError::Damaged { id, detail: detail.to_owned() })
    }
}

fn parse(mut bytes: Bytes) -> Result<Entry, &'static str> {
    const SHORT: &str = "shorter than a header";
    let version = Version(bytes.try_get_u64().map_err(|_| SHORT)?);
    let tag = Tag(bytes.try_get_u8().map_err(|_| SHORT)?);
    let expires_at_ms = Some(bytes.try_get_u64().map_err(|_| SHORT)?).filter(|at| *at != 0);
    if usize::from(tag.0) >= Tag::COUNT {
        return Err("its tag is unheard of");
    }
    Ok(Entry { version, value: Value { tag, expires_at_ms, bytes } })
}

fn push_entry(out: &mut Output, version: Option<Version>, value: &Value) {
    let (header, skip) = header(version, value);
    out.begin(HEADER - skip + value.bytes.len());
    out.raw(header.get(skip..).unwrap_or_default());
    out.shared(&value.bytes);
    out.end();
}

fn push_expiry(out: &mut Output, expires_at_ms: Option<u64>) {
    match expires_at_ms {
        // Zero would be refused.
        Some(at) => out.number(at.clamp(1, EXPIRY_MAX)),
        None => out.argument(b""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: RecordId = RecordId([0xa7; 16]);

    /// As the scripts make it.
    fn member(id: RecordId, expires_at_ms: Option<u64>) -> Vec<u8> {
        [&expires_at_ms.unwrap_or(0).to_be_bytes()[..], &hex_of(id)[..]].concat()
    }

    #[test]
    fn keys_and_members_name_the_id() {
        let layout = Layout::new("p:*", true);
        assert_eq!(layout.key(ID), b"p:*:{a7}:a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7");
        assert_eq!(layout.id(&layout.key(ID)), Some(ID));
        for other in
            ["", "a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7", "q:*:{a7}:a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7a7", "p:*:{a7}:unknown"]
        {
            assert_eq!(layout.id(other.as_bytes()), None, "{other}");
        }
        assert_eq!(layout.set(Listed::Unknown, 0x0a), b"p:*:{0a}:unknown");
        assert_eq!(layout.set(Listed::Claimed, 0x0a), b"p:*:{0a}:claimed");
        assert_eq!(layout.setting("secret"), b"p:*:{00}:setting:secret");
        assert!(layout.pattern().starts_with(b"p:\\*:{??}:????"));
        assert_eq!(read_member(&member(ID, Some(7))), Some((Some(7), ID)));
        assert_eq!(read_member(&member(ID, None)), Some((None, ID)));
        assert_eq!(read_member(b"short"), None);
    }

    #[test]
    fn entries_are_as_written() {
        for (tag, expires_at_ms) in [(0, None), (3, Some(u64::MAX))] {
            let value = Value { tag: Tag(tag), expires_at_ms, bytes: Bytes::from_static(b"bytes") };
            let mut out = Output::default();
            push_entry(&mut out, Some(Version(7)), &value);
            let written = out.into_bytes();
            let entry = written.strip_prefix(b"$22\r\n").and_then(|rest| rest.strip_suffix(b"\r\n")).unwrap();
            let read = Layout::entry(ID, Bytes::copy_from_slice(entry)).unwrap();
            assert_eq!(read, Entry { version: Version(7), value });
            for len in 0..HEADER {
                assert!(Layout::entry(ID, Bytes::copy_from_slice(&entry[..len])).is_err());
            }
        }
    }
}
