// The stand-in's pages.

const escape = (text) => String(text).replace(/[&<>"']/g, (it) => `&#${it.charCodeAt(0)};`);

const page = (title, body) => `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>${title}</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
  td { overflow-wrap: anywhere; vertical-align: top; }
  .twice { color: light-dark(#b00020, #ff8a80); font-weight: bold; }
</style>
<h1>${title}</h1>
${body}
</html>
`;

export function auditPage({ posts, keys, twice, requests }) {
  const rows = posts.toReversed().map(({ id, platform, text, key, at }) => {
    const often = key === null ? 'no key' : String(keys[key]);
    return `<tr><td>${id}<td>${platform}<td>${escape(text)}<td>${escape(key ?? '')}<td${keys[key] > 1 ? ' class="twice"' : ''}>${often}<td>${requests[key ?? ''] ?? 0}<td>${at}`;
  });
  const verdict = twice.length === 0 ? 'No post is here twice.' : `<span class="twice">${twice.length} posts are here more than once.</span>`;
  return page('What the networks were given', `<p>${posts.length} posts. ${verdict}
<table><tr><th>id<th>network<th>text<th>key<th>posts with it<th>requests with it<th>at
${rows.join('\n')}
</table>`);
}

export function postPage(post) {
  if (!post) return page('Not here', '<p>There is no such post.');
  return page(`Post ${post.id}`, `<p>${escape(post.text)}<p><small>${post.platform}, ${post.at}</small>`);
}
