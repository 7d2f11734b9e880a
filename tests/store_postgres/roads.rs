//! Other ways to the server: TLS, a connection pool.

use super::servers::Pooler;
use super::*;
use oncegate::store::shared::OpenError;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::sync::Arc;

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> Vec<u8> {
        self.0.pem().into_bytes()
    }

    /// Certificate and key.
    fn certify(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_verifies_the_server_and_shows_who_we_are() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (cert, key) = authority.certify("localhost");
    let files = [("ca.pem", &*authority.0.pem()), ("server.pem", &*cert), ("server.key", &*key)]
        .map(|(n, c)| (n, c.to_owned()));
    let files: Vec<(&str, &str)> = files.iter().map(|(name, content)| (*name, &**content)).collect();
    let settings = ["ssl=on", "ssl_ca_file=ca.pem", "ssl_cert_file=server.pem", "ssl_key_file=server.key"];
    let Some(server) = Server::start_with(&settings, &files) else { return };
    let session = session(&server.url()).await;
    session
        .batch_execute("CREATE ROLE with_certificate LOGIN; GRANT ALL ON SCHEMA public TO with_certificate")
        .await
        .unwrap();
    let at = |user: &str, host: &str, query: &str, ca: Option<&Authority>| {
        let mut options = options(format!("postgres://{user}@{host}:{}/postgres{query}", server.port), MS(20_000));
        options.tls.ca = ca.map(Authority::pem);
        options
    };
    for query in ["", "?sslmode=require", "?sslmode=verify-full"] {
        let store = open(&at("postgres", "localhost", query, Some(&authority))).await;
        put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
        let sql = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND application_name = 'oncegate'";
        assert!(session.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0, "{query}");
    }
    for wrong in [
        at("postgres", "localhost", "", Some(&other)),
        at("postgres", "localhost", "", None),
        // Another name than the certificate's.
        at("postgres", "127.0.0.1", "", Some(&authority)),
    ] {
        match Postgres::open(&wrong).await.err() {
            Some(OpenError::Unreachable { reason, .. }) => assert!(reason.contains("certificate"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    // Our own certificate is our name.
    let mut named = at("with_certificate", "localhost", "", Some(&authority));
    let (cert, key) = authority.certify("with_certificate");
    named.tls.client = Some((cert.clone().into_bytes(), key.into_bytes()));
    put(&open(&named).await, id(1), None, value(CLAIMED, None, "claim")).await;
    assert!(matches!(
        Postgres::open(&at("with_certificate", "localhost", "", Some(&authority))).await.err(),
        Some(OpenError::Refused { .. })
    ));
    for (client, ca, key) in [
        (None, Some(b"no certificate".to_vec()), "tls.ca"),
        (Some((b"no certificate".to_vec(), cert.clone().into_bytes())), None, "tls.cert"),
        (Some((cert.into_bytes(), b"no key".to_vec())), None, "tls.key"),
    ] {
        let mut broken = named.clone();
        broken.tls = TlsFiles { ca: ca.or(broken.tls.ca), client };
        match Postgres::open(&broken).await.err() {
            Some(OpenError::Options { key: of, .. }) => assert_eq!(of, key),
            other => panic!("{other:?}"),
        }
    }
    // A server that has none.
    if let Some(server) = &*SERVER {
        let plain = options(server.url().replace("disable", "require"), MS(20_000));
        assert!(matches!(Postgres::open(&plain).await.err(), Some(OpenError::Unreachable { .. })));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_in_transaction_mode_will_do() {
    let Some(server) = &*SERVER else { return };
    let Some(pooler) = Pooler::start(server) else { return };
    let options = options(pooler.url(), MS(20_000));
    let (here, there) = (Arc::new(open(&options).await), Arc::new(open(&options).await));
    let mut watch = there.watch(id(0));
    let claimed = put(&here, id(0), None, value(CLAIMED, None, "claim")).await;
    let tasks: Vec<_> = (1..64_u64)
        .map(|task| {
            let store = Arc::clone(if task % 2 == 0 { &here } else { &there });
            tokio::spawn(async move {
                for n in 0..10 {
                    let n = task * 10 + n;
                    let claimed = put(&store, id(n), None, value(CLAIMED, None, "claim")).await;
                    put(&store, id(n), Some(claimed), value(UNKNOWN, Some(1000), "?")).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(there.list(Some(UNKNOWN), 0, 1000).await.unwrap().entries.len(), 630);
    while here.sweep(1000).await.unwrap() < MS(500) {}
    assert_eq!(there.list(Some(UNKNOWN), 0, 1000).await.unwrap().entries, []);
    assert!(here.swap_setting("secret", None, b"x").await.unwrap());
    assert_eq!(there.setting("secret").await.unwrap().as_deref(), Some(&b"x"[..]));
    put(&here, id(0), Some(claimed), value(COMPLETED, Some(1 << 50), "settled")).await;
    // Who waits looks for himself.
    let began = Instant::now();
    while there.get(id(0)).await.unwrap().unwrap().value.tag == CLAIMED {
        watch.changed().await;
    }
    assert!(began.elapsed() < SOON + MS(1000));
    assert_eq!((here.status().health, there.status().health), (Health::Ok, Health::Ok));
}
