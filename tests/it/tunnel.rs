//! An open tunnel: bytes both ways, half-close, limits, the drain.

use crate::support::{Client, Gateway, eventually, request, skip};
use crate::upgrade::{listener_and_gateway, open};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

fn expect_tunnels(gateway: &Gateway, count: f64) {
    eventually("tunnels", || (gateway.metric("oncegate_tunnels") == count).then_some(()));
}

#[test]
fn either_side_may_finish_speaking_and_go_on_listening() {
    let (listener, gateway) = listener_and_gateway("");
    for client_first in [true, false] {
        let (client, server) = open(&listener, &gateway);
        let (mut first, mut second) = if client_first { (client, server) } else { (server, client) };
        first.send("last words");
        first.half_close();
        assert_eq!(second.read_exactly(10), b"last words");
        assert!(second.at_end(), "the other side learns of it");
        expect_tunnels(&gateway, 1.0);
        for word in ["still", "talking"] {
            second.send(word);
            assert_eq!(first.read_exactly(word.len()), word.as_bytes());
        }
        second.half_close();
        assert!(first.at_end());
        expect_tunnels(&gateway, 0.0);
    }
}

/// Sends `len` bytes of a pattern while the other end is read, and checks what comes.
fn exchange(end: &Client, len: usize, seed: u8) -> std::thread::JoinHandle<()> {
    let mut writer = end.stream.try_clone().unwrap();
    std::thread::spawn(move || {
        let bytes = (0..len).map(|at| (at % 251) as u8 ^ seed).collect::<Vec<_>>();
        writer.write_all(&bytes).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    })
}

fn check(end: &mut Client, len: usize, seed: u8) {
    let mut got = Vec::new();
    end.stream.read_to_end(&mut got).unwrap();
    assert_eq!(got.len(), len);
    assert!(got.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8 ^ seed), "every byte in its place");
}

#[test]
fn ten_mebibytes_go_both_ways_at_once() {
    const LEN: usize = 10 << 20;
    let (listener, gateway) = listener_and_gateway("");
    let (mut client, mut server) = open(&listener, &gateway);
    let (up, down) = (exchange(&client, LEN, 1), exchange(&server, LEN, 2));
    std::thread::scope(|scope| {
        scope.spawn(|| check(&mut server, LEN, 1));
        scope.spawn(|| check(&mut client, LEN, 2));
    });
    up.join().unwrap();
    down.join().unwrap();
    expect_tunnels(&gateway, 0.0);
}

#[test]
fn a_side_that_vanishes_ends_the_other() {
    let (listener, gateway) = listener_and_gateway("");
    let (client, mut server) = open(&listener, &gateway);
    client.reset();
    assert!(server.ends());
    expect_tunnels(&gateway, 0.0);

    let (mut client, server) = open(&listener, &gateway);
    server.reset();
    assert!(client.ends());
    expect_tunnels(&gateway, 0.0);

    let (client, mut server) = open(&listener, &gateway);
    drop(client);
    assert!(server.at_end(), "an orderly end arrives as one");
    drop(server);
    expect_tunnels(&gateway, 0.0);
}

#[test]
fn what_a_side_said_before_it_vanished_arrives() {
    let (listener, gateway) = listener_and_gateway("");
    let (mut client, mut server) = open(&listener, &gateway);
    server.send("bye");
    drop(server);
    // The gateway's writes fail by now, or will; what it has read is the client's all the same.
    client.try_send(vec![0; 1000]);
    assert_eq!(client.read_exactly(3), b"bye");
    assert!(client.ends());
}

#[test]
fn a_silent_tunnel_outlives_every_limit_of_http() {
    let short = "server.limits.idle_timeout = \"100ms\"\nserver.limits.header_timeout = \"100ms\"\n\
                 server.limits.body_timeout = \"100ms\"\nserver.limits.write_timeout = \"100ms\"\n\
                 upstream.idle_timeout = \"100ms\"\nupstream.response_timeout = \"100ms\"";
    let (listener, gateway) = listener_and_gateway(short);
    let (mut client, mut server) = open(&listener, &gateway);
    std::thread::sleep(Duration::from_millis(1500)); // Silence, beyond the limits and the pool's sweep.
    client.send("ping");
    assert_eq!(server.read_exactly(4), b"ping");
    server.send("pong");
    assert_eq!(client.read_exactly(4), b"pong");
}

#[test]
fn a_half_closed_tunnel_that_falls_silent_ends() {
    let (listener, gateway) = listener_and_gateway("server.limits.idle_timeout = \"200ms\"");
    let (mut client, mut server) = open(&listener, &gateway);
    client.half_close();
    assert!(server.at_end());
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(60)); // Longer than the limit in all, but never silent for so long.
        server.send("x");
        assert_eq!(client.read_exactly(1), b"x");
    }
    assert!(client.ends());
    expect_tunnels(&gateway, 0.0);
}

#[test]
fn a_side_that_takes_no_bytes_ends_the_tunnel() {
    let (listener, gateway) = listener_and_gateway("server.limits.write_timeout = \"200ms\"");
    for to_client in [true, false] {
        let (client, server) = open(&listener, &gateway);
        let (mut writer, _silent) = if to_client { (server, client) } else { (client, server) };
        let chunk = vec![0; 1 << 20];
        let failed = (0..1000).any(|_| writer.stream.write_all(&chunk).is_err());
        assert!(failed, "a thousand mebibytes are not taken from one who has no reader");
        expect_tunnels(&gateway, 0.0);
    }
    assert!(gateway.rss_kib() < 200 << 10, "{} KiB", gateway.rss_kib());
}

