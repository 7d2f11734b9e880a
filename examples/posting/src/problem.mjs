// Errors as the gateway writes them, too: RFC 9457.

export class Problem extends Error {
  constructor(status, code, detail) {
    super(detail);
    Object.assign(this, { status, code, detail });
  }
}

const TITLES = { 400: 'Bad request', 401: 'Unauthorized', 403: 'Forbidden', 404: 'Not found', 409: 'Conflict' };

export function sendProblem(res, { status, code, detail }) {
  if (status === 401) res.set('WWW-Authenticate', 'Bearer');
  const title = TITLES[status] ?? 'Error';
  res.status(status).type('application/problem+json');
  res.send(JSON.stringify({ type: `urn:posting:problem:${code}`, title, status, detail, code }));
}
