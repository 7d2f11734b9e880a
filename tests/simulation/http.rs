//! As much of HTTP/1.1 as clients and upstream need here.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

#[derive(Clone)]
pub(crate) struct Message {
    /// Of a response.
    pub(crate) status: u16,
    /// In the order in which they came, names in lower case.
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Message {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.text().chars().take(200).collect::<String>();
        write!(f, "{} {:?} {text:?}", self.status, self.fields)
    }
}

/// Reads one message; `None`: the connection has ended before it. What comes behind it stays in `buffer`.
pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<Option<Message>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let mut message = head(&buffer[..end])?;
            buffer.drain(..end + 4);
            if (100..200).contains(&message.status) {
                continue;
            }
            read_body(stream, buffer, &mut message).await?;
            return Ok(Some(message));
        }
        if fill(stream, buffer).await? == 0 {
            return if buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    }
}

async fn read_body(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    message: &mut Message,
) -> io::Result<()> {
    if message.field("transfer-encoding").is_some() {
        loop {
            let line = loop {
                if let Some(end) = buffer.windows(2).position(|window| window == b"\r\n") {
                    break buffer.drain(..end + 2).collect::<Vec<_>>();
                }
                need(fill(stream, buffer).await?)?;
            };
            let digits = std::str::from_utf8(&line[..line.len() - 2]).map_err(io::Error::other)?;
            let len = usize::from_str_radix(digits, 16).map_err(io::Error::other)?;
            while buffer.len() < len + 2 {
                need(fill(stream, buffer).await?)?;
            }
            message.body.extend(buffer.drain(..len));
            buffer.drain(..2);
            if len == 0 {
                return Ok(());
            }
        }
    }
    let len = message.field("content-length").map_or(Ok(0), str::parse::<usize>).map_err(io::Error::other)?;
    while buffer.len() < len {
        need(fill(stream, buffer).await?)?;
    }
    message.body = buffer.drain(..len).collect();
    Ok(())
}

fn need(len: usize) -> io::Result<()> {
    if len == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

async fn fill(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<usize> {
    let mut piece = [0; 4096];
    let len = stream.read(&mut piece).await?;
    buffer.extend_from_slice(&piece[..len]);
    Ok(len)
}

fn head(bytes: &[u8]) -> io::Result<Message> {
    let text = std::str::from_utf8(bytes).map_err(io::Error::other)?;
    let mut lines = text.split("\r\n");
    let start = lines.next().unwrap_or_default();
    let status = start.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0);
    let fields = lines.filter_map(|line| line.split_once(':'));
    let fields = fields.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    Ok(Message { status, fields, body: Vec::new() })
}
