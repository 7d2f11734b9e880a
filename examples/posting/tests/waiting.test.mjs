// With an egress gateway that does not let duplicates wait, but answers 409 in_progress at once.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { jobId } from '../src/queue.mjs';
import { atNetwork, begin, Client, hello, openQueue, setNetwork } from './helpers.mjs';

test('a job whose request is still under way waits, and that costs no attempt', async (t) => {
  const { stack, passed } = await begin(t, { env: { egress: { ONCEGATE_IDEMPOTENCY__CONCURRENT: 'conflict' } } });
  const queue = openQueue(t, stack);
  await setNetwork(stack, { mode: 'slow', slowMs: [9000, 9000] }); // the gateway's caller gets 504 after two seconds
  const demo = new Client(stack);
  const { body } = await demo.create(hello());
  const published = await demo.in('published', body.id);
  const job = await queue.getJob(jobId(body.id, 'mastodon'));
  // The first got 504, and the last the network's answer; between them were waits, of five seconds as the gateway asks.
  assert.ok(published.attempts >= 4, `${published.attempts} times at the gateway`);
  assert.equal(job.attemptsMade, 2);
  assert.deepEqual(await atNetwork(stack, body), { requests: 1, posts: 1 });
  passed();
});
