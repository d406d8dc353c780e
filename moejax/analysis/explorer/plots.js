// Plots: draws the charts with the library that is in the page, and draws them again.

const CONFIG = {
  background: "transparent",
  font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: {
    labelColor: INK,
    titleColor: INK,
    gridColor: INK,
    gridOpacity: 0.15,
    tickColor: INK,
    domainColor: INK,
    labelOverlap: "greedy",
    labelSeparation: 4,
  },
  legend: { labelColor: INK, titleColor: INK, orient: "bottom" },
  header: { labelColor: INK, titleColor: INK },
  rule: { color: INK },
  text: { color: INK },
};

const COMMON = {
  $schema: "https://vega.github.io/schema/vega-lite/v6.json",
  width: "container",
  autosize: { type: "fit-x", contains: "padding" },
  config: CONFIG,
};

class Plots {
  constructor(data, state, section) {
    Object.assign(this, { state, section });
    this.charts = new Charts(data, state);
    this.drawn = new Map();
    this.timer = 0;
    this.pending = Promise.resolve();
    section.append(make("h2", {}, "Plots"), make("div", { cls: "figures" }));
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
    for (const plot of this.charts.list()) {
      if (names && !plot.depends.some((one) => names.has(one))) continue;
      this.pending = this.pending
        .then(() => this.place(plot))
        .catch((error) => console.error(error));
    }
    return this.pending;
  }

  /** Draws one plot in place of its last drawing; hides it if it has no rows here. */
  async place({ name, title, caption, spec, size }) {
    const made = spec();
    const old = this.drawn.get(name);
    if (!made) {
      if (old) old.figure.hidden = true;
      return;
    }
    const { picks, ofLayer, ...own } = made;
    const figure = old?.figure ?? this.figure(name, size);
    const layer = ofLayer ? `, layer ${this.state.numbers[this.state.now.layer]}` : "";
    figure.hidden = false;
    figure.rows = own.data.values;
    figure.querySelector("h3").textContent = title + layer;
    figure.querySelector("figcaption").textContent = caption;
    const before = figure.querySelector(".chart");
    const chart = make("div", { cls: "chart" + (picks ? " picks" : "") });
    chart.style.minHeight = `${before.offsetHeight}px`; // Nothing below it jumps.
    old?.view.finalize();
    before.replaceWith(chart);
    const { view } = await vegaEmbed(
      chart,
      { ...COMMON, description: title, ...own },
      { renderer: "svg", actions: false },
    );
    chart.style.minHeight = "";
    if (picks)
      view.addEventListener(
        "click",
        (_, item) => item?.datum && this.state.change(picks(item.datum)),
      );
    this.drawn.set(name, { figure, view });
    const details = figure.querySelector("details");
    if (details.open) this.fill(details);
  }

  figure(name, size = "") {
    const figure = make("figure", { id: "plot-" + name, cls: size });
    figure.append(
      make("h3"),
      make("div", { cls: "chart" }),
      make("figcaption"),
      this.numbers(),
    );
    this.section.querySelector(".figures").append(figure);
    return figure;
  }

  /** The same numbers as a table, made when it is opened. */
  numbers() {
    const details = make(
      "details",
      {},
      make("summary", {}, "Numbers"),
      make("div", { cls: "wide" }),
    );
    details.addEventListener("toggle", () => details.open && this.fill(details));
    return details;
  }

  fill(details) {
    const rows = details.parentElement.rows.slice(0, 1500),
      names = Object.keys(rows[0] ?? {});
    const table = make(
      "table",
      {},
      make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))),
    );
    for (const row of rows)
      table.append(
        make(
          "tr",
          {},
          ...names.map((name) =>
            make(
              "td",
              {},
              typeof row[name] === "number"
                ? shown(row[name], 4)
                : String(row[name] ?? "-"),
            ),
          ),
        ),
      );
    details.querySelector(".wide").replaceChildren(table);
  }
}
