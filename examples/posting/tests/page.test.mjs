// The client page in a real browser, before the whole example: gateways, API, Redis, worker and network.
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import { audit, begin, Client, setNetwork, until } from './helpers.mjs';

const executablePath = [process.env.CHROMIUM, '/usr/bin/chromium', '/usr/bin/google-chrome'].find((path) => path && existsSync(path));
const skip = !executablePath && !process.env.ONCEGATE_REQUIRE_ALL && 'there is no Chromium: set CHROMIUM to its path';
const args = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync',
];
const POSTS = '**/v1/workspaces/demo/posts';
const UUID4 = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
const PATIENCE = 30_000;

// One example and one browser for all tests: each has a profile of its own and other texts.
let stack, browser, done;
const ends = [];
const tests = { all: 0, passed: 0 };

before(async () => {
  if (skip) return;
  ({ stack, passed: done } = await begin({ after: (end) => ends.push(end) }));
  browser = await chromium.launch({ executablePath, headless: true, args }); // in a temporary directory, which it removes
});

after(async () => {
  await browser?.close();
  if (tests.passed === tests.all) done?.();
  for (const end of ends) await end();
});

function check(name, run) {
  tests.all += 1;
  test(name, { skip }, async (t) => {
    await run(t);
    tests.passed += 1;
  });
}

/** How often the network has a text, by its own books. */
const atNetwork = async (text) => (await audit(stack)).posts.filter((post) => post.text === text).length;
const atApi = async (text) => (await new Client(stack).posts()).filter((post) => post.text === text);

/** A browser of its own for a test: nothing in its storage. `sent` has the requests by which it has tried to post. */
async function open(t, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  context.setDefaultTimeout(PATIENCE);
  t.after(() => context.close());
  const sent = [];
  const errors = [];
  context.on('request', (request) => {
    if (request.method() === 'POST') sent.push({ key: request.headers()['idempotency-key'], body: request.postData(), at: Date.now() });
  });
  context.on('weberror', (error) => errors.push(error.error()));
  t.after(() => assert.deepEqual(errors, []));
  const page = await context.newPage();
  await page.goto(stack.address.edge);
  await page.locator('#live[data-is=on]').waitFor();
  return { context, page, sent };
}

const card = (page, text) => page.locator('article').filter({ has: page.getByText(text, { exact: true }) }).first();
const reaches = (page, text, state) =>
  page.locator(`article[data-state=${state}]`).filter({ has: page.getByText(text, { exact: true }) }).first().waitFor();
const kinds = (page, text) => card(page, text).locator('.log li').evaluateAll((rows) => rows.map((row) => row.dataset.kind));
const pending = (page) =>
  page.evaluate(() => Object.keys(localStorage).filter((k) => k.startsWith('posting.pending.')).map((k) => JSON.parse(localStorage[k])));
const write = (page, text) => page.getByLabel('Post', { exact: true }).fill(text);
const publish = (page) => page.getByRole('button', { name: 'Publish', exact: true });

/** Answers the POSTs of a page by `handlers`, one each; what comes after them goes on to the gateway. */
async function answer(page, ...handlers) {
  await page.route(POSTS, (route) => {
    if (route.request().method() !== 'POST') return route.fallback();
    return (handlers.shift() ?? ((it) => it.fallback()))(route);
  });
}

const problem = (status, code, detail, headers = {}) => (route) =>
  route.fulfill({
    status,
    headers,
    contentType: 'application/problem+json',
    body: JSON.stringify({ type: `urn:oncegate:problem:${code}`, title: code, status, detail, code }),
  });

