//! A connection in between that loses answers.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

pub(super) struct Proxy {
    pub(super) port: u16,
    losses: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
    admits: watch::Sender<bool>,
}

impl Proxy {
    /// Before the server of that port. Of what goes through, only commands that contain the word can lose their answers.
    pub(super) async fn start(server: u16, word: &'static [u8]) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (losses, lost) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let admits = watch::Sender::new(true);
        let (to_lose, count, mut admitted) = (losses.clone(), lost.clone(), admits.subscribe());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if admitted.wait_for(|admitted| *admitted).await.is_err() {
                    return;
                }
                tokio::spawn(relay(client, server, word, to_lose.clone(), count.clone()));
            }
        });
        Self { port, losses, lost, admits }
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

    pub(super) fn lost(&self) -> usize {
        self.lost.load(Ordering::SeqCst)
    }
}

async fn relay(mut client: TcpStream, server: u16, word: &[u8], losses: Arc<AtomicUsize>, lost: Arc<AtomicUsize>) {
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
                if client.write_all(bytes).await.is_err() {
                    return;
                }
            }
        }
    }
}
