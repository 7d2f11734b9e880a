//! A small posting backend, and oncegate before it: sends a post, sends it again, and shows that the backend ran once.
//!
//! `cargo run --release --example quickstart` stays up for `curl`; with `-- --once` it ends after the demonstration,
//! with exit code 1 if the backend did not run exactly once.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use oncegate::config::{self, Flags};
use oncegate::run;
use oncegate::server::Address;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::{TcpListener, TcpStream};

const PAYLOAD: &str = r#"{"platform":"mastodon","accountId":"acc_1","status":"publish","text":"Hello, once."}"#;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let once = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => false,
        [flag] if flag == "--once" => true,
        _ => bail!("usage: quickstart [--once]"),
    };
    let backend = Backend::default();
    let upstream = backend.start(if once { 0 } else { 3000 }).await?;
    let data = tempfile::tempdir().context("no directory for the store")?;
    let gateway = start_gateway(upstream, data.path()).await.context("the gateway did not start")?;
    say(&format!(
        "backend  http://{upstream}   keeps posts in memory\n\
         gateway  http://{gateway}   store in {}\n",
        data.path().display()
    ))?;
    demonstrate(&backend, gateway).await?;
    if once {
        return Ok(());
    }
    say(&format!(
        "Both stay up until Ctrl-C. Try a key of your own, twice; then another payload under the same key:\n\n\
         curl -i http://{gateway}/posts -H 'Authorization: Bearer demo' -H 'Idempotency-Key: my-key-1' \\\n  \
         --json '{PAYLOAD}'\n\
         curl -i http://{gateway}/posts -H 'Authorization: Bearer demo' -H 'Idempotency-Key: my-key-1' \\\n  \
         --json '{{\"text\":\"Something else\"}}'\n\
         curl http://{gateway}/posts\n"
    ))?;
    tokio::signal::ctrl_c().await.context("no signals here")
}

/// Starts a gateway on a free port of 127.0.0.1, with an embedded store in `data`, and returns where it listens.
async fn start_gateway(upstream: SocketAddr, data: &Path) -> anyhow::Result<SocketAddr> {
    let file = format!(
        "server.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n\
         upstream.url = \"http://{upstream}\"\nstore.path = {:?}\n",
        data.display().to_string()
    );
    let config = config::parse("quickstart", &file, [], &Flags::default())?;
    let gateway = run::start(config, false).await?;
    let Some(Address::Tcp(address)) = gateway.addresses().first() else { bail!("it listens nowhere") };
    let address = address.parse().context("no address")?;
    tokio::spawn(gateway.until(std::future::pending()));
    Ok(address)
}

/// Sends one post twice, as a client does that has lost the first answer, and checks what came of it.
async fn demonstrate(backend: &Backend, gateway: SocketAddr) -> anyhow::Result<()> {
    let key = random_key()?;
    say(&format!("POST /posts, Idempotency-Key: {key}"))?;
    let first = send(gateway, &key).await?;
    first.show()?;
    say("the same request again")?;
    let second = send(gateway, &key).await?;
    second.show()?;

    let runs = backend.posts().len();
    say(&format!("times that the backend ran: {runs}\n"))?;
    ensure!(first.status == StatusCode::CREATED, "the first request was not executed");
    ensure!(!first.replayed() && second.replayed(), "the second answer did not come from the record");
    ensure!((first.status, &first.body) == (second.status, &second.body), "the two answers differ");
    ensure!(runs == 1, "the backend ran {runs} times");
    Ok(())
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn replayed(&self) -> bool {
        self.headers.get("idempotency-replayed").is_some_and(|value| value == "true")
    }

    fn show(&self) -> anyhow::Result<()> {
        let mut text = format!("  {}\n", self.status);
        for name in ["location", "idempotency-replayed", "age", "cache-status"] {
            if let Some(value) = self.headers.get(name) {
                text += &format!("  {name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
            }
        }
        say(&format!("{text}  {}", String::from_utf8_lossy(&self.body)))
    }
}

/// One request on a connection of its own.
async fn send(gateway: SocketAddr, key: &str) -> anyhow::Result<Answer> {
    let stream = TcpStream::connect(gateway).await.with_context(|| format!("no connection to {gateway}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::post("/posts")
        .header(header::HOST, gateway.to_string())
        .header(header::AUTHORIZATION, "Bearer demo")
        .header(header::CONTENT_TYPE, "application/json")
        .header("idempotency-key", key)
        .body(Full::new(Bytes::from_static(PAYLOAD.as_bytes())))?;
    let (parts, body) = sender.send_request(request).await?.into_parts();
    Ok(Answer { status: parts.status, headers: parts.headers, body: body.collect().await?.to_bytes() })
}

fn random_key() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("no randomness")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A posting service that knows nothing of idempotency keys: each `POST /posts` makes a post.
#[derive(Clone, Default)]
struct Backend {
    posts: Arc<Mutex<Vec<Value>>>,
}

impl Backend {
    /// Serves on `port` of 127.0.0.1 if it is free, else on any.
    async fn start(&self, port: u16) -> anyhow::Result<SocketAddr> {
        let listener = match TcpListener::bind(("127.0.0.1", port)).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind("127.0.0.1:0").await.context("no port for the backend")?,
        };
        let address = listener.local_addr()?;
        let backend = self.clone();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    // Out of descriptors, say: let others finish.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                };
                let backend = backend.clone();
                let service = service_fn(move |request| {
                    let backend = backend.clone();
                    async move { Ok::<_, Infallible>(backend.answer(request).await) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Ok(address)
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        match (request.method().clone(), request.uri().path()) {
            (Method::POST, "/posts") => {
                let Ok(body) = request.into_body().collect().await else {
                    return reply(StatusCode::BAD_REQUEST, &json!({ "error": "the body was cut off" }));
                };
                let Ok(payload) = serde_json::from_slice::<Value>(&body.to_bytes()) else {
                    return reply(StatusCode::BAD_REQUEST, &json!({ "error": "the body is not JSON" }));
                };
                self.create(&payload)
            }
            (Method::GET, "/posts") => reply(StatusCode::OK, &Value::from(self.posts())),
            _ => reply(StatusCode::NOT_FOUND, &json!({ "error": "POST /posts creates, GET /posts lists" })),
        }
    }

    fn create(&self, payload: &Value) -> Response<Full<Bytes>> {
        let mut posts = self.posts.lock().unwrap_or_else(PoisonError::into_inner);
        let id = posts.len() + 1;
        let post = json!({ "id": id, "post": payload });
        posts.push(post.clone());
        let mut response = reply(StatusCode::CREATED, &post);
        if let Ok(location) = format!("/posts/{id}").parse() {
            response.headers_mut().insert(header::LOCATION, location);
        }
        response
    }

    fn posts(&self) -> Vec<Value> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn reply(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{body}\n"))));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn say(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("standard output is closed")
}
