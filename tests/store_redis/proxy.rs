//! A connection in between that loses answers.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(super) struct Proxy {
    pub(super) port: u16,
    losses: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
    admits: watch::Sender<bool>,
    trickle_ms: Arc<AtomicU64>,
    refuses: Arc<AtomicBool>,
    refused: Arc<AtomicUsize>,
}

impl Proxy {
    /// Before the server of that port. Of what goes through, only commands that contain the word can lose their answers.
    pub(super) async fn start(server: u16, word: &'static [u8]) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (losses, lost) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let trickle_ms = Arc::new(AtomicU64::new(0));
        let (to_lose, count, trickle) = (losses.clone(), lost.clone(), trickle_ms.clone());
        let (refuses, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (shut, turned_away) = (refuses.clone(), refused.clone());
        let admits = watch::Sender::new(true);
        let mut admitted = admits.subscribe();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shut.load(Ordering::SeqCst) {
                    turned_away.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                if admitted.wait_for(|admitted| *admitted).await.is_err() {
                    return;
                }
                let faults = (to_lose.clone(), count.clone(), trickle.clone());
                tokio::spawn(relay(client, server, word, faults));
            }
        });
        Self { port, losses, lost, admits, trickle_ms, refuses, refused }
    }

    /// Whether new connections get through; otherwise they wait.
    pub(super) fn admit(&self, admits: bool) {
        self.admits.send_replace(admits);
    }

    pub(super) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Of the next so many commands with the word, the server gets all, and its answers get nowhere.
    pub(super) fn lose(&self, answers: usize) {
        self.losses.store(answers, Ordering::SeqCst);
    }

    /// Takes no more connections; those that stand go on.
    pub(super) fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// How many connections it has not taken.
    pub(super) fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    /// From now on each byte of an answer takes so many milliseconds.
    pub(super) fn trickle(&self, ms: u64) {
        self.trickle_ms.store(ms, Ordering::SeqCst);
    }

    pub(super) fn lost(&self) -> usize {
        self.lost.load(Ordering::SeqCst)
    }
}

type Faults = (Arc<AtomicUsize>, Arc<AtomicUsize>, Arc<AtomicU64>);

async fn relay(mut client: TcpStream, server: u16, word: &[u8], (losses, lost, trickle_ms): Faults) {
    let Ok(mut server) = TcpStream::connect((Ipv4Addr::LOCALHOST, server)).await else { return };
    let (mut from_client, mut from_server) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut loses = false;
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Some(bytes) = read.ok().filter(|n| *n > 0).map(|n| &from_client[..n]) else { return };
                if bytes.windows(word.len()).any(|window| window == word) {
                    let taken = losses.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
                    loses |= taken.is_ok();
                }
                if server.write_all(bytes).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut from_server) => {
                let Some(bytes) = read.ok().filter(|n| *n > 0).map(|n| &from_server[..n]) else { return };
                if loses {
                    // The server has answered, so it has done it.
                    lost.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                let mut rest = bytes;
                while !rest.is_empty() {
                    let ms = trickle_ms.load(Ordering::SeqCst);
                    let (now, later) = rest.split_at(if ms > 0 { 1 } else { rest.len() });
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    if client.write_all(now).await.is_err() {
                        return;
                    }
                    rest = later;
                }
            }
        }
    }
}
