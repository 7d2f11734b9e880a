// From the database to the queue. A post is written together with its row in the outbox; what the row asks for is done, and
// only then is the row marked. A crash in between repeats the enqueuing, and that is one job.
import { jobId, jobOptions } from './queue.mjs';

/** Passes on what waits, whenever it is called, and now and then by itself. */
export function relay(posts, queue, interval = 500) {
  let running = false;
  let again = false;
  async function pass() {
    again = true;
    if (running) return;
    running = true;
    try {
      while (again) {
        again = false;
        for (const { postId, platform } of posts.toEnqueue(100)) {
          await queue.add('publish', { postId }, jobOptions(postId, platform));
          posts.enqueued(postId);
          again = true;
        }
      }
    } catch (error) {
      console.error(`outbox: ${error.message}; trying again`);
    } finally {
      running = false;
    }
  }
  const timer = setInterval(pass, interval);
  return { pass, stop: () => clearInterval(timer) };
}

/**
 * At a start: posts that the queue should know and does not (a Redis that was set back) are enqueued again, and so are those whose job
 * has ended without them. Neither can publish twice, for the key at the egress gateway is the same.
 */
export async function reconcile(posts, queue) {
  for (const { id, platform } of posts.open()) {
    const job = await queue.getJob(jobId(id, platform));
    const state = job && (await job.getState());
    if (!posts.isOpen(id)) continue; // done while we were looking
    if (job && state !== 'completed' && state !== 'failed') continue;
    console.error(`reconciler: post ${id} is open and its job is ${state ?? 'missing'}: enqueued again`);
    if (job) await job.remove();
    posts.enqueueAgain(id);
  }
}
