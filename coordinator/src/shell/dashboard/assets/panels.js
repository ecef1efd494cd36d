// Everything below the curves: units, ranks, events, data, runs.

import { $, h, fill, table, ask, int, num, bytes, span, clock, ms, RUN } from "./dom.js";

const PARTS = [
  ["data", "waits for samples"],
  ["forward", "forward"],
  ["backward", "backward"],
  ["update", "update"],
  ["commit", "copy for a commit"],
  ["draw", "drawing samples"],
  ["other", "other"],
  ["reduce", "all-reduce"],
  ["waits", "waits for others"],
];
const KINDS = [
  ["lost", "Lost"],
  ["left", "Left"],
  ["joined", "Joined"],
  ["generation", "Generations"],
  ["commit", "Commits"],
  ["trouble", "Trouble"],
  ["phase", "Phases"],
  ["other", "Other"],
];

const swatch = (name) => {
  const mark = h("i", { class: name === "waits" ? "waits" : null });
  mark.style.backgroundColor = `var(--p-${name})`;
  return mark;
};

export class Ranks {
  constructor() {
    this.until = undefined;
    this.slider = h("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": "Steps until", oninput: () => this.move() });
    this.where = h("span", { class: "muted" });
    fill($("ranks-when"), h("label", {}, "Until", this.slider), this.where);
    fill(
      $("parts"),
      PARTS.map(([name, title]) => h("li", {}, swatch(name), title)),
    );
    this.windows = [];
  }

  move() {
    const at = Number(this.slider.value);
    this.until = at >= this.windows.length - 1 ? undefined : this.windows[at];
    this.load();
  }

  async load() {
    const found = await ask("ranks", { until: this.until, steps: this.until ? 64 : undefined });
    this.windows = found.windows;
    $("ranks-when").hidden = this.windows.length < 2;
    this.slider.max = String(Math.max(0, this.windows.length - 1));
    if (this.until === undefined) this.slider.value = this.slider.max;
    const steps = Math.max(0, ...found.ranks.map((rank) => rank.steps));
    const newest = this.until ?? this.windows.at(-1);
    this.where.textContent = newest ? `the ${int(steps)} steps until step ${int(newest)}` : "";
    this.slider.setAttribute("aria-valuetext", this.where.textContent);
    fill($("verdict"), found.verdict);
    const slowest = found.of > found.ranks.length ? `the slowest ${int(found.ranks.length)} of ${int(found.of)}` : `${int(found.of)}`;
    $("ranks-of").textContent = found.of ? `${slowest}${found.source === "status" ? ", by their newest step alone" : ", means of a step"}` : "";
    fill(
      $("ranks-body"),
      found.ranks.length ? this.table(found) : h("p", { class: "empty" }, "No rank has told of its steps yet."),
      this.others(found.others),
      found.of > found.ranks.length ? this.spread(found) : null,
    );
  }

  table(found) {
    const most = Math.max(1e-9, ...found.ranks.map((rank) => rank.seconds));
    const live = found.ranks.some((rank) => rank.silent_ms !== null);
    const columns = [
      ["Rank", "n mid"],
      ["Worker", "wide-only mid"],
      ["A step", "bars mid"],
      ["Takes", "n mid"],
      ["Waits", "n mid"],
      ...(live ? [["Heard of", "n mid wide-only"]] : []),
    ];
    return table(
      "Where each rank's step goes",
      columns,
      found.ranks.map((rank) => [
        int(rank.rank) + (rank.leaving ? " (leaving)" : ""),
        `${rank.host}${rank.device ? `, ${rank.device}` : ""}`,
        this.stack(rank, most),
        ms(rank.seconds),
        ms(rank.waits),
        ...(live ? [rank.silent_ms === null ? "–" : `${span(rank.silent_ms / 1000)} ago`] : []),
      ]),
    );
  }

  stack(rank, most) {
    const seconds = (name) =>
      ({ other: rank.other, waits: rank.waits, reduce: Math.max(0, (rank.parts.reduce || 0) - rank.waits) })[name] ?? rank.parts[name] ?? 0;
    const bar = h("div", { class: "stack", "aria-hidden": "true" });
    for (const [name, title] of PARTS) {
      const part = h("i", { class: name === "waits" ? "waits" : null, title: `${title}: ${ms(seconds(name))}` });
      part.style.width = `${(100 * seconds(name)) / most}%`;
      part.style.backgroundColor = `var(--p-${name})`;
      bar.append(part);
    }
    const said = PARTS.filter(([name]) => seconds(name) > 0)
      .map(([name, title]) => `${title} ${ms(seconds(name))}`)
      .join(", ");
    return [bar, h("span", { class: "sr" }, said)];
  }

  spread(found) {
    const rows = Object.entries(found.spread).map(([part, [min, middle, max]]) => [part, ms(min), ms(middle), ms(max)]);
    return h(
      "details",
      {},
      h("summary", {}, `All ${int(found.of)} ranks by part`),
      table(
        "All ranks by part",
        [
          ["Part", ""],
          ["Least", "n"],
          ["Median", "n"],
          ["Most", "n"],
        ],
        rows,
      ),
    );
  }

  others(workers) {
    if (!workers.length) return null;
    const rows = workers.map((worker) => [worker.worker_id.slice(0, 8), worker.state, `${worker.host} pid ${worker.pid}`, worker.device]);
    return h(
      "div",
      {},
      h("h3", {}, "Without a place"),
      table(
        "Workers without a place",
        [
          ["Worker", "code"],
          ["State", ""],
          ["Where", ""],
          ["Device", ""],
        ],
        rows,
      ),
    );
  }
}

