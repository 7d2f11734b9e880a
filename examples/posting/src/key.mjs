/** The key in an `Idempotency-Key` header, as the gateway reads it: an RFC 9651 String, or bare. By this key it asks later. */
export function keyOf(header) {
  if (header === undefined) return null;
  const quoted = /^"((?:[^"\\]|\\["\\])*)"/.exec(header.trim());
  return quoted ? quoted[1].replace(/\\(["\\])/g, '$1') : header.trim();
}
