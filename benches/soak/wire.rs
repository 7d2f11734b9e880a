//! Both ends' HTTP/1.1 on blocking sockets: heads by `httparse`, bodies by their `Content-Length`.

use std::io::{Error, ErrorKind, Read, Result};
use std::net::TcpStream;

const HEAD_MAX: usize = 256 << 10;

/// A message's head and body as they came.
pub(crate) struct Message {
    /// `POST` or `201`.
    pub(crate) first: String,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Message {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(crate) fn status(&self) -> u16 {
        self.first.parse().unwrap_or(0)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Request,
    Response,
}

pub(crate) struct Reader {
    kind: Kind,
    buffer: Vec<u8>,
}

impl Reader {
    pub(crate) fn new(kind: Kind) -> Self {
        Self { kind, buffer: Vec::new() }
    }

    /// The next message. An error if the connection ends before it is whole.
    pub(crate) fn read(&mut self, stream: &mut TcpStream) -> Result<Message> {
        let head_len = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if self.buffer.len() > HEAD_MAX {
                return Err(malformed("a head without end"));
            }
            self.fill(stream)?;
        };
        let (first, fields) = self.parse(head_len)?;
        let field = |name: &str| fields.iter().find(|(field, _)| field.eq_ignore_ascii_case(name));
        if field("transfer-encoding").is_some() {
            return Err(malformed("a message in chunks, where its length was known"));
        }
        let len = match field("content-length") {
            Some((_, value)) => value.parse::<usize>().map_err(|_| malformed("Content-Length"))?,
            None => 0,
        };
        while self.buffer.len() < head_len + len {
            self.fill(stream)?;
        }
        let body = self.buffer[head_len..head_len + len].to_vec();
        self.buffer.drain(..head_len + len);
        self.buffer.shrink_to(64 << 10);
        Ok(Message { first, fields, body })
    }

    fn parse(&self, head_len: usize) -> Result<(String, Vec<(String, String)>)> {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let head = &self.buffer[..head_len];
        let (first, fields) = match self.kind {
            Kind::Request => {
                let mut request = httparse::Request::new(&mut fields);
                request.parse(head).map_err(Error::other)?;
                (request.method.unwrap_or_default().to_owned(), request.headers)
            }
            Kind::Response => {
                let mut response = httparse::Response::new(&mut fields);
                response.parse(head).map_err(Error::other)?;
                (response.code.unwrap_or_default().to_string(), response.headers)
            }
        };
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        Ok((first, fields.iter().map(|field| (field.name.to_owned(), text(field.value))).collect()))
    }

    fn fill(&mut self, stream: &mut TcpStream) -> Result<()> {
        let mut chunk = [0; 16 << 10];
        match stream.read(&mut chunk)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            len => {
                self.buffer.extend_from_slice(&chunk[..len]);
                Ok(())
            }
        }
    }
}

fn malformed(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what.to_owned())
}
