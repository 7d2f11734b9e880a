// The posts, in SQLite, shared by the API and the worker: each is a process of its own, and may be killed at any instruction.
import { randomUUID } from 'node:crypto';
import Database from 'better-sqlite3';

const SCHEMA = `
  CREATE TABLE IF NOT EXISTS posts (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    workspace TEXT NOT NULL,
    platform TEXT NOT NULL,
    accountId TEXT NOT NULL,
    text TEXT NOT NULL,
    key TEXT,
    state TEXT NOT NULL,      -- queued, publishing, published, failed, unconfirmed; deleted: hidden, but its key is remembered
    createdAt TEXT NOT NULL,
    created TEXT NOT NULL,    -- what the creation answered: a look-up by key answers the same, whatever has happened since
    networkId TEXT,
    networkUrl TEXT,
    reason TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    doubt INTEGER NOT NULL DEFAULT 0  -- 1: for all that the worker knows, an attempt may have been executed
  );
  CREATE INDEX IF NOT EXISTS posts_by_key ON posts (workspace, owner, key) WHERE key IS NOT NULL;
  CREATE INDEX IF NOT EXISTS posts_open ON posts (state) WHERE state IN ('queued', 'publishing');
  CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY,
    postId TEXT NOT NULL UNIQUE,
    platform TEXT NOT NULL,
    enqueuedAt TEXT
  );
  CREATE INDEX IF NOT EXISTS outbox_waiting ON outbox (number) WHERE enqueuedAt IS NULL;
`;
const VISIBLE = `id, workspace, platform, accountId, text, key, state, createdAt, networkId, networkUrl, reason, attempts`;

export function openPosts(file) {
  const db = new Database(file, { timeout: 10_000 }); // how long one process waits for the other's transaction
  db.pragma('journal_mode = WAL');
  db.pragma('synchronous = FULL'); // what was answered survives a power cut
  db.exec(SCHEMA);
  const now = () => new Date().toISOString();

  const insertPost = db.prepare(`
    INSERT INTO posts (id, owner, workspace, platform, accountId, text, key, state, createdAt, created)
    VALUES (@id, @owner, @workspace, @platform, @accountId, @text, @key, @state, @createdAt, @created)`);
  const insertOutbox = db.prepare(`INSERT INTO outbox (postId, platform) VALUES (@id, @platform)`);
  const byId = db.prepare(`SELECT ${VISIBLE} FROM posts WHERE workspace = ? AND id = ? AND state <> 'deleted'`);
  const begin = db.prepare(`
    UPDATE posts SET state = 'publishing', attempts = attempts + 1, doubt = 1
    WHERE id = ? AND state IN ('queued', 'publishing') RETURNING id, platform, accountId, text, attempts`);

  // The write lock is taken at once: a transaction that reads first, and finds that another process has written, would fail.
  const transaction = (run) => db.transaction(run).immediate;

  return {
    /** The post and the note that it has to be enqueued: both or neither. */
    create: transaction(({ owner, workspace, platform, accountId, text, key }) => {
      const id = randomUUID();
      const answer = { id, workspace, platform, accountId, text, key, state: 'queued', createdAt: now() };
      insertPost.run({ ...answer, owner, created: JSON.stringify(answer) });
      insertOutbox.run({ id, platform });
      return answer;
    }),

    list: (workspace) =>
      db.prepare(`SELECT ${VISIBLE} FROM posts WHERE workspace = ? AND state <> 'deleted' ORDER BY number DESC LIMIT 1000`)
        .all(workspace),

    get: (workspace, id) => byId.get(workspace, id),

    /** The newest post that this user made with the key: what its creation answered, and when. Deleted ones count. */
    byKey: (workspace, owner, key) =>
      db.prepare(`SELECT id, created, createdAt FROM posts WHERE workspace = ? AND owner = ? AND key = ? ORDER BY number DESC LIMIT 1`)
        .get(workspace, owner, key),

    /** False if there is no such post, or the worker has begun with it: from then on its text must not change. */
    edit: (workspace, id, text) =>
      db.prepare(`UPDATE posts SET text = ? WHERE workspace = ? AND id = ? AND state = 'queued'`)
        .run(text, workspace, id).changes === 1,

    /** The row stays: the key has been used, and a retry of it must not make the post anew. */
    remove: (workspace, id) =>
      db.prepare(`UPDATE posts SET state = 'deleted' WHERE workspace = ? AND id = ? AND state NOT IN ('publishing', 'deleted')`)
        .run(workspace, id).changes === 1,

    toEnqueue: (limit) =>
      db.prepare(`SELECT postId, platform FROM outbox WHERE enqueuedAt IS NULL ORDER BY number LIMIT ?`).all(limit),
    enqueued: (id) => db.prepare(`UPDATE outbox SET enqueuedAt = ? WHERE postId = ?`).run(now(), id),
    enqueueAgain: (id) => db.prepare(`UPDATE outbox SET enqueuedAt = NULL WHERE postId = ?`).run(id),
    /** Posts that are enqueued, as the outbox has it, and not done. */
    open: () =>
      db.prepare(`SELECT id, posts.platform FROM posts JOIN outbox ON postId = id
                  WHERE state IN ('queued', 'publishing') AND enqueuedAt IS NOT NULL`).all(),
    isOpen: (id) => db.prepare(`SELECT 1 FROM posts WHERE id = ? AND state IN ('queued', 'publishing')`).get(id) !== undefined,

    /** Before an attempt is sent. Nothing, if the post is done or deleted. `doubted`: an earlier attempt may have been executed. */
    begin: transaction((id) => {
      const doubted = db.prepare(`SELECT doubt FROM posts WHERE id = ?`).get(id)?.doubt === 1;
      const post = begin.get(id);
      return post && { ...post, doubted };
    }),

    /** After an attempt that is to be repeated. Another attempt, begun meanwhile (its job had stalled), keeps the doubt. */
    learned: (post, doubt, reason) =>
      db.prepare(`UPDATE posts SET doubt = ?, reason = ? WHERE id = ? AND attempts = ? AND state = 'publishing'`)
        .run(doubt ? 1 : 0, reason, post.id, post.attempts),

    /** Published is what was seen to be published, whatever another attempt of the same job took it for. */
    published: (id, networkId, networkUrl) =>
      db.prepare(`UPDATE posts SET state = 'published', networkId = ?, networkUrl = ?, reason = NULL WHERE id = ? AND state <> 'published'`)
        .run(networkId, networkUrl, id),
    failed: (id, reason) =>
      db.prepare(`UPDATE posts SET state = 'failed', reason = ? WHERE id = ? AND state = 'publishing'`).run(reason, id),
    unconfirmed: (id, reason) =>
      db.prepare(`UPDATE posts SET state = 'unconfirmed', reason = ? WHERE id = ? AND state = 'publishing'`).run(reason, id),
    /** No attempt is left: it failed, unless one of them may have been executed after all. */
    gaveUp: (id, reason) =>
      db.prepare(`UPDATE posts SET state = CASE doubt WHEN 0 THEN 'failed' ELSE 'unconfirmed' END, reason = ?
                  WHERE id = ? AND state = 'publishing'`).run(reason, id),

    close: () => db.close(),
  };
}