#[test]
fn a_tunnel_keeps_its_place_among_the_connections() {
    let (listener, gateway) = listener_and_gateway("server.limits.max_connections = 1");
    let (client, server) = open(&listener, &gateway);
    assert_eq!((gateway.metric("oncegate_connections"), gateway.metric("oncegate_tunnels")), (1.0, 1.0));
    Client::connect(gateway.addr).read().expect_problem(503, "overloaded");
    drop((client, server));
    eventually("the place is free", || (gateway.metric("oncegate_connections") == 0.0).then_some(()));
    open(&listener, &gateway);
}

#[test]
fn a_drain_lets_tunnels_finish() {
    let (listener, mut gateway) = listener_and_gateway("server.drain_timeout = \"30s\"");
    let (mut client, mut server) = open(&listener, &gateway);
    gateway.terminate();
    gateway.wait_for_log("draining");
    eventually("the listener is closed", || Client::try_connect(gateway.addr).is_err().then_some(()));
    client.send("still here");
    assert_eq!(server.read_exactly(10), b"still here");
    assert_eq!(gateway.metric("oncegate_tunnels"), 1.0);
    drop((client, server));
    assert_eq!(gateway.wait(), Some(0));
    assert!(!gateway.log().contains("drain_timeout is over"), "{}", gateway.log());
}

#[test]
fn a_drain_closes_tunnels_when_its_time_is_over() {
    let (listener, mut gateway) = listener_and_gateway("server.drain_timeout = \"300ms\"");
    let (mut client, mut server) = open(&listener, &gateway);
    gateway.terminate();
    assert!(client.ends() && server.ends());
    assert_eq!(gateway.wait(), Some(0));
    gateway.wait_for_log("drain_timeout is over with tunnels still open");
}

#[test]
fn an_upgrade_is_accepted_while_draining() {
    let (listener, gateway) = listener_and_gateway("server.drain_delay = \"30s\"");
    gateway.terminate();
    gateway.wait_for_log("draining");
    let (mut client, mut server) = open(&listener, &gateway);
    client.send("x");
    assert_eq!(server.read_exactly(1), b"x");
}

/// What a WebSocket library's own client and server see of each other.
const WEBSOCKETS: &str = r#"
import asyncio, hashlib, json, sys, websockets

async def echo(ws):
    async for message in ws:
        if message == "close":
            return await ws.close(4001, "as you wish")
        await ws.send(message)

async def talk(url):
    seen = []
    async with websockets.connect(url, max_size=None, subprotocols=["b", "a"]) as ws:
        seen.append(ws.subprotocol)
        for size in [0, 1, 125, 126, 127, 65535, 65536, 1 << 20, 3 << 20]:
            for message in ["x" * size, bytes(i % 256 for i in range(size))]:
                await ws.send(message)
                back = await ws.recv()
                seen.append([type(back).__name__, len(back), back == message])
        await ws.send(["frag", "", "ment", "ed"])
        seen.append(await ws.recv())
        await asyncio.wait_for(await ws.ping(b"p"), 10)
        many = [str(i) * 50 for i in range(2000)]
        async def send():
            for message in many:
                await ws.send(message)
        sender = asyncio.create_task(send())
        seen.append([await ws.recv() for _ in many] == many)
        await sender
        await ws.send("close")
        try:
            await ws.recv()
        except websockets.ConnectionClosed as closed:
            seen.append([closed.rcvd.code, closed.rcvd.reason, closed.sent.code])
    return seen

async def main():
    server = await websockets.serve(echo, "127.0.0.1", 0, max_size=None, subprotocols=["a"])
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    while url := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        print(json.dumps(await talk(url)), flush=True)

asyncio.run(main())
"#;

#[test]
fn a_websocket_library_sees_no_difference() {
    // Debian's Python is where Debian's modules are.
    let python = ["/usr/bin/python3", "python3"].into_iter().find(|python| {
        let run = Command::new(python).args(["-c", "import websockets"]).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    });
    let Some(python) = python else { return skip("there is no Python with the module websockets") };
    let dir = tempfile::tempdir().unwrap();
    let script: PathBuf = dir.path().join("websockets_echo.py");
    std::fs::write(&script, WEBSOCKETS).unwrap();
    let mut child = Command::new(python).arg(&script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
    let port = output.next().unwrap().unwrap();
    let gateway = Gateway::start_before(&format!("http://127.0.0.1:{port}"), "");
    let mut talk = |to: String| {
        writeln!(input, "ws://{to}/").unwrap();
        output.next().unwrap().unwrap()
    };
    let direct = talk(format!("127.0.0.1:{port}"));
    assert!(direct.contains("[4001, \"as you wish\", 4001]"), "{direct}");
    for _ in 0..2 {
        assert_eq!(talk(gateway.addr.to_string()), direct);
        expect_tunnels(&gateway, 0.0);
    }
    drop(input);
    child.wait().unwrap();
    // The gateway serves HTTP as before.
    let answer = gateway.call(request("GET", "/", &[("Connection", "close")], ""));
    assert_eq!(answer.status, 502, "the server is gone by now: {answer:?}");
}
