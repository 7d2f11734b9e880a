// `run`, as a user has it.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Client, hello, until } from './helpers.mjs';

/** Starts it; the addresses that it prints, by the first word of their line. */
async function run(t, data) {
  const child = spawn(fileURLToPath(new URL('../run', import.meta.url)), {
    env: { ...process.env, POSTING_DATA: data },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const ended = new Promise((done) => child.once('exit', (code, signal) => done(signal ?? code)));
  t.after(() => child.kill('SIGTERM'));
  const address = {};
  for await (const line of createInterface({ input: child.stdout })) {
    const [, name, url] = /^ {2}(edge|posting|egress|the network).* (http:\/\/127\.0\.0\.1:\d+)/.exec(line) ?? [];
    if (name) address[name === 'posting' ? 'api' : name] ??= url;
    if (line.startsWith('Ctrl-C')) break;
  }
  return { child, ended, address };
}

const answers = (url) => fetch(url).then(() => true, () => false);

test('one command starts it all, Ctrl-C ends all of it, and what was posted is there the next time', async (t) => {
  const data = await mkdtemp(join(tmpdir(), 'oncegate-posting-run-'));
  const first = await run(t, data);
  const demo = new Client({ address: first.address });
  const { status, body } = await demo.create(hello(), 'my-first-click');
  assert.equal(status, 201);
  const published = await demo.in('published', body.id);
  assert.ok(published.networkUrl.startsWith(first.address['the network']), published.networkUrl);
  first.child.kill('SIGINT');
  assert.equal(await first.ended, 0);
  for (const url of Object.values(first.address)) assert.equal(await answers(url), false, `${url} still answers`);

  const second = await run(t, data);
  const again = await new Client({ address: second.address }).create(hello(), 'my-first-click');
  assert.deepEqual([again.status, again.replayed, again.body.id], [201, true, body.id]);
  second.child.kill('SIGINT');
  assert.equal(await second.ended, 0);
  await until('the directory is free', () => rm(data, { recursive: true, force: true }).then(() => true));
});
