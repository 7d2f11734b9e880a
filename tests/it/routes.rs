//! Which requests are intercepted: no spelling of a protected path slips a duplicate past the gateway.

use crate::support::{Client, Gateway, Response, Upstream, call, post, request};

const KEY: (&str, &str) = ("Idempotency-Key", "k");

fn upstream_and_gateway(settings: &str) -> (Upstream, Gateway) {
    let upstream = Upstream::counting();
    let gateway = Gateway::start(&upstream, settings);
    (upstream, gateway)
}

/// Sends the same keyed POST twice; whether the second was answered from the record.
#[track_caller]
fn twice(gateway: &Gateway, target: &str, key: &str) -> bool {
    let first = gateway.call(post(target, key, "{}"));
    assert_eq!((first.status, first.replayed()), (201, false), "{target}: {first:?}");
    let second = gateway.call(post(target, key, "{}"));
    assert_eq!((second.status, second.replayed()), (201, second.body == first.body), "{target}: {second:?}");
    second.replayed()
}

/// Asserts that the answer says `bad_request`, if it has a body at all, and ends the connection.
#[track_caller]
fn expect_refused(client: &mut Client, what: &str) -> Response {
    let answer = client.read();
    assert_eq!(answer.status, 400, "{what}: {answer:?}");
    assert_eq!(answer.header("connection"), Some("close"), "{what}: {answer:?}");
    if !answer.body.is_empty() {
        answer.expect_problem(400, "bad_request");
    }
    assert!(client.at_end(), "{what}: the connection goes on");
    answer
}

#[test]
fn the_default_routes_are_the_posting_api_and_nothing_else() {
    let (upstream, gateway) = upstream_and_gateway("");
    for (number, target) in ["/posts", "/v1/workspaces/w1/posts"].iter().enumerate() {
        assert!(twice(&gateway, target, &format!("in{number}")), "{target}");
        assert_eq!(upstream.executions(&format!("in{number}")), 1, "{target}");
    }
    let passed = [
        "/",
        "/post",
        "/posts/1",
        "/postsx",
        "/v1/posts",
        "/v1/workspaces/posts",
        "/v1/workspaces//posts",
        "/v1/workspaces/a/b/posts",
        "/v2/workspaces/a/posts",
        "/v1/workspaces/w1/posts/x",
        "/x?/posts",
    ];
    for (number, target) in passed.iter().enumerate() {
        assert!(!twice(&gateway, target, &format!("out{number}")), "{target}");
        assert_eq!(upstream.executions(&format!("out{number}")), 2, "{target}");
    }
}

#[test]
fn every_spelling_of_the_normalised_path_finds_the_same_record() {
    let (upstream, gateway) = upstream_and_gateway("");
    gateway.post("k", "{}");
    let spellings = [
        "/%70osts",
        "/%70%6F%73%74%73",
        "/%70%6f%73%74%73",
        "//posts",
        "///posts",
        "/posts/",
        "/./posts",
        "/posts/.",
        "/%2E/posts",
        "/x/../posts",
        "/x/%2e%2E/posts",
        "/x/.%2e/posts",
        "/../posts",
        "/posts/x/..",
        "/a/b/../../posts/",
    ];
    for target in spellings {
        let answer = gateway.call(post(target, "k", "{}"));
        assert!(answer.replayed(), "{target}: {answer:?}");
    }
    assert_eq!(upstream.count(), 1);
    gateway.call(post("/v1/workspaces/a-b%C3%A4@/posts", "k", "{}"));
    for target in ["/v1/workspaces/a%2Db%c3%a4%40/posts", "//v1/workspaces/./a%2db%C3%A4@/posts/"] {
        let answer = gateway.call(post(target, "k", "{}"));
        assert!(answer.replayed(), "{target}: {answer:?}");
    }
    assert_eq!(upstream.count(), 2);
}

#[test]
fn an_escaped_slash_in_a_parameter_is_no_segment_and_no_other_record() {
    let (upstream, gateway) = upstream_and_gateway("");
    let targets = ["/v1/workspaces/a%2Fb/posts", "/v1/workspaces/a%252Fb/posts", "/v1/workspaces/ab/posts"];
    for target in targets {
        assert!(twice(&gateway, target, "k"), "{target}");
    }
    assert_eq!(upstream.count(), targets.len(), "each is a record of its own");
}

