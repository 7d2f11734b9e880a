// Starts the six processes of the example, and can kill and restart each. `run` uses it, and so do the tests.
import { spawn } from 'node:child_process';
import { createWriteStream, mkdirSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const alive = new Set();
process.on('exit', () => {
  for (const child of alive) child.kill('SIGKILL');
});

async function freePort() {
  const server = createServer();
  await new Promise((done, fail) => server.once('error', fail).listen(0, '127.0.0.1', done));
  const { port } = server.address();
  await new Promise((done) => server.close(done));
  return port;
}

/** True once a Redis at the port has its data and serves. */
function redisServes(port) {
  return new Promise((done) => {
    const socket = connect(port, '127.0.0.1', () => socket.write('PING\r\n'));
    const end = (answer) => {
      socket.destroy();
      done(answer);
    };
    socket.once('data', (data) => end(data.toString().startsWith('+PONG')));
    socket.once('error', () => end(false));
    socket.setTimeout(1000, () => end(false));
  });
}

const portOf = (address) => Number(new URL(address).port);

export class Stack {
  /**
   * `directory` keeps everything; `env` has settings for one process or another, by its name. Without `egress` the worker speaks to
   * the network directly, as it would without oncegate.
   */
  constructor({ directory, oncegate = process.env.ONCEGATE, env = {}, egress = true }) {
    if (!oncegate) throw new Error('ONCEGATE has to name the binary of the gateway');
    Object.assign(this, { directory, oncegate, env, egress });
    this.processes = new Map(); // name → its running process
    this.address = {}; // name → http://127.0.0.1:PORT, the same after a restart
    this.admin = {};
    this.names = ['redis', 'network', ...(egress ? ['egress'] : []), 'api', 'worker', 'edge'];
    mkdirSync(join(directory, 'redis'), { recursive: true });
  }

  node(name) {
    const port = this.address[name] ? { PORT: portOf(this.address[name]) } : {};
    return { command: process.execPath, args: [here(`./${name}.mjs`)], env: { STOP_WITH_STDIN: '1', ...port } };
  }

  gateway(name, upstream) {
    const data = join(this.directory, name);
    const args = ['serve', '--config', here(`../${name}.toml`), '--upstream', upstream, '--data', data];
    args.push('--listen', this.address[name]?.slice('http://'.length) ?? '127.0.0.1:0');
    const env = { ONCEGATE_ADMIN__LISTEN: this.admin[name] ?? '127.0.0.1:0', NO_COLOR: '1' };
    return { command: this.oncegate, args, env };
  }

  /** How a process is started. */
  async plan(name) {
    const database = join(this.directory, 'posts.db');
    switch (name) {
      case 'redis': {
        this.redisPort ??= await freePort();
        const data = join(this.directory, 'redis');
        const args = ['--bind', '127.0.0.1', '--port', String(this.redisPort), '--dir', data];
        // What the queue has acknowledged it keeps, over a kill and a power cut; and it refuses rather than forgets.
        args.push('--appendonly', 'yes', '--appendfsync', 'always', '--save', '', '--maxmemory-policy', 'noeviction');
        return { command: 'redis-server', args, env: {} };
      }
      case 'network':
        return this.node('network');
      case 'egress':
        return this.gateway('egress', this.address.network);
      case 'edge':
        return this.gateway('edge', this.address.api);
      case 'api': {
        const plan = this.node('api');
        Object.assign(plan.env, { DATABASE: database, REDIS_PORT: this.redisPort, NETWORK_CONTROL_URL: this.address.network });
        return plan;
      }
      case 'worker': {
        const plan = this.node('worker');
        const url = this.egress ? this.address.egress : this.address.network;
        const there = { MASTODON_URL: url, X_URL: url, X_POST_URL: `${this.address.network}/i/status/` };
        Object.assign(plan.env, { DATABASE: database, REDIS_PORT: this.redisPort, ...there });
        return plan;
      }
      default:
        throw new Error(`no process is called ${name}`);
    }
  }

  async start(...names) {
    for (const name of names.length ? names : this.names) await this.startOne(name);
    return this;
  }

  /** Starts a process and waits until it serves. Its old port may be taken for a moment by somebody's connection: then again. */
  async startOne(name) {
    for (let attempt = 1; ; attempt += 1) {
      try {
        return await this.attempt(name);
      } catch (error) {
        if (attempt === 5) throw error;
        console.error(`${error.message}; trying again`);
        await sleep(200);
      }
    }
  }

  async attempt(name) {
    const { command, args, env } = await this.plan(name);
    // A gateway has only the settings that are given to it here.
    const inherited = Object.entries(process.env).filter(([variable]) => !variable.startsWith('ONCEGATE_'));
    const settings = { ...Object.fromEntries(inherited), ...env, ...this.env[name] };
    // A group of its own: Ctrl-C reaches `run` alone, and `run` stops the processes in order.
    const child = spawn(command, args, { env: settings, stdio: ['pipe', 'pipe', 'pipe'], detached: true, cwd: this.directory });
    child.stdin.on('error', () => {});
    const log = createWriteStream(join(this.directory, `${name}.log`), { flags: 'a' });
    alive.add(child);
    const gone = new Promise((done) => child.once('error', done).once('exit', (code, signal) => done(signal ?? code)));
    gone.then(() => {
      alive.delete(child);
      if (this.processes.get(name)?.child === child) this.processes.delete(name);
    });
    this.processes.set(name, { child, gone });
    const ready = new Promise((done) => {
      for (const stream of [child.stdout, child.stderr]) {
        createInterface({ input: stream }).on('line', (line) => {
          log.write(`${new Date().toISOString()} ${line}\n`);
          if (this.isReady(name, line)) done();
        });
      }
    });
    const served = name === 'redis' ? this.redisReady(gone) : ready;
    const late = sleep(60_000, 'is not ready after 60 s', { ref: false });
    const problem = await Promise.race([served, gone.then((how) => `ended: ${how?.message ?? how}`), late]);
    if (problem) {
      child.kill('SIGKILL');
      throw new Error(`${name} ${problem}; see ${join(this.directory, `${name}.log`)}`);
    }
  }

  async redisReady(gone) {
    let ended = false;
    gone.then(() => (ended = true));
    while (!ended && !(await redisServes(this.redisPort))) await sleep(20);
  }

  /** Each process says in its own words that it serves, and where. */
  isReady(name, line) {
    if (name === 'edge' || name === 'egress') {
      const [, address, role] = /listening address=(\S+) role="(\w+)"/.exec(line) ?? [];
      if (role === 'admin') this.admin[name] = address;
      if (role === 'server') this.address[name] = `http://${address}`;
      return role === 'server';
    }
    if (!line.startsWith('{"listening":') && !line.startsWith('{"ready":')) return false;
    const { listening } = JSON.parse(line);
    if (listening) this.address[name] = listening;
    return true;
  }

  /** kill -9. */
  async kill(name) {
    const { child, gone } = this.processes.get(name);
    child.kill('SIGKILL');
    await gone;
  }

  /** SIGTERM, in the order in which requests flow; whoever is not gone after `patience` is killed. */
  async stop(patience = 30_000) {
    for (const name of this.names.toReversed()) {
      const running = this.processes.get(name);
      if (!running) continue;
      running.child.kill('SIGTERM');
      await Promise.race([running.gone, sleep(patience, undefined, { ref: false })]);
      running.child.kill('SIGKILL');
      await running.gone;
    }
  }
}
