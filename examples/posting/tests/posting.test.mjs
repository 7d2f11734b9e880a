// What the scheme promises, a test for each sentence.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { after, before, beforeEach, test } from 'node:test';
import { promisify } from 'node:util';
import { jobId } from '../src/queue.mjs';
import { atNetwork, audit, begin, Client, hello, newKey, openQueue, setNetwork, until } from './helpers.mjs';

const undo = [];
const suite = { after: (what) => undo.unshift(what) };
let stack, queue, demo, other, failures = 0;
before(async () => {
  const begun = await begin(suite);
  stack = begun.stack;
  undo.unshift(() => failures === 0 && begun.passed());
  queue = openQueue(suite, stack);
  demo = new Client(stack);
  other = new Client(stack, { workspace: 'other' });
});
after(async () => {
  for (const what of undo) await what();
});
beforeEach(() => setNetwork(stack, { mode: 'good', slowMs: [3000, 3000] }));

/** A test that leaves the logs where they are if it fails. */
function it(name, run) {
  test(name, async (t) => {
    try {
      await run(t);
    } catch (error) {
      failures += 1;
      throw error;
    }
  });
}

it('the first request with a key creates the post and enqueues its job', async () => {
  const key = newKey();
  const answer = await demo.create(hello(), key);
  assert.equal(answer.status, 201);
  assert.equal(answer.replayed, false);
  const { id, createdAt, ...post } = answer.body;
  assert.deepEqual(post, { workspace: 'demo', platform: 'mastodon', accountId: 'acc_1', text: 'Hello', key, state: 'queued' });
  assert.ok(Math.abs(Date.parse(createdAt) - Date.now()) < 60_000, createdAt);
  assert.equal(answer.location, `/v1/workspaces/demo/posts/${id}`);
  const job = await until('the job is there', () => queue.getJob(jobId(id, 'mastodon')));
  assert.deepEqual([job.data, job.opts.attempts], [{ postId: id }, 5]);
  const published = await demo.in('published', id);
  assert.deepEqual(await atNetwork(stack, published), { requests: 1, posts: 1 });
  const there = await fetch(published.networkUrl);
  assert.ok(there.status === 200 && (await there.text()).includes('Hello'), published.networkUrl);
  assert.deepEqual([published.attempts, published.reason], [1, null]);
  assert.deepEqual((await demo.posts())[0], published);
});

it('X gets its posts by its own route', async () => {
  const { body } = await demo.create(hello({ platform: 'x', text: 'Hello X' }));
  const published = await demo.in('published', body.id);
  assert.equal((await fetch(published.networkUrl)).status, 200);
  const there = (await audit(stack)).posts.find(({ key }) => key === jobId(body.id, 'x'));
  assert.deepEqual([there.platform, there.text, there.account], ['x', 'Hello X', 'x-token-of-acc_1']);
});

it('the same key again returns the previous response, and the network is not called', async () => {
  const key = newKey();
  const first = await demo.create(hello(), key);
  await demo.in('published', first.body.id);
  const before = await audit(stack);
  for (let retry = 1; retry <= 3; retry += 1) {
    const again = await demo.create(hello(), key);
    assert.deepEqual([again.status, again.text, again.location, again.replayed], [201, first.text, first.location, true]);
  }
  assert.deepEqual((await queue.getJobCounts('wait', 'active', 'delayed')), { wait: 0, active: 0, delayed: 0 });
  assert.deepEqual(await audit(stack), before);
});

it('a double click is one post', async () => {
  const key = newKey();
  const answers = await Promise.all([1, 2, 3, 4].map(() => demo.create(hello(), key)));
  assert.equal(new Set(answers.map(({ status, text }) => `${status} ${text}`)).size, 1);
  assert.equal(answers.filter(({ replayed }) => replayed).length, 3);
  assert.equal((await demo.posts()).filter((post) => post.key === key).length, 1);
});

it('the same key with another payload is refused', async () => {
  const key = newKey();
  assert.equal((await demo.create(hello(), key)).status, 201);
  const answer = await demo.create(hello({ text: 'Something else' }), key);
  assert.deepEqual([answer.status, answer.body.code], [422, 'key_reused']);
});