export class Events {
  constructor(more) {
    this.limit = 100;
    this.hidden = new Set();
    this.events = [];
    fill(
      $("kinds"),
      KINDS.map(([kind, title]) =>
        h(
          "label",
          {},
          h("input", {
            type: "checkbox",
            checked: true,
            onchange: (event) => {
              if (event.target.checked) this.hidden.delete(kind);
              else this.hidden.add(kind);
              this.draw();
            },
          }),
          title,
        ),
      ),
    );
    this.more = h(
      "button",
      {
        type: "button",
        onclick: () => {
          this.limit = 500;
          more();
        },
      },
      "Show more",
    );
  }

  show(found) {
    Object.assign(this, { events: found.events, total: found.total, dropped: found.dropped });
    this.draw();
  }

  /** One that has just come about. */
  add(event) {
    this.events = [event, ...this.events].slice(0, this.limit);
    this.total = (this.total || 0) + 1;
    this.draw();
  }

  draw() {
    const shown = this.events.filter((event) => !this.hidden.has(event.kind));
    const gone = this.dropped ? `, and ${int(this.dropped)} older ones in the run's folder only` : "";
    $("events-of").textContent = this.total ? `the newest ${int(this.events.length)} of ${int(this.total)}${gone}` : "";
    const rows = shown.map((event) => [
      clock(event.at_unix_ms),
      event.step === null || this.job ? "" : int(event.step),
      h("span", { class: `mark k-${event.kind}` }, event.event.replaceAll("_", " ")),
      event.text,
    ]);
    fill(
      $("events-body"),
      rows.length
        ? table(
            "Events, newest first",
            [
              ["When", "t"],
              ["Step", "n"],
              ["What", ""],
              ["", ""],
            ],
            rows,
          )
        : h("p", { class: "empty" }, "Nothing to show."),
      this.total > this.events.length && this.limit < 500 ? this.more : null,
    );
    const blank = $("events-body").querySelector("thead th:last-child");
    if (blank) fill(blank, h("span", { class: "sr" }, "In words"));
  }
}

function bars(parts, all) {
  const bar = h("div", { class: "bar units", "aria-hidden": "true" });
  for (const [n, color] of parts) {
    const part = h("div", {});
    part.style.width = `${all ? (100 * n) / all : 0}%`;
    part.style.background = `var(${color})`;
    bar.append(part);
  }
  return bar;
}

