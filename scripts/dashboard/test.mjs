// Drives the dashboard with a real Chromium: what it shows, that it stays live, that keys and small screens do, how fast and how large it is, that it
// asks nobody else, and that axe-core finds nothing serious. Prints what was measured; pictures are for people. Usage: test.mjs EXAMPLE OUT

import { spawn } from "node:child_process";
import { mkdirSync, rmSync, writeFileSync, mkdtempSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { readFileSync } from "node:fs";
import { deflateSync } from "node:zlib";
import { chromium } from "playwright-core";

const [example, out] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const STEPS = Number(process.env.DASHBOARD_STEPS || 1_000_000);
const runs = mkdtempSync(join(tmpdir(), "ella-dashboard-"));
const children = [];
mkdirSync(out, { recursive: true });

function check(holds, what) {
  if (!holds) throw new Error(what);
  console.log(`ok  ${what}`);
}

/** Starts the example; gives what it says first. */
async function serve(...args) {
  const child = spawn(example, args, { stdio: ["ignore", "pipe", "inherit"] });
  children.push(child);
  const lines = createInterface({ input: child.stdout });
  const told = await new Promise((resolve, reject) => {
    lines.once("line", (line) => resolve(JSON.parse(line)));
    child.once("exit", (code) => reject(new Error(`the example ended with ${code}`)));
  });
  return {
    ...told,
    child,
    ended: new Promise((resolve) => {
      child.once("exit", resolve);
    }),
  };
}

/** A picture without a library: one colour fading into another. */
function png(size, hue) {
  const crc = (bytes) => {
    let sum = ~0;
    for (const byte of bytes) {
      sum ^= byte;
      for (let bit = 0; bit < 8; bit += 1) sum = (sum >>> 1) ^ (0xedb88320 & -(sum & 1));
    }
    return ~sum >>> 0;
  };
  const chunk = (name, data) => {
    const body = Buffer.concat([Buffer.from(name), data]);
    const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)];
    length.writeUInt32BE(data.length);
    sum.writeUInt32BE(crc(body));
    return Buffer.concat([length, body, sum]);
  };
  const header = Buffer.alloc(13);
  header.writeUInt32BE(size, 0);
  header.writeUInt32BE(size, 4);
  header.set([8, 2], 8);
  const rows = Buffer.alloc(size * (1 + 3 * size));
  for (let y = 0; y < size; y += 1) {
    for (let x = 0; x < size; x += 1) {
      const inside = (x - size / 2) ** 2 + (y - size / 2) ** 2 < (size / 3) ** 2;
      rows.set([(hue * 40 + x) % 256, inside ? 220 : (y * 2) % 256, inside ? 60 : (hue * 90) % 256], y * (1 + 3 * size) + 1 + 3 * x);
    }
  }
  return Buffer.concat([
    Buffer.from("\x89PNG\r\n\x1a\n", "latin1"),
    chunk("IHDR", header),
    chunk("IDAT", deflateSync(rows)),
    chunk("IEND", Buffer.alloc(0)),
  ]);
}

function drawSamples(folder, steps) {
  for (const step of steps) {
    const place = join(folder, "samples", String(step).padStart(12, "0"));
    mkdirSync(place, { recursive: true });
    const prompts = [
      "a red cube beside a blue sphere on a wooden table, soft light from the left",
      "<b>three</b> birds over a lake at dawn, mist, mountains behind",
      "a street at night in the rain",
    ];
    writeFileSync(
      join(place, "index.json"),
      JSON.stringify({ step, images: prompts.map((prompt, at) => ({ file: `00${at}.png`, prompt, seed: 7 })) }),
    );
    prompts.forEach((_, at) => {
      if (!(step === steps[0] && at === 2)) writeFileSync(join(place, `00${at}.png`), png(96, at + step / 1000));
    });
  }
}

/** A page of its own, with everything that it must not do noted. */
async function open(browser, base, path, options) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const faults = [];
  let bytes = 0;
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) faults.push(`console: ${message.text()} ${message.location().url}`);
  });
  page.on("pageerror", (error) => faults.push(`error: ${error.message}`));
  page.on("dialog", (dialog) => {
    faults.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== base) faults.push(`asked elsewhere: ${request.url()}`);
  });
  page.on("response", async (response) => {
    if (response.url().endsWith("/live")) return;
    bytes += (await response.body().catch(() => Buffer.alloc(0))).length;
  });
  const began = performance.now();
  await page.goto(base + path, { waitUntil: "commit" });
  await page.waitForFunction(
    () => document.querySelector("#range")?.textContent.includes("to") || document.querySelector("#job:not([hidden]) .bar"),
    null,
    { timeout: 90_000 },
  );
  await page.evaluate(
    () =>
      new Promise((done) => {
        requestAnimationFrame(() => requestAnimationFrame(done));
      }),
  );
  const millis = performance.now() - began;
  return { page, context, faults, millis, bytes: () => bytes };
}