it('a worker that is killed while it publishes: the job stalls, runs again, and the network is called once', async () => {
  await setNetwork(stack, { mode: 'slow', slowMs: [1000, 1000] });
  const { body } = await demo.create(hello());
  await until('the request is at the network', async () => (await atNetwork(stack, body)).requests === 1);
  await stack.kill('worker');
  await stack.start('worker');
  const published = await demo.in('published', body.id);
  assert.ok(published.attempts >= 2, `${published.attempts} attempts`);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
  const job = await queue.getJob(jobId(body.id, 'mastodon'));
  assert.ok(job.stalledCounter >= 1 || job.attemptsStarted >= 2, JSON.stringify(job));
});

it('a retry at the BullMQ layer makes no second attempt', async () => {
  // The post is made, its answer lost: BullMQ retries the job, and the gateway does not let it through.
  await setNetwork(stack, { mode: 'lost-after' });
  const { body } = await demo.create(hello());
  const unconfirmed = await demo.in('unconfirmed', body.id);
  assert.match(unconfirmed.reason, /nobody knows/);
  assert.ok(unconfirmed.attempts >= 2);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
  // Not even an operator who retries the failed job.
  await setNetwork(stack, { mode: 'good' });
  const job = await queue.getJob(jobId(body.id, 'mastodon'));
  await until('the job has failed', () => job.isFailed());
  await job.retry('failed');
  await until('it has been run again', () => job.isCompleted());
  assert.equal((await demo.get(body.id)).body.state, 'unconfirmed');
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
});

it('a network that answers too late: the job is retried until the answer is there, and gets it', async () => {
  await setNetwork(stack, { mode: 'slow', slowMs: [4000, 4000] }); // the gateway's caller gets 504 after two seconds
  const { body } = await demo.create(hello());
  const published = await demo.in('published', body.id);
  assert.ok(published.networkId && published.attempts >= 2);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
});

it('a post whose request was lost before it was made is unconfirmed, too: nobody can tell the two apart', async () => {
  await setNetwork(stack, { mode: 'lost-before' });
  const { body } = await demo.create(hello());
  await demo.in('unconfirmed', body.id);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 0 });
});

it('a 500 proves nothing: the post is unconfirmed and not sent again', async () => {
  await setNetwork(stack, { mode: 'failing' });
  const { body } = await demo.create(hello());
  await demo.in('unconfirmed', body.id);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 0 });
});

it('a network that throttles is asked again, and publishes once', async () => {
  await setNetwork(stack, { mode: 'throttled' });
  const { body } = await demo.create(hello());
  await until('it was throttled', async () => (await atNetwork(stack, body)).requests >= 1);
  await setNetwork(stack, { mode: 'good' });
  await demo.in('published', body.id);
  const there = await atNetwork(stack, body);
  assert.ok(there.posts === 1 && there.requests >= 2, JSON.stringify(there));
});

it('a network that goes on throttling: the post has failed, and says why', async () => {
  await setNetwork(stack, { mode: 'throttled' });
  const { body } = await demo.create(hello());
  const failed = await demo.in('failed', body.id);
  assert.match(failed.reason, /429: Too many requests \(given up after 5 attempts\)/);
  assert.deepEqual(await atNetwork(stack, body), { requests: 5, posts: 0 });
});

it('what the network refuses has failed, with its reason, after one attempt', async () => {
  for (const [platform, length, reason] of [['mastodon', 501, /422: .*longer than 500/], ['x', 281, /403: .*longer than 280/]]) {
    const { body } = await demo.create(hello({ platform, text: 'a'.repeat(length) }));
    const failed = await demo.in('failed', body.id);
    assert.match(failed.reason, reason);
    assert.equal(failed.attempts, 1);
  }
});

it('keys of two tenants do not collide', async () => {
  const key = newKey();
  const [mine, theirs] = [await demo.create(hello(), key), await other.create(hello({ text: 'Something else' }), key)];
  assert.deepEqual([mine.status, theirs.status, mine.replayed, theirs.replayed], [201, 201, false, false]);
  assert.notEqual(mine.body.id, theirs.body.id);
  await demo.in('published', mine.body.id);
  await other.in('published', theirs.body.id);
  assert.equal((await demo.create(hello(), key)).text, mine.text);
  assert.equal((await other.create(hello({ text: 'Something else' }), key)).text, theirs.text);
});

