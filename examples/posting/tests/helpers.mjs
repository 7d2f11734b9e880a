// A running example for a test, and the few things that tests do with it.
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Queue } from 'bullmq';
import { connection, jobId, QUEUE } from '../src/queue.mjs';
import { Stack } from '../src/stack.mjs';

/** Of this run, for what is drawn by lot: printed by who uses it, repeated with POSTING_SEED. */
export const SEED = Number(process.env.POSTING_SEED ?? Math.floor(Math.random() * 1e9));

// Impatient where the example is patient.
const IMPATIENT = {
  worker: { LOCK_MS: '2000', RETRY_MS: '200', PUBLISH_TIMEOUT_MS: '15000' },
  edge: { ONCEGATE_IDEMPOTENCY__LOOKUP__MIN_AGE: '2s' },
  egress: { ONCEGATE_UPSTREAM__RESPONSE_TIMEOUT: '2s', ONCEGATE_UPSTREAM__LATE_WINDOW: '10s' },
};

/** Starts all, in a temporary directory that is kept if the test fails. `env` adds to the settings of single processes. */
export async function begin(t, { env = {}, ...options } = {}) {
  const directory = await mkdtemp(join(tmpdir(), 'oncegate-posting-'));
  const settings = { ...IMPATIENT };
  for (const [name, more] of Object.entries(env)) settings[name] = { ...settings[name], ...more };
  const stack = new Stack({ directory, env: settings, ...options });
  let passed = false;
  t.after(async () => {
    await Promise.all([...stack.processes.keys()].map((name) => stack.kill(name)));
    if (passed && !process.env.POSTING_KEEP) await rm(directory, { recursive: true, force: true });
    else console.error(`logs are in ${directory}`);
  });
  await stack.start();
  return { stack, passed: () => (passed = true) };
}

/** Asks until the answer is truthy. */
export async function until(what, ask, { seconds = 30 } = {}) {
  const deadline = Date.now() + seconds * 1000;
  for (let error; ; await sleep(25)) {
    try {
      const answer = await ask();
      if (answer) return answer;
      error = undefined;
    } catch (caught) {
      error = caught;
    }
    if (Date.now() > deadline) throw new Error(`waited ${seconds} s in vain: ${what}`, { cause: error });
  }
}

let keys = 0;
export const newKey = () => `key-${process.pid}-${(keys += 1)}`;
export const hello = (more) => ({ platform: 'mastodon', accountId: 'acc_1', status: 'publish', text: 'Hello', ...more });

/** A user of the API, who comes in through the edge gateway. */
export class Client {
  constructor(stack, { workspace = 'demo', token = workspace } = {}) {
    Object.assign(this, { stack, token, path: `/v1/workspaces/${workspace}/posts` });
  }

  async send(method, path, { key, body, signal } = {}) {
    const headers = { Authorization: `Bearer ${this.token}` };
    if (key !== undefined) headers['Idempotency-Key'] = key;
    if (body !== undefined) headers['Content-Type'] = 'application/json';
    const url = this.stack.address.edge + this.path + path;
    const response = await fetch(url, { method, headers, body: body && JSON.stringify(body), signal });
    const text = await response.text();
    return {
      status: response.status,
      replayed: response.headers.get('Idempotency-Replayed') === 'true',
      location: response.headers.get('Location'),
      retryAfter: response.headers.get('Retry-After'),
      text,
      body: text && JSON.parse(text),
    };
  }

  create(body, key = newKey()) {
    return this.send('POST', '', { key, body });
  }
  get(id) {
    return this.send('GET', `/${id}`);
  }
  async posts() {
    return (await this.send('GET', '')).body.posts;
  }
  /** The post, once it is in the state. */
  in(state, id, options) {
    return until(`post ${id} is ${state}`, async () => {
      const { body } = await this.get(id);
      return body.state === state && body;
    }, options);
  }
}

export async function audit(stack) {
  return (await fetch(`${stack.address.network}/audit`)).json();
}

/** How often the network has been asked to publish this post, and how often it did. */
export async function atNetwork(stack, { id, platform }) {
  const { keys, requests } = await audit(stack);
  const key = jobId(id, platform);
  return { requests: requests[key] ?? 0, posts: keys[key] ?? 0 };
}

export async function setNetwork(stack, controls) {
  const answer = await fetch(`${stack.address.network}/control`, {
    method: 'PUT',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(controls),
  });
  assert.equal(answer.status, 200, await answer.text());
}

/** The queue, as an operator sees it. */
export function openQueue(t, stack) {
  const queue = new Queue(QUEUE, { connection: connection(stack.redisPort) });
  queue.on('error', () => {});
  t.after(() => {
    queue.disconnect().catch(() => {}); // not waited for: Redis may be gone by now
  });
  return queue;
}
