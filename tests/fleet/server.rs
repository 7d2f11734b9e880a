//! A real store, of either kind.

use crate::postgres_server;
use crate::redis_server;
use rustix::process::Signal;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    Redis,
    Postgres,
}

pub(crate) enum Server {
    Redis(Mutex<redis_server::Server>),
    Postgres(postgres_server::Server),
}

impl Server {
    /// One that loses nothing of what it has acknowledged. `None`: there is none to start here.
    pub(crate) fn start(engine: Engine) -> Option<Arc<Self>> {
        Some(Arc::new(match engine {
            Engine::Redis => {
                redis_server::installed().then(|| Self::Redis(Mutex::new(redis_server::Server::strict())))?
            }
            Engine::Postgres => Self::Postgres(postgres_server::Server::start(&[])?),
        }))
    }

    /// One that other tests may use at the same time: it must not be disturbed.
    pub(crate) fn shared(engine: Engine) -> Option<Arc<Self>> {
        static SHARED: [Mutex<Weak<Server>>; 2] = [const { Mutex::new(Weak::new()) }; 2];
        let mut shared = SHARED[engine as usize].lock().unwrap();
        if let Some(server) = shared.upgrade() {
            return Some(server);
        }
        let server = Self::start(engine)?;
        *shared = Arc::downgrade(&server);
        Some(server)
    }

    pub(crate) fn engine(&self) -> Engine {
        match self {
            Self::Redis(_) => Engine::Redis,
            Self::Postgres(_) => Engine::Postgres,
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        let port = match self {
            Self::Redis(server) => server.lock().unwrap().port,
            Self::Postgres(server) => server.port,
        };
        ([127, 0, 0, 1], port).into()
    }

    /// Its URL for who reaches it through `via`.
    pub(crate) fn url(&self, via: SocketAddr) -> String {
        match self {
            Self::Redis(_) => format!("redis://{via}"),
            Self::Postgres(_) => format!("postgres://postgres@{via}/postgres?sslmode=disable"),
        }
    }

    /// As a crash of its machine, but for what the kernel has of it.
    pub(crate) fn kill(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().kill(),
            Self::Postgres(server) => server.kill_9(),
        }
    }

    pub(crate) fn restart(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().restart(),
            Self::Postgres(server) => server.run(),
        }
    }

    /// It keeps its connections, and says nothing.
    pub(crate) fn pause(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().pause(),
            Self::Postgres(server) => server.signal_all(Signal::STOP),
        }
    }

    pub(crate) fn resume(&self) {
        match self {
            Self::Redis(server) => server.lock().unwrap().resume(),
            Self::Postgres(server) => server.signal_all(Signal::CONT),
        }
    }

    /// Loses all that gateways with that prefix have in it.
    pub(crate) fn empty(&self, prefix: &str) {
        match self {
            Self::Redis(server) => drop(server.lock().unwrap().client().ask(&["FLUSHALL"])),
            Self::Postgres(_) => drop(self.sql(&format!("TRUNCATE {prefix}_records, {prefix}_settings"))),
        }
    }

    /// Whether there is nothing in it, of any store.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Redis(server) => server.lock().unwrap().client().ask(&["DBSIZE"]).text() == "0",
            Self::Postgres(_) => self.sql("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0",
        }
    }

    pub(crate) fn lose_secret(&self, prefix: &str) {
        match self {
            Self::Redis(server) => {
                let key = format!("{prefix}:{{00}}:setting:secret");
                assert_eq!(server.lock().unwrap().client().ask(&["DEL", &key]).text(), "1");
            }
            Self::Postgres(_) => drop(self.sql(&format!("DELETE FROM {prefix}_settings WHERE name = 'secret'"))),
        }
    }

    /// How many connections it has, as it says itself.
    pub(crate) fn connections(&self) -> usize {
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
    pub(crate) fn sql(&self, statement: &str) -> String {
        let url = self.url(self.addr());
        let output = Command::new("psql").args([url.as_str(), "-XAtc", statement]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}