export function showJob(place, job) {
  const waiting = Math.max(0, job.units - job.units_done - job.units_held - job.units_given_up);
  const parts = [
    ["done", job.units_done, "--good"],
    ["held by workers", job.units_held, "--accent"],
    ["given up", job.units_given_up, "--bad"],
  ];
  const legend = h(
    "ul",
    { class: "legend" },
    parts.map(([name, n, color]) => {
      const mark = h("i", {});
      mark.style.background = `var(${color})`;
      return h("li", {}, mark, `${name} ${int(n)}`);
    }),
    h("li", {}, `waiting ${int(waiting)}`),
  );
  const workers = job.workers.map((worker) => [
    worker.host,
    int(worker.pid),
    worker.device,
    int(worker.units_done),
    worker.held.map((held) => h("div", {}, `${held.unit} (${int(held.done)} samples, ${span(held.held_ms / 1000)})`)),
    `${span(worker.silent_ms / 1000)} ago`,
  ]);
  const failed = job.given_up.map((unit) => [unit.unit, unit.error, unit.permanent ? "would fail again" : "may be tried again"]);
  const results = Object.entries(job.results)
    .sort((a, b) => b[1] - a[1])
    .map(([name, n]) => [name, int(n)]);
  fill(
    place,
    bars(
      parts.map(([, n, color]) => [n, color]),
      job.units,
    ),
    legend,
    h(
      "div",
      { class: "halves" },
      h(
        "div",
        {},
        h("h3", {}, "What came of the samples"),
        results.length
          ? table(
              "Results",
              [
                ["Result", ""],
                ["Samples", "n"],
              ],
              results,
            )
          : h("p", { class: "empty" }, "No unit is done yet."),
      ),
      h(
        "div",
        {},
        h("h3", {}, "Given up"),
        failed.length
          ? table(
              "Units that were given up",
              [
                ["Unit", "code"],
                ["Why", ""],
                ["", ""],
              ],
              failed,
            )
          : h("p", { class: "empty" }, "None."),
      ),
    ),
    h("h3", {}, "Workers"),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of workers" },
      workers.length
        ? table(
            "Workers",
            [
              ["Host", ""],
              ["Pid", "n wide-only"],
              ["Device", "wide-only"],
              ["Done", "n"],
              ["Holds", "code"],
              ["Heard of", "n wide-only"],
            ],
            workers,
          )
        : h("p", { class: "empty" }, "None is here."),
    ),
  );
  const blank = place.querySelector(".halves div:last-child thead th:last-child");
  if (blank && !blank.textContent.trim()) fill(blank, h("span", { class: "sr" }, "Again"));
}

export function showEpochs(place, summary) {
  const each = summary.samples_per_epoch;
  if (summary.job || RUN) return fill(place);
  if (!each) return fill(place, h("h3", {}, "Epochs"), h("p", { class: "empty" }, "The workers have not told yet how many samples an epoch has."));
  const now = Math.floor(summary.samples / each);
  const first = Math.max(0, now - 5);
  const rows = [];
  for (let epoch = now; epoch >= first; epoch -= 1) {
    const done = Math.min(each, summary.samples - epoch * each);
    rows.push(
      h(
        "div",
        { class: "epoch" },
        h("span", {}, `Epoch ${int(epoch)}`),
        bars([[done, "--accent"]], each),
        h("span", {}, `${int(done)} of ${int(each)}`),
      ),
    );
  }
  return fill(place, h("h3", {}, "Epochs"), rows, first > 0 ? h("p", { class: "muted" }, `and ${int(first)} whole ones before`) : null);
}

export function showCounts(place, summary) {
  const rows = (counts) => Object.entries(counts).map(([name, n]) => [name, name.endsWith("_bytes") ? bytes(n) : int(n)]);
  const counted = (title, counts) =>
    h(
      "div",
      {},
      h("h3", {}, title),
      rows(counts).length
        ? table(
            title,
            [
              ["What", "code"],
              ["Count", "n"],
            ],
            rows(counts),
          )
        : h("p", { class: "empty" }, "Nothing."),
    );
  fill(
    place,
    RUN ? null : counted("Counted by this coordinator: refused, retried, skipped, read", summary.counts),
    summary.job ? null : counted("Skipped or cut since the run began: samples, captions, steps", summary.skipped),
  );
}