it('two keys with the same content are two posts', async () => {
  const [one, two] = [await demo.create(hello()), await demo.create(hello())];
  assert.notEqual(one.body.id, two.body.id);
  for (const { body } of [one, two]) {
    await demo.in('published', body.id);
    assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
  }
});

it('a hash of the payload as the key makes them one', async () => {
  const file = join(stack.directory, 'payload.json');
  const keyOf = async (text) => {
    await writeFile(file, text);
    return (await promisify(execFile)(stack.oncegate, ['key', '--json', file])).stdout.trim();
  };
  const body = hello({ text: 'Only once' });
  const key = await keyOf(JSON.stringify(body));
  const reordered = Object.fromEntries(Object.entries(body).reverse());
  assert.equal(await keyOf(JSON.stringify(reordered, null, 2)), key, 'neither order nor whitespace counts');
  const [one, two] = [await demo.create(body, key), await demo.create(reordered, key)];
  assert.deepEqual([one.status, two.status, two.replayed, two.text], [201, 201, true, one.text]);
  await demo.in('published', one.body.id);
  assert.equal((await audit(stack)).posts.filter(({ text }) => text === 'Only once').length, 1);
});

it('GET, PATCH and DELETE with the header pass through, each time', async () => {
  await stack.kill('worker'); // so that the post stays queued
  const key = newKey();
  const { body } = await demo.create(hello(), key);
  const path = `/${body.id}`;
  for (const text of ['One', 'Two', 'Two']) {
    const patched = await demo.send('PATCH', path, { key, body: { text } });
    assert.deepEqual([patched.status, patched.replayed, patched.body.text], [200, false, text]);
    const got = await demo.send('GET', path, { key });
    assert.deepEqual([got.status, got.replayed, got.body.text], [200, false, text]);
  }
  const deleted = await demo.send('DELETE', path, { key });
  assert.deepEqual([deleted.status, deleted.replayed], [204, false]);
  const again = await demo.send('DELETE', path, { key });
  assert.deepEqual([again.status, again.replayed], [404, false], 'it was executed again, and not replayed');
  // The POST with the key is what it was, and does not bring the post back.
  const retried = await demo.create(hello(), key);
  assert.deepEqual([retried.status, retried.replayed, retried.body.id], [201, true, body.id]);
  const fetched = await demo.send('GET', `/by-key/${key}`);
  assert.deepEqual([fetched.status, fetched.text, fetched.location], [200, retried.text, retried.location]);
  await stack.start('worker');
  const job = await until('the job is there', () => queue.getJob(jobId(body.id, 'mastodon')));
  await until('the job has run', () => job.isCompleted());
  assert.deepEqual(await atNetwork(stack, body), { requests: 0, posts: 0 });
});

it('a post that is on its way can be neither changed nor deleted', async () => {
  const { body } = await demo.create(hello());
  await demo.in('published', body.id);
  const patched = await demo.send('PATCH', `/${body.id}`, { body: { text: 'Too late' } });
  assert.deepEqual([patched.status, patched.body.code], [409, 'not_queued']);
  assert.equal((await demo.send('DELETE', `/${body.id}`)).status, 204);
});

it('bad tokens, bodies and requests without a key are refused', async () => {
  const code = async (answer) => [(await answer).status, (await answer).body.code];
  assert.deepEqual(await code(new Client(stack, { token: 'guessed' }).create(hello())), [401, 'token_invalid']);
  assert.deepEqual(await code(new Client(stack, { token: 'other' }).create(hello())), [403, 'forbidden']);
  for (const wrong of [{ platform: 'fax' }, { accountId: '' }, { status: 'draft' }, { text: ' ' }, { text: 7 }]) {
    assert.deepEqual(await code(demo.create(hello(wrong))), [400, 'body_invalid'], JSON.stringify(wrong));
  }
  assert.deepEqual(await code(demo.send('POST', '', { body: hello() })), [400, 'key_missing']);
  assert.deepEqual(await code(demo.send('GET', '/by-key/never-used')), [404, 'not_found']);
});