async function accessible(page, name) {
  await page.evaluate(axe);
  const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  const serious = found.violations.filter((one) => ["serious", "critical"].includes(one.impact));
  found.violations.forEach((one) =>
    console.log(
      `    axe ${one.impact}: ${one.id} on ${one.nodes
        .map((node) => node.target.join(" "))
        .slice(0, 4)
        .join(", ")}`,
    ),
  );
  check(serious.length === 0, `axe-core finds nothing serious: ${name}`);
}

/** Colours on a canvas: a blank one has few. */
const inked = (page, at) =>
  page.evaluate((index) => {
    const canvas = document.querySelectorAll(".plot canvas")[index];
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let set = 0;
    for (let at = 3; at < data.length; at += 4) set += data[at] > 0 ? 1 : 0;
    return set / (data.length / 4);
  }, at);

const shot = async (page, name, full = true) => {
  await page.evaluate(() => scrollTo({ top: 0, behavior: "instant" }));
  await page.screenshot({ path: join(out, `${name}.png`), fullPage: full });
};
/** Pictures are fetched when they come into sight. */
const loaded = async (page) => {
  await page.evaluate(() => document.querySelector("#samples").scrollIntoView({ behavior: "instant" }));
  await page.waitForFunction(() => [...document.querySelectorAll("img")].every((image) => image.complete));
};

/** Pictures come before their index, as they do while a run draws. */
async function latePictures(browser, base, folder) {
  const late = await open(browser, base, "/", { colorScheme: "light", viewport: { width: 1280, height: 900 } });
  const place = join(folder, "samples", "000000003200");
  mkdirSync(place);
  writeFileSync(join(place, "000.png"), png(96, 3));
  const shows = (text) => document.querySelector("#samples .grid")?.textContent.includes(text);
  await late.page.waitForFunction(shows, "step 3,200", { timeout: 30_000 });
  drawSamples(folder, [3200]);
  await late.page.waitForFunction(() => document.querySelector('#samples img[alt^="step 3200:"]'), null, { timeout: 30_000 });
  check(true, "a step is shown when its index comes");
  await late.context.close();
}

/** One step makes a point, and no later one is spoken of; an axis tells its scale; a date is the reader's. */
async function oneStep(browser, base) {
  const viewport = { width: 1280, height: 900 };
  const one = await open(browser, base, "/?run=one", { colorScheme: "light", viewport, timezoneId: "Pacific/Auckland" });
  check((await one.page.textContent("#range")) === "steps 1 to 1", "a run of one step ends with it");
  const dots = await one.page.evaluate(() => {
    const canvas = document.querySelectorAll(".plot canvas")[1];
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    // The throughput's colour.
    return [...data.keys()].filter((at) => at % 4 === 0 && data[at] === 0x0b && data[at + 1] === 0x7a && data[at + 2] === 0x75).length;
  });
  check(dots > 5, `and it is drawn (${dots} dots)`);
  const [first, few] = await one.page.evaluate(async () => {
    const { ticks } = await import("/assets/chart.js");
    return [Object.is(ticks(-0.3, 8, 4)[0], 0), ticks(1, 83, 2.4)];
  });
  check(first && few.length > 1, `axes have more than one number, and no −0 (${few})`);
  const at = await one.page.evaluate(async () => (await import("/assets/dom.js")).clock(Date.UTC(2020, 0, 1, 12, 30)));
  check(at === "2020-01-02 01:30:00", `a time has the date of its own zone (${at})`);
  await one.context.close();
}

