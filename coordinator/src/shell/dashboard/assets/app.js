// The page: asks for what it shows, and keeps it new by the coordinator's events.

import { $, h, fill, ask, lazily, int, num, short, span, RUN } from "./dom.js";
import { Model, Plot } from "./chart.js";
import { showJob, showCounts, showEpochs, Ranks, Events, Runs } from "./panels.js";
import { Samples } from "./samples.js";

const POINTS = 700;
/** Steps that are drawn one by one before the curves are asked for anew. */
const TAIL = 300;

const state = { summary: null, link: "connecting", problems: new Map() };

// Colours: as the system says, or as was chosen.
const THEMES = ["auto", "light", "dark"];
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = THEMES.includes(localStorage.getItem("ella-theme")) ? localStorage.getItem("ella-theme") : "auto";
function paint() {
  document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${theme === "auto" ? "as the system" : theme}`);
  model.redraw();
}

const model = new Model(showRange, () => loadCurves());
const PLOTS = [
  {
    title: "Loss",
    wide: true,
    log: true,
    tells: true,
    series: [
      { key: "loss", label: "train", color: "--c-loss", band: true, smooth: true },
      { key: "held_out", label: "held out", color: "--c-held", dots: true },
      { other: true, label: "other run", color: "--c-other" },
    ],
  },
  { title: "Throughput", unit: "samples/s", zero: true, series: [{ key: "samples_per_second", label: "samples/s", color: "--c-rate" }] },
  { title: "Seconds of a step", zero: true, unit: "s", series: [{ key: "step_seconds", label: "seconds", color: "--c-time", band: true }] },
  { title: "Gradient norm", log: true, series: [{ key: "grad_norm", label: "norm", color: "--c-grad", band: true }] },
  { title: "Learning rate", zero: true, series: [{ key: "lr", label: "rate", color: "--c-lr" }] },
];
const plots = PLOTS.map((spec) => new Plot(model, spec));
fill(
  $("plots"),
  plots.map((plot) => plot.root),
);
const otherKey = plots[0].root.querySelector('[data-key="other run"]');
otherKey.hidden = true;

const ranks = new Ranks();
const events = new Events(() => loadMarks());
const samples = new Samples();
const runs = new Runs(async (name) => {
  model.other = null;
  otherKey.hidden = !name;
  if (name) {
    const columns = await curvesOf(name);
    // Another may have been chosen meanwhile.
    if (runs.with !== name) return;
    const points = { x: [], lo: [], mid: [], hi: [] };
    columns.step.forEach((step, at) => {
      if (columns.loss.mean[at] === null) return;
      points.x.push(step + (columns.width - 1) / 2);
      for (const part of ["lo", "mid", "hi"]) points[part].push(columns.loss.mean[at]);
    });
    model.other = { name, points };
    otherKey.lastChild.textContent = name;
  }
  model.redraw();
});

/** Another run's curves, once its past is read: that begins when it is first asked for. */
async function curvesOf(name) {
  for (let tries = 0; tries < 120; tries += 1) {
    const { history } = await ask("summary", { run: name });
    if (!history.restoring) break;
    await new Promise((later) => {
      setTimeout(later, 500);
    });
  }
  return ask("curves", { run: name, points: POINTS });
}

/** Does `work`; what goes wrong is shown until it goes right. */
async function attempt(name, work) {
  try {
    await work();
    state.problems.delete(name);
  } catch (error) {
    if (state.link !== "lost") state.problems.set(name, `${name}: ${error.message}`);
  }
  showNotices();
}

function showRange() {
  const [from, end] = model.domain;
  const to = Math.min(end, model.newest);
  const place = (at) => (model.seconds ? span(at) : short(Math.round(at)));
  const width = model.columns?.width ?? 1;
  const each = width > 1 ? `, a point is ${short(width)} ${model.seconds ? "seconds" : "steps"}` : "";
  $("range").textContent =
    model.columns?.step.length || model.tail.length ? `${model.seconds ? "" : "steps "}${place(from)} to ${place(to)}${each}` : "";
}

const loadCurves = lazily(
  () =>
    attempt("Curves", async () => {
      const [from, to] = [model.from || undefined, Number.isFinite(model.to) ? model.to : undefined];
      model.columns = await ask("curves", { from, to, points: POINTS });
      const last = model.columns.last_step ?? 0;
      model.tail = model.tail.filter((step) => step.step > last);
      model.redraw();
      loadMarks();
    }),
  150,
);

const loadMarks = lazily(
  () =>
    attempt("Events", async () => {
      const [from, to] = [model.from || undefined, Number.isFinite(model.to) ? model.to : undefined];
      const found = await ask("events", { from, to, limit: events.limit });
      model.marks = state.summary?.job ? [] : found.marks;
      events.show(found);
      model.redraw();
    }),
  250,
);

const loadSummary = lazily(() => attempt("Status", async () => showSummary(await ask("summary"))), 50);
const loadRanks = lazily(() => attempt("Ranks", () => ranks.load()), 400);
const loadSamples = lazily(() => attempt("Samples", () => samples.load()), 400);
const loadRuns = lazily(() => attempt("Runs", () => runs.load(state.summary)), 400);

function loadAll() {
  loadSummary();
  loadCurves();
  loadRanks();
  loadSamples();
  loadRuns();
}

const MOODS = {
  training: "good",
  working: "good",
  done: "good",
  failed: "bad",
  preempted: "warn",
  waiting: "warn",
  regrouping: "warn",
  draining: "warn",
};

function showSummary(summary) {
  const before = state.summary;
  state.summary = summary;
  const { job } = summary;
  model.seconds = Boolean(job);
  events.job = Boolean(job);
  const name = summary.name || summary.run_url;
  document.title = `${summary.phase} · ${job ? `${int(job.units_done)} of ${int(job.units)}` : `step ${int(summary.step)}`} · ${name}`;
  fill($("name"), job ? `${job.kind} ${name}` : name).title = summary.run_url;
  const badge = fill($("phase"), summary.phase);
  badge.className = `badge ${MOODS[summary.phase] || ""}`;
  const reason = fill($("reason"), summary.reason);
  reason.hidden = !summary.reason;
  reason.className = `reason ${summary.phase === "failed" ? "bad" : summary.phase === "done" ? "plain" : ""}`;
  const [done, all] = job ? [job.units_done, job.units] : [summary.step, summary.steps];
  const share = all ? (100 * done) / all : 0;
  fill($("done"), job ? `${int(done)} of ${int(all)} units` : `Step ${int(done)}`);
  fill($("share"), job ? `stage ${job.stage}` : `of ${int(all)}, ${share.toFixed(share < 10 ? 1 : 0)} %`);
  const left = job ? job.seconds_left : summary.seconds_left;
  fill($("left"), left ? `${span(left)} left` : "");
  $("bar").firstElementChild.style.width = `${Math.min(100, share)}%`;
  $("bar").setAttribute("aria-valuenow", share.toFixed(0));
  fill(
    $("tiles"),
    tiles(summary).map(([title, value, more]) => h("div", {}, h("dt", {}, title), h("dd", {}, value, more ? h("small", {}, ` ${more}`) : null))),
  );
  $("job").hidden = !job;
  for (const [id, hidden] of [
    ["ranks", Boolean(job)],
    ["samples", Boolean(job)],
    ["runs", Boolean(job)],
  ])
    $(id).hidden = hidden;
  plots
    .slice(0, 1)
    .concat(plots.slice(2))
    .forEach((plot) => {
      plot.root.hidden = Boolean(job);
    });
  plots[1].root.classList.toggle("wide", Boolean(job));
  if (job) showJob($("job-body"), job);
  showEpochs($("epochs"), summary);
  showCounts($("counts"), summary);
  $("foot").textContent = job ? summary.run_url : `${summary.run_url} · term ${summary.term}`;
  runs.update(summary);
  showNotices();
  if (!before || Boolean(before.job) !== Boolean(job)) showNav();
  if (before && (before.generation !== summary.generation || before.ranks !== summary.ranks)) loadRanks();
}

function tiles(summary) {
  if (summary.job) {
    const { job } = summary;
    return [
      ["Samples", int(job.samples)],
      ["Samples/s", num(job.samples_per_second)],
      ["Units/s", num(job.units_per_second)],
      ["Workers", int(job.workers.length)],
      ["Held now", int(job.units_held)],
      ["Given up", int(job.units_given_up)],
    ];
  }
  const all = [
    ["Loss", Number.isFinite(summary.loss) && summary.loss !== null ? num(summary.loss) : "–"],
    ["Samples/s", summary.samples_per_second ? num(summary.samples_per_second) : "–"],
    ["Epoch", int(summary.epoch)],
    ["Samples", short(summary.samples)],
    ["Last commit, step", summary.last_commit_step ? int(summary.last_commit_step) : "none yet"],
    ["Workers", int(summary.ranks), summary.others ? `and ${int(summary.others)} without a place` : ""],
    ["Generation", int(summary.generation), `term ${summary.term}`],
  ];
  return RUN ? [all[0], ["Term", int(summary.term)], ["Steps in all", int(summary.steps)]] : all;
}

function showNotices() {
  const { summary } = state;
  const notices = [...state.problems.values()].map((text) => h("div", { class: "notice bad" }, text));
  if (RUN)
    notices.unshift(
      h("div", { class: "notice" }, `This is the run ${RUN} as its folder has it, not live. `, h("a", { href: "/" }, "Back to the run that trains")),
    );
  if (state.link === "lost") {
    const over = ["done", "failed", "preempted"].includes(summary?.phase);
    notices.unshift(
      h(
        "div",
        { class: over ? "notice" : "notice bad" },
        over
          ? `The run is over (${summary.phase}), and its coordinator is gone; this is what was last known.`
          : "The coordinator does not answer. Training may go on without it; this page asks again by itself.",
      ),
    );
  }
  const { history } = summary || {};
  if (history?.restoring) {
    notices.push(
      h(
        "div",
        { class: "notice" },
        `What was before is being read from the run's folder: ${int(history.files_read)} of ${int(history.files)} files.`,
      ),
    );
  }
  const { damaged_lines: damaged = 0, unread_files: unread = 0, unlisted = {}, problems = [] } = history || {};
  const folders = Object.values(unlisted);
  if (damaged || unread || folders.length) {
    notices.push(
      h(
        "div",
        { class: "notice" },
        `Not all of the past could be read: ${int(damaged)} damaged lines, ${int(unread)} files and ${int(folders.length)} whole folders are left out.`,
        h(
          "ul",
          {},
          [...folders, ...problems].map((problem) => h("li", {}, problem)),
        ),
      ),
    );
  }
  const text = notices.map((notice) => notice.textContent).join("\n");
  if ($("notices").dataset.text !== text) fill($("notices"), notices).dataset.text = text;
}

