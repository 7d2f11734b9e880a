//! A client of the admin address: HTTP/1.1, one connection, time limits.

use bytes::Bytes;
use clap::Args;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use oncegate::config::{self, Flags};
use oncegate::server::Address;
use serde_json::Value;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// From the request to the end of the response.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// A page of records is far shorter.
const ANSWER_MAX: usize = 256 << 20;

/// How to get at the gateway.
#[derive(Args)]
pub(super) struct Access {
    /// The gateway's admin address: HOST:PORT or unix:/PATH
    #[arg(long, global = true, value_name = "ADDR", value_parser = address, conflicts_with = "config")]
    admin: Option<Address>,
    /// The gateway's configuration file, which says admin.listen and admin.token_file; without it and --admin
    /// ./config.toml, if there is one, or else the defaults
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A file whose first token is sent, written as admin.token_file is
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

fn address(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
        return Ok(Address::Unix(path.into()));
    }
    let wrong = || "write HOST:PORT, such as 127.0.0.1:9090 or [::1]:9090, or unix:/PATH".to_owned();
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let is_v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).map(str::parse::<Ipv6Addr>);
    let is_host = match is_v6 {
        Some(address) => address.is_ok(),
        None => !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte)),
    };
    if is_host && port != 0 { Ok(Address::Tcp(text.to_owned())) } else { Err(wrong()) }
}

/// Where to reach what listens there.
fn reachable(listen: Address) -> Result<Address, Failure> {
    let Address::Tcp(text) = &listen else { return Ok(listen) };
    let reached = match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_unspecified() => {
            let ip = match address.ip() {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            };
            SocketAddr::new(ip, address.port()).to_string()
        }
        _ => text.clone(),
    };
    self::address(&reached)
        .map_err(|_| Failure::Usage(format!("admin.listen is {text:?}, where nobody can be reached: use --admin")))
}

/// The first token of a file: a line `NAME:TOKEN` or `TOKEN`; empty ones and those that begin with `#` do not count.
fn first_token(path: &Path) -> Result<HeaderValue, Failure> {
    let place = path.display();
    let text = std::fs::read(path).map_err(|error| Failure::Usage(format!("{place}: cannot be read: {error}")))?;
    let mut lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let line = lines
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .ok_or_else(|| Failure::Usage(format!("{place}: holds no token")))?;
    let token = line.iter().position(|byte| *byte == b':').and_then(|at| line.get(at + 1..)).unwrap_or(line);
    let token = std::str::from_utf8(token.trim_ascii())
        .ok()
        .filter(|token| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()))
        .ok_or_else(|| Failure::Usage(format!("{place}: a token consists of visible ASCII characters")))?;
    let value = HeaderValue::try_from(format!("Bearer {token}"));
    let mut value = value.map_err(|error| Failure::Usage(format!("{place}: {error}")))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Failure {
    /// The arguments, or files that they name.
    Usage(String),
    /// The gateway's answer: the status, and the problem as it describes it.
    Refused(StatusCode, Value),
    Failed(String),
}

impl Failure {
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            // The gateway has read the arguments that it was not for us to understand.
            Self::Refused(_, problem) if problem.get("code").is_some_and(|code| code == "invalid_request") => 2,
            Self::Refused(..) | Self::Failed(_) => 1,
        }
    }

    /// The problem, if it concerns one record and says nothing about others; otherwise the failure itself.
    pub(super) fn of_one_record(self) -> Result<Value, Self> {
        match self {
            Self::Refused(StatusCode::CONFLICT | StatusCode::NOT_FOUND, problem) => Ok(problem),
            other => Err(other),
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usage(text) | Self::Failed(text) => f.write_str(text),
            Self::Refused(status, problem) => {
                let field = |name: &str| problem.get(name).and_then(Value::as_str).unwrap_or_default();
                write!(f, "refused ({status}, {}): {}", field("code"), field("detail"))?;
                if *status == StatusCode::UNAUTHORIZED {
                    f.write_str(" (--token-file)")?;
                }
                Ok(())
            }
        }
    }
}

pub(super) struct Client {
    address: Address,
    host: HeaderValue,
    authorization: Option<HeaderValue>,
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// # Errors
    /// What is wrong with the configuration or the file of tokens.
    pub(super) fn new(access: Access) -> Result<Self, Failure> {
        let Access { admin, config, token_file } = access;
        let (address, token_file) = match admin {
            Some(address) => (address, token_file),
            None => {
                let loaded = config::load(config.as_deref(), std::env::vars_os(), &Flags::default());
                let (config, _) = loaded.map_err(|errors| Failure::Usage(errors.to_string()))?;
                let configured = config.admin.tokens.map(|tokens| tokens.path().to_owned());
                (reachable(config.admin.listen)?, token_file.or(configured))
            }
        };
        let authorization = token_file.as_deref().map(first_token).transpose()?;
        let host = match &address {
            Address::Tcp(authority) => HeaderValue::try_from(authority.as_str()),
            Address::Unix(_) => Ok(HeaderValue::from_static("localhost")),
        };
        let host = host.map_err(|error| Failure::Usage(format!("{address}: {error}")))?;
        Ok(Self { address, host, authorization, connection: None })
    }

