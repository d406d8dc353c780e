// Plots: each is rows and a Vega-Lite specification of them; the library is in the page.

const INK = "currentColor";
/** Stands out from every cell of both schemes. */
const PICKED = "#d81b60";
const MOST_EXPERTS = 64;
const CONFIG = {
  background: "transparent",
  font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: { labelColor: INK, titleColor: INK, gridColor: INK, gridOpacity: 0.15, tickColor: INK, domainColor: INK, labelOverlap: "greedy", labelSeparation: 4 },
  legend: { labelColor: INK, titleColor: INK, orient: "bottom" },
  header: { labelColor: INK, titleColor: INK },
  rule: { color: INK },
  text: { color: INK },
};
const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];

const axis = (field, title, more = {}) => ({ field, type: "quantitative", title, ...more });
const ordinal = (field, title, more = {}) => ({ field, type: "ordinal", title, ...more });

/** Cells of colour; numbers in them where there is room. */
function heat(rows, { x, y, value, title, scale, digits, picked, height }) {
  const few = new Set(rows.map((row) => row[x.field])).size <= 16;
  const layers = [{
    mark: { type: "rect", aria: false, tooltip: true },
    encoding: { color: { field: value, type: "quantitative", title, scale, legend: { gradientLength: 180 } } },
  }];
  if (few && rows.length <= 256)
    layers.push({
      mark: { type: "text", fontSize: 10, aria: false },
      encoding: { text: { field: value, type: "quantitative", format: digits }, color: { condition: { test: `${scale.light}`, value: "#fff" }, value: "#000" } },
    });
  if (picked)
    layers.push({ transform: [{ filter: picked }], mark: { type: "rect", filled: false, fillOpacity: 0, stroke: PICKED, strokeWidth: 3, aria: false } });
  delete scale.light;
  return { data: { values: rows }, height, encoding: { x, y }, layer: layers };
}

/** Lines by name: the one of the layer shown is thick, chance is dashed. */
function lines(rows, x, y, { point = false, whole = true } = {}) {
  const names = [...new Set(rows.map((row) => row.name))], places = [...new Set(rows.map((row) => row.x))];
  const ticks = whole && places.length <= 24 ? { values: places, format: "d" } : {};
  return {
    data: { values: rows },
    height: 210,
    mark: { type: "line", point: point ? { size: 35 } : false, aria: false, tooltip: true },
    encoding: {
      x: axis("x", x, { scale: { zero: false, nice: false }, axis: { grid: false, ...ticks } }),
      y: axis("y", y, { scale: { zero: true } }),
      strokeDash: { field: "name", type: "nominal", title: null, scale: { domain: names, range: names.map((_, i) => DASHES[i % 4]) } },
      color: { field: "name", type: "nominal", title: null, scale: { domain: names, scheme: "tableau10" } },
    },
  };
}

class Plots {
  constructor(data, state, section) {
    Object.assign(this, { data, state, section });
    this.drawn = new Map();
    this.timer = 0;
    this.pending = Promise.resolve();
    section.append(make("h2", {}, "Plots"), make("div", { cls: "figures" }));
  }

