// Takes the screenshots of the page anew: node tests/screenshots.mjs (ONCEGATE: the gateway's binary; pngquant makes them small).
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { chromium } from 'playwright-core';
import { begin, setNetwork } from './helpers.mjs';

const LONG = `What is new in version 2.4, in one breath: drafts survive an empty battery, the queue shows what it is doing and why, a post that
the network may or may not have is called just that, the night mode is darker, the day mode brighter, and the settings page finally fits on one screen.`.replaceAll('\n', ' ');
const directory = fileURLToPath(new URL('../screenshots/', import.meta.url));
mkdirSync(directory, { recursive: true });
const ends = [];
const { stack, passed } = await begin({ after: (end) => ends.push(end) }, { env: { egress: { ONCEGATE_UPSTREAM__RESPONSE_TIMEOUT: '60s' }, worker: { PUBLISH_TIMEOUT_MS: '60000' } } });
const executablePath = [process.env.CHROMIUM, '/usr/bin/chromium', '/usr/bin/google-chrome'].find((path) => path && existsSync(path));
const browser = await chromium.launch({ executablePath, args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking'] });
try {
  const page = await browser.newPage({ viewport: { width: 1280, height: 1000 } });
  await page.goto(stack.address.edge);
  const post = (text, state) =>
    page.locator(`article${state ? `[data-state=${state}]` : ''}`).filter({ has: page.getByText(text, { exact: true }) });
  const attempts = (text, n) => post(text).locator(`.log li:not([data-kind=sending])`).nth(n - 1).waitFor();
  const mode = async (name, controls) => {
    await page.getByRole('radio', { name, exact: true }).check();
    await page.locator('#mode-note').getByText(/./).waitFor();
    await setNetwork(stack, { mode: name.toLowerCase().replace(' ', '-'), ...controls });
  };
  const write = async (platform, text) => {
    await page.getByRole('radio', { name: platform, exact: true }).check();
    await page.getByLabel('Post', { exact: true }).fill(text);
    return text;
  };
  const publish = page.getByRole('button', { name: 'Publish', exact: true });

  let text = await write('Mastodon', 'We open at nine on Saturday. Coffee is on us.');
  await publish.dblclick();
  await post(text, 'published').waitFor();
  await attempts(text, 2);
  text = await write('X', LONG);
  await publish.click();
  await post(text, 'failed').waitFor();
  text = await write('X', 'Version 2.4 is out: drafts survive an empty battery.');
  await publish.click();
  await post(text, 'published').waitFor();
  await post(text).getByRole('button', { name: 'Retry' }).click();
  await attempts(text, 2);
  await post(text).getByRole('button', { name: 'Same key, other text' }).click();
  await attempts(text, 3);
  await mode('Lost after');
  await page.getByLabel('And my own connection').check();
  text = await write('Mastodon', 'Maintenance tonight, from 22:00 to 22:30 UTC.');
  await publish.click();
  await post(text, 'unconfirmed').waitFor();
  await attempts(text, 2);
  await post(text).getByRole('button', { name: 'Look at the network' }).click();
  await post(text).getByText(/the network has it, once/).waitFor();
  await mode('Slow', { slowMs: [45_000, 45_000] });
  text = await write('Mastodon', 'Ten thousand readers. Thank you, every one of you!');
  await publish.click();
  await post(text, 'publishing').waitFor();
  await attempts(text, 2);
  await page.mouse.move(0, 0);
  await page.evaluate(() => document.activeElement.blur());

  for (const [width, height] of [[1280, 1140], [390, 1720]]) {
    for (const colorScheme of ['light', 'dark']) {
      await page.setViewportSize({ width, height });
      await page.emulateMedia({ colorScheme });
      await page.evaluate(() => document.fonts.ready);
      const path = `${directory}page-${width}-${colorScheme}.png`;
      await page.screenshot({ path, animations: 'disabled' });
      spawnSync('pngquant', ['--force', '--skip-if-larger', '--strip', '--speed', '1', '--quality', '70-95', '--output', path, path]);
      console.log(path);
    }
  }
  passed();
} finally {
  await browser.close();
  for (const end of ends) await end();
}
