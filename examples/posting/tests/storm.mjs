// The storm: many clients, double clicks, retries, a network that misbehaves in every way, and processes killed with -9. It returns what was seen;
// storm.test.mjs judges.
import { setTimeout as sleep } from 'node:timers/promises';
import { draw } from '../src/faults.mjs';
import { audit, Client, setNetwork, until } from './helpers.mjs';

const CLIENTS = 20;
const OPEN = ['queued', 'publishing'];
// Longer than the network allows, now and then: it refuses these, and they fail with a reason.
const TOO_LONG = ' and so on'.repeat(60);

/** A lot for each question, the same again with the same seed, in whatever order they are asked. */
const lots = (seed) => ({
  below: (limit, ...question) => Math.floor(draw(seed, ...question) * limit),
  chance: (probability, ...question) => draw(seed, ...question) < probability,
});

/** Everybody's clicks, before anything has happened. */
function clicks(seed, count) {
  const { below, chance } = lots(seed);
  return Array.from({ length: count }, (_, number) => {
    const tooLong = chance(0.04, 'too long', number);
    return {
      number,
      client: number % CLIENTS,
      key: `click-${seed}-${number}`,
      workspace: chance(0.5, 'workspace', number) ? 'demo' : 'other',
      body: {
        platform: number % 2 ? 'x' : 'mastodon',
        accountId: `acc_${below(5, 'account', number)}`,
        status: 'publish',
        text: `Post ${number}${tooLong ? TOO_LONG : ''}`,
      },
      together: 2 + below(2, 'together', number), // the double click, or a triple one
      retries: 1 + below(5, 'retries', number),
      hangsUp: chance(0.3, 'hangs up', number), // one more request does not wait for its answer
    };
  });
}

/**
 * One request of a click, sent again until the answer is final: as the README tells clients to, and 409 outcome_unknown as well, for
 * here the gateway asks the API what became of the key.
 */
async function insist(client, click, tally, deadline) {
  for (let last; ; await sleep(last?.retryAfter ? 500 : 250)) {
    try {
      last = await client.create(click.body, click.key);
      const code = last.body?.code ?? last.status;
      tally[code] = (tally[code] ?? 0) + 1;
      const again = [408, 429, 502, 503, 504].includes(last.status) || (last.status === 409 && code !== 'body_not_recorded');
      if (!again) return last;
    } catch (error) {
      const code = error.cause?.code ?? error.name;
      tally[code] = (tally[code] ?? 0) + 1;
    }
    if (Date.now() > deadline()) return last ?? { status: 0, text: 'no answer' };
  }
}

/** Kills and restarts, one after the other, until it has done so `kills` times. `step` lets the next clicks come: some just before, some while it is gone. */
async function slaughter(stack, seed, kills, step) {
  const { below } = lots(seed);
  const victims = ['api', 'worker', 'redis', 'edge', ...(stack.egress ? ['egress'] : [])];
  const killed = {};
  let slowestStart = 0;
  for (let kill = 0; kill < kills; kill += 1) {
    await sleep(below(600, 'calm', kill)); // at random: no condition would be
    // Each once in every round of as many as there are, in an order that differs.
    const round = Math.floor(kill / victims.length);
    const order = [...victims].sort((a, b) => draw(seed, 'victim', round, a) - draw(seed, 'victim', round, b));
    const victim = order[kill % victims.length];
    step();
    await sleep(below(120, 'into it', kill));
    await stack.kill(victim);
    step();
    await sleep(below(400, 'gone', kill));
    const started = Date.now();
    await stack.start(victim);
    slowestStart = Math.max(slowestStart, Date.now() - started);
    killed[victim] = (killed[victim] ?? 0) + 1;
  }
  return { killed, slowestStart };
}

export async function storm(stack, { seed, count, kills }) {
  await setNetwork(stack, { mode: 'stormy', seed, slowMs: [500, 4000] });
  const all = clicks(seed, count);
  const tally = {};
  // Clicks are spread over the kills: each comes when its share of their steps is done.
  let steps = 0;
  const waiting = [];
  const step = () => {
    steps += 1;
    for (const wake of waiting.splice(0)) wake();
  };
  const itsTurn = async (number) => {
    const turn = Math.min(2 * kills, 1 + Math.floor((number / count) * 2 * kills));
    while (steps < turn) await new Promise((wake) => waiting.push(wake));
  };
  let end = Infinity; // once all have been killed, this long for everybody to get an answer
  const deadline = () => end;
  const answers = new Map();
  const clients = Array.from({ length: CLIENTS }, async (_, who) => {
    for (const click of all.filter(({ client }) => client === who)) {
      await itsTurn(click.number);
      const client = new Client(stack, { workspace: click.workspace });
      const got = [];
      const request = async () => got.push(await insist(client, click, tally, deadline));
      const together = Array.from({ length: click.together }, request);
      if (click.hangsUp) {
        await client.send('POST', '', { key: click.key, body: click.body, signal: AbortSignal.timeout(5) }).catch(() => {});
      }
      await Promise.all(together);
      for (let retry = 0; retry < click.retries; retry += 1) await request();
      answers.set(click.key, got);
    }
  });
  const { killed, slowestStart } = await slaughter(stack, seed, kills, step);
  end = Date.now() + 60_000;
  await Promise.all(clients);
  // A last retry of all, when everything is long settled.
  for (const click of all) {
    const client = new Client(stack, { workspace: click.workspace });
    answers.get(click.key).push(await insist(client, click, tally, deadline));
  }
  const posts = await until('every post has come to an end', async () => {
    const lists = await Promise.all(['demo', 'other'].map((workspace) => new Client(stack, { workspace }).posts()));
    return lists.flat().every(({ state }) => !OPEN.includes(state)) && lists.flat();
  }, { seconds: 90 });
  const books = await until('the network has nothing under way', async () => {
    const seen = await audit(stack);
    return seen.inFlight === 0 && seen;
  });
  return { clicks: all, answers, posts, books, killed, slowestStart, tally };
}
