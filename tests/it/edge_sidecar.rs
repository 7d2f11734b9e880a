//! Two gateways at the edge, one beside the service, and any of them killed while a request is under way.

use crate::support::{Client, Gate, Gateway, Response, Upstream, eventually, post};
use std::sync::Arc;

struct Row {
    upstream: Upstream,
    gate: Gate,
    sidecar: Gateway,
    edges: Vec<Gateway>,
}

/// The edges send again what they do not know the end of: the gateway behind them honours the key.
const EDGE: &str = "idempotency.unknown_outcome = \"forward\"\n";

fn row(edge: &str) -> Row {
    let gate = Gate::default();
    let held = gate.clone();
    let upstream = Upstream::scripted(move |request, reply| {
        held.wait();
        reply.send(201, &[], format!("run {}", request.number));
    });
    let dir = Arc::new(tempfile::tempdir().unwrap());
    // A name that stays over a restart.
    let socket = dir.path().join("socket").display().to_string();
    let listen = format!("[\"127.0.0.1:0\", \"unix:{socket}\"]");
    let sidecar = Gateway::try_start(dir, &upstream.url(), "", &[], &[("ONCEGATE_SERVER__LISTEN", &listen)]).unwrap();
    let edges = (0..2).map(|_| Gateway::start_before(&format!("unix:{socket}"), edge)).collect();
    Row { upstream, gate, sidecar, edges }
}

impl Row {
    /// 64 duplicates through both edges, of which one has reached the service, and each edge has sent one on.
    fn duplicates(&self) -> Vec<Client> {
        let mut clients = Vec::new();
        for n in 0..64 {
            let mut client = Client::connect(self.edges[n % 2].addr);
            client.send(post("/posts", "k", "{}"));
            clients.push(client);
        }
        self.upstream.wait_for(1);
        eventually("the other edge's request waits beside the service", || {
            (self.sidecar.metric("oncegate_waiters") == 1.0).then_some(())
        });
        for edge in &self.edges {
            eventually("31 wait at each edge", || (edge.metric("oncegate_waiters") == 31.0).then_some(()));
        }
        clients
    }

    /// What a client gets through an edge that retries as long as it is told to.
    fn settled(&self, edge: usize) -> Response {
        eventually("an answer that is final", || {
            let answer = self.edges[edge].post("k", "{}");
            let retry = answer.header("retry-after").is_some() || answer.status >= 500;
            (!retry).then_some(answer)
        })
    }

    fn restart(self, victim: Victim) -> Self {
        let Self { upstream, gate, mut sidecar, mut edges } = self;
        match victim {
            Victim::Sidecar => sidecar = sidecar.restart(),
            Victim::Edge(n) => {
                let edge = edges.remove(n);
                edges.insert(n, edge.restart());
            }
        }
        Self { upstream, gate, sidecar, edges }
    }
}

#[derive(Clone, Copy, Debug)]
enum Victim {
    Sidecar,
    Edge(usize),
}

#[test]
fn of_64_duplicates_through_two_edges_one_is_executed_and_all_get_its_answer() {
    let row = row(EDGE);
    let mut clients = row.duplicates();
    row.gate.open();
    for client in &mut clients {
        let answer = client.read();
        assert_eq!((answer.status, answer.text().as_str()), (201, "run 1"));
    }
    assert_eq!(row.upstream.count(), 1);
}

#[test]
fn an_edge_that_is_killed_finds_the_answer_behind_it() {
    for victim in [Victim::Edge(0), Victim::Edge(1)] {
        let row = row(EDGE);
        let clients = row.duplicates();
        let row = row.restart(victim);
        row.gate.open();
        for edge in 0..2 {
            let answer = row.settled(edge);
            assert_eq!((answer.status, answer.text().as_str()), (201, "run 1"), "{victim:?}, edge {edge}");
        }
        assert_eq!(row.upstream.count(), 1, "{victim:?}");
        // Those at the edge that lived have got it, too.
        let lived = clients.into_iter().enumerate().filter(|(n, _)| !matches!(victim, Victim::Edge(v) if v == n % 2));
        for (_, mut client) in lived {
            assert_eq!(client.read().text(), "run 1");
        }
    }
}

#[test]
fn a_sidecar_that_is_killed_leaves_an_unknown_outcome_and_nothing_in_progress() {
    for edge in [EDGE, ""] {
        let row = row(edge);
        let clients = row.duplicates();
        let row = row.restart(Victim::Sidecar);
        row.gate.open();
        for mut client in clients {
            // Reset, or refused: but no answer of an execution that nobody saw the end of.
            assert!(client.try_read().is_none_or(|answer| answer.status != 201));
        }
        for edge in 0..2 {
            row.settled(edge).expect_problem(409, "outcome_unknown");
        }
        assert_eq!(row.upstream.count(), 1);
        assert_eq!(row.sidecar.metric("oncegate_records{state=\"unknown\"}"), 1.0);
        for edge in &row.edges {
            assert_eq!(edge.metric("oncegate_records{state=\"claimed\"}"), 0.0, "no key is stuck");
        }
    }
}

#[test]
fn all_three_killed_one_after_the_other_execute_a_key_once() {
    let mut row = row(EDGE);
    drop(row.duplicates());
    for victim in [Victim::Edge(0), Victim::Sidecar, Victim::Edge(1)] {
        row = row.restart(victim);
        // Retries go on meanwhile.
        for edge in &row.edges {
            Client::connect(edge.addr).send(post("/posts", "k", "{}"));
        }
    }
    row.gate.open();
    for edge in 0..2 {
        row.settled(edge).expect_problem(409, "outcome_unknown");
    }
    assert_eq!(row.upstream.count(), 1);
}
