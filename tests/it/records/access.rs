//! Who may see and change records.

use super::{ask, flaky, get, id, with_unknown};
use crate::support::{Client, Gateway, Response, Upstream, eventually, request};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

const TOKEN: &str = "a-token-of-operators";
const OTHER: &str = "another:token/of=operators";

fn with_host(gateway: &Gateway, head: &str) -> Response {
    let mut client = Client::connect(gateway.admin);
    client.send(format!("{head}Connection: close\r\n\r\n"));
    client.read()
}

#[test]
fn without_tokens_this_machine_may_and_other_sites_pages_may_not() {
    let (upstream, gateway, id) = with_unknown("", "unknown");
    for host in ["localhost", "localhost:9090", "127.0.0.1", "[::1]:9090", &gateway.admin.to_string()] {
        assert_eq!(with_host(&gateway, &format!("GET /records HTTP/1.1\r\nHost: {host}\r\n")).status, 200, "{host}");
    }
    for (method, path) in [
        ("GET", "/records".to_owned()),
        ("GET", format!("/records/{id}")),
        ("DELETE", format!("/records/{id}")),
        ("POST", format!("/records/{id}/resolve")),
        ("GET", "/records/x".to_owned()),
    ] {
        for head in [
            "Host: rebound.example\r\n",
            "Host: rebound.example:9090\r\n",
            "Host: localhost\r\nOrigin: https://evil.example\r\n",
            "Host: 127.0.0.1\r\nOrigin: null\r\n",
            "Host: localhost.evil.example\r\n",
        ] {
            let head =
                format!("{method} {path} HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: 0\r\n");
            with_host(&gateway, &head).expect_problem(403, "forbidden");
        }
    }
    with_host(&gateway, "GET /records HTTP/1.0\r\n").expect_problem(403, "forbidden");
    with_host(&gateway, "GET http://evil.example/records HTTP/1.1\r\nHost: localhost\r\n")
        .expect_problem(403, "forbidden");
    for path in ["/livez", "/readyz", "/metrics"] {
        let open = with_host(&gateway, &format!("GET {path} HTTP/1.1\r\nHost: any.example\r\nOrigin: https://a\r\n"));
        assert_eq!(open.status, 200, "{path}");
    }
    assert_eq!(super::record(&gateway, "unknown")["state"], "unknown");
    assert_eq!(upstream.executions("unknown"), 1);
}

/// A gateway with a file of tokens.
fn with_tokens(upstream: &Upstream, text: &str, environment: &[(&str, &str)]) -> Gateway {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let file = dir.path().join("tokens");
    std::fs::write(&file, text).unwrap();
    Gateway::try_start(dir, &upstream.url(), &format!("admin.token_file = {file:?}"), &[], environment).unwrap()
}

fn with_token(gateway: &Gateway, method: &str, target: &str, token: &str) -> Response {
    ask(gateway, method, target, &[("Authorization", &format!("Bearer {token}"))], "")
}

