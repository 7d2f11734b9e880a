//! A way to the server that can be disturbed.
#![allow(unreachable_pub)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Open,
    /// The next answer does not arrive: the connection is cut instead, and the way is open again.
    CutNextAnswer,
    /// As above, of an answer to what contains this: not of any to a connection that is being made.
    CutNextAnswerTo(&'static str),
    /// Answers are kept back, connections stay.
    NoAnswers,
    /// Nobody is let in, and whoever is in is thrown out.
    Shut,
}

pub struct Proxy {
    pub port: u16,
    way: watch::Sender<Way>,
    accepted: Arc<AtomicUsize>,
}

impl Proxy {
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (way, accepted) = (watch::Sender::new(Way::Open), Arc::new(AtomicUsize::new(0)));
        let (ways, count) = (way.clone(), Arc::clone(&accepted));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                if *ways.borrow() != Way::Shut {
                    tokio::spawn(carry(client, server, ways.clone()));
                }
            }
        });
        Self { port, way, accepted }
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Waits until the way is that again.
    pub async fn until(&self, way: Way) {
        let mut ways = self.way.subscribe();
        tokio::time::timeout(super::PATIENCE, ways.wait_for(|now| *now == way)).await.unwrap().unwrap();
    }

    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

async fn carry(mut client: TcpStream, server: u16, way: watch::Sender<Way>) -> Option<()> {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await.ok()?;
    let (mut ways, mut held) = (way.subscribe(), way.subscribe());
    let (mut to, mut from) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut asked = Vec::new();
    loop {
        tokio::select! {
            read = client.read(&mut to) => match read.ok()? {
                0 => return None,
                n => {
                    asked = to[..n].to_vec();
                    server.write_all(&asked).await.ok()?;
                }
            },
            read = server.read(&mut from) => {
                let n = read.ok().filter(|n| *n > 0)?;
                let mut cut = false;
                way.send_if_modified(|way| {
                    cut = match *way {
                        Way::CutNextAnswer => true,
                        Way::CutNextAnswerTo(word) => asked.windows(word.len()).any(|window| window == word.as_bytes()),
                        _ => false,
                    };
                    if cut {
                        *way = Way::Open;
                    }
                    cut
                });
                if cut {
                    return None;
                }
                if is(&mut held, |way| way != Way::NoAnswers).await? == Way::Shut {
                    return None;
                }
                client.write_all(&from[..n]).await.ok()?;
            }
            _ = is(&mut ways, |way| way == Way::Shut) => return None,
        }
    }
}

async fn is(ways: &mut watch::Receiver<Way>, wanted: impl Fn(Way) -> bool) -> Option<Way> {
    ways.wait_for(|way| wanted(*way)).await.ok().map(|way| *way)
}
