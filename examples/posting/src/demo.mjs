// What the client page needs besides posts: the switch that makes the network bad, and what the network saw.
import express from 'express';
import { Problem } from './problem.mjs';

export function demo(control) {
  const router = express.Router();
  router.use(express.json());
  const ask = async (res, path, init) => {
    const answer = await fetch(control + path, { ...init, signal: AbortSignal.timeout(5000) }).catch((error) => {
      throw new Problem(502, 'network_away', `The network's control address: ${error.cause?.message ?? error.message}`);
    });
    res.status(answer.status).type('application/json').send(await answer.text());
  };
  router.get('/network', (_req, res) => ask(res, '/control'));
  router.put('/network', (req, res) =>
    ask(res, '/control', {
      method: 'PUT',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ mode: req.body?.mode }),
    }),
  );
  router.get('/audit', (_req, res) => ask(res, '/audit'));
  return router;
}