check('one click is one post, and its key is stored before it is sent', async (t) => {
  const text = 'one click';
  const { page, sent } = await open(t);
  let stored;
  await answer(page, async (route) => {
    stored = await pending(page);
    await route.fallback();
  });
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'published');
  assert.equal(sent.length, 1);
  assert.match(sent[0].key, UUID4);
  assert.deepEqual(stored.map(({ key, body }) => ({ key, body })), [{ key: sent[0].key, body: sent[0].body }]);
  assert.deepEqual(JSON.parse(sent[0].body), { platform: 'mastodon', accountId: 'acc_mastodon', status: 'publish', text });
  assert.deepEqual(await kinds(page, text), ['first']);
  assert.deepEqual(await pending(page), [], 'the outcome is known: the key need not be kept');
  assert.equal(await atNetwork(text), 1);
  await card(page, text).getByText('Once at the network').waitFor();
  const link = await card(page, text).getByRole('link').getAttribute('href');
  assert.ok((await (await fetch(link)).text()).includes(text), 'the link leads to the post');
  const row = page.locator('#audit tbody tr').filter({ hasText: text });
  assert.equal(await row.locator('td').nth(2).textContent(), '1 ✓');
});

check('a double click is one post: one attempt is the first, the other a replay', async (t) => {
  const text = 'double click';
  const { page, sent } = await open(t);
  await page.getByRole('radio', { name: 'X', exact: true }).check();
  await write(page, text);
  await publish(page).dblclick();
  await reaches(page, text, 'published');
  await until('both attempts are answered', async () => (await kinds(page, text)).toSorted().join() === 'first,replayed');
  assert.equal(sent.length, 2);
  assert.equal(sent[0].key, sent[1].key);
  assert.equal((await atApi(text)).length, 1);
  assert.equal(await atNetwork(text), 1);

  // Both at once, from the button that says so.
  const other = 'clicked twice';
  await write(page, other);
  await page.getByRole('button', { name: 'Publish, clicked twice' }).click();
  await reaches(page, other, 'published');
  await until('both attempts are answered', async () => (await kinds(page, other)).toSorted().join() === 'first,replayed');
  assert.equal((await atApi(other)).length, 1);
  assert.equal(await atNetwork(other), 1);
});

check('retries are replays, another text with the same key is refused, and all of it is shown', async (t) => {
  const text = 'retried';
  const { page, sent } = await open(t);
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'published');
  await card(page, text).getByRole('button', { name: 'Retry' }).click();
  await until('a replay', async () => (await kinds(page, text)).join() === 'first,replayed');
  await card(page, text).getByRole('button', { name: 'Double click' }).click();
  await until('two more', async () => (await kinds(page, text)).join() === 'first,replayed,replayed,replayed');
  await card(page, text).getByRole('button', { name: 'Same key, other text' }).click();
  await until('a refusal', async () => (await kinds(page, text)).at(-1) === 'refused');
  const said = await card(page, text).locator('.log li').last().textContent();
  assert.match(said, /422 key_reused: This key was used with another payload/);
  await reaches(page, text, 'published'); // still
  assert.equal(new Set(sent.map(({ key }) => key)).size, 1);
  assert.equal(await atNetwork(text), 1);

  // Without what this browser remembers, the same buttons work from what the API lists.
  await page.evaluate(() => localStorage.clear());
  await page.reload();
  await reaches(page, text, 'published');
  await card(page, text).getByRole('button', { name: 'Retry' }).click();
  await until('a replay', async () => (await kinds(page, text)).join() === 'replayed');
  assert.equal(await atNetwork(text), 1);
});

check('what the API refuses is shown with its reason, and may be edited and sent anew', async (t) => {
  const text = 'refused at first';
  const { page, sent } = await open(t);
  await answer(page, problem(400, 'body_invalid', 'Something is wrong with it.'));
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'refused');
  await card(page, text).getByText('Refused. body_invalid: Something is wrong with it.').waitFor();
  assert.deepEqual(await pending(page), []);
  await card(page, text).getByRole('button', { name: 'Edit and send anew' }).click();
  await publish(page).click();
  await reaches(page, text, 'published');
  assert.equal(sent.length, 2);
  assert.notEqual(sent[0].key, sent[1].key);
  assert.equal(await atNetwork(text), 1);

  // Nothing to send is not sent.
  await page.reload();
  await publish(page).click();
  await page.getByText('Write something first.').first().waitFor();
  assert.equal(sent.length, 2);
});

