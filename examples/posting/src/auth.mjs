// Who may do what. A demonstration: a real API asks its database for users, and its vault for the networks' tokens.
import { Problem } from './problem.mjs';

const USERS = new Map([
  ['demo', { name: 'user-demo', workspaces: ['demo'] }],
  ['other', { name: 'user-other', workspaces: ['other'] }],
]);

/** Express middleware: the caller is known, and may use the workspace in the path. */
export function authorize(req, _res, next) {
  const token = /^Bearer +(\S+)$/i.exec(req.get('Authorization') ?? '')?.[1];
  const user = token && USERS.get(token);
  if (!user) throw new Problem(401, 'token_invalid', 'Send "Authorization: Bearer demo" for the workspace demo.');
  if (!user.workspaces.includes(req.params.workspace)) {
    throw new Problem(403, 'forbidden', `This token may not use the workspace ${req.params.workspace}.`);
  }
  req.user = user.name;
  next();
}

/** The token with which the account's owner has let us post. Asked for at each attempt, since it may have been renewed. */
export function networkToken(platform, accountId) {
  return `${platform}-token-of-${accountId}`;
}