  /** [name, title, caption, what it depends on, rows and specification] of each plot. */
  list() {
    return [
      ["load", "Load, over an even load", "Each expert of each layer; a click chooses it.", ["layer", "expert"], () => this.load(), "whole"],
      ["pairs", "Experts that compute the same tokens", "Lift over chance: 1 is chance. A click chooses the expert of the row.", ["layer", "expert"], () => this.matrix("lift", "lift / chance", { scheme: "blueorange", domain: [0, 1, 2], clamp: true })],
      ["flow", "Where its tokens go in the next MoE layer", "Share of the row's tokens that the column's expert computes.", ["layer", "expert"], () => this.matrix("flow", "share", { scheme: "viridis" })],
      ["similarity", "Similarity of outputs", this.aboutSimilarity(), ["layer", "expert"], () => this.matrix("cka", "CKA", { scheme: "viridis", domain: [0, 1] })],
      ["knockout", "Loss without each expert", "Change in nats per token, with two standard errors.", ["layer", "expert"], () => this.knockout()],
      ["saturation", "Choices that the last checkpoint makes too", "By step of training; chance is for this layer's loads.", ["layer"], () => this.saturation()],
      ["specialisation", "Preferences, over chance", "A word's favourite expert, and what an expert tells of the domain. Only the distance to chance says something.", [], () => this.specialisation()],
      ["place", "Lost tokens by place in the group", "Tokens that no expert computes under the capacity of training, by part of the routing group, from its beginning.", ["layer"], () => this.drops("place", "part of the routing group")],
      ["position", "Lost tokens by position", "By position in the document: 0, 1-2, 3-6, 7-14, ...", ["layer"], () => this.drops("position", "position, powers of two")],
      ["domain", "Lost tokens by domain", "The domains of the most tokens, with two standard errors.", ["layer"], () => this.domainDrops()],
      ["consistency", "How few experts would do", "Best experts of a stretch of text, and a cache of the latest ones.", ["layer"], () => this.consistency()],
      ["replay", "What other capacities would drop", "Exact at the first MoE layer, an estimate at later ones.", ["layer"], () => this.replay()],
    ];
  }