async function longRun(browser) {
  const folder = join(runs, "<img src=x onerror=alert(1)>");
  mkdirSync(folder);
  drawSamples(folder, [400, 800, 1200, 1600, 2000, 2400, 2800]);
  const done = await serve(join(runs, "finished"), "--steps", "300", "--pace-ms", "2", "--world", "2");
  check((await done.ended) === 0, "a short run trains to its end");
  await (await serve(join(runs, "one"), "--steps", "1", "--pace-ms", "2", "--world", "2")).ended;
  const served = await serve(folder, "--past", String(STEPS), "--pace-ms", "100", "--loss-of-workers");
  console.log(`    ${STEPS} steps written in ${served.written_seconds} s; the coordinator opened the run in ${served.open_seconds} s`);
  const base = served.http;
  await fetch(`${base}/api/v1/summary`);
  const restored = async () => {
    const deadline = Date.now() + 300_000;
    while ((await (await fetch(`${base}/api/v1/summary`)).json()).history.restoring) {
      if (Date.now() > deadline) throw new Error("the past is not restored after five minutes");
      await new Promise((later) => setTimeout(later, 20));
    }
  };
  await restored();

  // What a first visit costs; the browser itself is warm.
  await (await open(browser, base, "/", { colorScheme: "light" })).context.close();
  const first = await open(browser, base, "/", { colorScheme: "light", viewport: { width: 1280, height: 900 } });
  const { page } = first;
  console.log(`    drawn after ${first.millis.toFixed(0)} ms`);
  check(first.millis < 1000, "the page is drawn within a second");
  await page.waitForTimeout(1500);
  await loaded(page);
  console.log(`    ${first.bytes()} bytes by then, pictures included`);
  check(first.bytes() < 1_000_000, "it is less than a megabyte");
  for (let at = 0; at < 5; at += 1) check((await inked(page, at)) > 0.01, `curve ${at} is drawn`);
  check((await page.textContent("#range")).includes("1M") || STEPS !== 1_000_000, "the whole run is shown");

  const before = await page.textContent("#done");
  await page.waitForFunction((text) => document.querySelector("#done").textContent !== text, before);
  check(true, "steps come live");
  await page.waitForFunction(() => [...document.querySelectorAll("#events-body .mark")].some((mark) => mark.textContent === "lost"), null, {
    timeout: 20_000,
  });
  check(true, "a worker that is lost comes live");
  await page.waitForFunction(() => document.querySelectorAll("#ranks-body tbody tr").length === 4, null, { timeout: 20_000 });
  check((await page.textContent("#verdict")).length > 20, "who waits for whom is said");

  await page.focus(".plot canvas");
  await page.keyboard.press("End");
  await page.keyboard.press("ArrowLeft");
  await page.waitForFunction(() => document.querySelector(".plot canvas").getAttribute("aria-valuetext"));
  const said = await page.getAttribute(".plot canvas", "aria-valuetext");
  check(/^step [\d,]+: train [\d.]+/.test(said), `keys read values: ${said.slice(0, 80)}`);
  const wide = await page.textContent("#range");
  for (let n = 0; n < 4; n += 1) await page.keyboard.press("+");
  await page.waitForFunction((text) => document.querySelector("#range").textContent !== text, wide);
  await page.waitForTimeout(400);
  await shot(page, "zoomed", false);
  await page.keyboard.press("Escape");
  await page.waitForFunction((text) => document.querySelector("#range").textContent.slice(0, 8) === text.slice(0, 8), wide);
  check(true, "keys zoom, and back");
  const box = await page.locator(".plot canvas").first().boundingBox();
  await page.mouse.move(box.x + box.width * 0.4, box.y + 60);
  await page.mouse.down();
  await page.mouse.move(box.x + box.width * 0.6, box.y + 90, { steps: 5 });
  await page.mouse.up();
  await page.waitForFunction(() => Number(document.querySelector("#range").textContent.match(/point is ([\d.]+)/)?.[1] || 1) < 1000);
  check(true, "dragging zooms");
  await page.click('[data-zoom="whole"]');
  await page.click(".plot details summary");
  await page.waitForFunction(() => document.querySelectorAll(".plot details table tbody tr").length > 10);
  check(true, "there is a table instead of the curve");
  await page.click(".plot details summary");

  await page.selectOption("#with", "finished");
  await page.waitForFunction(() => document.querySelectorAll("#config-body tbody tr").length > 0);
  check((await page.textContent("#config-body")).includes("train.steps"), "configs are compared by key");
  await page.waitForFunction(() => document.querySelector(".plot .read").textContent.includes("other run"));
  check(true, "the other run's loss is drawn beside, once it is read");
  await page.selectOption("#with", "");
  await page
    .locator(".grid .shot img")
    .first()
    .focus()
    .catch(() => {});
  await page.locator("button.shot").first().press("Enter");
  check(await page.evaluate(() => document.querySelector("dialog").open), "a picture opens by key");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("Escape");
  check(await page.evaluate(() => !document.querySelector("dialog").open), "and closes");
  const markup = await page.locator("img[src='x'], .grid b, h1 *").count();
  check((await page.locator(".grid .prompt").count()) === 3 && markup === 0, "what comes from outside stays text");

  await accessible(page, "light");
  await loaded(page);
  await shot(page, "light");
  await page.click("#theme");
  await page.click("#theme");
  check((await page.getAttribute("html", "data-theme")) === "dark", "the switch turns it dark");
  await page.waitForTimeout(300);
  await accessible(page, "dark by the switch");
  check(first.faults.length === 0, `nothing is complained of, nobody else is asked (${first.faults.join("; ")})`);
  await first.context.close();

  const dark = await open(browser, base, "/", { colorScheme: "dark", viewport: { width: 1280, height: 900 } });
  check((await dark.page.getAttribute("html", "data-theme")) === "dark", "the system's colours are taken");
  await dark.page.waitForTimeout(2500);
  await loaded(dark.page);
  await shot(dark.page, "dark");
  await dark.context.close();

  const phone = await open(browser, base, "/", {
    colorScheme: "light",
    viewport: { width: 390, height: 844 },
    deviceScaleFactor: 2,
    isMobile: true,
    hasTouch: true,
  });
  await phone.page.waitForTimeout(2500);
  await loaded(phone.page);
  const over = await phone.page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
  check(over <= 0, `a phone need not scroll sideways (${over})`);
  await accessible(phone.page, "phone");
  await shot(phone.page, "phone");
  check(phone.faults.length === 0, `nor is anything wrong on a phone (${phone.faults.join("; ")})`);
  await phone.context.close();

  const finished = await open(browser, base, "/?run=finished", { colorScheme: "light", viewport: { width: 1280, height: 900 } });
  await finished.page.waitForFunction(() => document.querySelector("#phase").textContent === "done");
  check((await inked(finished.page, 0)) > 0.01, "a finished run beside this one is shown");
  await finished.page.waitForTimeout(1000);
  await accessible(finished.page, "a finished run");
  await shot(finished.page, "finished");
  await finished.context.close();

  await oneStep(browser, base);
  await latePictures(browser, base, folder);

  const last = await open(browser, base, "/", { colorScheme: "light", viewport: { width: 1280, height: 900 } });
  served.child.kill("SIGKILL");
  await last.page.waitForFunction(() => document.querySelector("#notices").textContent.includes("does not answer"));
  check((await inked(last.page, 0)) > 0.01, "what was known stays when the coordinator dies");
  await shot(last.page, "gone", false);
  await last.context.close();
}

