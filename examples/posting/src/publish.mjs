// One attempt to publish a post, and what its answer means. This is all that a worker has to know about the gateway.
import { networkToken } from './auth.mjs';
import { jobId } from './queue.mjs';

const PLATFORMS = {
  mastodon: {
    path: '/api/v1/statuses',
    body: (text) => ({ status: text }),
    made: (answer) => ({ id: answer.id, url: answer.url }),
  },
  x: {
    path: '/2/tweets',
    body: (text) => ({ text }),
    made: (answer, { xPostUrl }) => ({ id: answer.data?.id, url: answer.data && xPostUrl + answer.data.id }),
  },
};

// The connection was never made, so nothing was sent.
const UNSENT = ['ECONNREFUSED', 'ENOTFOUND', 'EAI_AGAIN', 'EHOSTUNREACH', 'ENETUNREACH', 'UND_ERR_CONNECT_TIMEOUT'];

/** What an attempt may have done, for `later`: NOTHING_EVER, counting all attempts before it; NOT_NOW, this one; or MAYBE. */
export const NOTHING_EVER = 'nothing ever';
export const NOT_NOW = 'not now';
export const MAYBE = 'maybe';

/** An outcome: published, failed and unconfirmed are the end; `wait` costs no attempt, `later` costs one. */
export async function publish(post, { urls, xPostUrl, timeout }) {
  const platform = PLATFORMS[post.platform];
  let response, body;
  try {
    response = await fetch(urls[post.platform] + platform.path, {
      method: 'POST',
      headers: {
        'Authorization': `Bearer ${networkToken(post.platform, post.accountId)}`,
        'Content-Type': 'application/json',
        'Idempotency-Key': jobId(post.id, post.platform), // the job's name: all its attempts are one for the gateway
      },
      body: JSON.stringify(platform.body(post.text)),
      redirect: 'manual',
      signal: AbortSignal.timeout(timeout),
    });
    body = await response.text();
  } catch (error) {
    const cause = error.cause ?? error;
    const executed = UNSENT.includes(cause.code) ? NOT_NOW : MAYBE;
    return { kind: 'later', executed, reason: `The network could not be reached: ${cause.message || cause.code}` };
  }
  const answer = json(body);
  if (response.ok) {
    const made = platform.made(answer ?? {}, { xPostUrl });
    return { kind: 'published', networkId: made.id ?? null, networkUrl: made.url ?? null };
  }
  return understand(response, answer);
}

function json(body) {
  try {
    return JSON.parse(body);
  } catch {
    return undefined;
  }
}

/** Of an answer that is no success. The gateway's own say so in their `type`; everything else is the network's, sent on or replayed. */
export function understand({ status, headers }, answer) {
  const prefix = 'urn:oncegate:problem:';
  const own = typeof answer?.type === 'string' && answer.type.startsWith(prefix) ? answer.type.slice(prefix.length) : undefined;
  const after = retryAfter(headers.get('Retry-After'));
  switch (own) {
    case 'in_progress': // another attempt of this job is under way, or may still be answered
      return { kind: 'wait', after: after ?? 1000, reason: answer.detail };
    case 'outcome_unknown':
      return { kind: 'unconfirmed', reason: 'The connection to the network was lost, and nobody knows whether the post was made. Look there.' };
    case 'key_reused': // an earlier attempt had another text: it may have been published
      return { kind: 'unconfirmed', reason: answer.detail };
    case 'body_not_recorded': // it ran; its answer was too long to be recorded
      if (answer.upstream_status >= 200 && answer.upstream_status < 300) {
        return { kind: 'published', networkId: null, networkUrl: answer.location ?? null };
      }
      return { kind: 'failed', reason: `The network answered ${answer.upstream_status}.` };
    case 'upstream_unreachable': // this attempt held the key, so no other was executed either
      return { kind: 'later', executed: NOTHING_EVER, after, reason: 'The network could not be reached.' };
    case 'upstream_broken':
    case 'upstream_timeout':
      return { kind: 'later', executed: MAYBE, after, reason: answer.detail };
    case undefined:
      break;
    default:
      // Overloaded, draining, without its store: not sent. Anything else that it refuses (4xx) it will refuse again.
      if (status >= 500) return { kind: 'later', executed: NOT_NOW, after, reason: answer.detail };
      return { kind: 'failed', reason: `The gateway refused: ${answer.detail}` };
  }
  const said = answer?.error ?? answer?.detail ?? answer?.title;
  const reason = `The network answered ${status}${typeof said === 'string' ? `: ${said}` : ''}`;
  // It turned this attempt away, and the gateway would not have sent it if an earlier one might have been executed.
  if (status === 429 || (status === 503 && after !== undefined)) return { kind: 'later', executed: NOTHING_EVER, after, reason };
  if (status === 408 || status >= 500) return { kind: 'later', executed: MAYBE, after, reason };
  return { kind: 'failed', reason };
}

function retryAfter(value) {
  return /^\d+$/.test(value ?? '') ? Number(value) * 1000 : undefined;
}