function showNav() {
  const shown = [...document.querySelectorAll("section[data-title]")].filter((section) => !section.hidden);
  fill(
    $("nav"),
    shown.map((section) => h("li", {}, h("a", { href: `#${section.id}` }, section.dataset.title))),
  );
  const links = [...$("nav").querySelectorAll("a")];
  const seen = new IntersectionObserver(
    (entries) =>
      entries
        .filter((entry) => entry.isIntersecting)
        .forEach(({ target }) => {
          links.forEach((link) => {
            if (link.hash === `#${target.id}`) link.setAttribute("aria-current", "true");
            else link.removeAttribute("aria-current");
          });
        }),
    { rootMargin: "-30% 0px -65% 0px" },
  );
  // What is above them all has no link: none is current there.
  [document.querySelector(".hero"), ...shown].forEach((section) => seen.observe(section));
}

function setLink(link, text) {
  if (state.link === link) return;
  state.link = link;
  const shown = fill($("link"), text);
  shown.className = `link ${link}`;
  showNotices();
}

function take(steps) {
  // The rate of one step jumps by the clock's grain: it is shown over the newest few.
  const rate = (step) => {
    const recent = model.tail.slice(-15);
    const passed = recent.length ? step.at_unix_ms - recent[0].at_unix_ms : 0;
    if (passed > 0 && passed < 600000) return [...recent.slice(1), step].reduce((sum, one) => sum + one.samples, 0) / (passed / 1000);
    return step.step_seconds > 0 ? step.samples / step.step_seconds : null;
  };
  for (const step of steps) {
    const before = model.tail.at(-1);
    if (before && step.step <= before.step) model.tail = model.tail.filter((one) => one.step < step.step);
    if (model.columns && step.step <= (model.columns.last_step ?? 0)) loadCurves();
    model.tail.push({ ...step, samples_per_second: rate(step) });
  }
  if (model.tail.length > TAIL) loadCurves();
  const newest = steps.at(-1)?.step ?? 0;
  if (Math.floor(newest / 64) !== Math.floor((steps[0]?.step ?? 0) / 64)) loadRanks();
  model.redraw();
}