#[test]
fn the_query_does_not_count_for_the_route_but_for_the_payload() {
    let (upstream, gateway) = upstream_and_gateway("");
    gateway.call(post("/posts?a=1&b=2", "k", "{}"));
    assert!(gateway.call(post("/posts?a=1&b=2", "k", "{}")).replayed());
    assert!(gateway.call(post("/%70osts/?a=1&b=2", "k", "{}")).replayed());
    for target in ["/posts", "/posts?", "/posts?b=2&a=1", "/posts?a=%31&b=2", "/posts?A=1&b=2", "/posts?a=1&b=2&"] {
        gateway.call(post(target, "k", "{}")).expect_problem(422, "key_reused");
    }
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_name_matches_one_segment_and_a_star_the_rest() {
    let routes = "[[routes]]\npath = \"/w/{name}/send\"\n[[routes]]\npath = \"/all/{*rest}\"\n";
    let (_upstream, gateway) = upstream_and_gateway(routes);
    for target in ["/w/a/send", "/w/a%2Fb/send", "/all/a", "/all/a/b/c"] {
        assert!(twice(&gateway, target, "k"), "{target}");
    }
    for target in ["/w/send", "/w//send", "/w/a/b/send", "/w/a", "/allx/a"] {
        assert!(!twice(&gateway, target, "k"), "{target}");
    }
}

#[test]
fn routes_in_the_file_replace_the_default_ones() {
    let (_upstream, gateway) = upstream_and_gateway("[[routes]]\npath = \"/orders\"\n");
    assert!(twice(&gateway, "/orders", "k"));
    assert!(!twice(&gateway, "/posts", "k"));
    assert!(!twice(&gateway, "/v1/workspaces/w/posts", "k"));
}

#[test]
fn the_first_route_in_the_file_that_matches_wins() {
    let wide = "[[routes]]\npath = \"/a/{*rest}\"\nmissing_key = \"reject\"\n";
    let narrow = "[[routes]]\npath = \"/a/b\"\nmissing_key = \"pass\"\n";
    let unkeyed = request("POST", "/a/b", &[], "{}");
    let (upstream, gateway) = upstream_and_gateway(&format!("{wide}{narrow}"));
    gateway.call(&unkeyed).expect_problem(400, "key_missing");
    assert_eq!(upstream.count(), 0);
    let (upstream, gateway) = upstream_and_gateway(&format!("{narrow}{wide}"));
    assert_eq!(gateway.call(&unkeyed).status, 201);
    gateway.call(request("POST", "/a/c", &[], "{}")).expect_problem(400, "key_missing");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn the_target_is_forwarded_byte_for_byte() {
    let (upstream, gateway) = upstream_and_gateway("");
    let targets = [
        "/%70osts?x=%7e&y=a+b%2F",
        "//posts",
        "/x/../posts",
        "/./posts",
        "/posts/",
        "/posts?",
        "/posts?/../%2e;\\",
        "/v1/workspaces/%e4%B8%80/posts",
        "/passed/../%70//x;y/%zz?q=[]{}|\\^`",
        "/other;v=1/..%2f",
    ];
    for (number, target) in targets.iter().enumerate() {
        let answer = gateway.call(post(target, &format!("k{number}"), "{}"));
        assert_eq!(answer.status, 201, "{target}: {answer:?}");
        assert_eq!(upstream.requests()[number].target, *target);
    }
}

#[test]
fn only_post_is_intercepted() {
    let (upstream, gateway) = upstream_and_gateway("");
    for (number, method) in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "post", "PUBLISH"].iter().enumerate() {
        let headers = [("Authorization", "Bearer alice"), KEY];
        for _ in 0..2 {
            let answer = gateway.call(request(method, "/posts", &headers, ""));
            assert_eq!((answer.status, answer.replayed()), (201, false), "{method}: {answer:?}");
        }
        let requests = upstream.requests();
        assert_eq!(requests.len(), 2 * (number + 1), "{method}");
        assert_eq!((requests[2 * number].method.as_str(), requests[2 * number].key()), (*method, Some("k")));
    }
    gateway.post("k", "{}");
    assert_eq!(gateway.call(request("GET", "/posts", &[KEY], "")).status, 201);
    assert!(gateway.post("k", "{}").replayed(), "another method's request touched the record");
}

#[test]
fn a_route_that_ignores_case_folds_it_in_scope_and_payload_too() {
    let route = "[[routes]]\npath = \"/Orders/{id}\"\ncase_sensitive = false\n";
    let (upstream, gateway) = upstream_and_gateway(route);
    gateway.call(post("/Orders/Ab", "k", "{}"));
    for target in ["/orders/ab", "/ORDERS/AB", "/Orders/Ab", "/%4Frders/%41b", "//orDers/aB/"] {
        let answer = gateway.call(post(target, "k", "{}"));
        assert!(answer.replayed(), "{target}: {answer:?}");
    }
    gateway.call(post("/orders/ab?Q=1", "q", "{}"));
    gateway.call(post("/orders/ab?q=1", "q", "{}")).expect_problem(422, "key_reused");
    assert_eq!(upstream.count(), 2);
}

#[test]
fn case_counts_on_other_routes() {
    let (upstream, gateway) = upstream_and_gateway("");
    assert!(twice(&gateway, "/v1/workspaces/A/posts", "k"));
    assert!(twice(&gateway, "/v1/workspaces/a/posts", "k"));
    assert_eq!(upstream.count(), 2);
}

#[test]
fn a_keyed_post_that_some_upstream_could_read_as_a_route_is_refused() {
    let (upstream, gateway) = upstream_and_gateway("");
    let targets = [
        "/Posts",
        "/POSTS/",
        "/v1/Workspaces/w/posts",
        "/%50osts",
        "/v1%2Fworkspaces/w/posts",
        "/v1%2fworkspaces%2Fw%2fposts",
        "/%2Fposts",
        "/posts%2F",
        "/x%2F..%2Fposts",
        "/x/..%2fposts",
        "/x%2F../posts",
        "/v1%5Cworkspaces/w/posts",
        "/%5cposts",
        "/x/..%5Cposts",
        "/v1\\workspaces\\w\\posts",
        "/\\posts",
        "/posts\\",
        "/x\\..\\posts",
        "/posts;v=1",
        "/posts;",
        "/posts;a=b/",
        "/v1;x=y/workspaces/w/posts",
        "/x/..;/posts",
        "/x/..;a=b/posts",
        "/x;/../posts;y",
        "/;x/posts",
        "/posts%3Bv=1",
        "/a//../posts",
        "/X/..%5C;y/POSTS;z",
    ];
    for target in targets {
        let answer = gateway.call(post(target, "k", "{}"));
        assert_eq!(answer.status, 400, "{target}: {answer:?}");
        answer.expect_problem(400, "path_ambiguous");
    }
    assert_eq!(upstream.count(), 0, "{:?}", upstream.requests());
    for target in targets {
        let answer = gateway.call(request("POST", target, &[("Authorization", "Bearer alice")], "{}"));
        assert_eq!(answer.status, 201, "{target} without a key: {answer:?}");
        assert_eq!(upstream.requests().last().unwrap().target, target);
        assert_eq!(gateway.call(request("GET", target, &[KEY], "")).status, 201, "GET {target}");
    }
    assert_eq!(upstream.count(), 2 * targets.len());
}

#[test]
fn an_escape_of_a_character_that_the_route_has_in_plain_is_no_way_around_the_record() {
    let (upstream, gateway) = upstream_and_gateway("[[routes]]\npath = \"/users/@me/posts\"\n");
    gateway.call(post("/users/@me/posts", "k", "{}"));
    let answer = gateway.call(post("/users/%40me/posts", "k", "{}"));
    // Compared fully decoded it is the same path; to refuse it would be as safe.
    assert!(answer.replayed() || answer.status == 400, "{answer:?}");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn the_ambiguity_of_a_route_is_judged_by_its_own_key_header() {
    let routes = "[[routes]]\npath = \"/orders\"\nheader = \"X-Request-Key\"\n";
    let (upstream, gateway) = upstream_and_gateway(routes);
    gateway.call(request("POST", "/Orders", &[("X-Request-Key", "k")], "{}")).expect_problem(400, "path_ambiguous");
    gateway.call(request("POST", "/Orders", &[("X-Request-Key", "")], "{}")).expect_problem(400, "path_ambiguous");
    assert_eq!(upstream.count(), 0);
    assert_eq!(gateway.call(request("POST", "/Orders", &[KEY], "{}")).status, 201);
}

#[test]
fn a_path_that_is_no_route_under_any_reading_passes_with_a_key() {
    let (upstream, gateway) = upstream_and_gateway("");
    for target in ["/x;v/posts", "/x%2Fposts", "/x\\posts", "/Posts/1", "/%2570osts/x", "/comments"] {
        let answer = gateway.call(post(target, "k", "{}"));
        assert_eq!(answer.status, 201, "{target}: {answer:?}");
        assert_eq!(upstream.requests().last().unwrap().target, target);
    }
}

#[test]
fn an_absolute_target_becomes_a_path_and_its_authority_the_host() {
    let (upstream, gateway) = upstream_and_gateway("");
    let absolute = |target: &str, host: &str| {
        let headers = "Authorization: Bearer alice\r\nContent-Type: application/json\r\nIdempotency-Key: k\r\n";
        format!("POST {target} HTTP/1.1\r\n{host}{headers}Content-Length: 2\r\n\r\n{{}}")
    };
    let first = gateway.call(absolute("http://api.example/posts?a=%41", "Host: api.example\r\n"));
    assert_eq!(first.status, 201, "{first:?}");
    let received = &upstream.requests()[0];
    assert_eq!((received.target.as_str(), received.headers("host")), ("/posts?a=%41", vec!["api.example"]));
    assert!(gateway.call(post("/posts?a=%41", "k", "{}")).replayed(), "the same route, scope and payload");
    assert!(gateway.call(absolute("http://api.example/%70osts?a=%41", "Host: api.example\r\n")).replayed());
    for (target, host) in [
        ("http://api.example/posts?a=%41", "Host: evil.example\r\n"),
        ("http://api.example/other", "Host: evil.example\r\n"),
        ("http://api.example:81/other", "Host: api.example:82\r\n"),
        ("http://api.example/other", ""),
    ] {
        let mut client = Client::connect(gateway.addr);
        client.send(absolute(target, host));
        expect_refused(&mut client, &format!("{target} {host}"));
    }
    assert_eq!(upstream.count(), 1);
    let passed = gateway.call(absolute("http://api.example:81", "Host: api.example:81\r\n"));
    assert_eq!(passed.status, 201, "{passed:?}");
    let received = &upstream.requests()[1];
    assert_eq!((received.target.as_str(), received.headers("host")), ("/", vec!["api.example:81"]));
}

#[test]
fn a_request_names_its_host_exactly_once() {
    let (upstream, gateway) = upstream_and_gateway("");
    let keyed = "Authorization: Bearer alice\r\nIdempotency-Key: k\r\nContent-Length: 0\r\n\r\n";
    for line in ["POST /posts", "POST /other", "GET /posts"] {
        for hosts in ["", "Host: a.example\r\nHost: a.example\r\n", "Host: a.example\r\nHost: b.example\r\n"] {
            let mut client = Client::connect(gateway.addr);
            client.send(format!("{line} HTTP/1.1\r\n{hosts}{keyed}"));
            expect_refused(&mut client, &format!("{line} {hosts}"));
        }
    }
    assert_eq!(upstream.count(), 0);
    let mut client = Client::connect(gateway.addr);
    client.send(format!("POST /posts HTTP/1.0\r\nHost: a.example\r\nHost: b.example\r\n{keyed}"));
    assert_eq!(client.read().status, 400);
    assert_eq!(upstream.count(), 0);
    for (number, path) in ["/posts", "/other"].iter().enumerate() {
        assert_eq!(call(gateway.addr, format!("POST {path} HTTP/1.0\r\n{keyed}")).status, 201);
        assert_eq!(upstream.requests()[number].headers("host"), vec![upstream.addr.to_string()], "{path}");
    }
}

#[test]
fn connect_is_refused() {
    let (upstream, gateway) = upstream_and_gateway("");
    for target in ["api.example:443", "127.0.0.1:1"] {
        let mut client = Client::connect(gateway.addr);
        client.send(format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n"));
        expect_refused(&mut client, target);
    }
    assert_eq!((upstream.count(), upstream.connections()), (0, 0));
}

#[test]
fn a_transfer_coding_other_than_one_chunked_is_refused() {
    let (upstream, gateway) = upstream_and_gateway("");
    let codings = [
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding: \x0bchunked\r\n",
        "Transfer-Encoding:\r\n",
    ];
    for path in ["/posts", "/other"] {
        for coding in codings {
            let mut client = Client::connect(gateway.addr);
            client.send(format!(
                "POST {path} HTTP/1.1\r\nHost: a.example\r\nAuthorization: a\r\nIdempotency-Key: k\r\n{coding}\r\n2\r\n{{}}\r\n0\r\n\r\n"
            ));
            expect_refused(&mut client, &format!("{path} {coding}"));
        }
    }
    assert_eq!(upstream.count(), 0);
    for (number, path) in ["/posts", "/other"].iter().enumerate() {
        let head = format!("POST {path} HTTP/1.1\r\nHost: a.example\r\nAuthorization: a\r\nIdempotency-Key: k\r\n");
        let answer =
            gateway.call(format!("{head}Transfer-Encoding: Chunked\r\n\r\n1\r\n{{\r\n1;x=y\r\n}}\r\n0\r\n\r\n"));
        assert_eq!((answer.status, upstream.requests()[number].body.as_slice()), (201, b"{}".as_slice()), "{path}");
    }
}
