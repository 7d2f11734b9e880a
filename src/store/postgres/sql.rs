//! The statements.

/// With the prefix of the tables written into them. None leaves anything behind in its session, none needs a prepared
/// statement: that is what a connection pool in transaction mode can carry.
#[derive(Debug)]
pub(super) struct Sql {
    pub(super) get: String,
    pub(super) swap: String,
    pub(super) arm: String,
    pub(super) sweep: String,
    pub(super) list_all: String,
    pub(super) list_tag: String,
    pub(super) counts: String,
    pub(super) setting: String,
    pub(super) insert_setting: String,
    pub(super) update_setting: String,
    pub(super) empty: String,
    /// Whether the tables are there, then their version.
    pub(super) schema_exists: String,
    pub(super) schema_version: String,
    pub(super) set_schema_version: String,
    pub(super) rights: String,
    /// Held while tables are made or changed.
    pub(super) lock_schema: String,
    pub(super) listen: String,
    pub(super) channel: String,
    pub(super) prefix: String,
}

/// Where the connection leads, and what the server promises there.
pub(super) const CHECK: &str = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only') = 'on', \
     current_setting('synchronous_commit') <> 'off', current_setting('fsync') = 'on', \
     current_setting('full_page_writes') = 'on', floor(date_part('epoch', clock_timestamp()) * 1000)::bigint";

pub(super) const NOTIFY: &str = "SELECT pg_notify($1, $2)";

/// Unknown entries are counted no further than this: each gateway counts every few seconds.
pub(super) const COUNT_MAX: u64 = 100_000;

impl Sql {
    pub(super) fn new(prefix: &str) -> Self {
        let page = |from: &str| {
            format!(
                "SELECT id, version, tag, expires_at, value, total FROM (SELECT *, count(*) OVER () AS total, \
                 sum(octet_length(value)) OVER (ORDER BY version) - octet_length(value) AS before FROM ({from} \
                 ORDER BY version LIMIT $2) AS page) AS sized WHERE before < $3 ORDER BY version"
            )
        };
        let columns = "version, tag, expires_at, id, value";
        let records = format!("{prefix}_records");
        let count = |tag: u8| {
            format!("(SELECT count(*) FROM (SELECT FROM {records} WHERE tag = {tag} LIMIT {COUNT_MAX}) AS counted)")
        };
        let may = |right: &str| format!("has_table_privilege('{records}', '{right}')");
        Self {
            get: format!("SELECT * FROM {prefix}_get_1($1)"),
            // The limit is set for this transaction, and before the function is called: its last argument needs it.
            swap: format!(
                "SELECT swapped.* FROM (SELECT set_config('lock_timeout', $8, true) AS given) AS limits, LATERAL \
                 {prefix}_swap_1($1, $2, $3, $4, $5, $6, $7 AND limits.given IS NOT NULL) AS swapped"
            ),
            arm: format!("SELECT * FROM {prefix}_await_1($1)"),
            // The server's clock has the last word. What is swept and then lost in a crash is swept again.
            sweep: format!(
                "WITH gone AS (DELETE FROM {records} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {records} WHERE \
                 expires_at <= least($1, floor(date_part('epoch', statement_timestamp()) * 1000)::bigint) \
                 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED)) RETURNING 1) SELECT count(*), set_config('synchronous_commit', 'off', true) FROM gone"
            ),
            list_all: page(&format!(
                "SELECT one.* FROM generate_series(0, 3) AS kinds (kind), LATERAL (SELECT {columns} FROM {records} \
                 WHERE tag = kind AND version > $1 ORDER BY version LIMIT $2) AS one"
            )),
            list_tag: page(&format!("SELECT {columns} FROM {records} WHERE tag = $4 AND version > $1")),
            counts: format!(
                "SELECT {}, {}, (SELECT written_at FROM {records} WHERE tag = 2 ORDER BY version LIMIT 1), \
                 (SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = '{records}'::regclass), \
                 pg_total_relation_size('{records}')",
                count(0),
                count(2)
            ),
            setting: format!("SELECT value FROM {prefix}_settings WHERE name = $1"),
            insert_setting: format!(
                "INSERT INTO {prefix}_settings (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING 1"
            ),
            update_setting: format!(
                "UPDATE {prefix}_settings SET value = $2 WHERE name = $1 AND value = $3 RETURNING 1"
            ),
            empty: format!("SELECT NOT EXISTS (SELECT FROM {prefix}_settings) AND NOT EXISTS (SELECT FROM {records})"),
            schema_exists: format!("SELECT to_regclass('{prefix}_schema') IS NOT NULL"),
            schema_version: format!("SELECT version FROM {prefix}_schema"),
            set_schema_version: format!(
                "INSERT INTO {prefix}_schema (version) VALUES ($1) ON CONFLICT (one) DO UPDATE SET version = $1"
            ),
            rights: format!(
                "SELECT {} AND {} AND {} AND {} AND has_sequence_privilege('{prefix}_versions', 'USAGE') AND \
                 has_table_privilege('{prefix}_settings', 'SELECT') AND \
                 has_table_privilege('{prefix}_settings', 'INSERT') AND \
                 has_table_privilege('{prefix}_settings', 'UPDATE') AND \
                 has_function_privilege('{prefix}_get_1(bytea[])', 'EXECUTE') AND has_function_privilege(\
                 '{prefix}_swap_1(bytea[],bigint[],smallint[],bigint[],bytea[],bigint,boolean)', 'EXECUTE') AND \
                 has_function_privilege('{prefix}_await_1(bytea[])', 'EXECUTE')",
                may("SELECT"),
                may("INSERT"),
                may("UPDATE"),
                may("DELETE")
            ),
            lock_schema: format!("SELECT pg_advisory_xact_lock(hashtext('{prefix}_schema'))::text"),
            listen: format!("LISTEN {prefix}_settled"),
            channel: format!("{prefix}_settled"),
            prefix: prefix.to_owned(),
        }
    }
}
