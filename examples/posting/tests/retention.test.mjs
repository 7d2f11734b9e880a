// What happens to a key when its time is over. With gateways and an API that forget after two seconds.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { atNetwork, begin, Client, hello, newKey, until } from './helpers.mjs';

test('after its retention a key works with a fresh payload', async (t) => {
  const { stack, passed } = await begin(t, {
    env: { edge: { ONCEGATE_IDEMPOTENCY__RETENTION: '2s' }, api: { KEY_RETENTION_MS: '2000', UNKNOWN_RETENTION_MS: '4000' } },
  });
  const demo = new Client(stack);
  const key = newKey();
  const first = await demo.create(hello(), key);
  assert.equal(first.status, 201);
  const second = await until('the key is free', async () => {
    const answer = await demo.create(hello({ text: 'A fresh payload' }), key);
    if (answer.status === 422) return false;
    return answer;
  });
  assert.ok(Date.parse(second.body.createdAt) - Date.parse(first.body.createdAt) >= 2000, second.text);
  assert.deepEqual([second.status, second.replayed, second.body.text], [201, false, 'A fresh payload']);
  assert.notEqual(second.body.id, first.body.id);
  for (const { body } of [first, second]) {
    await demo.in('published', body.id);
    assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
  }
  // Asked for the key, the API tells of the newest post; of one that may be of an earlier use it says so; in the end it knows none.
  const ask = () => demo.send('GET', `/by-key/${key}`);
  const seen = [];
  await until('the API has forgotten the key', async () => {
    const { status, body } = await ask();
    const said = status === 200 ? body.id : status;
    if (seen.at(-1) !== said) seen.push(said);
    return status === 404;
  });
  assert.deepEqual(seen.slice(-2), [409, 404], JSON.stringify(seen));
  assert.ok(seen.length === 2 || (seen.length === 3 && seen[0] === second.body.id), JSON.stringify(seen));
  passed();
});
