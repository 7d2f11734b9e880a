-- Version 1 of the tables. {p} is the prefix. Runs in one transaction, under an advisory lock.

CREATE TABLE IF NOT EXISTS {p}_schema (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    version integer NOT NULL
);

CREATE TABLE IF NOT EXISTS {p}_settings (
    name text PRIMARY KEY,
    value bytea NOT NULL
);

CREATE SEQUENCE IF NOT EXISTS {p}_versions;

-- Times are milliseconds since the Unix epoch, by the clock of this server. Columns of fixed width come first. No CHECK: each
-- would be read and prepared anew for each record (measured: a third of the cost), and what is read is checked anyway.
CREATE TABLE IF NOT EXISTS {p}_records (
    version bigint NOT NULL,
    written_at bigint NOT NULL,
    expires_at bigint,
    tag smallint NOT NULL,
    -- Some gateway waits for this claim to be settled: whoever does it notifies.
    awaited boolean NOT NULL DEFAULT false,
    id bytea PRIMARY KEY,
    value bytea NOT NULL
) WITH (
    -- Each record is written twice at least, and gone after a day: what is dead has to be found early.
    fillfactor = 90,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_analyze_scale_factor = 0.05,
    toast.autovacuum_vacuum_scale_factor = 0.02
);

-- Not compressed: that would cost more than all the rest.
ALTER TABLE {p}_records ALTER COLUMN value SET STORAGE EXTERNAL;

-- Listings by kind, oldest first; counts of claimed and unknown ones.
CREATE INDEX IF NOT EXISTS {p}_records_listed ON {p}_records (tag, version);
-- The sweep.
CREATE INDEX IF NOT EXISTS {p}_records_expiry ON {p}_records (expires_at) WHERE expires_at IS NOT NULL;

-- What is held under each of the ids, one row each, in their order. Functions, for their plans are kept by the server
-- without prepared statements; and never a plan made when the table was small.
CREATE OR REPLACE FUNCTION {p}_get_1(ids bytea[])
RETURNS TABLE (held_version bigint, held_tag smallint, held_expires_at bigint, held_value bytea, clock bigint)
LANGUAGE plpgsql STABLE SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    wanted bytea;
BEGIN
    FOREACH wanted IN ARRAY ids LOOP
        SELECT r.version, r.tag, r.expires_at, r.value INTO held_version, held_tag, held_expires_at, held_value
            FROM {p}_records r WHERE r.id = wanted;
        clock := floor(date_part('epoch', clock_timestamp()) * 1000)::bigint;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Compare-and-swap of many entries, each for itself, in one transaction. The ids are distinct and in order, so that two such
-- calls never wait for each other in a circle. `expected` NULL: nothing is held; `tag` NULL: remove. A row for each, in
-- their order: whether it was done and the new version, or else what is held.
--
-- `deadline` is by this server's clock: past it nothing is written, for whoever sent this has given it up. Only the commit itself
-- comes later. `durable`: a session that another client of a pool has left without synchronous_commit is mended.
CREATE OR REPLACE FUNCTION {p}_swap_1(
    ids bytea[], expected_versions bigint[], tags smallint[], expiries bigint[], contents bytea[],
    deadline bigint, durable boolean
)
RETURNS TABLE (
    done boolean, held_version bigint, held_tag smallint, held_expires_at bigint, held_value bytea, clock bigint
)
LANGUAGE plpgsql VOLATILE SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    op record;
    heard boolean;
BEGIN
    IF durable AND current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    FOR op IN
        SELECT * FROM unnest(ids, expected_versions, tags, expiries, contents) AS o (id, expected, tag, expires_at, value)
    LOOP
        clock := floor(date_part('epoch', clock_timestamp()) * 1000)::bigint;
        IF clock > deadline THEN
            RAISE EXCEPTION '%', clock USING ERRCODE = 'OG001';
        END IF;
        held_version := (clock << 20) | (nextval('{p}_versions') & 1048575);
        held_tag := NULL;
        held_expires_at := NULL;
        held_value := NULL;
        heard := false;
        IF op.expected IS NULL AND op.tag IS NULL THEN
            done := NOT EXISTS (SELECT FROM {p}_records r WHERE r.id = op.id);
        ELSIF op.expected IS NULL THEN
            INSERT INTO {p}_records AS r (version, written_at, expires_at, tag, id, value)
                VALUES (held_version, clock, op.expires_at, op.tag, op.id, op.value)
                ON CONFLICT DO NOTHING;
            done := FOUND;
        ELSIF op.tag IS NULL THEN
            DELETE FROM {p}_records r WHERE r.id = op.id AND r.version = op.expected RETURNING r.awaited INTO heard;
            done := FOUND;
        ELSE
            UPDATE {p}_records r
                SET version = held_version, written_at = clock, expires_at = op.expires_at, tag = op.tag, value = op.value
                WHERE r.id = op.id AND r.version = op.expected
                RETURNING r.awaited AND op.tag <> 0 INTO heard;
            done := FOUND;
        END IF;
        IF NOT done THEN
            SELECT r.version, r.tag, r.expires_at, r.value INTO held_version, held_tag, held_expires_at, held_value
                FROM {p}_records r WHERE r.id = op.id;
        ELSIF heard THEN
            PERFORM pg_notify('{p}_settled', encode(op.id, 'hex'));
        END IF;
        RETURN NEXT;
    END LOOP;
    clock := floor(date_part('epoch', clock_timestamp()) * 1000)::bigint;
    IF clock > deadline THEN
        RAISE EXCEPTION '%', clock USING ERRCODE = 'OG001';
    END IF;
END
$$;

-- Somebody waits for the claims of these ids. Tells of each whether it is there to be waited for.
CREATE OR REPLACE FUNCTION {p}_await_1(ids bytea[])
RETURNS SETOF boolean
LANGUAGE plpgsql VOLATILE SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    wanted bytea;
BEGIN
    -- A mark that a crash takes away costs a waiter a second.
    PERFORM set_config('synchronous_commit', 'off', true);
    FOREACH wanted IN ARRAY ids LOOP
        UPDATE {p}_records r SET awaited = true WHERE r.id = wanted AND r.tag = 0 AND NOT r.awaited;
        RETURN NEXT FOUND OR EXISTS (SELECT FROM {p}_records r WHERE r.id = wanted AND r.tag = 0);
    END LOOP;
END
$$;