export class Runs {
  constructor(overlay) {
    this.overlay = overlay;
    this.with = "";
    this.all = false;
    this.select = h("select", {
      id: "with",
      onchange: () => {
        this.with = this.select.value;
        this.compare();
      },
    });
    this.every = h("input", {
      type: "checkbox",
      onchange: () => {
        this.all = this.every.checked;
        this.draw();
      },
    });
    this.place = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of keys" });
    this.said = h("span", { class: "muted" });
    fill(
      $("config-body"),
      h("div", { class: "head" }, h("h3", {}, "Config"), this.said),
      h("div", { class: "row" }, h("label", { for: "with" }, "Beside"), this.select, h("label", {}, this.every, "all keys")),
      this.place,
    );
  }

  reached({ step, steps, loss }) {
    return [`${int(step)}${steps ? ` of ${int(steps)}` : ""}`, num(loss)];
  }

  /** The coordinator's own run, as the rest of the page has it. */
  update(summary) {
    const row = RUN ? null : $("runs-body").querySelector("tr.own");
    if (!row) return;
    [summary.phase + (summary.reason ? `: ${summary.reason}` : ""), ...this.reached(summary)].forEach((text, at) => fill(row.cells[at + 1], text));
  }

  async load(summary) {
    if (summary?.job) return;
    const found = await ask("runs");
    this.runs = found.runs;
    const shown = RUN || found.runs[0]?.name;
    const rows = found.runs.map((run) => ({
      kind: run.own ? "own" : null,
      cells: [
        [
          run.name === shown ? h("strong", {}, run.name) : h("a", { href: run.own ? "/" : `/?run=${encodeURIComponent(run.name)}` }, run.name),
          run.own ? " (this coordinator's)" : "",
        ],
        run.problem ? h("span", { class: "k-lost" }, run.problem) : run.state + (run.reason ? `: ${run.reason}` : ""),
        ...this.reached(run),
        run.at_unix_ms ? clock(run.at_unix_ms) : "now",
      ],
    }));
    const left = found.left_off ? ` ${int(found.left_off)} more folders were not looked at.` : "";
    fill(
      $("runs-body"),
      found.problem ? h("p", { class: "notice bad" }, found.problem) : null,
      h(
        "div",
        { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of runs" },
        table(
          "Runs",
          [
            ["Run", ""],
            ["State", ""],
            ["Step", "n"],
            ["Loss", "n"],
            ["Measured", "t wide-only"],
          ],
          rows,
        ),
      ),
      left ? h("p", { class: "muted" }, left) : null,
    );
    if (summary) this.update(summary);
    const others = found.runs.filter((run) => run.name !== shown && !run.problem);
    fill(
      this.select,
      h("option", { value: "" }, others.length ? "no other run" : "there is no other run"),
      others.map((run) => h("option", { value: run.name, selected: run.name === this.with }, run.name)),
    );
    if (!this.config) await this.compare();
  }

  async compare() {
    const own = RUN ? {} : { run: undefined };
    this.config = await ask("config", { ...own, with: this.with || undefined }).catch((error) => ({ keys: [], problem: error.message }));
    this.draw();
    await this.overlay(this.with).catch((error) => {
      this.said.textContent = `its loss cannot be drawn: ${error.message}`;
    });
  }

  draw() {
    const { keys, problem } = this.config || { keys: [] };
    const differs = keys.filter((key) => key.differs).length;
    this.said.textContent =
      problem || (this.with ? `${int(differs)} of ${int(keys.length)} keys differ; its loss is drawn dashed` : `${int(keys.length)} keys`);
    const shown = this.with && !this.all ? keys.filter((key) => key.differs) : this.all || this.with ? keys : [];
    const columns = [["Key", "code"], [RUN || "This run", "code"], ...(this.with ? [[this.with, "code"]] : [])];
    const rows = shown.map((key) => ({
      kind: key.differs && this.all ? "diff" : null,
      cells: [key.key, key.value, ...(this.with ? [key.other] : [])],
    }));
    fill(this.place, rows.length ? table("Config by key", columns, rows) : null);
  }
}
