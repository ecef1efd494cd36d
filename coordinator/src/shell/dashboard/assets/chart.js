// Curves on a canvas, from columns that the coordinator has thinned. All plots share one range and one cursor.

import { h, fill, table, num, int, short, span } from "./dom.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const PAD = { left: 56, right: 10, top: 8, bottom: 22 };

/** What all plots show: columns, the newest steps one by one, and where one looks. */
export class Model {
  constructor(changed, ranged) {
    Object.assign(this, { columns: null, tail: [], other: null, from: 0, to: Infinity, cursor: null, marks: [], seconds: false, changed, ranged });
    this.plots = [];
  }

  /** The newest step that is known of. */
  get newest() {
    return this.tail.at(-1)?.step ?? this.columns?.last_step ?? 2;
  }

  /** The first and the last step that are shown: at least two. */
  get domain() {
    const from = Math.max(this.from, this.columns?.first_step ?? 1);
    return [from, Math.max(Math.min(this.to, this.newest), from + 1)];
  }

  /** One series in columns, with the newest steps at its end. */
  series(key) {
    const points = { x: [], lo: [], mid: [], hi: [] };
    const push = (x, lo, mid, hi) => {
      if (mid === null || mid === undefined || !Number.isFinite(mid)) return;
      points.x.push(x);
      points.lo.push(lo);
      points.mid.push(mid);
      points.hi.push(hi);
    };
    const add = (columns) => {
      const half = (columns.width - 1) / 2;
      const found = columns[key];
      columns.step.forEach((step, at) =>
        Array.isArray(found) ? push(step + half, found[at], found[at], found[at]) : push(step + half, found.min[at], found.mean[at], found.max[at]),
      );
    };
    if (this.columns) add(this.columns);
    if (this.to >= (this.columns?.last_step ?? 0)) {
      for (const step of this.tail) push(step.step, step[key], step[key], step[key]);
    }
    return points;
  }

  zoom(from, to) {
    const first = this.columns?.first_step ?? 1;
    const newest = Math.max(this.columns?.last_step ?? 2, this.tail.at(-1)?.step ?? 0);
    const wide = to - from;
    if (wide >= newest - first) [this.from, this.to] = [0, Infinity];
    else {
      this.from = Math.max(first, Math.round(from));
      this.to = to >= newest ? Infinity : Math.round(Math.max(to, from + 8));
    }
    this.redraw();
    this.ranged();
  }

  /** Makes the range `by` times as wide, around the cursor. */
  scale(by) {
    const [from, to] = this.domain;
    const at = this.cursor ?? (from + to) / 2;
    const wide = Math.max(8, (to - from) * by);
    const left = at - ((at - from) / (to - from)) * wide;
    this.zoom(left, left + wide);
  }

  point(step) {
    this.cursor = step;
    this.redraw();
  }

  redraw() {
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      this.plots.forEach((plot) => plot.draw());
      this.changed();
    });
  }
}

/** A running mean over some of the points on either side. */
export function smooth(values, reach) {
  const sums = [0];
  values.forEach((value) => sums.push(sums[sums.length - 1] + value));
  return values.map((_, at) => {
    const [from, to] = [Math.max(0, at - reach), Math.min(values.length, at + reach + 1)];
    return (sums[to] - sums[from]) / (to - from);
  });
}

/** Round numbers within a range, about so many. */
export function ticks(from, to, most) {
  const raw = (to - from) / Math.max(1, most);
  const ten = 10 ** Math.floor(Math.log10(raw));
  const units = [1, 2, 5, 10].map((n) => n * ten);
  const fits = units.findIndex((n) => n >= raw);
  // One label alone tells no scale.
  const unit = fits > 0 && (to - from) / units[fits] < 2 ? units[fits - 1] : (units[fits] ?? ten * 10);
  const all = [];
  // + 0: zero has no sign.
  for (let at = Math.ceil(from / unit) * unit + 0; at <= to + unit * 1e-9 && all.length < 40; at += unit) all.push(at);
  return all;
}