#[test]
fn with_tokens_only_their_holders_may_and_the_log_says_who() {
    let upstream = flaky();
    let gateway = with_tokens(&upstream, &format!("# operators\n{TOKEN}\n\nalice:{OTHER}\n"), &[]);
    gateway.post("unknown", "{}");
    let listed = with_token(&gateway, "GET", "/records", TOKEN);
    assert_eq!((listed.status, listed.header("cache-control")), (200, Some("no-store")));
    let id = listed.json()["records"][0]["id"].as_str().unwrap().to_owned();
    for (method, target) in [
        ("GET", "/records".to_owned()),
        ("GET", format!("/records/{id}")),
        ("DELETE", format!("/records/{id}")),
        ("POST", format!("/records/{id}/resolve")),
        ("GET", "/records/x".to_owned()),
        ("PUT", "/records".to_owned()),
    ] {
        for wrong in [
            "Bearer",
            "Bearer ",
            "Bearer a-token-of-operator",
            "Bearer a-token-of-operators2",
            "Basic a-token-of-operators",
            TOKEN,
            "Bearer alice:another:token/of=operators",
        ] {
            let answer = ask(&gateway, method, &target, &[("Authorization", wrong)], "");
            answer.expect_problem(401, "unauthorized");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{wrong}");
        }
        ask(&gateway, method, &target, &[], "").expect_problem(401, "unauthorized");
        let twice = [("Authorization", "Bearer a-token-of-operators"); 2];
        ask(&gateway, method, &target, &twice, "").expect_problem(401, "unauthorized");
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(gateway.admin(path).status, 200, "{path} is open to all");
    }
    // Whoever has a token may come by any name, a browser of his own included.
    let bearer = format!("bearer {OTHER}");
    let headers = [("Authorization", bearer.as_str()), ("Origin", "https://console.example")];
    assert_eq!(ask(&gateway, "DELETE", &format!("/records/{id}"), &headers, "").status, 200);
    let line: serde_json::Value = serde_json::from_str(&gateway.wait_for_log("an operator's act")).unwrap();
    assert_eq!((&line["who"], &line["act"]), (&"alice".into(), &"forget".into()));
    gateway.post("unknown-2", "{}");
    let id = with_token(&gateway, "GET", "/records?key=unknown-2", TOKEN).json()["records"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(with_token(&gateway, "DELETE", &format!("/records/{id}"), TOKEN).status, 200);
    gateway.wait_for_log("\"who\":\"admin\"");
    assert!(![TOKEN, OTHER].iter().any(|token| gateway.log().contains(token)), "{}", gateway.log());
}

#[test]
fn tokens_are_read_again_on_sighup_and_a_broken_file_changes_nothing() {
    let upstream = Upstream::counting();
    let gateway = with_tokens(&upstream, TOKEN, &[]);
    let file = gateway.dir().path().join("tokens");
    let status = |token: &str| with_token(&gateway, "GET", "/records", token).status;
    assert_eq!((status(TOKEN), status(OTHER)), (200, 401));
    std::fs::write(&file, format!("alice:{OTHER}")).unwrap();
    assert_eq!((status(TOKEN), status(OTHER)), (200, 401), "not before it is told");
    gateway.hang_up();
    gateway.wait_for_log("admin.token_file was read again");
    assert_eq!((status(TOKEN), status(OTHER)), (401, 200), "the old token is worth nothing any more");
    std::fs::write(&file, format!("{TOKEN}\nbob:tooshort")).unwrap();
    gateway.hang_up();
    let line = gateway.wait_for_log("the tokens stay as they were");
    assert!(line.contains("line 2") && line.contains("admin.token_file") && !line.contains("tooshort"), "{line}");
    assert_eq!((status(TOKEN), status(OTHER)), (401, 200));
    std::fs::remove_file(&file).unwrap();
    gateway.hang_up();
    gateway.wait_for_log("cannot be read");
    assert_eq!((status(TOKEN), status(OTHER)), (401, 200));
}

#[test]
fn off_loopback_it_does_not_start_without_tokens() {
    let upstream = Upstream::counting();
    let everywhere = [("ONCEGATE_ADMIN__LISTEN", "0.0.0.0:0")];
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let refusal = Gateway::try_start(Arc::clone(&dir), &upstream.url(), "", &[], &everywhere).err().unwrap();
    assert_eq!(refusal.code, Some(2), "{refusal:?}");
    for text in ["ONCEGATE_ADMIN__LISTEN: admin.listen: ", "admin.token_file"] {
        assert!(refusal.stderr.contains(text), "{text}: {refusal:?}");
    }
    assert!(!dir.path().join("data").exists(), "nothing was opened");
    let gateway = with_tokens(&upstream, TOKEN, &everywhere);
    assert!(gateway.admin.ip().is_unspecified());
    assert_eq!(get(&gateway, "/records").status, 401);
    assert_eq!(with_token(&gateway, "GET", "/records", TOKEN).status, 200);
    assert_eq!(gateway.admin("/metrics").status, 200);
}

#[test]
fn a_broken_file_of_tokens_is_an_error_of_the_configuration() {
    let upstream = Upstream::counting();
    for (text, error) in [
        ("", "holds no token"),
        ("# none\n\n", "holds no token"),
        ("alice:short", "line 1: "),
        ("\nal ice:0123456789abcdef", "line 2: "),
        ("0123456789 abcdef", "line 1: "),
    ] {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let file = dir.path().join("tokens");
        std::fs::write(&file, text).unwrap();
        let settings = format!("admin.token_file = {file:?}");
        let refusal = Gateway::try_start(dir, &upstream.url(), &settings, &[], &[]).err().unwrap();
        assert_eq!(refusal.code, Some(2), "{refusal:?}");
        assert!(refusal.stderr.contains(error) && refusal.stderr.contains("admin.token_file: "), "{text}: {refusal:?}");
    }
}

#[test]
fn over_a_unix_socket_any_name_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let (config, socket) = (dir.path().join("config.toml"), dir.path().join("admin.sock"));
    let data = dir.path().join("data");
    let text =
        format!("server.listen = \"127.0.0.1:0\"\nadmin.listen = \"unix:{}\"\nstore.path = {data:?}", socket.display());
    std::fs::write(&config, text).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_oncegate")).arg("--config").arg(&config).stderr(Stdio::null()).spawn();
    let _guard = Guard(child.unwrap());
    eventually("it listens", || UnixStream::connect(&socket).ok());
    for (head, status) in [
        ("GET /records HTTP/1.1\r\nHost: any.example\r\n", "200"),
        ("GET /records HTTP/1.0\r\n", "200"),
        ("GET /records HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a\r\n", "403"),
    ] {
        assert_eq!(over(&socket, head).split(' ').nth(1), Some(status), "{head}");
    }
}

fn over(socket: &Path, head: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Ends the process whatever becomes of the test.
struct Guard(std::process::Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_client_that_closes_its_half_gets_its_answer() {
    let (_upstream, gateway, _) = with_unknown("", "unknown");
    let id = id(&gateway, "unknown");
    let mut client = Client::connect(gateway.admin);
    client.send(format!("DELETE /records/{id} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    client.half_close();
    assert_eq!(client.read().status, 200);
    // The helper of all other tests sends a foreign Host.
    let foreign = request("GET", "/records", &[], "");
    crate::support::call(gateway.admin, foreign).expect_problem(403, "forbidden");
}
