// The queue between the API and the worker: BullMQ on Redis.

export const QUEUE = 'publish';
export const ATTEMPTS = 5;

/** Enqueuing twice is one job, and the key under which the network sees the post. BullMQ allows no colon in it. */
export const jobId = (postId, platform) => `post-${postId}-${platform}`;

/** Commands wait for a Redis that is away, and are sent when it is back: all of ours may be sent twice. */
export function connection(port) {
  return {
    host: '127.0.0.1',
    port,
    maxRetriesPerRequest: null,
    retryStrategy: (times) => Math.min(times * 50, 1000),
  };
}

/** Jobs are kept, for only a job that is there makes enqueuing it again do nothing. */
export const jobOptions = (postId, platform) => ({
  jobId: jobId(postId, platform),
  attempts: ATTEMPTS,
  backoff: { type: 'custom' },
  removeOnComplete: false,
  removeOnFail: false,
});