async function jobPage(browser) {
  const served = await serve("data/mine", "--job", "--world", "3", "--pace-ms", "20");
  const job = await open(browser, served.http, "/", { colorScheme: "light", viewport: { width: 1280, height: 900 } });
  await job.page.waitForFunction(() => document.querySelector("#job-body")?.textContent.includes("truncated"), null, { timeout: 30_000 });
  await job.page.waitForTimeout(4000);
  const text = await job.page.textContent("#job-body");
  check(text.includes("refused.too_small") && text.includes("<b>truncated</b>"), "a job's results and given-up units are shown");
  check((await inked(job.page, 1)) > 0.01, "and its throughput");
  await accessible(job.page, "a job");
  await shot(job.page, "job");
  check(job.faults.length === 0, `nothing is wrong with it (${job.faults.join("; ")})`);
  await job.context.close();
  served.child.kill("SIGKILL");
}

async function thousandRanks(browser) {
  const served = await serve(join(runs, "thousand"), "--world", "1000", "--pace-ms", "1000", "--steps", "100000");
  const many = await open(browser, served.http, "/", { colorScheme: "dark", viewport: { width: 1280, height: 900 } });
  await many.page.waitForFunction(() => document.querySelector("#ranks-of").textContent.includes("of 1,000"), null, { timeout: 90_000 });
  const rows = await many.page.locator("#ranks-body tbody tr").count();
  check(rows <= 60, `of a thousand ranks the slowest are listed (${rows} rows)`);
  await many.page.waitForTimeout(2000);
  console.log(`    ${many.bytes()} bytes for a thousand ranks`);
  check(many.bytes() < 1_000_000, "which is less than a megabyte too");
  await shot(many.page, "thousand");
  await many.context.close();
  served.child.kill("SIGKILL");
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: FLAGS, headless: true });
const only = process.env.DASHBOARD_ONLY;
let failed = null;
try {
  for (const [name, part] of [
    ["run", longRun],
    ["job", jobPage],
    ["thousand", thousandRanks],
  ])
    if (!only || only === name) await part(browser);
} catch (error) {
  failed = error;
  const page = browser
    .contexts()
    .flatMap((context) => context.pages())
    .at(-1);
  await page?.screenshot({ path: join(out, "failed.png") }).catch(() => {});
}
await browser.close();
children.forEach((child) => child.kill("SIGKILL"));
rmSync(runs, { recursive: true, force: true });
if (failed) {
  console.error(failed);
  process.exit(1);
}
console.log(`all of it holds; pictures are in ${out}`);