  async start(library) {
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    this.draw(null);
    this.state.listen((_, changed) => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.draw(changed), 120);
      this.waiting = new Set([...(this.waiting ?? []), ...changed]);
    });
  }

  /** Draws what depends on what changed, one after the other. */
  draw(changed) {
    const names = changed && this.waiting;
    this.waiting = null;
    for (const [name, title, caption, depends, spec, size] of this.list()) {
      if (names && !depends.some((one) => names.has(one))) continue;
      this.pending = this.pending.then(() => this.place(name, title, caption, spec, size)).catch((error) => console.error(error));
    }
    return this.pending;
  }

  async place(name, title, caption, makeSpec, size) {
    const spec = makeSpec(), old = this.drawn.get(name);
    if (!spec) {
      if (old) old.figure.hidden = true;
      return;
    }
    const figure = old ? old.figure : make("figure", { id: "plot-" + name, cls: size ?? "" });
    const chart = make("div", { cls: "chart" + (spec.picks ? " picks" : "") });
    const rows = spec.data.values;
    if (!old) {
      figure.append(make("h3", {}, ""), chart, make("figcaption"), this.numbers());
      this.section.querySelector(".figures").append(figure);
    }
    figure.hidden = false;
    figure.rows = rows;
    figure.querySelector("figcaption").textContent = caption;
    const number = this.state.numbers[this.state.now.layer];
    figure.querySelector("h3").textContent = title + (spec.ofLayer ? `, layer ${number}` : "");
    const picks = spec.picks;
    delete spec.picks;
    delete spec.ofLayer;
    const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", autosize: { type: "fit-x", contains: "padding" }, description: title, ...spec, config: CONFIG };
    const before = figure.querySelector(".chart");
    before.style.minHeight = `${before.offsetHeight}px`;
    old?.view.finalize();
    if (before !== chart) before.replaceWith(chart);
    const { view } = await vegaEmbed(chart, whole, { renderer: "svg", actions: false });
    if (picks) view.addEventListener("click", (_, item) => item?.datum && this.state.change(picks(item.datum)));
    this.drawn.set(name, { figure, view });
    const details = figure.querySelector("details");
    if (details.open) this.fill(details);
  }

  /** The same numbers as a table, made when it is opened. */
  numbers() {
    const details = make("details", {}, make("summary", {}, "Numbers"), make("div", { cls: "wide" }));
    details.addEventListener("toggle", () => details.open && this.fill(details));
    return details;
  }

  fill(details) {
    const rows = details.parentElement.rows.slice(0, 1500), names = Object.keys(rows[0] ?? {});
    const table = make("table", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
    for (const row of rows)
      table.append(make("tr", {}, ...names.map((name) => make("td", {}, typeof row[name] === "number" ? shown(row[name], 4) : String(row[name] ?? "-")))));
    details.querySelector(".wide").replaceChildren(table);
  }

  load() {
    const { facts } = this.data, { layer, expert } = this.state.now;
    const rows = facts.layers.flatMap((own, index) => own.load.share.map((share, e) => ({ layer: own.layer, expert: e, load: share * facts.num_experts, index })));
    const number = this.state.numbers[layer], wide = facts.num_experts > 32;
    const spec = heat(rows, {
      x: ordinal("expert", "expert", { axis: { labelAngle: 0, orient: "bottom" } }),
      y: ordinal("layer", "layer"),
      value: "load", title: "load / even load", digits: ".1f",
      scale: { scheme: "blueorange", domain: [0, 1, 2], clamp: true, light: "datum.load < 0.3 || datum.load > 1.7" },
      picked: `datum.layer === ${number} && datum.expert === ${expert}`,
      height: Math.max(facts.layers.length * (wide ? 14 : 24), 60),
    });
    return { ...spec, picks: (datum) => (datum.index === undefined ? {} : { layer: datum.index, expert: datum.expert }) };
  }

  /** The experts of a matrix: all, or those of the most load. */
  largest(layer) {
    const share = this.data.facts.layers[layer].load.share;
    const order = share.map((_, e) => e);
    if (order.length <= MOST_EXPERTS) return order;
    return order.sort((a, b) => share[b] - share[a]).slice(0, MOST_EXPERTS).sort((a, b) => a - b);
  }

  matrix(kind, title, scale) {
    const { layer, expert } = this.state.now, matrix = this.data.matrices?.[kind + layer];
    if (!matrix) return null;
    const size = matrix.shape[1], rows = [], over = kind === "lift" ? this.data.facts.layers[layer].chanceLift || 1 : 1;
    const from = this.largest(layer), to = kind === "flow" ? this.largest(layer + 1) : from;
    for (const i of from)
      for (const j of to) {
        if (kind !== "flow" && i === j) continue;
        rows.push({ expert: i, other: j, value: matrix.values[i * size + j] / over });
      }
    if (!rows.length) return null;
    const light = kind === "lift" ? "datum.value < 0.3 || datum.value > 1.7" : kind === "cka" ? "datum.value < 0.55" : `datum.value < ${0.55 * Math.max(...rows.map((row) => row.value))}`;
    const spec = heat(rows, {
      x: ordinal("other", kind === "flow" ? "expert in the next MoE layer" : "expert", { axis: { labelAngle: 0 } }),
      y: ordinal("expert", "expert"), value: "value", title, digits: ".2f", scale: { ...scale, light },
      picked: `datum.expert === ${expert}`, height: Math.min(Math.max(from.length * 22, 120), 380),
    });
    spec.layer.at(-1).mark.strokeWidth = 1;
    return { ...spec, ofLayer: true, picks: (datum) => (datum.expert === undefined ? {} : { expert: datum.expert }) };
  }

  aboutSimilarity() {
    const chance = this.data.facts.layers[this.state.now.layer].ckaShuffled;
    const unrelated = chance ? `; shuffled tokens give ${shown(chance.mean, 2)} ± ${shown(chance.std, 2)}` : "";
    return `CKA of what two experts compute for the same tokens: 1 is equal up to rotation${unrelated}.`;
  }

  knockout() {
    const { layer, expert } = this.state.now, number = this.state.numbers[layer];
    const row = (this.data.facts.knockout ?? []).find((found) => found.layer === number);
    if (!row) return null;
    const rows = row.delta.map((delta, e) => ({ expert: e, change: delta, low: delta - 2 * row.error[e], high: delta + 2 * row.error[e] }));
    return {
      ofLayer: true, data: { values: rows }, height: 210, encoding: { x: ordinal("expert", "expert removed", { axis: { labelAngle: 0 } }) },
      layer: [
        { mark: { type: "bar", color: "#4c78a8", aria: false, tooltip: true }, encoding: { y: axis("change", "nats/token"), stroke: { condition: { test: `datum.expert === ${expert}`, value: PICKED }, value: null }, strokeWidth: { value: 3 } } },
        { mark: { type: "rule", aria: false }, encoding: { y: axis("low", "nats/token"), y2: { field: "high" } } },
      ],
      picks: (datum) => (datum.expert === undefined ? {} : { expert: datum.expert }),
    };
  }

  saturation() {
    const found = this.data.facts.saturation, layer = this.state.now.layer;
    if (!found || found.length < 2) return null;
    const rows = found.flatMap((row) => [
      { x: row.step, y: row.layers[layer].saturation, name: "the same experts" },
      { x: row.step, y: row.layers[layer].chance, name: "chance" },
    ]);
    return { ...lines(rows, "step", "share of choices", { point: true }), ofLayer: true };
  }

  specialisation() {
    const rows = [];
    for (const own of this.data.facts.layers) {
      if (own.words?.input) {
        rows.push({ x: own.layer, y: own.words.input.favourite, name: "a word's favourite" });
        rows.push({ x: own.layer, y: own.words.input.chance, name: "favourite, shuffled" });
      }
      if (own.domainInformation) {
        rows.push({ x: own.layer, y: own.domainInformation[0], name: "told of the domain" });
        rows.push({ x: own.layer, y: own.domainInformation[1], name: "domain, shuffled" });
      }
    }
    return rows.length ? lines(rows, "layer", "share, 0 to 1", { point: true }) : null;
  }

  drops(kind, title) {
    const own = this.data.facts.layers[this.state.now.layer].drops?.[kind];
    if (!own || !own.lost.some((value) => value > 0)) return null;
    const rows = own.lost.flatMap((lost, x) => {
      if (!own.tokens[x]) return [];
      const dropped = own.dropped && own.dropped[x] !== lost ? [{ x, y: own.dropped[x], name: "choices dropped" }] : [];
      return [{ x, y: lost, name: "tokens lost" }, ...dropped];
    });
    return { ...lines(rows, title, "share", { point: true }), ofLayer: true };
  }

  domainDrops() {
    const { facts } = this.data, own = facts.layers[this.state.now.layer].drops?.domain;
    if (!own || !facts.cardDomains.length || !own.lost.some((value) => value > 0)) return null;
    const rows = facts.cardDomains.slice(0, 16).map((d) => ({ domain: facts.domains[d], lost: own.lost[d], low: Math.max(own.lost[d] - 2 * own.error[d], 0), high: own.lost[d] + 2 * own.error[d] }));
    const sort = [...rows].sort((a, b) => b.lost - a.lost).map((row) => row.domain);
    const y = { field: "domain", type: "nominal", sort, title: null, axis: { labelLimit: 130 } };
    return {
      ofLayer: true, data: { values: rows }, height: 60 + 14 * rows.length, encoding: { y },
      layer: [
        { mark: { type: "point", filled: true, color: INK, aria: false, tooltip: true }, encoding: { x: axis("lost", "share of its tokens") } },
        { mark: { type: "rule", aria: false }, encoding: { x: axis("low", "share of its tokens"), x2: { field: "high" } } },
      ],
    };
  }

  consistency() {
    const own = this.data.facts.layers[this.state.now.layer].consistency;
    if (!own) return null;
    const rows = [];
    const segment = own.segments.at(-1);
    segment?.covered.forEach((y, i) => rows.push({ x: i + 1, y, name: `best of ${segment.tokens} tokens` }));
    segment?.chance.forEach((y, i) => rows.push({ x: i + 1, y, name: "best, by chance" }));
    own.lru_hit_rate.forEach((y, i) => rows.push({ x: i + 1, y, name: "cache of the latest" }));
    return { ...lines(rows, "experts kept", "share of choices"), ofLayer: true };
  }

  replay() {
    const layer = this.state.now.layer;
    const rows = this.data.facts.replay.filter((entry) => entry.setting.capacity_factor).map(({ setting, layers }) => {
      const { capacity_factor: x, ...others } = setting;
      return { x, y: layers[layer].drop_fraction, name: Object.values(others).join(", ") || "drops" };
    });
    return new Set(rows.map((row) => row.x)).size > 1 ? { ...lines(rows, "capacity factor", "dropped choices", { point: true, whole: false }), ofLayer: true } : null;
  }
}
