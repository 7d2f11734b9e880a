//! HTTP/1.1 read by the letter (RFC 9110, RFC 9112): whatever could be read in two ways is an error. Bytes become the
//! characters of the same number.

pub(crate) type Fields = Vec<(String, String)>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    /// The three parts of its first line.
    pub(crate) start: [String; 3],
    /// In the order in which they came, names in lower case.
    pub(crate) fields: Fields,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Fields,
    pub(crate) framing: Framing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Framing {
    #[default]
    Nothing,
    Length(usize),
    Chunked,
    /// With the connection.
    Close,
}

#[derive(Debug)]
pub(crate) enum Parsed {
    /// A message, and how many bytes it took.
    Whole(Message, usize),
    /// The beginning of one, as far as it goes, if its head is there.
    Partial(Option<Message>),
}

impl Message {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields.iter().filter(move |(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    /// Of a response.
    pub(crate) fn status(&self) -> u16 {
        self.start[1].parse().unwrap_or(0)
    }

    /// Of a problem of the gateway's own.
    pub(crate) fn problem(&self) -> Option<serde_json::Value> {
        let problem = self.field("content-type")? == "application/problem+json";
        let json = serde_json::from_slice::<serde_json::Value>(&self.body).ok().filter(|_| problem)?;
        json["type"].as_str()?.starts_with("urn:oncegate:problem:").then_some(json)
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

pub(crate) fn is_token(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c))
}

/// Takes a line that ends with CRLF.
fn line<'a>(bytes: &'a [u8], at: &mut usize) -> Result<Option<&'a [u8]>, String> {
    let rest = &bytes[*at..];
    let Some(end) = rest.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else { return Ok(None) };
    match &rest[end..] {
        [b'\r', b'\n', ..] => {
            *at += end + 2;
            Ok(Some(&rest[..end]))
        }
        [b'\r'] => Ok(None),
        _ => Err(format!("a bare CR or LF behind {:?}", text(&rest[..end]))),
    }
}

fn fields(bytes: &[u8], at: &mut usize) -> Result<Option<Fields>, String> {
    let mut fields = Fields::new();
    loop {
        let Some(line) = line(bytes, at)? else { return Ok(None) };
        if line.is_empty() {
            return Ok(Some(fields));
        }
        let line = text(line);
        let (name, value) = line.split_once(':').ok_or_else(|| format!("a field without a colon: {line:?}"))?;
        if !is_token(name) {
            return Err(format!("a field without a proper name: {line:?}"));
        }
        if value.chars().any(|c| c < ' ' && c != '\t' || c == '\x7f') {
            return Err(format!("a control character in a field: {line:?}"));
        }
        fields.push((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()));
    }
}

/// What the fields say of the body's length.
fn framing(message: &Message) -> Result<Option<Framing>, String> {
    let codings = message.all("transfer-encoding").collect::<Vec<_>>();
    let lengths = message.all("content-length").collect::<Vec<_>>();
    match (codings.as_slice(), lengths.as_slice()) {
        ([], []) => Ok(None),
        ([coding], []) if coding.eq_ignore_ascii_case("chunked") => Ok(Some(Framing::Chunked)),
        ([], [length]) => {
            let plain =
                length.bytes().all(|byte| byte.is_ascii_digit()) && (*length == "0" || !length.starts_with('0'));
            let length = length.parse().ok().filter(|_| plain).ok_or_else(|| format!("a length of {length:?}"))?;
            Ok(Some(Framing::Length(length)))
        }
        _ => Err(format!("framed by {codings:?} and {lengths:?}")),
    }
}

