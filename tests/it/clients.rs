//! Clients that hang up, half-close, are slow or send too much at once: none of them cancels or doubles an execution.

use crate::support::{Client, Gate, Gateway, Upstream, eventually, post, request};

/// How a client ends in the middle of things.
#[derive(Clone, Copy, Debug)]
enum End {
    Close,
    Reset,
    HalfClose,
}

impl End {
    fn perform(self, mut client: Client) {
        match self {
            Self::Close => drop(client),
            Self::Reset => client.reset(),
            Self::HalfClose => {
                client.half_close();
                // Whatever the answer is: it comes, or the connection ends.
                let _ = client.try_read();
            }
        }
    }
}

#[test]
fn an_upload_cut_off_at_any_byte_claims_nothing_and_its_retry_executes_once() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let whole = post("/posts", "cut", r#"{"text":"hello"}"#);
    for end in [End::Close, End::Reset, End::HalfClose] {
        for len in 0..whole.len() {
            let mut client = Client::connect(gateway.addr);
            client.try_send(&whole.as_bytes()[..len]);
            end.perform(client);
        }
    }
    eventually("all connections have ended", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.metric("oncegate_store_batched_writes_total"), 0.0, "nothing was claimed");
    assert_eq!(gateway.metric("oncegate_buffered_bytes"), 0.0);
    let retry = gateway.call(&whole);
    assert_eq!((retry.text().as_str(), retry.replayed()), (r#"{"n":1}"#, false));
}

#[test]
fn a_client_that_goes_after_the_request_does_not_cancel_it() {
    for end in [End::Close, End::Reset] {
        let gate = Gate::default();
        let passed = gate.clone();
        let upstream = Upstream::scripted(move |_, reply| {
            passed.wait();
            reply.send(201, &[], "made");
        });
        let gateway = Gateway::start(&upstream, "");
        let mut client = Client::connect(gateway.addr);
        client.send(post("/posts", "k", "{}"));
        upstream.wait_for(1);
        end.perform(client);
        gate.open();
        let settled = "oncegate_settled_total{outcome=\"final\"}";
        eventually("it is settled", || (gateway.metric(settled) == 1.0).then_some(()));
        let retry = gateway.post("k", "{}");
        assert_eq!((retry.text().as_str(), retry.replayed()), ("made", true), "{end:?}");
        assert_eq!(upstream.count(), 1);
    }
}

#[test]
fn a_client_that_goes_at_any_byte_of_the_response_gets_it_on_the_retry() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    for len in 0..40 {
        let key = format!("k{len}");
        let mut client = Client::connect(gateway.addr);
        client.send(post("/posts", &key, "{}"));
        let mut some = vec![0; len + 1];
        std::io::Read::read_exact(&mut client.stream, &mut some).unwrap();
        client.reset();
        assert!(gateway.post(&key, "{}").replayed());
        assert_eq!(upstream.executions(&key), 1);
    }
}

#[test]
fn a_client_that_half_closes_gets_its_response() {
    let gate = Gate::default();
    let passed = gate.clone();
    let upstream = Upstream::scripted(move |_, reply| {
        passed.wait();
        reply.send(201, &[], "made");
    });
    let gateway = Gateway::start(&upstream, "");
    for (request, path) in [(post("/posts", "k", "{}"), "claimed"), (post("/other", "k", "{}"), "passed")] {
        let mut client = Client::connect(gateway.addr);
        client.send(request);
        client.half_close();
        gate.open();
        assert_eq!(client.read().text(), "made", "{path}");
    }
}

#[test]
fn requests_that_come_one_byte_at_a_time_are_whole_requests() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let mut client = Client::connect(gateway.addr);
    for _ in 0..2 {
        for byte in post("/posts", "k", r#"{"a":1}"#).as_bytes() {
            client.send([*byte]);
        }
        assert_eq!(client.read().text(), r#"{"n":1}"#);
    }
    assert_eq!(upstream.requests()[0].body, br#"{"a":1}"#);
}

#[test]
fn what_follows_a_replayed_request_on_its_connection_is_the_next_request() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    gateway.post("k", r#"{"a":1}"#);
    let mut client = Client::connect(gateway.addr);
    let pipelined = post("/posts", "k", r#"{"a":1}"#) + &post("/posts", "k2", "{}") + &request("GET", "/x", &[], "");
    client.send(pipelined);
    let answers = [client.read(), client.read(), client.read()];
    assert_eq!(answers.each_ref().map(|answer| answer.text()), [r#"{"n":1}"#, r#"{"n":2}"#, r#"{"n":3}"#]);
    assert_eq!(answers.map(|answer| answer.replayed()), [true, false, false]);
}

#[test]
fn a_chunked_upload_is_the_same_payload_as_one_with_a_length() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "");
    let head = "POST /posts HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer alice\r\nContent-Type: application/json\r\n\
                Idempotency-Key: k\r\nTransfer-Encoding: chunked\r\n\r\n";
    let first = gateway.call(format!("{head}3\r\n{{\"a\r\n4;x=y\r\n\":1}}\r\n0\r\nTrailer: t\r\n\r\n"));
    assert_eq!(first.text(), r#"{"n":1}"#);
    let forwarded = &upstream.requests()[0];
    assert_eq!((forwarded.header("content-length"), forwarded.body.as_slice()), (Some("7"), br#"{"a":1}"#.as_slice()));
    assert!(gateway.post("k", r#"{"a":1}"#).replayed());
}

fn expecting(headers: &[(&str, &str)], len: usize) -> String {
    let mut text = "POST /posts HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n".to_owned();
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text + &format!("Content-Length: {len}\r\n\r\n")
}

#[test]
fn expect_is_answered_after_key_and_length_and_not_passed_on() {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, "server.limits.max_body = \"1KiB\"");
    let mut client = Client::connect(gateway.addr);
    client.send(expecting(&[("Idempotency-Key", "k")], 2));
    assert_eq!(client.try_read_any().unwrap().status, 100);
    assert_eq!(upstream.count(), 0, "nothing is claimed before the body is here");
    client.send("{}");
    assert_eq!(client.read().status, 201);
    assert_eq!(upstream.requests()[0].header("expect"), None);

    for (headers, len, status, code) in [
        ([("Idempotency-Key", "")], 2, 400, "key_invalid"),
        ([("Idempotency-Key", "big")], 2000, 413, "body_too_large"),
    ] {
        let mut client = Client::connect(gateway.addr);
        client.send(expecting(&headers, len));
        let first = client.try_read_any().unwrap();
        first.expect_problem(status, code);
    }
    assert_eq!(upstream.count(), 1);
}
