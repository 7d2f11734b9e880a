//! When two payloads are the same, rule by rule, and against oracles that know nothing of the implementation: texts
//! written in two ways from one value, and `serde_json` as the judge of what JSON is.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use oncegate::idempotency::fingerprint::{FingerprintMode, FingerprintSettings, Payload};
use proptest::prelude::*;

fn settings(mode: FingerprintMode) -> FingerprintSettings {
    FingerprintSettings { mode, ..FingerprintSettings::default() }
}

fn ignoring(pointers: &[&str]) -> FingerprintSettings {
    FingerprintSettings { ignore: pointers.iter().map(ToString::to_string).collect(), ..FingerprintSettings::default() }
}

/// A JSON POST to `/posts`.
fn post(body: &[u8]) -> Payload<'_> {
    Payload {
        method: "POST",
        path: &[],
        query: None,
        content_type: &[b"application/json"],
        content_encoding: &[],
        headers: &[],
        body,
    }
}

fn digest(settings: &FingerprintSettings, payload: &Payload<'_>) -> [u8; 32] {
    settings.fingerprint(payload).digest
}

/// Whether two bodies are the same payload, each way of asking agreeing with the others.
fn same(settings: &FingerprintSettings, a: impl AsRef<[u8]>, b: impl AsRef<[u8]>) -> bool {
    let (a, b) = (a.as_ref(), b.as_ref());
    let same = digest(settings, &post(a)) == digest(settings, &post(b));
    assert_eq!(settings.json_digest(a) == settings.json_digest(b), same, "json_digest disagrees");
    let fingerprints = (settings.fingerprint(&post(a)), settings.fingerprint(&post(b)));
    assert_eq!(fingerprints.0.conflicts_with(&fingerprints.1), !same);
    same
}

fn same_json(a: impl AsRef<[u8]>, b: impl AsRef<[u8]>) -> bool {
    same(&FingerprintSettings::default(), a, b)
}

/// Whether a body is read as JSON: then, and only then, whitespace behind it does not count.
fn read_as_json(body: &[u8]) -> bool {
    same_json(body, [body, b" "].concat())
}

// ── What is forgiven, and what is not ──────────────────────────────────────────────────────────────────────────────

#[test]
fn whitespace_and_the_order_of_members_do_not_count() {
    let compact = r#"{"platform":"x","tags":["a",{"b":1,"c":2}],"n":null,"t":true,"f":false}"#;
    let spread = " {\r\n\t\"f\" : false , \"t\":true,\"n\": null,\n \"tags\":[ \"a\" ,{ \"c\":2,\"b\" :1 } ] ,\"platform\":\"x\" }\n";
    assert!(same_json(compact, spread));
    assert!(same_json("[ ]", "[]") && same_json("{ }", "{}"));
}

#[test]
fn the_order_of_array_elements_counts() {
    assert!(!same_json("[1,2]", "[2,1]"));
    assert!(!same_json("[1,2]", "[12]"));
    assert!(!same_json("[[1],2]", "[[1,2]]"));
    assert!(!same_json("[[],[]]", "[[[]]]"));
}

#[test]
fn numbers_compare_by_their_text() {
    let zeroes = ["0", "-0", "0.0", "0.00", "0e0", "0E0", "0e1", "0e+1", "0e-1", "-0.0"];
    for (i, a) in zeroes.iter().enumerate() {
        for (j, b) in zeroes.iter().enumerate() {
            assert_eq!(same_json(format!("[{a}]"), format!("[ {b} ]")), i == j, "{a} {b}");
        }
    }
    assert!(!same_json("1.0", "1.00"));
    assert!(!same_json("1e5", "1E5"));
    assert!(!same_json("100000", "1e5"));
    assert!(!same_json("9007199254740992", "9007199254740993"));
    assert!(!same_json("18446744073709551616", "18446744073709551617"));
    assert!(!same_json("1e400", "1e401"), "beyond a double both are infinite");
    assert!(!same_json("1", "\"1\""));
    assert!(!same_json("[1,23]", "[12,3]"));
}

