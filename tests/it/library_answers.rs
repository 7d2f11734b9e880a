//! Answers that the HTTP library would make by itself are problems, too.

use crate::support::{Client, Gateway, Response, Upstream, request};

/// Sends what is too long to a gateway that has no use for it.
#[track_caller]
fn refused(settings: &str, text: String) -> Response {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    let mut client = Client::connect(gateway.addr);
    client.try_send(text);
    let answer = client.read();
    assert_eq!(answer.header("connection"), Some("close"), "{answer:?}");
    assert!(client.at_end());
    assert_eq!(upstream.count(), 0);
    answer
}

#[test]
fn headers_too_large_is_a_problem() {
    let text = request("GET", "/", &[("X-Long", &"x".repeat(9000))], "");
    refused("server.limits.max_header_bytes = \"8KiB\"", text).expect_problem(431, "headers_too_large");
}

#[test]
fn target_too_long_is_a_problem() {
    let text = request("GET", &format!("/{}", "x".repeat(70_000)), &[], "");
    refused("server.limits.max_header_bytes = \"256KiB\"", text).expect_problem(414, "target_too_long");
}
