//! Stores that are not opened, and why.

use super::*;
use oncegate::store::postgres::migrate;
use oncegate::store::shared::OpenError;

async fn refusal(options: &Options) -> OpenError {
    match Postgres::open(options).await {
        Ok(_) => panic!("it was opened"),
        Err(error) => {
            assert!(!error.to_string().contains("s3cret") && !format!("{error:?}").contains("s3cret"), "{error:?}");
            error
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_names_and_passwords_are_refused_without_telling_them() {
    let Some(server) = &*SERVER else { return };
    let session = session(&server.url()).await;
    session
        .batch_execute("CREATE ROLE with_password LOGIN PASSWORD 's3cret'; GRANT ALL ON SCHEMA public TO with_password")
        .await
        .unwrap();
    let at = |user: &str, database: &str| {
        let url = format!("postgres://{user}@127.0.0.1:{}/{database}?sslmode=disable", server.port);
        options(url, MS(20_000))
    };
    let right = Options { password: Some("s3cret".to_owned()), ..at("with_password:wrong", "postgres") };
    put(&open(&right).await, id(1), None, value(CLAIMED, None, "claim")).await;
    for wrong in [
        at("with_password:nos3cret", "postgres"),
        Options { password: Some("nos3cret".to_owned()), ..at("with_password", "postgres") },
        at("nobody", "postgres"),
        at("postgres", "nowhere"),
    ] {
        assert!(matches!(refusal(&wrong).await, OpenError::Refused { .. }));
    }
    assert!(matches!(refusal(&at("a:s3cret@b", "postgres")).await, OpenError::Options { key: "url", .. }));
    for prefix in ["", "1", "x-y", "Upper", "x;drop", &"x".repeat(41)] {
        let options = Options { prefix: prefix.to_owned(), ..at("postgres", "postgres") };
        assert!(matches!(refusal(&options).await, OpenError::Options { key: "prefix", .. }), "{prefix}");
    }
    let url = format!("postgres://postgres:s3cret@127.0.0.1:{}/postgres", servers::free_port());
    let began = Instant::now();
    assert!(matches!(refusal(&options(url, MS(20_000))).await, OpenError::Unreachable { .. }));
    assert!(began.elapsed() < SOON);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_refuses_what_may_lose_acknowledged_writes() {
    let Some(server) = Server::start(&[]) else { return };
    let session = session(&server.url()).await;
    let options = options(server.url(), MS(5000));
    let relaxed = Options { strict: false, ..options.clone() };
    // One that is open meanwhile.
    let store = open(&options).await;
    for setting in ["synchronous_commit", "fsync", "full_page_writes"] {
        session.batch_execute(&format!("ALTER SYSTEM SET {setting} = off")).await.unwrap();
        session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        until("it is set", async || {
            let row = session.query_one(&format!("SHOW {setting}"), &[]).await.unwrap();
            row.get::<_, String>(0) == "off"
        })
        .await;
        match refusal(&options).await {
            OpenError::NotStrict { reason, .. } => assert!(reason.contains(setting), "{reason}"),
            other => panic!("{other:?}"),
        }
        put(&open(&relaxed).await, id(1), None, value(CLAIMED, None, setting)).await;
        swap(&store, id(1), store.get(id(1)).await.unwrap().map(|entry| entry.version), None).await.unwrap();
        if setting == "fsync" {
            // Noticed by the heartbeat; then nothing is claimed any more.
            until_health(&store, Health::Unreachable).await;
            assert_eq!(unavailable(store.get(id(1)).await), None);
        }
        session.batch_execute(&format!("ALTER SYSTEM RESET {setting}")).await.unwrap();
        session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
        until_health(&store, Health::Ok).await;
    }
    // A session of a pool that another client has left in such a state.
    let prefix = &options.prefix;
    let sql = format!(
        "SELECT done FROM {prefix}_swap_1(ARRAY['\\x00112233445566778899aabbccddeeff'::bytea], ARRAY[NULL]::bigint[], \
         ARRAY[0]::smallint[], ARRAY[NULL]::bigint[], ARRAY[''::bytea], 1::bigint << 60, true)"
    );
    session.batch_execute("SET synchronous_commit = off; BEGIN").await.unwrap();
    assert!(session.query_one(&sql, &[]).await.unwrap().get::<_, bool>(0));
    let row = session.query_one("SHOW synchronous_commit", &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), "on", "for this transaction");
    session.batch_execute("COMMIT").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_became_lax_is_noticed_before_anything_is_written_on_a_new_connection() {
    let Some(server) = Server::start(&[]) else { return };
    let session = session(&server.url()).await;
    let store = open(&options(server.url(), MS(5000))).await;
    put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    session.batch_execute("ALTER SYSTEM SET fsync = off").await.unwrap();
    session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    until("it is set", async || session.query_one("SHOW fsync", &[]).await.unwrap().get::<_, String>(0) == "off").await;
    let ours = "FROM pg_stat_activity WHERE application_name = 'oncegate'";
    let old = session.query(&format!("SELECT pid, pg_terminate_backend(pid) {ours}"), &[]).await.unwrap();
    let old: Vec<i32> = old.iter().map(|row| row.get(0)).collect();
    assert!(!old.is_empty());
    until("its connections have ended", async || {
        let left = session.query(&format!("SELECT {ours} AND pid = ANY ($1)"), &[&old]).await;
        left.unwrap().is_empty()
    })
    .await;
    until("it is refused for that", async || {
        match swap(&store, id(2), None, Some(value(CLAIMED, None, "claim"))).await {
            Err(StoreError::Unavailable { reason, .. }) => reason.contains("fsync"),
            other => panic!("{other:?}"),
        }
    })
    .await;
    assert_eq!(store.status().health, Health::Unreachable);
    session.batch_execute("ALTER SYSTEM RESET fsync").await.unwrap();
    session.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    until_health(&store, Health::Ok).await;
    assert_eq!(store.get(id(2)).await.unwrap(), None);
}

/// As a connection pool in transaction mode may hand them out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_somebody_left_lax_commit_durably_all_the_same() {
    let Some(server) = &*SERVER else { return };
    let options = options(server.url(), MS(20_000));
    let store = open(&options).await;
    let (session, prefix) = (session(&server.url()).await, &options.prefix);
    // Notes how each write is committed, and leaves its session in that state.
    let trigger = format!(
        "CREATE TABLE {prefix}_seen (setting text); \
         CREATE FUNCTION {prefix}_loosen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
         INSERT INTO {prefix}_seen VALUES (current_setting('synchronous_commit')); \
         PERFORM set_config('synchronous_commit', 'off', false); RETURN NULL; END $$; \
         CREATE TRIGGER loosen AFTER INSERT ON {prefix}_records FOR EACH ROW EXECUTE FUNCTION {prefix}_loosen()"
    );
    session.batch_execute(&trigger).await.unwrap();
    // More than there are connections.
    for n in 0..20 {
        put(&store, id(n), None, value(CLAIMED, None, "claim")).await;
    }
    let seen = session.query(&format!("SELECT setting, count(*) FROM {prefix}_seen GROUP BY 1"), &[]).await.unwrap();
    let seen: Vec<(String, i64)> = seen.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(seen, [("on".to_owned(), 20)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_are_made_once_by_whoever_may() {
    let Some(server) = &*SERVER else { return };
    let session = session(&server.url()).await;
    // The last who opens it has no right to make anything.
    session.batch_execute("CREATE ROLE gateway LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC").await.unwrap();
    let mut options = options(server.url(), MS(20_000));
    let gateway = Options { url: server.url().replace("postgres@", "gateway@"), ..options.clone() };
    options.migrate = false;
    match refusal(&options).await {
        OpenError::Refused { reason, .. } => assert!(reason.contains("oncegate store migrate"), "{reason}"),
        other => panic!("{other:?}"),
    }
    match refusal(&gateway).await {
        OpenError::Refused { reason, .. } => assert!(reason.contains("oncegate store migrate"), "{reason}"),
        other => panic!("{other:?}"),
    }
    // Many at once, as gateways that start together.
    let migrations: Vec<_> = (0..8)
        .map(|_| {
            let options = options.clone();
            tokio::spawn(async move { migrate(&options).await })
        })
        .collect();
    for migration in migrations {
        migration.await.unwrap().unwrap();
    }
    migrate(&options).await.unwrap();
    match refusal(&gateway).await {
        OpenError::Refused { reason, .. } => assert!(reason.contains("SELECT, INSERT, UPDATE and DELETE"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let prefix = &options.prefix;
    let grant = format!(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON {prefix}_records, {prefix}_settings TO gateway; \
         GRANT SELECT ON {prefix}_schema TO gateway; GRANT USAGE ON {prefix}_versions TO gateway"
    );
    session.batch_execute(&grant).await.unwrap();
    let store = open(&gateway).await;
    assert!(store.status().created, "nobody has used it yet");
    let version = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let watch = store.watch(id(1));
    swap(&store, id(1), Some(version), None).await.unwrap();
    drop(watch);
    store.sweep(0).await.unwrap();
    assert!(store.swap_setting("secret", None, b"x").await.unwrap());
    assert!(!open(&gateway).await.status().created);
    // Of a later program.
    session.batch_execute(&format!("UPDATE {prefix}_schema SET version = 1000")).await.unwrap();
    match refusal(&gateway).await {
        OpenError::Refused { reason, .. } => assert!(reason.contains("1000"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(migrate(&options).await, Err(OpenError::Refused { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_were_emptied_are_another_store_until_they_are_back() {
    let Some(server) = Server::start(&[]) else { return };
    let session = session(&server.url()).await;
    let options = options(server.url(), MS(3000));
    let store = open(&options).await;
    let version = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let prefix = &options.prefix;
    let disowned = async |n: u64| match swap(&store, id(n), None, Some(value(CLAIMED, None, "claim"))).await {
        Err(StoreError::Unavailable { reason, may_land_until_ms: None }) => {
            assert!(reason.contains("not the store that the gateway started with"), "{reason}");
        }
        other => panic!("{other:?}"),
    };
    session
        .batch_execute(&format!(
            "CREATE TABLE kept_records AS TABLE {prefix}_records; CREATE TABLE kept_settings AS TABLE {prefix}_settings; \
             TRUNCATE {prefix}_records, {prefix}_settings"
        ))
        .await
        .unwrap();
    // The heartbeat looks.
    until_health(&store, Health::Unreachable).await;
    disowned(2).await;
    // Whoever starts now begins a new store, and is alone with it.
    let new = open(&options).await;
    assert!(new.status().created);
    put(&new, id(1), None, value(CLAIMED, None, "anew")).await;
    disowned(2).await;
    new.close();
    let count = session.query_one(&format!("SELECT count(*) FROM {prefix}_records"), &[]).await.unwrap();
    assert_eq!(count.get::<_, i64>(0), 1, "nothing else was written");
    // A backup is brought back.
    session
        .batch_execute(&format!(
            "TRUNCATE {prefix}_records, {prefix}_settings; INSERT INTO {prefix}_records TABLE kept_records; \
             INSERT INTO {prefix}_settings TABLE kept_settings"
        ))
        .await
        .unwrap();
    until_health(&store, Health::Ok).await;
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, version);
    put(&store, id(2), None, value(CLAIMED, None, "claim")).await;
}

/// While there was no connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_in_its_place_is_another_store() {
    let Some(server) = Server::start(&[]) else { return };
    let options = options(server.url(), MS(3000));
    let store = open(&options).await;
    put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let session = session(&server.url()).await;
    let prefix = &options.prefix;
    session
        .batch_execute(&format!(
            "TRUNCATE {prefix}_records; UPDATE {prefix}_settings SET value = 'another'; \
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'oncegate'"
        ))
        .await
        .unwrap();
    until_health(&store, Health::Unreachable).await;
    let claimed = swap(&store, id(1), None, Some(value(CLAIMED, None, "claim"))).await;
    assert_eq!(unavailable(claimed), None);
    let count = session.query_one(&format!("SELECT count(*) FROM {prefix}_records"), &[]).await.unwrap();
    assert_eq!(count.get::<_, i64>(0), 0, "nothing was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_are_taken_away_are_missed_and_found_again() {
    let Some(server) = &*SERVER else { return };
    let session = session(&server.url()).await;
    let options = options(server.url(), MS(3000));
    let store = open(&options).await;
    let version = put(&store, id(1), None, value(CLAIMED, None, "claim")).await;
    let prefix = &options.prefix;
    session.batch_execute(&format!("ALTER TABLE {prefix}_records RENAME TO {prefix}_gone")).await.unwrap();
    assert_eq!(unavailable(swap(&store, id(2), None, Some(value(CLAIMED, None, "claim"))).await), None);
    until_health(&store, Health::Unreachable).await;
    session.batch_execute(&format!("ALTER TABLE {prefix}_gone RENAME TO {prefix}_records")).await.unwrap();
    until_health(&store, Health::Ok).await;
    assert_eq!(store.get(id(1)).await.unwrap().unwrap().version, version);
}