/// A request.
pub(crate) fn request(bytes: &[u8]) -> Result<Parsed, String> {
    let mut at = 0;
    let Some(first) = line(bytes, &mut at)? else { return Ok(Parsed::Partial(None)) };
    let first = text(first);
    let start = first.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let start: [String; 3] = start.try_into().map_err(|_| format!("not a request line: {first:?}"))?;
    let [method, target, version] = &start;
    let sound = target.chars().all(|c| c > ' ' && c != '\x7f') && !target.is_empty();
    if !is_token(method) || !sound || version != "HTTP/1.1" {
        return Err(format!("not a request line: {first:?}"));
    }
    let Some(fields) = fields(bytes, &mut at)? else { return Ok(Parsed::Partial(None)) };
    let mut message = Message { start, fields, ..Message::default() };
    if message.all("host").count() != 1 {
        return Err(format!("not one Host: {:?}", message.fields));
    }
    message.framing = framing(&message)?.unwrap_or(Framing::Nothing);
    body(bytes, at, message, false)
}

/// A response. `to_head`: to a HEAD. `ended`: no more will come.
pub(crate) fn response(bytes: &[u8], to_head: bool, ended: bool) -> Result<Parsed, String> {
    let mut at = 0;
    let Some(first) = line(bytes, &mut at)? else { return Ok(Parsed::Partial(None)) };
    let first = text(first);
    let start = first.splitn(3, ' ').map(str::to_owned).collect::<Vec<_>>();
    let start: [String; 3] = start.try_into().map_err(|_| format!("not a status line: {first:?}"))?;
    let [version, status, _] = &start;
    let sound = status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit()) && status.as_str() >= "100";
    if !version.starts_with("HTTP/1.") || version.len() != 8 || !sound {
        return Err(format!("not a status line: {first:?}"));
    }
    let Some(fields) = fields(bytes, &mut at)? else { return Ok(Parsed::Partial(None)) };
    let mut message = Message { start, fields, ..Message::default() };
    let bodiless = to_head || matches!(message.status(), 100..200 | 204 | 304);
    let framing = framing(&message)?;
    message.framing = if bodiless { Framing::Nothing } else { framing.unwrap_or(Framing::Close) };
    body(bytes, at, message, ended)
}

fn body(bytes: &[u8], mut at: usize, mut message: Message, ended: bool) -> Result<Parsed, String> {
    match message.framing {
        Framing::Nothing => {}
        Framing::Length(len) => {
            let end = at.saturating_add(len);
            message.body = bytes[at..end.min(bytes.len())].to_vec();
            if end > bytes.len() {
                return Ok(Parsed::Partial(Some(message)));
            }
            at = end;
        }
        Framing::Close => {
            message.body = bytes[at..].to_vec();
            at = bytes.len();
            if !ended {
                return Ok(Parsed::Partial(Some(message)));
            }
        }
        Framing::Chunked => {
            if !chunks(bytes, &mut at, &mut message)? {
                return Ok(Parsed::Partial(Some(message)));
            }
        }
    }
    Ok(Parsed::Whole(message, at))
}

/// Chunks without extensions: nobody has to send any. `false`: there is more to come.
fn chunks(bytes: &[u8], at: &mut usize, message: &mut Message) -> Result<bool, String> {
    loop {
        let Some(size) = line(bytes, at)? else { return Ok(false) };
        let digits = text(size);
        let hex = !digits.is_empty() && digits.len() <= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let size = usize::from_str_radix(&digits, 16).ok().filter(|_| hex);
        let size = size.ok_or_else(|| format!("a chunk of size {digits:?}"))?;
        if size == 0 {
            let Some(trailers) = fields(bytes, at)? else { return Ok(false) };
            message.trailers = trailers;
            return Ok(true);
        }
        let end = *at + size;
        message.body.extend_from_slice(&bytes[*at..end.min(bytes.len())]);
        match bytes.get(end..).map(|rest| &rest[..rest.len().min(2)]) {
            Some(b"\r\n") => *at = end + 2,
            None | Some(b"" | b"\r") => return Ok(false),
            Some(other) => return Err(format!("{:?} behind a chunk", text(other))),
        }
    }
}
