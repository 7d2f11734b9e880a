// What the three processes have in common: where they listen, and when they stop.

/** A setting from the environment; without a default it has to be there. */
export function setting(name, otherwise) {
  const value = process.env[name] ?? otherwise;
  if (value === undefined) {
    console.error(`${name} is not set`);
    process.exit(2);
  }
  return value;
}

export const number = (name, otherwise) => Number(setting(name, otherwise));

/** Tells whoever started this process, in one line of JSON, that it works and where. */
export function tell(what) {
  process.stdout.write(`${JSON.stringify(what)}\n`);
}

/** Listens on loopback, and tells the port: 0 means any. */
export function listen(app, port) {
  const server = app.listen(port, '127.0.0.1');
  server.once('listening', () => tell({ listening: `http://127.0.0.1:${server.address().port}` }));
  server.once('error', (error) => {
    console.error(`cannot listen on 127.0.0.1:${port}: ${error.message}`);
    process.exit(1);
  });
  return server;
}

/** Calls `stop` once, on SIGTERM or SIGINT, or when whoever started this process is gone. */
export function onStop(stop) {
  let stopping = false;
  const once = async () => {
    if (stopping) return;
    stopping = true;
    try {
      await stop();
    } finally {
      process.exit(0);
    }
  };
  process.on('SIGTERM', once);
  process.on('SIGINT', once);
  if (process.env.STOP_WITH_STDIN) process.stdin.resume().once('end', once).once('error', once);
}