    /// Sends a request and reads the answer.
    ///
    /// # Errors
    /// If there is none in time, or it says no. After [`Failure::Failed`] nobody knows whether a change was made.
    pub(super) async fn call(
        &mut self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
        body: Option<(&'static str, Bytes)>,
    ) -> Result<Value, Failure> {
        let mut target = path.to_owned();
        for (at, (name, value)) in query.iter().enumerate() {
            target.push(if at == 0 { '?' } else { '&' });
            target.push_str(name);
            target.push('=');
            encode(value, &mut target);
        }
        let mut request = Request::builder().method(method.clone()).uri(target).header(HOST, self.host.clone());
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        if let Some((media_type, _)) = &body {
            request = request.header(CONTENT_TYPE, *media_type);
        }
        let body = Full::new(body.map(|(_, body)| body).unwrap_or_default());
        let request = request.body(body).map_err(|error| Failure::Usage(error.to_string()))?;
        let address = self.address.to_string();
        let lost = |why: String| {
            let doubt =
                if method == Method::GET { "" } else { "; whether it was done is not known: look at the record" };
            Failure::Failed(format!("the gateway at {address} has not answered: {why}{doubt}"))
        };
        let mut connection = self.connect().await?;
        let exchange = async {
            let response = connection.send_request(request).await.map_err(|error| lost(error.to_string()))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_MAX).collect().await.map_err(|error| lost(error.to_string()))?;
            Ok::<_, Failure>(Response::from_parts(head, body.to_bytes()))
        };
        let limit = format!("nothing for {} s", ANSWER_TIMEOUT.as_secs());
        let response = timeout(ANSWER_TIMEOUT, exchange).await.map_err(|_| lost(limit))??;
        self.connection = Some(connection);
        self.understand(&response)
    }

    fn understand(&self, response: &Response<Bytes>) -> Result<Value, Failure> {
        let document = serde_json::from_slice::<Value>(response.body()).ok().filter(Value::is_object);
        match (response.status(), document) {
            (status, Some(document)) if status.is_success() => Ok(document),
            (status, Some(problem)) if problem.get("code").is_some_and(Value::is_string) => {
                Err(Failure::Refused(status, problem))
            }
            _ => Err(self.no_gateway()),
        }
    }

    /// Whoever answers there does not speak as a gateway does.
    pub(super) fn no_gateway(&self) -> Failure {
        let address = &self.address;
        Failure::Failed(format!("what answers at {address} is not the admin address of a gateway with records"))
    }

    async fn connect(&mut self) -> Result<SendRequest<Full<Bytes>>, Failure> {
        if let Some(mut connection) = self.connection.take()
            && connection.ready().await.is_ok()
        {
            return Ok(connection);
        }
        let address = self.address.to_string();
        let failed = |why: String| {
            Failure::Failed(format!("cannot reach a gateway at {address}: {why}; does it run, with this admin.listen?"))
        };
        let connect = async {
            match &self.address {
                Address::Tcp(authority) => handshake(TcpStream::connect(authority).await?).await,
                Address::Unix(path) => handshake(UnixStream::connect(path).await?).await,
            }
        };
        match timeout(CONNECT_TIMEOUT, connect).await {
            Ok(connected) => connected.map_err(|error| failed(error.to_string())),
            Err(_) => Err(failed(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))),
        }
    }
}

async fn handshake<S>(stream: S) -> std::io::Result<SendRequest<Full<Bytes>>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
    // Its errors are told to whoever waits for an answer.
    tokio::spawn(connection);
    Ok(sender)
}

/// Percent-encodes all but unreserved characters (RFC 3986, section 2.3).
fn encode(value: &str, out: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_nonsense_is_refused() {
        for good in
            ["127.0.0.1:9090", "[::1]:9090", "localhost:1", "gateway-1.internal:65535", "unix:/run/a b", "unix:x"]
        {
            assert_eq!(address(good).unwrap().to_string(), good);
        }
        for wrong in [
            "",
            "9090",
            ":9090",
            "localhost",
            "::1:9090",
            "[::1]",
            "[a]:1",
            "a:0",
            "a:65536",
            "a b:1",
            "unix:",
            "http://a:1",
        ] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_listens_everywhere_is_reached_here() {
        let at = |text: &str| reachable(Address::Tcp(text.to_owned())).map(|address| address.to_string()).ok();
        assert_eq!(at("0.0.0.0:9090").as_deref(), Some("127.0.0.1:9090"));
        assert_eq!(at("[::]:9090").as_deref(), Some("[::1]:9090"));
        assert_eq!(at("10.0.0.7:9090").as_deref(), Some("10.0.0.7:9090"));
        assert_eq!(at("localhost:9090").as_deref(), Some("localhost:9090"));
        assert_eq!(at("127.0.0.1:0"), None);
    }

    #[test]
    fn the_first_token_of_a_file_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        let token = |text: &str| {
            std::fs::write(&file, text).unwrap();
            first_token(&file).map(|value| value.to_str().unwrap().to_owned()).ok()
        };
        assert_eq!(
            token("# alice:no\n\n  bob : 0123456789abcdef:x \r\nalice:second\n").as_deref(),
            Some("Bearer 0123456789abcdef:x")
        );
        assert_eq!(token("0123456789abcdef").as_deref(), Some("Bearer 0123456789abcdef"));
        for wrong in ["", "# only\n", "a:", "a:b c", "a:\u{e9}", "a:\x1b"] {
            assert_eq!(token(wrong), None, "{wrong}");
        }
        assert!(first_token(&dir.path().join("nowhere")).is_err());
    }

    #[test]
    fn values_of_a_query_are_encoded() {
        let mut out = String::new();
        encode("a b&c=d%/{}+é\n~", &mut out);
        assert_eq!(out, "a%20b%26c%3Dd%25%2F%7B%7D%2B%C3%A9%0A~");
    }
}
