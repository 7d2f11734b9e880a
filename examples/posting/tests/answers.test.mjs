// What the worker makes of each answer, and the API of each spelling of a key: nothing has to run for that.
import assert from 'node:assert/strict';
import { createServer } from 'node:net';
import { test } from 'node:test';
import { keyOf } from '../src/key.mjs';
import { MAYBE, NOT_NOW, NOTHING_EVER, publish, understand } from '../src/publish.mjs';

const of = (status, answer, headers = {}) => {
  const { kind, executed, after } = understand({ status, headers: new Headers(headers) }, answer);
  return [kind, executed ?? after].filter((it) => it !== undefined);
};
const own = (status, code, more, headers) =>
  of(status, { type: `urn:oncegate:problem:${code}`, status, code, detail: 'What to do.', ...more }, headers);

test('the gateway\'s own answers', () => {
  assert.deepEqual(own(409, 'in_progress', {}, { 'Retry-After': '5' }), ['wait', 5000]);
  assert.deepEqual(own(409, 'outcome_unknown'), ['unconfirmed']);
  assert.deepEqual(own(409, 'body_not_recorded', { upstream_status: 201, location: '/1' }), ['published']);
  assert.deepEqual(own(409, 'body_not_recorded', { upstream_status: 422 }), ['failed']);
  assert.deepEqual(own(422, 'key_reused'), ['unconfirmed']);
  assert.deepEqual(own(502, 'upstream_unreachable'), ['later', NOTHING_EVER]);
  assert.deepEqual(own(502, 'upstream_broken'), ['later', MAYBE]);
  assert.deepEqual(own(504, 'upstream_timeout'), ['later', MAYBE]);
  for (const code of ['store_unavailable', 'overloaded', 'draining', 'probe_failed']) {
    assert.deepEqual(own(503, code, {}, { 'Retry-After': '1' }), ['later', NOT_NOW], code);
  }
  for (const [status, code] of [[400, 'key_invalid'], [400, 'path_ambiguous'], [413, 'body_too_large']]) {
    assert.deepEqual(own(status, code), ['failed'], code);
  }
});

test('the network\'s answers', () => {
  assert.deepEqual(of(429, { error: 'Too many requests' }), ['later', NOTHING_EVER]);
  assert.deepEqual(of(503, undefined, { 'Retry-After': '10' }), ['later', NOTHING_EVER]);
  for (const status of [408, 500, 502, 503, 504]) assert.deepEqual(of(status, undefined), ['later', MAYBE], String(status));
  for (const status of [301, 307, 400, 401, 403, 404, 409, 422]) assert.deepEqual(of(status, { error: 'No' }), ['failed'], String(status));
  const { reason } = understand({ status: 422, headers: new Headers() }, { error: 'Too long' });
  assert.equal(reason, 'The network answered 422: Too long');
  // A network that writes problems, too, is not taken for the gateway.
  assert.deepEqual(of(409, { type: 'about:blank', code: 'in_progress', detail: 'Busy' }), ['failed']);
});

test('a gateway that is not there has sent nothing', async () => {
  const server = createServer();
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  const { port } = server.address();
  await new Promise((done) => server.close(done));
  const post = { id: '1', platform: 'x', accountId: 'acc_1', text: 'Hello' };
  const outcome = await publish(post, { urls: { x: `http://127.0.0.1:${port}` }, timeout: 5000 });
  assert.deepEqual([outcome.kind, outcome.executed], ['later', NOT_NOW], outcome.reason);
});

test('a key as the gateway reads it', () => {
  assert.equal(keyOf(undefined), null);
  assert.equal(keyOf('abc'), 'abc');
  assert.equal(keyOf('"abc"'), 'abc');
  assert.equal(keyOf('"abc";a=1'), 'abc');
  assert.equal(keyOf('"a \\"b\\" \\\\"'), 'a "b" \\');
});