export class Plot {
  /** `spec`: title, unit, wide, log, series: [{key, label, color, band, smooth, dots}]. */
  constructor(model, spec) {
    Object.assign(this, { model, spec, log: false, peaks: false, drag: null });
    model.plots.push(this);
    this.canvas = h("canvas", {
      tabindex: "0",
      role: "slider",
      "aria-label": `${spec.title}: read values with the arrow keys`,
      "aria-valuenow": "0",
    });
    this.read = h("span", { class: "read" });
    this.details = h("details", { ontoggle: () => this.tabulate() }, h("summary", {}, `${spec.title} as a table`));
    const keys = spec.series.map((one) => h("span", { class: "key", "data-key": one.label }, h("i", {}), one.label));
    const turn = (name, title) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": "false",
          title,
          onclick: (event) => {
            this[name] = !this[name];
            event.currentTarget.setAttribute("aria-pressed", String(this[name]));
            this.draw();
          },
        },
        name,
      );
    const banded = spec.series.some((one) => one.band);
    const log =
      (spec.log || banded) &&
      h(
        "span",
        { class: "tools" },
        spec.log && turn("log", "a logarithmic scale"),
        banded && turn("peaks", "a scale that holds the highest peaks; else ▴ marks those above it"),
      );
    this.root = h(
      "figure",
      { class: spec.wide ? "plot wide" : "plot" },
      h("figcaption", {}, h("b", {}, spec.title), keys, log || null, this.read),
      h("div", { class: "canvas" }, this.canvas),
      this.details,
    );
    keys.forEach((key, at) => {
      key.firstChild.style.background = `var(${spec.series[at].color})`;
    });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.listen();
  }

  listen() {
    const at = (event) => this.step(event.clientX - this.canvas.getBoundingClientRect().left);
    const on = (name, work) => this.canvas.addEventListener(name, work);
    on("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) this.drag = [at(event), at(event)];
    });
    on("pointermove", (event) => {
      if (this.drag) this.drag[1] = at(event);
      this.model.point(at(event));
    });
    on("pointerleave", () => {
      if (!this.drag && document.activeElement !== this.canvas) this.model.point(null);
    });
    on("dblclick", () => this.model.zoom(0, Infinity));
    const end = () => {
      if (!this.drag) return;
      const [a, b] = this.drag.sort((x, y) => x - y);
      this.drag = null;
      const [from, to] = this.model.domain;
      if (b - a > (to - from) / 50) this.model.zoom(a, b);
      else this.model.redraw();
    };
    addEventListener("pointerup", end);
    addEventListener("pointercancel", () => {
      this.drag = null;
    });
    on("keydown", (event) => this.key(event));
    on("focus", () => {
      if (this.model.cursor === null) this.model.point(this.model.domain[1]);
    });
  }

  key(event) {
    const { model } = this;
    const xs = this.shown?.[0]?.points.x || [];
    const here = model.cursor ?? model.domain[1];
    const near = xs.reduce((best, x, at) => (Math.abs(x - here) < Math.abs(xs[best] - here) ? at : best), 0);
    const go = (at) => model.point(xs[Math.max(0, Math.min(xs.length - 1, at))] ?? here);
    const wide = event.shiftKey ? 10 : 1;
    const done = {
      ArrowLeft: () => go(near - wide),
      ArrowRight: () => go(near + wide),
      Home: () => go(0),
      End: () => go(xs.length - 1),
      "+": () => model.scale(0.5),
      "=": () => model.scale(0.5),
      "-": () => model.scale(2),
      Escape: () => model.zoom(0, Infinity),
      0: () => model.zoom(0, Infinity),
    }[event.key];
    if (!done || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    done();
  }

  step(x) {
    const [from, to] = this.model.domain;
    const width = this.canvas.clientWidth - PAD.left - PAD.right;
    return Math.min(to, Math.max(from, from + ((x - PAD.left) / width) * (to - from)));
  }

  /** What is drawn: every series within the range. */
  collect() {
    const [from, to] = this.model.domain;
    return this.spec.series.map((one) => {
      const points = one.other ? this.model.other?.points || { x: [], lo: [], mid: [], hi: [] } : this.model.series(one.key);
      const keep = points.x.map((x) => x >= from - 1e-9 && x <= to + 1e-9);
      const pick = (all) => all.filter((_, at) => keep[at]);
      const shown = { x: pick(points.x), lo: pick(points.lo), mid: pick(points.mid), hi: pick(points.hi) };
      const reach = Math.max(1, Math.round(shown.x.length / 50));
      return { one, points: shown, line: one.smooth ? smooth(shown.mid, reach) : shown.mid };
    });
  }

  extent(all) {
    let [low, high, mean] = [Infinity, -Infinity, -Infinity];
    for (const { one, points, line } of all) {
      const [below, above] = one.band ? [points.lo, points.hi] : [line, line];
      below.forEach((y) => {
        if (!this.log || y > 0) low = Math.min(low, y);
      });
      above.forEach((y) => {
        high = Math.max(high, y);
      });
      points.mid.forEach((y) => {
        mean = Math.max(mean, y);
      });
    }
    // A few peaks of single steps must not press everything else flat.
    if (!this.peaks && !this.log && low >= 0 && high > 2 * mean) high = mean * 1.25;
    if (!Number.isFinite(low) || !Number.isFinite(high)) return [this.log ? 0.1 : 0, 1];
    if (this.log) return high > low ? [low * 0.95, high * 1.05] : [low / 2, high * 2];
    const gap = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
    return [this.spec.zero ? 0 : low - gap, high + gap];
  }

  draw() {
    const { canvas, model } = this;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    const dense = devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * dense)) canvas.width = Math.round(width * dense);
    if (canvas.height !== Math.round(height * dense)) canvas.height = Math.round(height * dense);
    const ink = canvas.getContext("2d");
    ink.setTransform(dense, 0, 0, dense, 0, 0);
    ink.clearRect(0, 0, width, height);
    ink.font = "11.5px system-ui, sans-serif";
    this.shown = this.collect();
    const [from, to] = model.domain;
    const [low, high] = this.extent(this.shown);
    const scale = this.log ? (y) => Math.log(Math.max(y, low)) : (y) => y;
    const x = (step) => PAD.left + ((step - from) / (to - from)) * (width - PAD.left - PAD.right);
    const y = (value) => height - PAD.bottom - ((scale(value) - scale(low)) / (scale(high) - scale(low))) * (height - PAD.top - PAD.bottom);
    this.axes(ink, x, y, { from, to, low, high, width, height });
    this.marks(ink, x, { from, to, height });
    ink.save();
    ink.beginPath();
    ink.rect(PAD.left - 3, PAD.top - 3, width - PAD.left - PAD.right + 6, height - PAD.top - PAD.bottom + 4);
    ink.clip();
    for (const series of this.shown) this.curve(ink, x, y, series, high);
    ink.restore();
    if (!this.shown.some((series) => series.points.x.length)) {
      ink.fillStyle = style("--muted");
      ink.textAlign = "center";
      ink.fillText("nothing was measured yet", (width + PAD.left) / 2, height / 2);
    }
    this.cursor(ink, x, y, height);
  }

  axes(ink, x, y, { from, to, low, high, width, height }) {
    ink.strokeStyle = style("--line");
    ink.fillStyle = style("--muted");
    ink.lineWidth = 1;
    ink.textAlign = "right";
    ink.textBaseline = "middle";
    const logs = () => {
      const all = [];
      for (let ten = 10 ** Math.floor(Math.log10(low)); ten <= high; ten *= 10)
        [1, 2, 5].forEach((n) => {
          if (n * ten >= low && n * ten <= high) all.push(n * ten);
        });
      return all.length > 1 ? all : [low, high];
    };
    for (const value of this.log ? logs() : ticks(low, high, height / 45)) {
      const at = Math.round(y(value)) + 0.5;
      ink.beginPath();
      ink.moveTo(PAD.left, at);
      ink.lineTo(width - PAD.right, at);
      ink.stroke();
      ink.fillText(num(value), PAD.left - 7, at);
    }
    ink.textBaseline = "alphabetic";
    for (const step of ticks(from, to, Math.min(width / 110, to - from))) {
      const name = this.model.seconds ? span(step) : short(step);
      const half = ink.measureText(name).width / 2;
      ink.textAlign = "left";
      ink.fillText(name, Math.min(Math.max(x(step) - half, PAD.left - 20), width - 2 * half), height - 6);
    }
  }

  marks(ink, x, { from, to, height }) {
    for (const mark of this.model.marks) {
      if (mark.step < from || mark.step > to) continue;
      const at = Math.round(x(mark.step)) + 0.5;
      const small = mark.kind === "commit";
      ink.strokeStyle = style({ lost: "--bad", joined: "--good", trouble: "--warn", generation: "--accent" }[mark.kind] || "--muted");
      ink.globalAlpha = small ? 0.8 : 0.65;
      ink.setLineDash(mark.kind === "generation" ? [3, 3] : []);
      ink.beginPath();
      ink.moveTo(at, small ? height - PAD.bottom - 5 : PAD.top);
      ink.lineTo(at, height - PAD.bottom);
      ink.stroke();
    }
    ink.setLineDash([]);
    ink.globalAlpha = 1;
  }

  curve(ink, x, y, { one, points, line }, high) {
    const color = style(one.color);
    ink.lineJoin = "round";
    const path = (values) => {
      ink.beginPath();
      points.x.forEach((step, at) => (at ? ink.lineTo(x(step), y(values[at])) : ink.moveTo(x(step), y(values[at]))));
    };
    if (one.band && points.x.length > 1) {
      path(points.hi);
      for (let at = points.x.length - 1; at >= 0; at -= 1) ink.lineTo(x(points.x[at]), y(points.lo[at]));
      ink.fillStyle = color;
      ink.globalAlpha = 0.2;
      ink.fill();
      ink.globalAlpha = one.smooth ? 0.4 : 1;
      ink.strokeStyle = color;
      ink.lineWidth = 1;
      path(points.mid);
      ink.stroke();
      ink.globalAlpha = 1;
    }
    if (one.band) {
      ink.fillStyle = color;
      points.hi.forEach((value, at) => {
        if (value <= high) return;
        const [px, py] = [x(points.x[at]), PAD.top - 2];
        ink.beginPath();
        ink.moveTo(px - 2.5, py + 5);
        ink.lineTo(px, py);
        ink.lineTo(px + 2.5, py + 5);
        ink.fill();
      });
    }
    ink.strokeStyle = color;
    ink.lineWidth = one.smooth || !one.band ? 2 : 1.4;
    ink.setLineDash(one.other ? [6, 4] : []);
    path(line);
    ink.stroke();
    ink.setLineDash([]);
    // A point alone makes no line.
    if ((one.dots && points.x.length < 150) || points.x.length === 1) {
      ink.fillStyle = color;
      points.x.forEach((step, at) => {
        ink.beginPath();
        ink.arc(x(step), y(points.mid[at]), 2.4, 0, 7);
        ink.fill();
      });
    }
  }

  cursor(ink, x, y, height) {
    if (this.drag) {
      const [a, b] = this.drag;
      ink.fillStyle = style("--accent");
      ink.globalAlpha = 0.15;
      ink.fillRect(x(Math.min(a, b)), PAD.top, Math.abs(x(b) - x(a)), height - PAD.top - PAD.bottom);
      ink.globalAlpha = 1;
    }
    const at = this.model.cursor;
    const said = this.say(at, (step, value, color) => {
      ink.fillStyle = style(color);
      ink.beginPath();
      ink.arc(x(step), y(value), 3.5, 0, 7);
      ink.fill();
    });
    // The large plot names the step; the small ones have no room for it.
    fill(this.read, this.spec.tells || this.model.seconds ? said : said.replace(/^step [^:]*: /, ""));
    if (at === null) return;
    ink.strokeStyle = style("--muted");
    ink.lineWidth = 1;
    ink.beginPath();
    ink.moveTo(Math.round(x(at)) + 0.5, PAD.top);
    ink.lineTo(Math.round(x(at)) + 0.5, height - PAD.bottom);
    ink.stroke();
    this.canvas.setAttribute("aria-valuenow", String(Math.round(at)));
    this.canvas.setAttribute("aria-valuetext", said);
  }

  /** The values at a step, or the newest, in words. */
  say(step, dot) {
    const words = [];
    const end = Math.min(this.model.domain[1], this.model.newest);
    let named = step;
    for (const { one, points, line } of this.shown) {
      if (!points.x.length) continue;
      const near = points.x.reduce(
        (best, x, at) => (Math.abs(x - (step ?? Infinity)) < Math.abs(points.x[best] - (step ?? Infinity)) ? at : best),
        step === null ? points.x.length - 1 : 0,
      );
      if (step !== null) {
        dot(points.x[near], line[near], one.color);
        if (!words.length) named = points.x[near];
      }
      const wide = one.band && points.hi[near] > points.lo[near] ? ` (${num(points.lo[near])} … ${num(points.hi[near])})` : "";
      // Nothing newer was finite.
      const old = step === null && !one.dots && !one.other && points.x[near] + (this.model.columns?.width ?? 1) <= end;
      const when = old ? ` (${this.model.seconds ? `after ${span(points.x[near])}` : `step ${int(points.x[near])}`})` : "";
      words.push(`${this.spec.series.length > 1 ? `${one.label} ` : ""}${num(points.mid[near])}${wide}${when}`);
    }
    if (!words.length) return "";
    const where = step === null ? "" : this.model.seconds ? `after ${span(named)}: ` : `step ${int(named)}: `;
    const mark = step === null || !this.spec.tells ? null : this.nearby(step);
    return `${where}${words.join(", ")}${this.spec.unit ? ` ${this.spec.unit}` : ""}${mark ? ` — ${mark.text}` : ""}`;
  }

  nearby(step) {
    const [from, to] = this.model.domain;
    const reach = ((to - from) / this.canvas.clientWidth) * 5;
    return this.model.marks
      .filter((mark) => Math.abs(mark.step - step) <= reach)
      .sort((a, b) => Math.abs(a.step - step) - Math.abs(b.step - step))[0];
  }

  tabulate() {
    if (!this.details.open) return;
    const [main] = this.collect();
    const { points } = main;
    const stride = Math.max(1, Math.ceil(points.x.length / 60));
    const rows = points.x
      .map((step, at) => [this.model.seconds ? span(step) : int(step), num(points.mid[at]), num(points.lo[at]), num(points.hi[at])])
      .filter((_, at) => at % stride === 0 || at === points.x.length - 1);
    const place = h(
      "div",
      { class: "scroll tall", tabindex: "0", role: "region", "aria-label": `${this.spec.title} as a table` },
      table(
        this.spec.title,
        [
          [this.model.seconds ? "Time" : "Step", "n"],
          ["Mean", "n"],
          ["Least", "n"],
          ["Largest", "n"],
        ],
        rows,
      ),
    );
    fill(this.details, this.details.firstElementChild, place);
  }
}
