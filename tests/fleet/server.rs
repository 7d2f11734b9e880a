//! A real store, of either kind.

use crate::postgres_server as postgres;
use crate::redis_server as redis;
use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Redis,
    Postgres,
}

pub enum Server {
    Redis(Mutex<redis::Server>),
    Postgres(postgres::Server),
}

impl Server {
    /// One that loses nothing of what it has acknowledged. `None`: there is none to start here.
    pub fn start(engine: Engine) -> Option<Arc<Self>> {
        Some(Arc::new(match engine {
            Engine::Redis => redis::installed().then(|| Self::Redis(Mutex::new(redis::Server::strict())))?,
            Engine::Postgres => Self::Postgres(postgres::Server::start(&[])?),
        }))
    }

    /// One that other tests may use at the same time: it must not be disturbed.
    pub fn shared(engine: Engine) -> Option<Arc<Self>> {
        static SHARED: [Mutex<Weak<Server>>; 2] = [const { Mutex::new(Weak::new()) }; 2];
        let mut shared = SHARED[engine as usize].lock().unwrap();
        if let Some(server) = shared.upgrade() {
            return Some(server);
        }
        let server = Self::start(engine)?;
        *shared = Arc::downgrade(&server);
        Some(server)
    }

    pub fn engine(&self) -> Engine {
        match self {
            Self::Redis(_) => Engine::Redis,
            Self::Postgres(_) => Engine::Postgres,
        }
    }

    pub fn addr(&self) -> SocketAddr {
        let port = match self {
            Self::Redis(server) => server.lock().unwrap().port,
            Self::Postgres(server) => server.port,
        };
        ([127, 0, 0, 1], port).into()
    }

    /// Its URL for who reaches it through `via`.
    pub fn url(&self, via: SocketAddr) -> String {
        match self {
            Self::Redis(_) => format!("redis://{via}"),
            Self::Postgres(_) => format!("postgres://postgres@{via}/postgres?sslmode=disable"),
        }
    }

    /// As a crash of its machine, but for what the kernel has of it.
    pub fn kill(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().kill(),
            Self::Postgres(server) => server.kill_9(),
        }
    }

    pub fn restart(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().restart(),
            Self::Postgres(server) => server.run(),
        }
    }

    /// It keeps its connections, and says nothing.
    pub fn pause(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().pause(),
            Self::Postgres(server) => server.signal_all(Signal::SIGSTOP),
        }
    }

    pub fn resume(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().resume(),
            Self::Postgres(server) => server.signal_all(Signal::SIGCONT),
        }
    }

    /// How many connections it has, as it says itself.
    pub fn connections(&self) -> usize {
        match self {
            Self::Redis(server) => {
                let list = server.lock().unwrap().client().ask(&["CLIENT", "LIST"]).text();
                list.lines().count() - 1
            }
            Self::Postgres(_) => {
                let others = "SELECT count(*) FROM pg_stat_activity \
                              WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
                self.sql(others).parse().unwrap()
            }
        }
    }

    /// What PostgreSQL answers.
    pub fn sql(&self, statement: &str) -> String {
        let url = self.url(self.addr());
        let output = Command::new("psql").args([url.as_str(), "-XAtc", statement]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}
