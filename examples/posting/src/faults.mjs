// How the stand-in for the networks misbehaves.
import { createHash } from 'node:crypto';

/** What may become of one request. A mode is one of these, or a mixture. */
export const FAULTS = ['good', 'slow', 'throttled', 'failing', 'failing-after', 'lost-before', 'lost-after'];
export const MODES = ['good', 'slow', 'throttled', 'failing', 'lost-before', 'lost-after', 'stormy'];

export const STORM = { 'good': 8, 'slow': 2, 'throttled': 2, 'failing': 1, 'failing-after': 1, 'lost-before': 1, 'lost-after': 1 };

/** A number from 0 to 1 that depends on nothing but its parts: a storm is the same again, in whatever order requests arrive. */
export function draw(...parts) {
  const digest = createHash('sha256').update(JSON.stringify(parts)).digest();
  return digest.readUInt32BE(0) / 2 ** 32;
}

export function pick(weights, at) {
  const entries = Object.entries(weights);
  let left = at * entries.reduce((sum, [, weight]) => sum + weight, 0);
  return (entries.find(([, weight]) => (left -= weight) < 0) ?? entries[0])[0];
}
