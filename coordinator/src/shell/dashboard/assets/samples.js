// Pictures that training drew: a row for each prompt, a column for each step.

import { $, h, fill, ask, int, many, RUN } from "./dom.js";

export class Samples {
  constructor() {
    this.steps = [];
    this.at = null;
    this.known = new Map();
    /** Steps that are shown without an index, which is written once all their pictures are there. */
    this.lacking = [];
    this.slider = h("input", {
      type: "range",
      min: "0",
      max: "0",
      value: "0",
      "aria-label": "Step",
      oninput: () => {
        this.at = Number(this.slider.value);
        this.draw();
      },
    });
    this.where = h("output", { class: "muted" });
    this.grid = h("div", { class: "grid" });
    this.dialog = h("dialog", {
      "aria-label": "Picture",
      onkeydown: (event) => this.key(event),
      onclick: (event) => {
        if (event.target === this.dialog) this.dialog.close();
      },
    });
    document.body.append(this.dialog);
  }

  async load() {
    const { steps } = await ask("samples");
    const follows = this.at === null || this.at >= this.steps.length - 1;
    const same = steps.length === this.steps.length && steps.at(-1) === this.steps.at(-1);
    this.steps = steps;
    if (!steps.length) {
      fill($("samples-body"), h("p", { class: "empty" }, "No pictures yet. Training draws some if the run's config has a [sample] table."));
      return;
    }
    if (same && this.grid.isConnected && !(await this.arrived())) return;
    if (follows) this.at = steps.length - 1;
    this.slider.max = String(steps.length - 1);
    this.slider.value = String(this.at);
    fill($("samples-body"), steps.length > 1 ? h("div", { class: "row" }, h("label", {}, "Until step", this.slider), this.where) : null, this.grid);
    await this.draw();
  }

  /** What there is of a step; words if there is nothing. */
  async index(step) {
    if (!this.known.has(step)) {
      const found = await ask(`samples/${step}`).catch((error) => ({ images: [], problem: error.message }));
      // What failed may be there later.
      if (!found.problem) this.known.set(step, found);
      return found;
    }
    return this.known.get(step);
  }

  /** Whether a step that lacked its index has it by now. */
  async arrived() {
    const indexes = await Promise.all(this.lacking.map((step) => this.index(step)));
    return indexes.some((index) => !index.problem);
  }

  async draw() {
    const columns = Math.min(matchMedia("(max-width: 46rem)").matches ? 2 : 5, this.steps.length);
    const last = this.at;
    const from = Math.max(0, last - columns + 1);
    const steps = this.steps.slice(from, Math.max(last + 1, from + columns));
    const indexes = await Promise.all(steps.map((step) => this.index(step)));
    if (last !== this.at) return;
    this.lacking = steps.filter((_, column) => indexes[column].problem);
    this.where.textContent = `step ${int(this.steps[last])}`;
    this.slider.setAttribute("aria-valuetext", this.where.textContent);
    const rows = new Map();
    indexes.forEach((index, column) =>
      index.images.forEach((image) => {
        const key = `${image.seed ?? ""}\n${image.prompt}`;
        if (!rows.has(key)) rows.set(key, { prompt: image.prompt, seed: image.seed, cells: [] });
        rows.get(key).cells[column] ??= image.file;
      }),
    );
    const prompts = new Set([...rows.values()].map((row) => row.prompt)).size;
    const left = indexes.reduce((sum, index) => sum + (index.left_out || 0), 0);
    $("samples-of").textContent =
      `${many(this.steps.length, "step")}, ${many(prompts, "prompt")}${left ? `, ${many(left, "picture")} left out` : ""}`;
    this.grid.style.gridTemplateColumns = `minmax(max(20%, 7rem), 1fr) repeat(${steps.length}, minmax(0, 11.5rem))`;
    const head = [
      h("span", {}),
      ...steps.map((step, at) =>
        h(
          "span",
          { class: from + at === last ? "at now" : "at" },
          `step ${int(step)}`,
          indexes[at].problem ? h("span", { class: "sr" }, indexes[at].problem) : null,
        ),
      ),
    ];
    this.rows = [...rows.values()];
    this.shown = steps;
    fill(
      this.grid,
      head,
      this.rows
        .map((row, at) => [
          h(
            "div",
            { class: "prompt" },
            h("span", { title: row.prompt }, row.prompt || "(no prompt)"),
            row.seed === null || row.seed === undefined ? null : h("small", { class: "muted" }, `seed ${row.seed}`),
          ),
          ...steps.map((step, column) => this.cell(at, column, step, row)),
        ])
        .flat(),
    );
  }

  source(step, file) {
    return `/api/v1/samples/${step}/${encodeURIComponent(file)}${RUN ? `?run=${encodeURIComponent(RUN)}` : ""}`;
  }

  cell(row, column, step, { prompt, cells }) {
    const file = cells[column];
    if (!file) return h("div", { class: "shot" }, "none");
    const image = h("img", { src: this.source(step, file), alt: `step ${step}: ${prompt.slice(0, 80)}`, loading: "lazy", decoding: "async" });
    const button = h("button", { type: "button", class: "shot", onclick: () => this.open(row, column) }, image);
    image.addEventListener("error", () => fill(button, "cannot be shown"));
    return button;
  }

  open(row, column) {
    this.place = [row, column];
    const { prompt, seed, cells } = this.rows[row];
    const step = this.shown[column];
    const close = h("button", { type: "button", onclick: () => this.dialog.close() }, "Close");
    fill(
      this.dialog,
      cells[column] ? h("img", { src: this.source(step, cells[column]), alt: `step ${step}: ${prompt.slice(0, 200)}` }) : h("p", {}, "none"),
      h("p", {}, h("strong", {}, `Step ${int(step)}`), seed === null || seed === undefined ? "" : `, seed ${seed}`, ". ", prompt),
      h("p", { class: "muted" }, "← → other steps, ↑ ↓ other prompts "),
      close,
    );
    if (!this.dialog.open) this.dialog.showModal();
    close.focus();
  }

  key(event) {
    const [row, column] = this.place;
    const [down, right] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key] || [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    const limit = (n, most) => Math.max(0, Math.min(most, n));
    this.open(limit(row + down, this.rows.length - 1), limit(column + right, this.shown.length - 1));
  }
}
