// Elements, numbers and answers. Text becomes text nodes only: what workers and configs say is never read as markup.

export const $ = (id) => document.getElementById(id);

/** An element; `set` has attributes, `class`, and `on…` functions. */
export function h(tag, set, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(set || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Replaces what an element holds. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A table; a column is [title, class]. */
export function table(caption, columns, rows) {
  const cell = (tag, content, kind, more) => h(tag, { class: kind, ...more }, ...[content ?? "–"].flat());
  return h(
    "table",
    {},
    h("caption", { class: "sr" }, caption),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        columns.map(([title, kind]) => cell("th", title, kind, { scope: "col" })),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((row) =>
        h(
          "tr",
          { class: row.kind },
          (row.cells || row).map((content, at) => cell("td", content, columns[at][1])),
        ),
      ),
    ),
  );
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const int = (n) => (Number.isFinite(n) ? whole.format(n) : "–");

/** A number with about four digits that count. */
export function num(x) {
  if (!Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return Number(x.toPrecision(3)).toExponential().replace("e+", "e").replaceAll("-", "−");
  return x.toLocaleString("en", { maximumFractionDigits: size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4 });
}

/** A step on an axis. */
export function short(n) {
  const [unit, name] = n >= 1e6 ? [1e6, "M"] : n >= 1e4 ? [1e3, "k"] : [1, ""];
  return unit === 1 ? int(n) : String(Number((n / unit).toPrecision(4))) + name;
}

/** Bytes, in the unit that suits. */
export function bytes(n) {
  const [unit, name] = [
    [1e12, "TB"],
    [1e9, "GB"],
    [1e6, "MB"],
    [1e3, "kB"],
  ].find(([size]) => n >= size) || [1, "B"];
  return `${(n / unit).toLocaleString("en", { maximumFractionDigits: unit > 1 ? 1 : 0 })} ${name}`;
}

/** So many of a thing. */
export const many = (n, thing) => `${int(n)} ${thing}${n === 1 ? "" : "s"}`;

/** A time span. */
export function span(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const s = Math.max(0, seconds);
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(Math.floor(s % 60)).padStart(2, "0")} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${(s / 86400).toFixed(1)} days`;
}

export const ms = (seconds) => {
  if (!Number.isFinite(seconds)) return "–";
  const millis = seconds * 1000;
  return `${millis.toLocaleString("en", { maximumFractionDigits: millis >= 100 ? 0 : millis >= 10 ? 1 : 2 })} ms`;
};

/** A time of day where the reader is, with the date there if it is not today's. */
export function clock(unixMs) {
  if (!unixMs) return "–";
  const at = new Date(unixMs);
  const time = at.toLocaleTimeString("en-GB");
  const date = [at.getFullYear(), at.getMonth() + 1, at.getDate()].map((n) => String(n).padStart(2, "0")).join("-");
  return at.toDateString() === new Date().toDateString() ? time : `${date} ${time}`;
}

/** The run that this page shows, if it is another than the coordinator's own. */
export const RUN = new URLSearchParams(location.search).get("run") || "";

/** An answer of the coordinator; `query` without what is undefined. */
export async function ask(path, query = {}) {
  const asked = new URLSearchParams();
  for (const [name, value] of Object.entries({ run: RUN || undefined, ...query })) if (value !== undefined) asked.set(name, value);
  const answer = await fetch(`/api/v1/${path}?${asked}`, { headers: { accept: "application/json" }, signal: AbortSignal.timeout(20000) });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error || `the coordinator answers with ${answer.status}`);
  return body;
}

/** Calls `work` soon, once for many calls, and never twice at a time. */
export function lazily(work, pause) {
  let timer = null;
  let busy = false;
  const run = async () => {
    timer = null;
    if (busy) return call();
    busy = true;
    try {
      await work();
    } finally {
      busy = false;
    }
  };
  const call = () => {
    timer ??= setTimeout(run, pause);
  };
  return call;
}
