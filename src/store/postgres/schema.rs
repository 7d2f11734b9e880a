//! Tables and functions: made, migrated, checked.

use super::connect::{Connection, Connector, describe};
use crate::store::shared::OpenError;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

/// What brings the schema from each version to the next.
const MIGRATIONS: &[&str] = &[include_str!("schema_1.sql")];

const RIGHTS: &str = "the role needs SELECT, INSERT, UPDATE and DELETE on the tables, USAGE on the sequence and EXECUTE on \
     the functions that begin with store.prefix";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Schema {
    Absent,
    Older,
    Current,
}

fn current() -> i32 {
    i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX)
}

/// # Errors
/// [`OpenError::Refused`] for one of a later oncegate.
pub(super) async fn find(connection: &Connection, connector: &Connector) -> Result<Schema, OpenError> {
    let sql = &connector.sql;
    let exists = connection.client.query_typed_one(&sql.schema_exists, &[]).await;
    let exists = exists.map_err(|error| connector.refusal(&error))?;
    if !exists.try_get::<_, bool>(0).unwrap_or(false) {
        return Ok(Schema::Absent);
    }
    let row = connection.client.query_typed_opt(&sql.schema_version, &[]).await;
    let row = row.map_err(|error| match error.code() {
        Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            OpenError::Refused { place: connector.place.clone(), reason: RIGHTS.to_owned() }
        }
        _ => connector.refusal(&error),
    })?;
    let version = row.and_then(|row| row.try_get::<_, i32>(0).ok()).unwrap_or(0);
    if version > current() {
        let reason = format!("its tables are of version {version}, and this oncegate knows {} only", current());
        return Err(OpenError::Refused { place: connector.place.clone(), reason });
    }
    Ok(if version == current() { Schema::Current } else { Schema::Older })
}

/// Whether tables are there that this program can use, and may.
///
/// # Errors
/// [`OpenError::Refused`].
pub(super) async fn check(connection: &Connection, connector: &Connector) -> Result<(), OpenError> {
    let refused = |reason: &str| OpenError::Refused { place: connector.place.clone(), reason: reason.to_owned() };
    match find(connection, connector).await? {
        Schema::Current => {}
        Schema::Absent => return Err(refused("the tables are missing; `oncegate store migrate` makes them")),
        Schema::Older => return Err(refused("the tables are older; `oncegate store migrate` brings them up to date")),
    }
    let rights = connection.client.query_typed_one(&connector.sql.rights, &[]).await;
    let rights = rights.map_err(|error| connector.refusal(&error))?;
    if rights.try_get::<_, bool>(0).unwrap_or(false) {
        return Ok(());
    }
    Err(refused(RIGHTS))
}

/// Brings the tables up to date; two that do so at once do it once. Whether there were none before.
///
/// # Errors
/// [`OpenError::Refused`], [`OpenError::Unreachable`].
pub(super) async fn migrate(connection: &mut Connection, connector: &Connector) -> Result<bool, OpenError> {
    let before = find(connection, connector).await?;
    if before == Schema::Current {
        return Ok(false);
    }
    let failed = |error: &tokio_postgres::Error| match connector.refusal(error) {
        OpenError::Refused { place, .. } => {
            let reason = format!(
                "the tables cannot be made or changed: {}. Let a role that may do it run `oncegate store migrate`",
                describe(error)
            );
            OpenError::Refused { place, reason }
        }
        other => other,
    };
    let sql = &connector.sql;
    let transaction = connection.client.transaction().await.map_err(|error| failed(&error))?;
    transaction.query_typed(&sql.lock_schema, &[]).await.map_err(|error| failed(&error))?;
    // Now that nobody else is at it.
    let exists = transaction.query_typed(&sql.schema_exists, &[]).await.map_err(|error| failed(&error))?;
    let mut version = 0;
    if exists.first().is_some_and(|row| row.try_get::<_, bool>(0).unwrap_or(false)) {
        let row = transaction.query_typed(&sql.schema_version, &[]).await.map_err(|error| failed(&error))?;
        version = row.first().and_then(|row| row.try_get::<_, i32>(0).ok()).unwrap_or(0);
    }
    let created = version == 0;
    for (migration, from) in MIGRATIONS.iter().zip(0..) {
        if from >= version {
            let script = migration.replace("{p}", &sql.prefix);
            transaction.batch_execute(&script).await.map_err(|error| failed(&error))?;
        }
    }
    if version < current() {
        let set = transaction.query_typed(&sql.set_schema_version, &[(&current(), Type::INT4)]).await;
        set.map_err(|error| failed(&error))?;
    }
    transaction.commit().await.map_err(|error| failed(&error))?;
    Ok(created)
}