#[test]
fn strings_compare_by_their_decoded_value() {
    assert!(same_json(r#""a/b""#, r#""\u0061\/\u0062""#));
    assert!(same_json(r#""\b\f\n\r\t\"\\""#, r#""\u0008\u000C\u000a\u000D\u0009\u0022\u005c""#));
    assert!(same_json("\"é😀\"", r#""\u00e9\uD83D\uDE00""#));
    assert!(same_json(r#"{"a":1,"\u0062":2}"#, r#"{"b":2,"\u0061":1}"#), "in member names, too");
    assert!(!same_json(r#""\u0000""#, r#""""#));
    assert!(!same_json("\"e\u{301}\"", "\"é\""), "no Unicode normalisation");
    assert!(!same_json(r#""a""#, r#""A""#));
    assert!(!same_json(r#"["a","b"]"#, r#"["a\",\"b"]"#));
    assert!(!same_json(r#""null""#, "null"));
}

#[test]
fn kinds_of_values_are_told_apart() {
    let values = [
        "null",
        "true",
        "false",
        "0",
        "\"\"",
        "[]",
        "{}",
        "[null]",
        "{\"\":null}",
        "\"n\"",
        "\"t\"",
        "\"f\"",
        "\"[]\"",
    ];
    for (i, a) in values.iter().enumerate() {
        for (j, b) in values.iter().enumerate() {
            assert_eq!(same_json(a, b), i == j, "{a} {b}");
            assert_eq!(same_json(format!("[{a},1]"), format!("[{b},1]")), i == j, "{a} {b}");
        }
    }
}

#[test]
fn an_absent_member_is_not_null() {
    assert!(!same_json(r#"{"a":null}"#, "{}"));
    assert!(!same_json(r#"{"a":1}"#, r#"{"b":1}"#));
    assert!(!same_json(r#"{"a":{"b":1}}"#, r#"{"a":{},"b":1}"#));
}

// ── What falls back to raw bytes ───────────────────────────────────────────────────────────────────────────────────

#[test]
fn what_is_not_valid_json_is_compared_by_its_bytes() {
    let invalid: &[&[u8]] = &[
        b"",
        b" ",
        b"{",
        b"}",
        b"[1,]",
        b"[,1]",
        b"[1 2]",
        b"{\"a\":1,}",
        b"{\"a\" 1}",
        b"{a:1}",
        b"{'a':1}",
        b"{\"a\":1}}",
        b"{} x",
        b"1 2",
        b"nul",
        b"nulll",
        b"True",
        b"NaN",
        b"Infinity",
        b"+1",
        b"-",
        b"01",
        b"-01",
        b".5",
        b"1.",
        b"1.e5",
        b"1e",
        b"1e+",
        b"1e-x",
        b"0x10",
        b"1_000",
        b"\"",
        b"\"a",
        b"\"\\",
        b"\"\\x\"",
        b"\"\\U0041\"",
        b"\"\\u00e\"",
        b"\"\\u00eg\"",
        b"\"\\u+041\"",
        b"\"tab\there\"",
        b"\"nul\0\"",
        b"\"line\n\"",
        b"\"\x1f\"",
        b"// comment\n1",
        b"[1]/**/",
        b"\x0b1",
        b"\x0c1",
        b"\xc2\xa01",
    ];
    for body in invalid {
        assert!(!read_as_json(body), "{}", body.escape_ascii());
        let in_array = [b"[", *body, b"]"].concat();
        assert!(!read_as_json(&in_array) || [&b""[..], b" "].contains(body), "{}", in_array.escape_ascii());
    }
    assert!(same_json("not json", "not json"));
    assert!(!same_json("not json", "not  json"));
}

#[test]
fn valid_json_of_every_kind_is_read() {
    let valid = [
        "null",
        "true",
        "-0",
        "0.5",
        "-1.5e+10",
        "1E-2",
        "10",
        "\"\u{7f}\"",
        "[[],{}]",
        "\"\\/\"",
        "{\"\":{\"\":0}}",
        "\t\n\r 1",
    ];
    for body in valid {
        assert!(read_as_json(body.as_bytes()), "{body}");
    }
}

#[test]
fn lone_surrogates_make_a_body_raw() {
    let lone = [
        r#""\ud83d""#,
        r#""\ude00""#,
        r#""\ud83dx""#,
        r#""\ud83d\n""#,
        r#""\ud83d\u0041""#,
        r#""\ude00\ud83d""#,
        r#""\ud83d\ud83d\ude00""#,
        r#""\udfff""#,
        r#""\ud800""#,
        r#""\udbff\udbff""#,
        r#""\udbff\ue000""#,
    ];
    for body in lone {
        assert!(!read_as_json(body.as_bytes()), "{body}");
    }
    for body in [r#""\ud800\udc00""#, r#""\udbff\udfff""#, r#""\ud7ff\ue000""#, r#""\uffff""#] {
        assert!(read_as_json(body.as_bytes()), "{body}");
    }
}

#[test]
fn invalid_utf8_and_a_byte_order_mark_make_a_body_raw() {
    for body in
        [&b"\"\xff\""[..], b"\"\xc3\"", b"\"\xed\xa0\x80\"", b"\"\xc0\x80\"", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0"]
    {
        assert!(!read_as_json(body), "{}", body.escape_ascii());
    }
    assert!(read_as_json("\"\u{feff}\"".as_bytes()), "within a string the mark is a character like any other");
}

#[test]
fn a_repeated_member_name_makes_a_body_raw() {
    let repeated = [
        r#"{"a":1,"a":1}"#,
        r#"{"a":1,"b":2,"a":3}"#,
        r#"{"b":1,"a":2,"b":3}"#,
        r#"{"a":1,"\u0061":2}"#,
        r#"[{"x":{"":0,"":0}}]"#,
        r#"{"z":0,"a":{"q":1,"q":1}}"#,
    ];
    for body in repeated {
        assert!(!read_as_json(body.as_bytes()), "{body}");
    }
    for body in [r#"{"a":{"a":1}}"#, r#"[{"a":1},{"a":1}]"#, r#"{"a":1,"A":2,"":3,"aa":4}"#] {
        assert!(read_as_json(body.as_bytes()), "{body}");
    }
    assert!(!same_json(r#"{"a":1,"a":2}"#, r#"{"a":2}"#));
    assert!(!same_json(r#"{"a":1,"a":2}"#, r#"{"a":2,"a":1}"#));
}

#[test]
fn nesting_is_read_to_a_depth_of_128() {
    let nested =
        |open: &str, core: &str, close: &str, depth| [open.repeat(depth), core.into(), close.repeat(depth)].concat();
    for (open, core, close) in
        [("[", "", "]"), ("[", "1", "]"), ("{\"a\":", "{}", "}"), ("{\"a\":", "[0]", "}"), ("[[", "[]", "]]")]
    {
        let own = open.matches(['[', '{']).count();
        let inner = usize::from(core.starts_with(['[', '{']));
        for depth in 1..100 {
            let body = nested(open, core, close, depth);
            assert_eq!(read_as_json(body.as_bytes()), own * depth + inner <= 128, "{body}");
        }
        for depth in 100..140 {
            let body = nested(open, core, close, depth);
            assert_eq!(read_as_json(body.as_bytes()), own * depth + inner <= 128, "{body}");
        }
    }
    let wide = format!("[{}[]]", "[],{},".repeat(1000));
    assert!(read_as_json(wide.as_bytes()), "what is side by side is not deep");
    let abyss = "[".repeat(1_000_000);
    assert!(!read_as_json(abyss.as_bytes()), "no stack is used up");
}

#[test]
fn a_raw_body_never_equals_a_json_one() {
    // The same bytes once as JSON and once as text: different media types, and even the bodies are tagged.
    let text: &[&[u8]] = &[b"text/plain"];
    let body = br#"{"a":1}"#;
    let settings = FingerprintSettings::default();
    assert_ne!(digest(&settings, &post(body)), digest(&settings, &Payload { content_type: text, ..post(body) }));
    // The canonical form of [1], sent as it is.
    assert!(!same_json("[1]", b"[1\xff]"));
    assert!(!same_json("null", "n"));
}

// ── The media type and the encoding ────────────────────────────────────────────────────────────────────────────────

fn with_type<'a>(content_type: &'a [&'a [u8]], body: &'a [u8]) -> [u8; 32] {
    digest(&FingerprintSettings::default(), &Payload { content_type, ..post(body) })
}

fn type_is_json(content_type: &[&[u8]]) -> bool {
    with_type(content_type, b"[1, 2]") == with_type(content_type, b"[1,2]")
}

#[test]
fn json_is_told_by_the_media_type_or_its_absence() {
    let json: &[&[&[u8]]] = &[
        &[],
        &[b"application/json"],
        &[b"APPLICATION/Json"],
        &[b" application/json ; charset=utf-8"],
        &[b"application/json;x=\"text/plain\""],
        &[b"application/vnd.api+json"],
        &[b"application/merge-patch+JSON; v=1"],
    ];
    for content_type in json {
        assert!(type_is_json(content_type), "{content_type:?}");
    }
    let other: &[&[&[u8]]] = &[
        &[b""],
        &[b"text/plain"],
        &[b"text/json"],
        &[b"application/jsonp"],
        &[b"application/json-seq"],
        &[b"application/x-json+xml"],
        &[b"text/plain; application/json"],
        &[b"application/json, text/plain"],
        &[b"application/json", b"application/json"],
        &[b"application/json", b"text/plain"],
    ];
    for content_type in other {
        assert!(!type_is_json(content_type), "{content_type:?}");
    }
}

#[test]
fn the_media_type_counts_without_its_parameters() {
    let body = b"[1]";
    let plain = with_type(&[b"application/json"], body);
    assert_eq!(with_type(&[b"application/json; charset=utf-8"], body), plain);
    assert_eq!(with_type(&[b"Application/JSON;charset=UTF-8"], body), plain);
    assert_ne!(with_type(&[b"application/vnd.api+json"], body), plain);
    assert_ne!(with_type(&[], body), plain);
    assert_ne!(with_type(&[b""], body), with_type(&[], body));
    assert_ne!(with_type(&[b"text/plain"], body), with_type(&[b"text/html"], body));
    assert_eq!(with_type(&[b"text/plain; a=b"], body), with_type(&[b"TEXT/plain"], body));
    assert_ne!(with_type(&[b"a/b", b"c/d"], body), with_type(&[b"a/b"], body));
}

#[test]
fn the_content_encoding_counts_and_makes_the_body_opaque() {
    let encoded = |content_encoding: &[&[u8]], body: &[u8]| {
        digest(&FingerprintSettings::default(), &Payload { content_encoding, ..post(body) })
    };
    let plain = encoded(&[], b"[1]");
    for none in [&[&b"identity"[..]][..], &[b"Identity"], &[b""], &[b" , identity,", b"identity"]] {
        assert_eq!(encoded(none, b"[1]"), plain, "{none:?}");
        assert_eq!(encoded(none, b"[ 1 ]"), plain, "{none:?}");
    }
    let gzip = encoded(&[b"gzip"], b"[1]");
    assert_ne!(gzip, plain);
    assert_ne!(gzip, encoded(&[b"br"], b"[1]"));
    assert_ne!(gzip, encoded(&[b"gzip"], b"[ 1 ]"), "what is encoded is not read");
    assert_eq!(gzip, encoded(&[b"GZip "], b"[1]"));
    assert_eq!(encoded(&[b"gzip, br"], b"[1]"), encoded(&[b"gzip", b"br"], b"[1]"));
    assert_ne!(encoded(&[b"gzip, br"], b"[1]"), encoded(&[b"br, gzip"], b"[1]"));
    assert_ne!(encoded(&[b"gzip, br"], b"[1]"), encoded(&[b"gzipbr"], b"[1]"));
    assert_ne!(encoded(&[b"gzip, gzip"], b"[1]"), gzip);
}

// ── Multipart bodies ───────────────────────────────────────────────────────────────────────────────────────────────

fn multipart(content_type: &str, body: &str) -> [u8; 32] {
    let digest =
        |mode| digest(&settings(mode), &Payload { content_type: &[content_type.as_bytes()], ..post(body.as_bytes()) });
    let same_under_both = (digest(FingerprintMode::Json), digest(FingerprintMode::Raw));
    assert_eq!(same_under_both.0, same_under_both.1, "the mode is about JSON alone");
    same_under_both.0
}

fn form(boundary: &str) -> String {
    format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\none\r\n--{boundary}\r\n\r\ntwo\r\n--{boundary}--\r\n"
    )
}

#[test]
fn the_boundary_of_a_multipart_body_does_not_count() {
    let one = multipart("multipart/form-data; boundary=one", &form("one"));
    assert_eq!(multipart("multipart/form-data; boundary=other", &form("other")), one);
    assert_eq!(multipart("Multipart/Form-Data; charset=utf-8; BOUNDARY=\"a b:c\"; x", &form("a b:c")), one);
    assert_eq!(multipart("multipart/form-data; x=\"; boundary=no\"; boundary=yes", &form("yes")), one);
    assert_eq!(multipart("multipart/form-data; boundary=\"o\\n\\e\"", &form("one")), one);
    assert_eq!(multipart("multipart/form-data; flag; boundary=one ", &form("one")), one);
    for parameters in [
        ";boundary=one",
        ";flag;boundary=one",
        ";a=b;boundary=one;c=d",
        ";a=\"b\";boundary=one",
        ";a=\"\";;boundary=one",
    ] {
        assert_eq!(multipart(&format!("multipart/form-data{parameters}"), &form("one")), one, "{parameters}");
    }
    assert_ne!(multipart("multipart/mixed; boundary=one", &form("one")), one, "the subtype does");
    assert_ne!(multipart("multipart/form-data; boundary=one", &form("one").replace("two", "tw0")), one);
    assert_ne!(multipart("multipart/form-data; boundary=one", &form("one").replace("name=\"a\"", "name=\"b\"")), one);
}

#[test]
fn a_multipart_body_without_one_clear_boundary_is_raw() {
    for content_type in [
        "multipart/form-data",
        "multipart/form-data; boundary",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=\"\"",
        "multipart/form-data; boundary=\"one",
        "multipart/form-data; boundary=one; boundary=one",
        "multipart/form-data; xboundary=one",
    ] {
        let raw = multipart(content_type, &form("one"));
        assert_ne!(raw, multipart(content_type, &form("two")), "{content_type}");
        assert_ne!(raw, multipart("multipart/form-data; boundary=one", &form("one")), "{content_type}");
        assert_eq!(raw, multipart("multipart/form-data", &form("one")), "{content_type}");
    }
}

#[test]
fn only_multipart_bodies_have_a_boundary() {
    let text = |boundary: &str| multipart(&format!("text/plain; boundary={boundary}"), &form(boundary));
    assert_ne!(text("one"), text("two"));
}

#[test]
fn only_whole_delimiter_lines_are_replaced() {
    let differ = |a: &str, b: &str| {
        multipart("multipart/form-data; boundary=AA", &a.replace('@', "AA"))
            != multipart("multipart/form-data; boundary=BB", &b.replace('@', "BB"))
    };
    for same in [
        "--@",
        "--@--",
        "--@\r\n",
        "--@ \t\r\nx",
        "x\r\n--@\r\ny\r\n--@--\r\nepilogue",
        "--@\r\n--@\r\n--@--",
        "--@-- \t",
        "",
    ] {
        assert!(!differ(same, same), "{same:?}");
    }
    for content in [
        "x--@\r\n",        // not at the start of a line
        " --@\r\n",        //
        "x\n--@\r\n",      // the start of a line is behind CRLF
        "x\r--@\r\n",      //
        "\r\n--@x\r\n",    // a longer line
        "\r\n--@---\r\n",  //
        "\r\n--@ x\r\n",   //
        "\r\n--@-\r\n",    //
        "\r\n--@\n",       //
        "\r\n-@\r\n",      // not two dashes
        "\r\n@\r\n",       //
        "\r\n--@--@\r\n",  //
        "--@\r\n x @\r\n", // within the content
    ] {
        assert!(differ(content, content), "{content:?}");
    }
    assert!(differ("--@\r\nx\r\n--@--", "--@\r\nx\r\n--@"), "a delimiter that closes is another");
    assert!(differ("--@\r\n", "--@ \r\n"));
    assert!(differ("\r\n--@\r\n", "--@\r\n"));
    assert!(differ("--@\r\nx\r\n--@\r\n", "--@\r\nx\r\n\r\n"), "a part more, a part less");
    assert!(differ("x", "--@\r\nx"));
}

#[test]
fn an_encoded_multipart_body_is_raw() {
    let encoded = |boundary: &str| {
        let content_type = format!("multipart/form-data; boundary={boundary}");
        let body = form(boundary);
        let payload =
            Payload { content_type: &[content_type.as_bytes()], content_encoding: &[b"gzip"], ..post(body.as_bytes()) };
        digest(&FingerprintSettings::default(), &payload)
    };
    assert_ne!(encoded("one"), encoded("two"));
}

// ── The rest of the payload ────────────────────────────────────────────────────────────────────────────────────────

#[test]
fn method_path_and_query_count() {
    let settings = FingerprintSettings::default();
    let paths: [Vec<Vec<u8>>; 6] = [
        vec![],
        vec![b"posts".to_vec()],
        vec![b"posts".to_vec(), vec![]],
        vec![b"po".to_vec(), b"sts".to_vec()],
        vec![b"po/sts".to_vec()],
        vec![b"Posts".to_vec()],
    ];
    let queries: [Option<&[u8]>; 6] =
        [None, Some(b""), Some(b"a=1"), Some(b"a=1&b=2"), Some(b"b=2&a=1"), Some(b"a=%31")];
    let mut seen = std::collections::HashSet::new();
    for method in ["POST", "post", "PUT"] {
        for path in &paths {
            for query in queries {
                let payload = Payload { method, path, query, ..post(b"{}") };
                assert!(seen.insert(digest(&settings, &payload)), "{payload:?} equals another payload");
            }
        }
    }
}

#[test]
fn parts_do_not_run_into_one_another() {
    let settings = FingerprintSettings::default();
    let text: &[&[u8]] = &[b"text/plain"];
    let a = Payload { query: Some(b"ab"), content_type: text, ..post(b"c") };
    let b = Payload { query: Some(b"a"), content_type: text, ..post(b"bc") };
    assert_ne!(digest(&settings, &a), digest(&settings, &b));
    let a = Payload { path: &[b"a".to_vec()], query: None, ..post(b"") };
    let b = Payload { method: "POSTa", ..post(b"") };
    assert_ne!(digest(&settings, &a), digest(&settings, &b));
}

#[test]
fn the_chosen_headers_count() {
    let settings =
        FingerprintSettings { headers: vec!["stripe-account".into(), "x-a".into()], ..FingerprintSettings::default() };
    let with = |account: &[&'static [u8]], other: &[&'static [u8]]| {
        digest(&settings, &Payload { headers: &[account.to_vec(), other.to_vec()], ..post(b"{}") })
    };
    let variants: [[&[&[u8]]; 2]; 8] = [
        [&[], &[]],
        [&[b""], &[]],
        [&[b"1"], &[]],
        [&[], &[b"1"]],
        [&[b"1"], &[b"1"]],
        [&[b"1", b"2"], &[]],
        [&[b"2", b"1"], &[]],
        [&[b"1, 2"], &[]],
    ];
    let distinct: std::collections::HashSet<_> = variants.iter().map(|[account, other]| with(account, other)).collect();
    assert_eq!(distinct.len(), variants.len());
    assert_eq!(with(&[b"1"], &[b"2"]), with(&[b"1"], &[b"2"]));

    let turned = FingerprintSettings { headers: vec!["x-a".into(), "stripe-account".into()], ..settings.clone() };
    let payload = Payload { headers: &[vec![b"2"], vec![b"1"]], ..post(b"{}") };
    assert_eq!(
        turned.fingerprint(&payload),
        settings.fingerprint(&Payload { headers: &[vec![b"1"], vec![b"2"]], ..payload })
    );
    // Fewer values than names: the others count as absent.
    assert_eq!(with(&[b"1"], &[]), digest(&settings, &Payload { headers: &[vec![b"1"]], ..post(b"{}") }));
}

// ── Modes and settings ─────────────────────────────────────────────────────────────────────────────────────────────

#[test]
fn raw_compares_bytes() {
    let raw = settings(FingerprintMode::Raw);
    let differ = |a: &[u8], b: &[u8]| digest(&raw, &post(a)) != digest(&raw, &post(b));
    assert!(differ(b"[1]", b"[ 1]"));
    assert!(!differ(b"[1]", b"[1]"));
    let untyped = |body| Payload { content_type: &[], ..post(body) };
    assert_ne!(digest(&raw, &untyped(b"[1]")), digest(&raw, &untyped(b"[ 1]")));
    assert_ne!(digest(&raw, &post(b"[1]")), digest(&raw, &Payload { query: Some(b"a"), ..post(b"[1]") }));
}

#[test]
fn none_compares_nothing() {
    let none = FingerprintSettings { headers: vec!["x".into()], ..settings(FingerprintMode::None) };
    let other = Payload {
        method: "PUT",
        path: &[b"elsewhere".to_vec()],
        query: Some(b"q"),
        content_type: &[b"text/plain"],
        content_encoding: &[b"gzip"],
        headers: &[vec![b"y"]],
        body: b"other",
    };
    assert_eq!(none.fingerprint(&post(b"{}")), none.fingerprint(&other));
}

#[test]
fn payloads_condensed_under_different_settings_are_not_compared() {
    let all = [
        settings(FingerprintMode::Json),
        settings(FingerprintMode::Raw),
        settings(FingerprintMode::None),
        ignoring(&["/a"]),
        ignoring(&["/b"]),
        ignoring(&["/a", "/b"]),
        ignoring(&["/a/b"]),
        FingerprintSettings { headers: vec!["a".into()], ..settings(FingerprintMode::Json) },
        FingerprintSettings { headers: vec!["/a".into()], ..settings(FingerprintMode::Json) },
        FingerprintSettings { headers: vec!["a".into()], ..settings(FingerprintMode::Raw) },
    ];
    for (i, a) in all.iter().enumerate() {
        for (j, b) in all.iter().enumerate() {
            assert_eq!(a.id() == b.id(), i == j, "{a:?} {b:?}");
            let (fingerprint, other) = (a.fingerprint(&post(b"1")), b.fingerprint(&post(b"2")));
            assert_eq!(fingerprint.settings, a.id());
            assert!(i == j || !fingerprint.conflicts_with(&other));
        }
    }
}

#[test]
fn settings_without_effect_do_not_change_the_id() {
    assert_eq!(ignoring(&["/a", "/b"]).id(), ignoring(&["/b", "/a", "/b"]).id());
    let raw = settings(FingerprintMode::Raw);
    assert_eq!(FingerprintSettings { mode: FingerprintMode::Raw, ..ignoring(&["/a"]) }.id(), raw.id());
    let none = settings(FingerprintMode::None);
    let with_headers = FingerprintSettings { headers: vec!["a".into()], ..none.clone() };
    assert_eq!(with_headers.id(), none.id());
}

/// Stored records and derived keys depend on these: a change of any is a new version of the algorithm.
#[test]
fn ids_and_digests_are_stable_across_releases() {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let json = FingerprintSettings::default();
    let all = FingerprintSettings {
        ignore: vec!["/timestamp".into(), "/a~1b".into()],
        headers: vec!["stripe-account".into()],
        ..json.clone()
    };
    let body = br#"{"status":"publish","accountId":9007199254740993,"tags":["a",null,true,false],"o":{}}"#;
    let path = [b"v1".to_vec(), b"posts".to_vec()];
    let payload = Payload { path: &path, query: Some(b"a=1"), headers: &[vec![b"acct"]], ..post(body) };
    let form = form("xyz");
    let multipart = Payload { content_type: &[b"multipart/form-data; boundary=xyz"], ..post(form.as_bytes()) };
    let golden = [
        format!("json {:016x}", json.id()),
        format!("raw {:016x}", settings(FingerprintMode::Raw).id()),
        format!("none {:016x}", settings(FingerprintMode::None).id()),
        format!("all {:016x}", all.id()),
        hex(&digest(&json, &payload)),
        hex(&digest(&all, &payload)),
        hex(&digest(&settings(FingerprintMode::Raw), &payload)),
        hex(&digest(&settings(FingerprintMode::None), &payload)),
        hex(&digest(&json, &multipart)),
        hex(&json.json_digest(body)),
        hex(&json.json_digest(b"not json")),
    ];
    assert_eq!(golden.join("\n") + "\n", include_str!("golden/fingerprint-1.txt"));
}

// ── Ignored pointers ───────────────────────────────────────────────────────────────────────────────────────────────

#[test]
fn ignored_members_count_as_absent() {
    let timestamp = ignoring(&["/timestamp"]);
    assert!(same(&timestamp, r#"{"a":1,"timestamp":5}"#, r#"{"timestamp":{"x":[6]},"a":1}"#));
    assert!(same(&timestamp, r#"{"a":1,"timestamp":5}"#, r#"{"a":1}"#));
    assert!(same(&timestamp, r#"{"timestamp":5}"#, "{}"));
    assert!(!same(&timestamp, r#"{"a":1,"timestamp":5}"#, r#"{"a":2,"timestamp":5}"#));
    assert!(!same(&timestamp, r#"{"o":{"timestamp":5}}"#, r#"{"o":{"timestamp":6}}"#), "only where the pointer says");
    assert!(!same(&timestamp, r#"[{"timestamp":5}]"#, r#"[{"timestamp":6}]"#));
    assert!(!same(&timestamp, r#"{"timestamps":5}"#, r#"{"timestamps":6}"#));
    assert!(same(&timestamp, r#"{"t\u0069mestamp":5}"#, "{}"), "names compare decoded");

    let several = ignoring(&["/a", "/b/c", "/b/d/0"]);
    assert!(same(&several, r#"{"a":1,"b":{"c":2,"d":[3,4]},"e":5}"#, r#"{"e":5,"b":{"d":[0,4],"c":[[]]}}"#));
    assert!(!same(&several, r#"{"b":{"d":[3,4]}}"#, r#"{"b":{"d":[3,5]}}"#));
    assert!(!same(&several, r#"{"b":{"a":1}}"#, r#"{"b":{"a":2}}"#));
}

#[test]
fn ignored_elements_are_named_by_their_index() {
    let second = ignoring(&["/1"]);
    assert!(same(&second, "[1,2,3]", "[1,9,3]"));
    assert!(same(&second, r#"{"1":2}"#, "{}"), "a digit may be a member's name");
    assert!(!same(&second, "[1,2,3]", "[1,2,4]"));
    assert!(!same(&second, "[1,2,3]", "[0,2,3]"));
    assert!(same(&ignoring(&["/10"]), "[0,1,2,3,4,5,6,7,8,9,10]", "[0,1,2,3,4,5,6,7,8,9,11]"));
    let within = ignoring(&["/0/t", "/2"]);
    assert!(same(&within, r#"[{"t":1,"u":2},3,4]"#, r#"[{"u":2},3,5]"#));
    assert!(!same(&within, r#"[0,{"t":1}]"#, r#"[0,{"t":2}]"#));
    for no_index in ["/01", "/-", "/+1", "/1.0", "/ 1"] {
        assert!(!same(&ignoring(&[no_index]), "[1,2]", "[1,3]"), "{no_index}");
    }
}

#[test]
fn pointers_are_unescaped() {
    assert!(same(&ignoring(&["/a~1b"]), r#"{"a/b":1}"#, "{}"));
    assert!(same(&ignoring(&["/m~0n"]), r#"{"m~n":1}"#, "{}"));
    assert!(same(&ignoring(&["/~01"]), r#"{"~1":1}"#, "{}"), "unescaped once");
    assert!(!same(&ignoring(&["/~01"]), r#"{"/":1}"#, "{}"));
    assert!(same(&ignoring(&["/"]), r#"{"":1}"#, "{}"), "the empty name");
    assert!(same(&ignoring(&["/a//b"]), r#"{"a":{"":{"b":1}}}"#, r#"{"a":{"":{}}}"#));
    assert!(same(&ignoring(&["/é"]), r#"{"\u00e9":1}"#, "{}"));
    assert!(same(&ignoring(&["/~1~0~1"]), r#"{"/~/":1}"#, "{}"));
}

#[test]
fn what_is_ignored_must_still_be_json() {
    let ignored = ignoring(&["/a"]);
    for body in [r#"{"a":01}"#, r#"{"a":{"x":1,"x":1}}"#, r#"{"a":1,"a":2}"#, r#"{"a":"\ud800"}"#, r#"{"a":1"#] {
        assert!(!same(&ignored, body, format!("{body} ")), "{body}");
    }
    let text: &[&[u8]] = &[b"text/plain"];
    let as_text = |body| digest(&ignored, &Payload { content_type: text, ..post(body) });
    assert_ne!(as_text(br#"{"a":1}"#), as_text(br#"{"a":2}"#), "other bodies have no members");
}

#[test]
fn malformed_pointers_are_all_reported() {
    assert_eq!(FingerprintSettings::default().validate(), Ok(()));
    assert_eq!(ignoring(&["/", "/a", "/a/0/-", "/~0~1", "/a b/é", "//"]).validate(), Ok(()));
    let malformed = ["", "a", "#/a", "/a~", "/~2", "/a~/b", "/ok/~~0"];
    let errors = ignoring(&malformed).validate().unwrap_err();
    assert_eq!(errors.len(), malformed.len());
    for (error, pointer) in errors.iter().zip(malformed) {
        assert!(error.starts_with(&format!("{pointer:?}: ")), "{error}");
    }
    assert!(errors[1].contains("\"/a\""), "{}", errors[1]);
    // Not validated, they ignore nothing.
    assert!(!same(&ignoring(&malformed), r#"{"a":1,"a~":1,"":1}"#, r#"{"a":1,"a~":1,"":2}"#));
}

// ── Against oracles ────────────────────────────────────────────────────────────────────────────────────────────────

/// A JSON value; a number is its literal.
#[derive(Clone, Debug, PartialEq)]
enum Json {
    Word(&'static str),
    Number(String),
    Text(String),
    Array(Vec<Json>),
    /// Distinct names.
    Object(Vec<(String, Json)>),
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-c]{0,3}",
        prop::collection::vec(
            prop_oneof![any::<char>(), Just('"'), Just('\\'), Just('/'), Just('\0'), Just('😀'), Just('\u{ffff}')],
            0..8
        )
        .prop_map(String::from_iter),
    ]
}

fn any_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        prop::sample::select(&["null", "true", "false"][..]).prop_map(Json::Word),
        "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,4})?([eE][+-]?[0-9]{1,3})?".prop_map(Json::Number),
        any_text().prop_map(Json::Text),
    ];
    leaf.prop_recursive(5, 48, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Json::Array),
            prop::collection::btree_map(any_text(), inner, 0..6)
                .prop_map(|members| Json::Object(members.into_iter().collect())),
        ]
    })
}

/// Decisions of the writer, taken from a random sequence.
struct Dice<'a>(std::iter::Cycle<std::slice::Iter<'a, u8>>);

impl Dice<'_> {
    fn roll(&mut self, sides: usize) -> usize {
        usize::from(*self.0.next().unwrap()) % sides
    }
}

fn dice() -> impl Strategy<Value = Vec<u8>> {
    // A prime length, so that decisions of one kind do not repeat.
    prop::collection::vec(any::<u8>(), 251)
}

/// Writes a value in one of the many ways in which it can be written.
fn write(value: &Json, dice: &mut Dice<'_>, out: &mut String) {
    space(dice, out);
    match value {
        Json::Word(word) => out.push_str(word),
        Json::Number(literal) => out.push_str(literal),
        Json::Text(text) => write_text(text, dice, out),
        Json::Array(elements) => {
            out.push('[');
            for (at, element) in elements.iter().enumerate() {
                out.push_str(if at > 0 { "," } else { "" });
                write(element, dice, out);
            }
            space(dice, out);
            out.push(']');
        }
        Json::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            for at in (1..members.len()).rev() {
                members.swap(at, dice.roll(at + 1));
            }
            out.push('{');
            for (at, (name, value)) in members.into_iter().enumerate() {
                out.push_str(if at > 0 { "," } else { "" });
                space(dice, out);
                write_text(name, dice, out);
                space(dice, out);
                out.push(':');
                write(value, dice, out);
            }
            space(dice, out);
            out.push('}');
        }
    }
    space(dice, out);
}

fn space(dice: &mut Dice<'_>, out: &mut String) {
    for _ in 0..dice.roll(5).saturating_sub(2) {
        out.push([' ', '\t', '\n', '\r'][dice.roll(4)]);
    }
}

fn write_text(text: &str, dice: &mut Dice<'_>, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        let short = match c {
            '"' | '\\' | '/' => Some(c),
            '\u{8}' => Some('b'),
            '\u{c}' => Some('f'),
            '\n' => Some('n'),
            '\r' => Some('r'),
            '\t' => Some('t'),
            _ => None,
        };
        let plain = c >= ' ' && c != '"' && c != '\\';
        match (dice.roll(3), short) {
            (0, _) if plain => out.push(c),
            (1, Some(letter)) => out.extend(['\\', letter]),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let digits = format!("{unit:04x}");
                    out.push_str("\\u");
                    out.push_str(&if dice.roll(2) == 0 { digits.to_uppercase() } else { digits });
                }
            }
        }
    }
    out.push('"');
}

fn text(value: &Json, dice: &[u8]) -> String {
    let mut out = String::new();
    write(value, &mut Dice(dice.iter().cycle()), &mut out);
    out
}

/// Changes one thing in a value: a leaf, a number's text, a name, an order, a length.
fn mutate(value: &mut Json, dice: &mut Dice<'_>) {
    match value {
        Json::Array(elements) if !elements.is_empty() && dice.roll(4) > 0 => {
            let at = dice.roll(elements.len());
            mutate(&mut elements[at], dice);
        }
        Json::Object(members) if !members.is_empty() && dice.roll(4) > 0 => {
            let at = dice.roll(members.len());
            mutate(&mut members[at].1, dice);
        }
        Json::Array(elements) => match dice.roll(4) {
            0 => elements.push(Json::Word("null")),
            1 if elements.first() != elements.last() => elements.reverse(),
            2 if !elements.is_empty() => drop(elements.remove(dice.roll(elements.len()))),
            _ => *value = Json::Array(vec![value.clone()]),
        },
        Json::Object(members) => {
            if members.is_empty() || dice.roll(3) == 0 {
                members.push(("a name that no other has".into(), Json::Word("null")));
            } else {
                let at = dice.roll(members.len());
                if dice.roll(2) == 0 {
                    members.remove(at);
                } else {
                    members[at].0.push_str("longer than any other");
                }
            }
        }
        Json::Word(word) => *word = if *word == "null" { "false" } else { "null" },
        Json::Number(literal) => match dice.roll(3) {
            0 if literal.starts_with('-') => drop(literal.remove(0)),
            0 => literal.insert(0, '-'),
            1 => *value = Json::Text(literal.clone()),
            _ if literal.contains(['e', 'E']) => literal.push('0'),
            _ => literal.push_str("e0"),
        },
        Json::Text(text) => {
            if dice.roll(2) == 0 || text.is_empty() {
                text.push('x');
            } else {
                text.pop();
            }
        }
    }
}

/// `serde_json`'s judgement: whether a text is JSON, and repeats no member name.
fn judged_json(body: &[u8]) -> bool {
    struct Unique;
    impl<'de> serde::Deserialize<'de> for Unique {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(Unique)
        }
    }
    impl<'de> serde::de::Visitor<'de> for Unique {
        type Value = Self;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("any JSON without a repeated name")
        }
        fn visit_unit<E>(self) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_str<E>(self, _: &str) -> Result<Self, E> {
            Ok(self)
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
            while seq.next_element::<Self>()?.is_some() {}
            Ok(self)
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
            let mut names = std::collections::HashSet::new();
            while let Some(name) = map.next_key::<String>()? {
                // How `arbitrary_precision` hands over a number.
                if name == "$serde_json::private::Number" {
                    map.next_value::<String>()?;
                } else {
                    map.next_value::<Self>()?;
                }
                if !names.insert(name) {
                    return Err(serde::de::Error::custom("repeated"));
                }
            }
            Ok(self)
        }
    }
    serde_json::from_slice::<Unique>(body).is_ok()
}

/// Text that is often JSON, and often nearly.
fn nearly_json() -> impl Strategy<Value = Vec<u8>> {
    let tokens = prop::sample::select(
        &[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"a\"",
            "\"a\":",
            "\"b\":",
            "\"\\u0061\":",
            "null",
            "true",
            "false",
            "0",
            "-0",
            "1",
            "12",
            "-",
            ".",
            "e",
            "E",
            "+",
            "1.5",
            "1e5",
            "\"",
            "\\",
            "\\u",
            "d83d",
            "\\ude00",
            "\"\\ud83d\\ude00\"",
            " ",
            "\n",
            "\t",
            "\0",
            "é",
            "\u{feff}",
        ][..],
    );
    prop_oneof![
        prop::collection::vec(tokens, 0..12).prop_map(|tokens| tokens.concat().into_bytes()),
        (any_json(), dice(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(value, dice, at, byte)| {
            let mut body = text(&value, &dice).into_bytes();
            let at = at.index(body.len());
            match byte % 3 {
                0 => body[at] = byte,
                1 => body.insert(at, byte),
                _ => drop(body.remove(at)),
            }
            body
        }),
        prop::collection::vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_value_written_in_two_ways_is_the_same_payload(value in any_json(), a in dice(), b in dice()) {
        let (a, b) = (text(&value, &a), text(&value, &b));
        prop_assert!(judged_json(a.as_bytes()), "the writer is broken: {}", a);
        prop_assert!(same_json(&a, &b), "{} / {}", a, b);
    }

    #[test]
    fn a_value_changed_in_one_place_is_another_payload(value in any_json(), a in dice(), b in dice(), change in dice()) {
        let mut changed = value.clone();
        mutate(&mut changed, &mut Dice(change.iter().cycle()));
        prop_assume!(value != changed);
        let (a, b) = (text(&value, &a), text(&changed, &b));
        prop_assert!(!same_json(&a, &b), "{} / {}", a, b);
    }

    #[test]
    fn two_values_are_one_payload_only_if_they_are_equal(a in any_json(), b in any_json(), dice in dice()) {
        prop_assert_eq!(same_json(text(&a, &dice), text(&b, &dice)), a == b);
    }

    #[test]
    fn what_is_read_as_json_is_what_serde_json_accepts(body in nearly_json()) {
        prop_assert_eq!(read_as_json(&body), judged_json(&body), "{}", body.escape_ascii());
    }

    #[test]
    fn ignored_members_may_hold_anything(value in any_json(), other in any_json(), rest in any_json(), a in dice(), b in dice()) {
        let with = |value: &Json| Json::Object(vec![("rest".into(), rest.clone()), ("a/b".into(), value.clone())]);
        let settings = ignoring(&["/a~1b", "/unheard-of"]);
        prop_assert!(same(&settings, text(&with(&value), &a), text(&with(&other), &b)));
        let without = Json::Object(vec![("rest".into(), rest.clone())]);
        prop_assert!(same(&settings, text(&with(&value), &a), text(&without, &b)));
        // What is left is compared as ever.
        let alone = |value: &Json| Json::Object(vec![("rest".into(), value.clone())]);
        prop_assert_eq!(same(&settings, text(&alone(&value), &a), text(&alone(&other), &b)), value == other);
    }

    #[test]
    fn any_bytes_under_any_header_never_panic(
        body in prop_oneof![nearly_json(), prop::collection::vec(any::<u8>(), 0..300)],
        content_type in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            "multipart/form-data; ?boundary=\"?[-a\"\\\\ ]{0,4}".prop_map(String::into_bytes),
        ], 0..3),
        content_encoding in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..10), 0..3),
        pointers in prop::collection::vec("(/|~|a|0|1){0,4}", 0..3),
    ) {
        let content_type: Vec<&[u8]> = content_type.iter().map(Vec::as_slice).collect();
        let content_encoding: Vec<&[u8]> = content_encoding.iter().map(Vec::as_slice).collect();
        let payload = Payload { content_type: &content_type, content_encoding: &content_encoding, ..post(&body) };
        let settings = FingerprintSettings { ignore: pointers, ..FingerprintSettings::default() };
        prop_assert_eq!(settings.fingerprint(&payload), settings.fingerprint(&payload));
        let _ = settings.validate();
    }

    /// The oracle replaces the boundary in a list of lines, of which some are delimiters.
    #[test]
    fn multipart_bodies_differ_only_by_boundary_or_by_content(
        lines in prop::collection::vec("[-a ]{0,3}|@|@--", 1..8),
        other in prop::collection::vec("[-a ]{0,3}|@|@--", 1..8),
        (one, two) in ("[x-z]{1,4}", "[0-9]{1,4}"),
    ) {
        let body = |lines: &[String], boundary: &str| lines.join("\r\n").replace('@', &format!("--{boundary}"));
        let digest = |lines: &[String], boundary: &str| {
            multipart(&format!("multipart/mixed; boundary=\"{boundary}\""), &body(lines, boundary))
        };
        prop_assert_eq!(digest(&lines, &one), digest(&lines, &two));
        prop_assert_eq!(digest(&lines, &one) == digest(&other, &two), lines == other);
    }
}