for (const [name, reached] of [['before the request has left', false], ['after the post was made', true]]) {
  check(`a reload ${name} keeps the key and comes to the end with one post`, async (t) => {
    const text = `reloaded ${name}`;
    const { page, sent } = await open(t);
    let held;
    const holding = new Promise((done) => (held = done));
    await answer(page, async (route) => {
      if (reached) assert.equal((await route.fetch()).status(), 201);
      held(); // and no answer, ever
    });
    await write(page, text);
    await publish(page).click();
    await holding;
    assert.equal((await atApi(text)).length, reached ? 1 : 0);
    assert.equal((await pending(page)).length, 1);
    await page.reload();
    await reaches(page, text, 'published');
    await until('an answer', async () => (await kinds(page, text)).join() === `lost,${reached ? 'replayed' : 'first'}`);
    assert.equal(sent.length, 2);
    assert.equal(sent[0].key, sent[1].key);
    assert.equal(sent[0].body, sent[1].body);
    assert.deepEqual(await pending(page), []);
    assert.equal((await atApi(text)).length, 1);
    assert.equal(await atNetwork(text), 1);
  });
}

check('a second tab does not send what the first one is sending, and takes over when that is closed', async (t) => {
  const text = 'two tabs';
  const { context, page, sent } = await open(t);
  let held;
  const holding = new Promise((done) => (held = done));
  await answer(page, async () => held());
  await write(page, text);
  await publish(page).click();
  await holding;
  const second = await context.newPage();
  await second.goto(stack.address.edge);
  await second.locator('#live[data-is=on]').waitFor();
  await reaches(second, text, 'sending');
  assert.equal(sent.length, 1);
  await page.close();
  await reaches(second, text, 'published');
  assert.equal(sent.length, 2);
  assert.equal(sent[0].key, sent[1].key);
  assert.equal(await atNetwork(text), 1);
});

check('an answer that gets lost is asked for again with the same key', async (t) => {
  const text = 'lossy';
  const { page, sent } = await open(t);
  await page.getByLabel('And my own connection').check();
  await write(page, text);
  await publish(page).click();
  await until('the second attempt', async () => (await kinds(page, text)).join() === 'lost,replayed');
  await reaches(page, text, 'published');
  assert.equal(sent[0].key, sent[1].key);
  assert.equal(await atNetwork(text), 1);
});

check('while the gateway is down the key waits; when it is back the post goes out', async (t) => {
  const text = 'the gateway was down';
  const { page, sent } = await open(t);
  await stack.kill('edge');
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'waiting');
  await until('a second attempt', () => sent.length >= 2);
  await page.locator('#live[data-is=off]').waitFor();
  assert.match(await card(page, text).locator('.log li').first().textContent(), /No answer/);
  await stack.start('edge');
  await reaches(page, text, 'published');
  assert.equal(new Set(sent.map(({ key }) => key)).size, 1);
  assert.equal(await atNetwork(text), 1);
  await page.locator('#live[data-is=on]').waitFor();
});

check('while the API is down the gateway says so, and the same key is sent again', async (t) => {
  const text = 'the API was down';
  const { page, sent } = await open(t);
  await stack.kill('api');
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'waiting');
  assert.match(await card(page, text).locator('.log li').first().textContent(), /Waiting.*502 upstream_unreachable/);
  await stack.start('api');
  await reaches(page, text, 'published');
  assert.equal(new Set(sent.map(({ key }) => key)).size, 1);
  assert.equal(await atNetwork(text), 1);
});

check('in_progress: a countdown by Retry-After, then the same key again', async (t) => {
  const text = 'in progress';
  const { page, sent } = await open(t);
  await answer(page, problem(409, 'in_progress', 'The first request is under way.', { 'Retry-After': '2' }));
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'waiting');
  await card(page, text).getByText(/409 in_progress: The first request is under way\. Again in 2 s, same key\./).waitFor();
  await reaches(page, text, 'published');
  assert.deepEqual(await kinds(page, text), ['waiting', 'first']);
  assert.equal(sent.length, 2);
  assert.equal(sent[0].key, sent[1].key);
  assert.ok(sent[1].at - sent[0].at >= 2000, `again after ${sent[1].at - sent[0].at} ms`);
});

