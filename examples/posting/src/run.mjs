// Starts everything, says where it is, and ends it on Ctrl-C.
import { mkdirSync } from 'node:fs';
import { resolve } from 'node:path';
import { Stack } from './stack.mjs';

const directory = resolve(process.env.POSTING_DATA ?? 'data');
mkdirSync(directory, { recursive: true });
// A browser keeps its connection open, and a gateway that drains waits for it: not as long as in production.
const drain = { ONCEGATE_SERVER__DRAIN_TIMEOUT: '2s' };
const stack = new Stack({ directory, env: { worker: { LOCK_MS: '10000' }, edge: drain, egress: drain } });

let stopping = false;
async function stop(code) {
  if (stopping) process.exit(1); // a second Ctrl-C: whatever is left is killed
  stopping = true;
  console.log('\nstopping');
  await stack.stop();
  process.exit(code);
}
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => void stop(0));

try {
  await stack.start();
} catch (error) {
  if (!stopping) {
    console.error(error.message);
    await stop(1);
  }
}
const { edge, api, egress, network } = stack.address;
console.log(`
  the page, through the gateway   ${edge}
  the network and its audit       ${network}

  edge oncegate     ${edge}   admin ${stack.admin.edge}
  posting API       ${api}
  Redis             127.0.0.1:${stack.redisPort}
  egress oncegate   ${egress}   admin ${stack.admin.egress}
  data and logs     ${directory}

  curl -i ${edge}/v1/workspaces/demo/posts -H 'Authorization: Bearer demo' -H 'Idempotency-Key: my-first-click' \\
       --json '{"platform":"mastodon","accountId":"acc_1","status":"publish","text":"Hello"}'

Ctrl-C ends all of it.`);
for (const [name, { gone }] of stack.processes) {
  void gone.then((how) => {
    if (stopping) return;
    console.error(`${name} ended by itself (${how}); see ${directory}/${name}.log`);
    void stop(1);
  });
}
