// A stand-in for two social networks, with the routes by which Mastodon and X are posted to. It misbehaves on demand, and keeps books on
// what was posted. It does not look at keys, but for the books: a request that arrives twice is two posts.
import express from 'express';
import { auditPage, postPage } from './audit.mjs';
import { draw, FAULTS, MODES, pick, STORM } from './faults.mjs';
import { listen, number, onStop } from './process.mjs';

const LIMITS = { mastodon: 500, x: 280 };
const control = { mode: 'good', seed: number('SEED', 1), storm: STORM, slowMs: [3000, 6000] };
let books; // of this run: posts as they were made, and how many requests each key came with
const clear = () => (books = { posts: [], requests: {}, arrivals: new Map(), inFlight: 0, next: 1 });
clear();

const app = express();
app.disable('x-powered-by');
app.disable('etag');
app.use(express.json(), express.urlencoded({ extended: false }));

/** What is wrong with the request, as either network puts it. */
function objection(platform, req, text) {
  if (!/^Bearer \S/.test(req.get('Authorization') ?? '')) {
    return [401, platform === 'x' ? { title: 'Unauthorized', status: 401, detail: 'Unauthorized' } : { error: 'The access token is invalid' }];
  }
  if (typeof text !== 'string' || text === '') {
    return [platform === 'x' ? 400 : 422, { error: "Validation failed: Text can't be blank" }];
  }
  if ([...text].length > LIMITS[platform]) {
    const detail = `The text is longer than ${LIMITS[platform]} characters`;
    return platform === 'x' ? [403, { title: 'Forbidden', status: 403, detail }] : [422, { error: `Validation failed: ${detail}` }];
  }
}

function make(platform, req, text) {
  const post = {
    id: String(books.next++),
    platform,
    account: req.get('Authorization').slice('Bearer '.length),
    text,
    key: req.get('Idempotency-Key') ?? null,
    at: new Date().toISOString(),
  };
  books.posts.push(post);
  return post;
}

function answer(platform, req, res, post) {
  if (platform === 'x') return res.status(201).json({ data: { id: post.id, text: post.text } });
  const url = `http://${req.get('Host')}/@demo/${post.id}`;
  res.json({ id: post.id, created_at: post.at, url, uri: url, content: post.text, visibility: 'public' });
}

async function publish(platform, req, res, text) {
  const wrong = objection(platform, req, text);
  if (wrong) return res.status(wrong[0]).json(wrong[1]);
  const name = `${platform} ${text}`;
  const arrival = (books.arrivals.get(name) ?? 0) + 1;
  books.arrivals.set(name, arrival);
  const key = req.get('Idempotency-Key') ?? '';
  books.requests[key] = (books.requests[key] ?? 0) + 1;
  const mode = control.mode;
  const fault = mode === 'stormy' ? pick(control.storm, draw(control.seed, name, arrival)) : mode;
  books.inFlight += 1;
  try {
    switch (fault) {
      case 'slow': {
        const [from, to] = control.slowMs;
        await new Promise((done) => setTimeout(done, from + (to - from) * draw(control.seed, 'slow', name, arrival)));
        return answer(platform, req, res, make(platform, req, text));
      }
      case 'throttled':
        return res.status(429).set('Retry-After', '1').json({ error: 'Too many requests' });
      case 'failing':
        return res.status(500).json({ error: 'Something is broken' });
      case 'failing-after': // a network that has saved the post, and fails at what comes next
        make(platform, req, text);
        return res.status(500).json({ error: 'Something is broken' });
      case 'lost-before':
        return req.socket.resetAndDestroy();
      case 'lost-after':
        make(platform, req, text);
        return req.socket.resetAndDestroy();
      default:
        return answer(platform, req, res, make(platform, req, text));
    }
  } finally {
    books.inFlight -= 1;
  }
}

app.post('/api/v1/statuses', (req, res) => publish('mastodon', req, res, req.body?.status));
app.post('/2/tweets', (req, res) => publish('x', req, res, req.body?.text));

/** What was posted, how often under each key, and how many requests came for it. */
function audit() {
  const keys = {};
  for (const post of books.posts) keys[post.key ?? ''] = (keys[post.key ?? ''] ?? 0) + 1;
  const twice = Object.keys(keys).filter((key) => key !== '' && keys[key] > 1);
  return { posts: books.posts, keys, twice, requests: books.requests, inFlight: books.inFlight };
}

app.get('/audit', (_req, res) => res.json(audit()));
app.delete('/audit', (_req, res) => {
  clear();
  res.status(204).end();
});
app.get('/', (_req, res) => res.type('html').send(auditPage(audit())));
for (const path of ['/@demo/:id', '/i/status/:id']) {
  app.get(path, (req, res) => {
    const post = books.posts.find(({ id }) => id === req.params.id);
    res.status(post ? 200 : 404).type('html').send(postPage(post));
  });
}

const controls = () => ({ mode: control.mode, modes: MODES, seed: control.seed, storm: control.storm, slowMs: control.slowMs });
app.get('/control', (_req, res) => res.json(controls()));
app.put('/control', (req, res) => {
  const { mode = control.mode, seed = control.seed, storm = control.storm, slowMs = control.slowMs } = req.body ?? {};
  const wrong =
    (!MODES.includes(mode) && `mode has to be one of: ${MODES.join(', ')}`) ||
    (!Number.isFinite(seed) && 'seed has to be a number') ||
    (Object.keys(storm).some((fault) => !FAULTS.includes(fault) || !(storm[fault] >= 0)) && `storm has to give weights to: ${FAULTS.join(', ')}`) ||
    (!(Array.isArray(slowMs) && slowMs.length === 2 && slowMs[0] <= slowMs[1]) && 'slowMs has to be [from, to]');
  if (wrong) return res.status(400).json({ error: wrong });
  Object.assign(control, { mode, seed, storm, slowMs });
  res.json(controls());
});

const server = listen(app, number('PORT', 0));
onStop(() => new Promise((done) => server.close(done).closeAllConnections()));