it('the demonstration switches the network, and shows its books', async () => {
  const url = `${stack.address.edge}/demo`;
  const put = (mode) =>
    fetch(`${url}/network`, { method: 'PUT', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify({ mode }) });
  assert.equal((await put('throttled')).status, 200);
  const { mode, modes } = await (await fetch(`${url}/network`)).json();
  assert.deepEqual([mode, modes], ['throttled', ['good', 'slow', 'throttled', 'failing', 'lost-before', 'lost-after', 'stormy']]);
  assert.equal((await put('sunny')).status, 400);
  assert.deepEqual(await (await fetch(`${url}/audit`)).json(), await audit(stack));
  const page = await (await fetch(stack.address.network)).text();
  assert.match(page, /No post is here twice/);
});

it('an API that is killed before it could enqueue enqueues when it is back, and once', async () => {
  await stack.kill('redis');
  const { status, body } = await demo.create(hello({ text: 'Written while the queue was away' }));
  assert.equal(status, 201);
  await stack.kill('api');
  await stack.start('redis', 'api');
  await demo.in('published', body.id);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
});

it('a queue that has forgotten a job gets it again from the reconciler, and nothing is published twice', async () => {
  await setNetwork(stack, { mode: 'slow', slowMs: [1000, 1000] });
  const { body } = await demo.create(hello());
  await until('the request is at the network', async () => (await atNetwork(stack, body)).requests === 1);
  await stack.kill('worker');
  await queue.obliterate({ force: true });
  await stack.kill('api');
  await stack.start('api', 'worker');
  await demo.in('published', body.id);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
});

it('an API that is killed before it could answer is asked for the key: the retry gets what was made', async () => {
  // The post is there, the gateway's record is not settled: its claim is found open when it is back.
  const key = newKey();
  const direct = await fetch(`${stack.address.api}/v1/workspaces/demo/posts`, {
    method: 'POST',
    headers: { 'Authorization': 'Bearer demo', 'Content-Type': 'application/json', 'Idempotency-Key': key },
    body: JSON.stringify(hello()),
  });
  const made = await direct.json();
  stack.processes.get('api').child.kill('SIGSTOP'); // takes the connection, and never answers
  const lost = demo.create(hello(), key).catch(() => 'lost');
  const records = async () => (await fetch(`http://${stack.admin.edge}/records?state=claimed`)).json();
  await until('the gateway has claimed the key', async () => (await records()).records.some((record) => record.key === key));
  await stack.kill('api');
  assert.notEqual(await lost, 201);
  await stack.start('api');
  const settled = await until('the gateway has asked', async () => {
    const answer = await demo.create(hello(), key);
    return answer.status < 300 && answer;
  });
  assert.deepEqual([settled.status, settled.body], [200, made]);
  const again = await demo.create(hello(), key);
  assert.deepEqual([again.status, again.text, again.replayed], [200, settled.text, true]);
  assert.equal((await demo.posts()).filter((post) => post.key === key).length, 1);
});

it('an edge gateway that is killed before the API has seen the request: the retry is executed', async () => {
  const key = newKey();
  const begun = Date.now();
  stack.processes.get('api').child.kill('SIGSTOP');
  const lost = demo.create(hello(), key).catch(() => 'lost');
  const records = async () => (await fetch(`http://${stack.admin.edge}/records?state=claimed`)).json();
  await until('the gateway has claimed the key', async () => (await records()).records.some((record) => record.key === key));
  await stack.kill('api');
  await stack.kill('edge');
  await lost;
  await stack.start('api', 'edge');
  const codes = new Set();
  const made = await until('the retry is executed', async () => {
    const answer = await demo.create(hello(), key);
    codes.add(answer.body.code ?? answer.status);
    return answer.status === 201 && answer;
  });
  codes.delete('in_progress');
  assert.deepEqual([...codes], [201]);
  assert.ok(Date.now() - begun >= 2000, 'a 404 counts only after min_age');
  await demo.in('published', made.body.id);
  assert.equal((await demo.posts()).filter((post) => post.key === key).length, 1);
});