check('outcome_unknown is not retried by itself: a person looks, and may send it anew', async (t) => {
  const text = 'who knows';
  const { page, sent } = await open(t);
  await page.clock.install();
  await answer(page, problem(409, 'outcome_unknown', 'Nobody knows what came of it.'));
  await write(page, text);
  await publish(page).click();
  await reaches(page, text, 'unknown');
  await page.clock.runFor(600_000);
  assert.equal(sent.length, 1, 'nothing is sent again, however long it takes');
  assert.equal((await pending(page)).length, 1);
  await page.reload();
  await reaches(page, text, 'unknown');
  await page.clock.runFor(60_000);
  assert.equal(sent.length, 1, 'nor after a reload');

  await card(page, text).getByRole('button', { name: 'Look at the network' }).click();
  await card(page, text).getByText(/the network has no such post so far/).waitFor();
  await card(page, text).getByRole('button', { name: 'Send anew…' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Leave it' }).click();
  await reaches(page, text, 'unknown');
  assert.equal(sent.length, 1);
  await card(page, text).getByRole('button', { name: 'Send anew…' }).click();
  await page.getByRole('dialog').getByText(/it will be there twice/).waitFor();
  await page.getByRole('dialog').getByRole('button', { name: 'Send anew with a new key' }).click();
  await until('the second click is published', async () => {
    await page.clock.runFor(1000);
    return page.locator(`article[data-state=published]`).filter({ has: page.getByText(text, { exact: true }) }).count();
  });
  assert.equal(sent.length, 2);
  assert.notEqual(sent[0].key, sent[1].key);
  assert.deepEqual(await pending(page), []);
  assert.equal(await atNetwork(text), 1);
});

check('a bad network, then a good one', async (t) => {
  t.after(() => setNetwork(stack, { mode: 'good' }));
  const { page } = await open(t);
  const choose = async (name) => {
    await page.getByRole('radio', { name, exact: true }).check();
    const mode = name.toLowerCase().replace(' ', '-');
    await until(`the network is ${mode}`, async () => (await (await fetch(`${stack.address.network}/control`)).json()).mode === mode);
  };

  // It turns the worker away: the queue tries again.
  await choose('Throttled');
  await write(page, 'throttled');
  await publish(page).click();
  await card(page, 'throttled').getByText(/The network answered 429/).waitFor();
  await choose('Good');
  await reaches(page, 'throttled', 'published');
  assert.equal(await atNetwork('throttled'), 1);

  // The post is made and its answer lost: nobody may send it again, and nobody does.
  await choose('Lost after');
  await write(page, 'lost after');
  await publish(page).click();
  await reaches(page, 'lost after', 'unconfirmed');
  await choose('Good');
  await card(page, 'lost after').getByRole('button', { name: 'Look at the network' }).click();
  await card(page, 'lost after').getByText(/the network has it, once/).waitFor();
  await card(page, 'lost after').getByRole('button', { name: 'Retry' }).click();
  await until('a replay', async () => (await kinds(page, 'lost after')).join() === 'first,replayed');
  assert.equal(await atNetwork('lost after'), 1);

  // The connection is lost before: the same doubt, and a person who has looked sends it anew.
  await choose('Lost before');
  await write(page, 'lost before');
  await publish(page).click();
  await reaches(page, 'lost before', 'unconfirmed');
  await choose('Good');
  await card(page, 'lost before').getByRole('button', { name: 'Look at the network' }).click();
  await card(page, 'lost before').getByText(/the network has no such post so far/).waitFor();
  await card(page, 'lost before').getByRole('button', { name: 'Send anew…' }).click();
  await page.getByRole('dialog').getByRole('button', { name: 'Send anew with a new key' }).click();
  await reaches(page, 'lost before', 'published');
  assert.equal(await atNetwork('lost before'), 1);

  // What the network will not have fails with its reason.
  const long = 'far too long for X '.repeat(20).trim();
  await page.getByRole('radio', { name: 'X', exact: true }).check();
  await write(page, long);
  await page.getByText('X will refuse this.').waitFor();
  await publish(page).click();
  await reaches(page, long, 'failed');
  await card(page, long).getByText(/longer than 280 characters|answered 403/).waitFor();
  assert.equal(await atNetwork(long), 0);
});

check('a key older than the gateway remembers is not sent again', async (t) => {
  const text = 'from yesterday';
  const { page, sent } = await open(t);
  await page.evaluate((text) => {
    const key = '11111111-1111-4111-8111-111111111111';
    const body = JSON.stringify({ platform: 'x', accountId: 'acc_x', status: 'publish', text });
    localStorage.setItem(`posting.pending.${key}`, JSON.stringify({ key, body, clickedAt: Date.now() - 21 * 3600_000 }));
  }, text);
  await page.reload();
  await reaches(page, text, 'unknown');
  await card(page, text).getByText(/too old for a retry/).waitFor();
  await card(page, text).getByRole('button', { name: 'Leave it' }).click();
  await reaches(page, text, 'left');
  assert.deepEqual(await pending(page), []);
  assert.equal(sent.length, 0);
});

check('where randomUUID is missing (an insecure context) keys are UUIDs all the same', async (t) => {
  const { page, sent } = await open(t);
  await page.addInitScript(() => delete Crypto.prototype.randomUUID);
  await page.reload();
  assert.equal(await page.evaluate(() => crypto.randomUUID), undefined);
  await write(page, 'insecure');
  await publish(page).click();
  await reaches(page, 'insecure', 'published');
  assert.match(sent[0].key, UUID4);
});

check('a hidden tab asks nothing, and asks at once when it is seen again', async (t) => {
  const { page } = await open(t);
  await page.addInitScript(() => {
    window.away = false;
    Object.defineProperty(document, 'hidden', { get: () => window.away });
    window.leave = (away) => { window.away = away; document.dispatchEvent(new Event('visibilitychange')); };
  });
  await page.clock.install();
  await page.reload();
  await page.locator('#live[data-is=on]').waitFor();
  let asked = 0;
  page.on('request', () => asked++);
  await page.clock.runFor(10_000);
  await until('it polls', () => asked > 0);
  await page.evaluate(() => window.leave(true));
  await page.locator('#live[data-is=paused]').waitFor();
  asked = 0;
  await page.clock.runFor(120_000);
  assert.equal(asked, 0);
  await page.evaluate(() => window.leave(false));
  await page.locator('#live[data-is=on]').waitFor();
  assert.ok(asked > 0);
});

check('by keyboard alone, on a small screen, and nothing jumps', async (t) => {
  const text = 'by keyboard';
  const { page } = await open(t, { viewport: { width: 390, height: 844 } });
  await page.addInitScript(() => {
    window.shifts = [];
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
    }).observe({ type: 'layout-shift', buffered: true });
  });
  await page.reload();
  await page.locator('#live[data-is=on]').waitFor();
  const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.name || document.activeElement.textContent);
  await page.keyboard.press('Tab');
  assert.equal(await focused(), 'platform');
  await page.keyboard.press('Tab');
  assert.equal(await focused(), 'text');
  await page.keyboard.type(text);
  await page.keyboard.press('Tab');
  assert.equal(await focused(), 'publish');
  await page.keyboard.press('Enter');
  await reaches(page, text, 'published');
  assert.equal(await focused(), 'publish', 'what is polled does not take the focus away');
  await page.locator('#say').getByText(/by keyboard: Published\./).waitFor({ state: 'attached' });
  const { wide, shifts } = await page.evaluate(() => ({ wide: document.documentElement.scrollWidth, shifts: window.shifts }));
  assert.ok(wide <= 390, `${wide} px wide`);
  assert.ok(shifts.reduce((sum, it) => sum + it, 0) < 0.05, `layout shifts: ${shifts}`);
  assert.equal(await atNetwork(text), 1);
});
