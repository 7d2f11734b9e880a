// The storm, with the egress gateway and without. POSTING_SEED repeats one, POSTING_POSTS and POSTING_KILLS make it smaller or larger.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { jobId } from '../src/queue.mjs';
import { begin, SEED } from './helpers.mjs';
import { storm } from './storm.mjs';

const size = { seed: SEED, count: Number(process.env.POSTING_POSTS ?? 300), kills: Number(process.env.POSTING_KILLS ?? 20) };

function count(values) {
  const counts = {};
  for (const value of values) counts[value] = (counts[value] ?? 0) + 1;
  return counts;
}

/** The figures of a storm, in one place: they are what a failure has to be understood from. */
function tell(name, { posts, books, killed, slowestStart, tally, answers }, started) {
  const figures = {
    ...size,
    seconds: Math.round((Date.now() - started) / 1000),
    killed,
    slowestStart,
    states: count(posts.map(({ state }) => state)),
    unconfirmedAtNetwork: posts.filter((post) => post.state === 'unconfirmed' && books.keys[jobId(post.id, post.platform)]).length,
    requestsAtNetwork: Object.values(books.requests).reduce((sum, number) => sum + number, 0),
    twice: books.twice.length,
    finalAnswers: count([...answers.values()].flat().map(({ status, body }) => body?.code ?? status)),
    tally,
  };
  console.log(`${name}: ${JSON.stringify(figures)}`);
}

/** What has to be true of the API and its clients, whatever is between the worker and the network. */
function oneAnswerPerKey({ clicks, answers, posts }) {
  for (const click of clicks) {
    const got = answers.get(click.key);
    const different = new Set(got.map(({ status, location, text }) => `${status} ${location} ${text}`));
    assert.equal(different.size, 1, `${click.key} was answered differently:\n${[...different].join('\n')}`);
    const [{ status, body }] = got;
    assert.ok(status === 201 || status === 200, `${click.key}: ${[...different]}`);
    const made = posts.filter(({ key, workspace }) => key === click.key && workspace === click.workspace);
    assert.deepEqual(made.map(({ id }) => id), [body.id], `${click.key}: one post, and the one that was answered`);
  }
  assert.equal(posts.length, clicks.length);
}

test('a storm: every click is one answer, and at most one post at the network', async (t) => {
  console.log(`POSTING_SEED=${SEED}`);
  const started = Date.now();
  const { stack, passed } = await begin(t);
  const seen = await storm(stack, size);
  tell('with the egress gateway', seen, started);
  oneAnswerPerKey(seen);
  const { posts, books } = seen;
  assert.deepEqual(books.twice, [], 'no post is at the network twice');
  const texts = count(books.posts.map(({ platform, text }) => `${platform} ${text}`));
  assert.deepEqual(Object.entries(texts).filter(([, often]) => often > 1), [], 'nor with another key');
  const known = new Map(posts.map((post) => [jobId(post.id, post.platform), post]));
  for (const { key } of books.posts) assert.ok(known.has(key), `the network has ${key}, and the API knows nothing of it`);
  for (const [key, post] of known) {
    const there = books.posts.find((one) => one.key === key);
    const place = `${key} is ${post.state}: ${post.reason}`;
    switch (post.state) {
      case 'published':
        assert.deepEqual([there?.id, there?.text, there?.platform], [post.networkId, post.text, post.platform], place);
        break;
      case 'failed':
        assert.equal(there, undefined, `${place}, but it is at the network`);
        assert.ok(post.reason, place);
        break;
      case 'unconfirmed':
        assert.ok(post.reason, place);
        break;
      default:
        assert.fail(place);
    }
  }
  // A storm that has not blown shows nothing.
  const states = count(posts.map(({ state }) => state));
  if (size.count >= 100) assert.ok(states.published > 0 && states.unconfirmed > 0 && states.failed > 0, JSON.stringify(states));
  passed();
});

test('the same storm without the egress gateway publishes twice: the test can fail', async (t) => {
  const started = Date.now();
  const { stack, passed } = await begin(t, { egress: false });
  const seen = await storm(stack, size);
  tell('without it', seen, started);
  oneAnswerPerKey(seen); // the edge gateway is there, and does its part
  assert.ok(seen.books.twice.length >= 1, 'at least one post is at the network twice');
  passed();
});