function listen() {
  const source = new EventSource("/api/v1/live");
  const on = (name, work) =>
    source.addEventListener(name, (event) => {
      setLink("live", "live");
      work(JSON.parse(event.data));
    });
  source.onopen = () => setLink("live", "live");
  source.onerror = () => {
    setLink("lost", "not answering");
    // A refusal ends it for good.
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 5000);
  };
  on("reset", () => {
    loadAll();
  });
  on("summary", showSummary);
  on("steps", take);
  on("curves", () => loadCurves());
  on("event", (event) => {
    events.add(event);
    loadMarks();
    if (["phase", "lost", "left", "generation"].includes(event.kind)) loadSummary();
  });
}

$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("ella-theme", theme);
  paint();
});
dark.addEventListener("change", paint);
document.querySelectorAll("[data-zoom]").forEach((button) =>
  button.addEventListener("click", () => {
    const newest = model.domain[1];
    ({
      whole: () => model.zoom(0, Infinity),
      out: () => model.scale(2),
      in: () => model.scale(0.5),
      last: () => {
        model.from = Math.max(1, Math.round(newest - 1000));
        model.to = Infinity;
        model.redraw();
        loadCurves();
      },
    })[button.dataset.zoom]();
  }),
);

paint();
showNav();
loadAll();
if (RUN) {
  setLink("still", "from its folder");
  // While its past is being read, there is soon more to show.
  let waited = 0;
  setInterval(() => {
    waited += 1;
    if (waited < (state.summary?.history.restoring ? 2 : 15)) return;
    waited = 0;
    loadAll();
  }, 1000);
} else {
  listen();
  setInterval(() => {
    if (!document.hidden && state.link === "live") {
      loadRanks();
      loadSamples();
    }
  }, 10000);
  setInterval(() => {
    if (!document.hidden && state.link === "live") loadRuns();
  }, 60000);
}
document.documentElement.dataset.ready = "true";
