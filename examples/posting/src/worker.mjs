// The worker: takes jobs from the queue and publishes them, through the egress gateway. BullMQ may run a job as often as it likes
// (attempts, stalled jobs, an operator's retry): what keeps the network from seeing it twice is the key.
import { DelayedError, UnrecoverableError, Worker } from 'bullmq';
import { openPosts } from './posts.mjs';
import { number, onStop, setting, tell } from './process.mjs';
import { MAYBE, NOT_NOW, publish } from './publish.mjs';
import { connection, QUEUE } from './queue.mjs';

const posts = openPosts(setting('DATABASE'));
const network = {
  urls: { mastodon: setting('MASTODON_URL'), x: setting('X_URL') }, // the egress gateways, or one for both
  xPostUrl: setting('X_POST_URL', 'https://x.com/i/status/'),
  timeout: number('PUBLISH_TIMEOUT_MS', 60_000), // longer than the gateway's response_timeout: it knows more than a timeout does
};
const RETRY = number('RETRY_MS', 1000);

class Later extends Error {
  constructor(reason, after = 0) {
    super(reason);
    this.after = after;
  }
}

/** The wait before the next attempt: doubled each time, and at least what the network asked for. */
function backoff(attemptsMade, _type, error) {
  const doubled = RETRY * 2 ** (attemptsMade - 1);
  return Math.max(Math.round(doubled * (0.75 + Math.random() / 2)), error?.after ?? 0);
}

async function run(job, token) {
  try {
    return await attempt(job, token);
  } catch (error) {
    if (error instanceof Later || error instanceof UnrecoverableError || error instanceof DelayedError) throw error;
    // A fault of our own, a full disk say, is no attempt.
    console.error(`${job.id}:`, error);
    await job.moveToDelayed(Date.now() + RETRY, token);
    throw new DelayedError();
  }
}

async function attempt(job, token) {
  const post = posts.begin(job.data.postId);
  if (!post) return 'nothing left to do';
  const outcome = await publish(post, network);
  switch (outcome.kind) {
    case 'published':
      posts.published(post.id, outcome.networkId, outcome.networkUrl);
      return outcome.networkId;
    case 'failed':
    case 'unconfirmed':
      posts[outcome.kind](post.id, outcome.reason);
      throw new UnrecoverableError(outcome.reason);
    case 'wait':
      posts.learned(post, true, outcome.reason);
      await job.moveToDelayed(Date.now() + outcome.after, token);
      throw new DelayedError();
    default: {
      const { executed, reason, after } = outcome;
      posts.learned(post, executed === MAYBE || (executed === NOT_NOW && post.doubted), reason);
      if (job.attemptsMade + 1 >= job.opts.attempts) posts.gaveUp(post.id, `${reason} (given up after ${job.opts.attempts} attempts)`);
      throw new Later(reason, after);
    }
  }
}

const lockDuration = number('LOCK_MS', 30_000);
const worker = new Worker(QUEUE, run, {
  connection: connection(number('REDIS_PORT', 6379)),
  concurrency: number('CONCURRENCY', 8),
  lockDuration,
  stalledInterval: Math.min(lockDuration, 30_000),
  // A job that stalled is safe to run again, however often: it must not be given up for that.
  maxStalledCount: 1_000_000,
  runRetryDelay: 500,
  settings: { backoffStrategy: backoff },
});
worker.on('error', (error) => console.error(`worker: ${error.message}`)); // it connects again by itself
worker.on('failed', (job, error) => console.error(`${job?.id}: ${error.message}`));
worker.waitUntilReady().then(() => tell({ ready: true }));

onStop(() => worker.close());
