// The posting API. It knows nothing of retries: the gateway before it lets each key through once.
import { fileURLToPath } from 'node:url';
import { Queue } from 'bullmq';
import express from 'express';
import { authorize } from './auth.mjs';
import { demo } from './demo.mjs';
import { keyOf } from './key.mjs';
import { reconcile, relay } from './outbox.mjs';
import { openPosts } from './posts.mjs';
import { Problem, sendProblem } from './problem.mjs';
import { listen, number, onStop, setting } from './process.mjs';
import { connection, QUEUE } from './queue.mjs';

const PLATFORMS = ['mastodon', 'x'];
const DAY = 24 * 3600 * 1000;
// As the edge gateway has them: how long it replays, and how long it may ask what became of a key.
const KEY_RETENTION = number('KEY_RETENTION_MS', DAY);
const UNKNOWN_RETENTION = number('UNKNOWN_RETENTION_MS', 7 * DAY);

const posts = openPosts(setting('DATABASE'));
const queue = new Queue(QUEUE, { connection: connection(number('REDIS_PORT', 6379)) });
queue.on('error', (error) => console.error(`queue: ${error.message}`)); // it connects again by itself
const outbox = relay(posts, queue);

const app = express();
// Express ignores case unless it is told not to; the gateway's route does not (`case_sensitive`).
app.set('case sensitive routing', true);
app.disable('x-powered-by');
app.disable('etag');
const base = '/v1/workspaces/:workspace/posts';
app.use(base, express.json({ limit: '64kb' }));

function text(body) {
  const value = body?.text;
  if (typeof value !== 'string' || value.trim() === '' || value.length > 5000) {
    throw new Problem(400, 'body_invalid', 'text has to be a string of 1 to 5000 characters.');
  }
  return value;
}

function wanted(body) {
  const { platform, accountId, status } = body ?? {};
  if (!PLATFORMS.includes(platform)) {
    throw new Problem(400, 'body_invalid', `platform has to be one of: ${PLATFORMS.join(', ')}.`);
  }
  if (typeof accountId !== 'string' || !/^[\w.@-]{1,64}$/.test(accountId)) {
    throw new Problem(400, 'body_invalid', 'accountId has to be 1 to 64 letters, digits, or any of . @ _ -');
  }
  if (status !== 'publish') throw new Problem(400, 'body_invalid', 'status has to be "publish".');
  return { platform, accountId, text: text(body) };
}

function found(req) {
  const post = posts.get(req.params.workspace, req.params.id);
  if (!post) throw new Problem(404, 'not_found', 'There is no such post.');
  return post;
}

app.post(base, authorize, (req, res) => {
  const key = keyOf(req.get('Idempotency-Key'));
  const post = posts.create({ ...wanted(req.body), workspace: req.params.workspace, owner: req.user, key });
  void outbox.pass(); // the answer does not wait for the queue: the outbox remembers
  res.status(201).location(`/v1/workspaces/${post.workspace}/posts/${post.id}`).json(post);
});

app.get(base, authorize, (req, res) => {
  res.json({ posts: posts.list(req.params.workspace) });
});

// What became of a key: the gateway asks this when it has lost an outcome.
app.get(`${base}/by-key/:key`, authorize, (req, res) => {
  const post = posts.byKey(req.params.workspace, req.user, req.params.key);
  const age = post && Date.now() - Date.parse(post.createdAt);
  if (!post || age > KEY_RETENTION + UNKNOWN_RETENTION) throw new Problem(404, 'not_found', 'No post was made with this key.');
  // Older than the gateway replays: this post may be the one that is asked for, or the key may have been used once more since. Neither
  // answer would be known to be right, so neither is given, and the gateway says that the outcome is unknown.
  if (age > KEY_RETENTION) throw new Problem(409, 'key_old', 'The post with this key may be of an earlier use of it.');
  res.location(`/v1/workspaces/${req.params.workspace}/posts/${post.id}`);
  res.type('application/json').send(post.created);
});

app.get(`${base}/:id`, authorize, (req, res) => {
  res.json(found(req));
});

app.patch(`${base}/:id`, authorize, (req, res) => {
  found(req);
  if (!posts.edit(req.params.workspace, req.params.id, text(req.body))) {
    throw new Problem(409, 'not_queued', 'Only a post that is queued can be changed: this one is on its way, or done.');
  }
  res.json(found(req));
});

app.delete(`${base}/:id`, authorize, (req, res) => {
  found(req);
  if (!posts.remove(req.params.workspace, req.params.id)) {
    throw new Problem(409, 'publishing', 'This post is on its way to the network.');
  }
  res.status(204).end();
});

app.use('/demo', demo(setting('NETWORK_CONTROL_URL')));
app.use(express.static(fileURLToPath(new URL('../web', import.meta.url))));

app.use((_req, _res) => {
  throw new Problem(404, 'not_found', 'There is nothing here.');
});
app.use((error, _req, res, next) => {
  if (res.headersSent) return next(error);
  if (error instanceof Problem) return sendProblem(res, error);
  if (error.status >= 400 && error.status < 500) {
    return sendProblem(res, { status: error.status, code: 'body_invalid', detail: error.message });
  }
  console.error(error);
  sendProblem(res, { status: 500, code: 'internal', detail: 'The API failed; its log says why.' });
});

const server = listen(app, number('PORT', 0));
reconcile(posts, queue)
  .catch((error) => console.error(`reconciler: ${error.message}`))
  .finally(() => outbox.pass());

onStop(async () => {
  outbox.stop();
  await new Promise((done) => server.close(done).closeIdleConnections());
});
