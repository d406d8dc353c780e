// Charts: the rows of each plot, and a Vega-Lite specification of them.

/** Rows of a matrix of experts: more would be a blur, and slow. */
const MOST_EXPERTS = 64;

class Charts {
  constructor(data, state) {
    Object.assign(this, { data, state });
  }

  /** Each plot: what of the state it depends on, and its rows with their specification. */
  list() {
    return [
      {
        name: "load",
        title: "Load, over an even load",
        caption: "Each expert of each layer; a click chooses it.",
        depends: ["layer", "expert"],
        spec: () => this.load(),
        size: "whole",
      },
      {
        name: "pairs",
        title: "Experts that compute the same tokens",
        caption: "Lift over chance: 1 is chance. A click chooses the expert of the row.",
        depends: ["layer", "expert"],
        spec: () =>
          this.matrix("lift", "lift / chance", {
            scheme: "blueorange",
            domain: [0, 1, 2],
            clamp: true,
          }),
      },
      {
        name: "flow",
        title: "Where its tokens go in the next MoE layer",
        caption: "Share of the row's tokens that the column's expert computes.",
        depends: ["layer", "expert"],
        spec: () => this.matrix("flow", "share", { scheme: "viridis" }),
      },
      {
        name: "similarity",
        title: "Similarity of outputs",
        caption: this.aboutSimilarity(),
        depends: ["layer", "expert"],
        spec: () => this.matrix("cka", "CKA", { scheme: "viridis", domain: [0, 1] }),
      },
      {
        name: "knockout",
        title: "Change of the loss without each expert",
        caption: "In nats per token, ± two standard errors.",
        depends: ["layer", "expert"],
        spec: () => this.knockout(),
      },
      {
        name: "saturation",
        title: "Choices also made by the last checkpoint",
        caption: "By step of training; chance is for this layer's loads.",
        depends: ["layer"],
        spec: () => this.saturation(),
      },
      {
        name: "specialisation",
        title: "Preferences, over chance",
        caption:
          "A word's favourite expert, and the information of the expert about the domain. Only the distance to chance is meaningful.",
        depends: [],
        spec: () => this.specialisation(),
      },
      {
        name: "place",
        title: "Lost tokens by place in the group",
        caption:
          "Tokens that no expert computes under the capacity of training, by part of the routing group, from its beginning.",
        depends: ["layer"],
        spec: () => this.drops("place", "part of the routing group"),
      },
      {
        name: "position",
        title: "Lost tokens by position",
        caption: "By position in the document: 0, 1-2, 3-6, 7-14, ...",
        depends: ["layer"],
        spec: () => this.drops("position", "position, powers of two"),
      },
      {
        name: "domain",
        title: "Lost tokens by domain",
        caption: "The domains of the most tokens, ± two standard errors.",
        depends: ["layer"],
        spec: () => this.domainDrops(),
      },
      {
        name: "consistency",
        title: "How few experts suffice",
        caption: "Best experts of a stretch of text, and a cache of the latest ones.",
        depends: ["layer"],
        spec: () => this.consistency(),
      },
      {
        name: "replay",
        title: "What other capacities would drop",
        caption: "Exact at the first MoE layer, an estimate at later ones.",
        depends: ["layer"],
        spec: () => this.replay(),
      },
    ];
  }

  load() {
    const { facts } = this.data,
      { layer, expert } = this.state.now;
    const rows = facts.layers.flatMap((own, index) =>
      own.load.share.map((share, e) => ({
        layer: own.layer,
        expert: e,
        load: share * facts.num_experts,
        index,
      })),
    );
    const number = this.state.numbers[layer],
      wide = facts.num_experts > 32;
    const spec = heat(rows, {
      x: ordinal("expert", "expert", { axis: { labelAngle: 0, orient: "bottom" } }),
      y: ordinal("layer", "layer", { sort: null }),
      value: "load",
      title: "load / even load",
      digits: ".1f",
      scale: {
        scheme: "blueorange",
        domain: [0, 1, 2],
        clamp: true,
        light: "datum.load < 0.3 || datum.load > 1.7",
      },
      picked: `datum.layer === ${JSON.stringify(number)} && datum.expert === ${expert}`,
      height: Math.max(facts.layers.length * (wide ? 14 : 24), 60),
    });
    return {
      ...spec,
      picks: (datum) =>
        datum.index === undefined ? {} : { layer: datum.index, expert: datum.expert },
    };
  }

  /** The experts of a matrix: all, or those of the most load. */
  largest(layer) {
    const share = this.data.facts.layers[layer].load.share;
    const order = share.map((_, e) => e);
    if (order.length <= MOST_EXPERTS) return order;
    return order
      .sort((a, b) => share[b] - share[a])
      .slice(0, MOST_EXPERTS)
      .sort((a, b) => a - b);
  }

  matrix(kind, title, scale) {
    const { layer, expert } = this.state.now,
      matrix = this.data.matrices?.[kind + layer];
    if (!matrix) return null;
    const size = matrix.shape[1],
      rows = [];
    const from = this.largest(layer),
      to = kind === "flow" ? this.largest(layer + 1) : from;
    for (const i of from)
      for (const j of to) {
        if (kind !== "flow" && i === j) continue;
        rows.push({ expert: i, other: j, value: matrix.values[i * size + j] });
      }
    if (!rows.length) return null;
    const light =
      kind === "lift"
        ? "datum.value < 0.3 || datum.value > 1.7"
        : kind === "cka"
          ? "datum.value < 0.55"
          : `datum.value < ${0.55 * Math.max(...rows.map((row) => row.value))}`;
    const spec = heat(rows, {
      x: ordinal("other", kind === "flow" ? "expert in the next MoE layer" : "expert", {
        axis: { labelAngle: 0 },
      }),
      y: ordinal("expert", "expert"),
      value: "value",
      title,
      digits: ".2f",
      scale: { ...scale, light },
      picked: `datum.expert === ${expert}`,
      height: Math.min(Math.max(from.length * 22, 120), 380),
    });
    spec.layer.at(-1).mark.strokeWidth = 1;
    return {
      ...spec,
      ofLayer: true,
      picks: (datum) => (datum.expert === undefined ? {} : { expert: datum.expert }),
    };
  }

  aboutSimilarity() {
    const chance = this.data.facts.layers[this.state.now.layer].ckaShuffled;
    const unrelated = chance
      ? `; shuffled tokens give ${shown(chance.mean, 2)} ± ${shown(chance.std, 2)}`
      : "";
    return `CKA of what two experts compute for the same tokens: 1 is equal up to rotation${unrelated}.`;
  }

  knockout() {
    const { layer, expert } = this.state.now,
      number = this.state.numbers[layer];
    const row = (this.data.facts.knockout ?? []).find((found) => found.layer === number);
    if (!row) return null;
    const rows = row.delta.map((delta, e) => ({
      expert: e,
      change: delta,
      low: delta - 2 * row.error[e],
      high: delta + 2 * row.error[e],
    }));
    return {
      ofLayer: true,
      data: { values: rows },
      height: 210,
      encoding: { x: ordinal("expert", "expert removed", { axis: { labelAngle: 0 } }) },
      layer: [
        {
          mark: { type: "bar", color: "#4c78a8", aria: false, tooltip: true },
          encoding: {
            y: axis("change", "nats/token"),
            stroke: {
              condition: { test: `datum.expert === ${expert}`, value: PICKED },
              value: null,
            },
            strokeWidth: { value: 3 },
          },
        },
        {
          mark: { type: "rule", aria: false },
          encoding: { y: axis("low", "nats/token"), y2: { field: "high" } },
        },
      ],
      picks: (datum) => (datum.expert === undefined ? {} : { expert: datum.expert }),
    };
  }

  saturation() {
    const found = this.data.facts.saturation,
      layer = this.state.now.layer;
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
        rows.push({
          x: own.layer,
          y: own.words.input.favourite,
          name: "a word's favourite",
        });
        rows.push({
          x: own.layer,
          y: own.words.input.chance,
          name: "favourite, shuffled",
        });
      }
      if (own.domainInformation) {
        rows.push({
          x: own.layer,
          y: own.domainInformation[0],
          name: "information about the domain",
        });
        rows.push({
          x: own.layer,
          y: own.domainInformation[1],
          name: "domain, shuffled",
        });
      }
    }
    return rows.length ? lines(rows, "layer", "share, 0 to 1", { point: true }) : null;
  }

  drops(kind, title) {
    const own = this.data.facts.layers[this.state.now.layer].drops?.[kind];
    if (!own || !own.lost.some((value) => value > 0)) return null;
    const rows = own.lost.flatMap((lost, x) => {
      if (!own.tokens[x]) return [];
      const dropped =
        own.dropped && own.dropped[x] !== lost
          ? [{ x, y: own.dropped[x], name: "choices dropped" }]
          : [];
      return [{ x, y: lost, name: "tokens lost" }, ...dropped];
    });
    return { ...lines(rows, title, "share", { point: true }), ofLayer: true };
  }

  domainDrops() {
    const { facts } = this.data,
      own = facts.layers[this.state.now.layer].drops?.domain;
    if (!own || !facts.cardDomains.length || !own.lost.some((value) => value > 0))
      return null;
    const rows = facts.cardDomains.slice(0, 16).map((d) => ({
      domain: facts.domains[d],
      lost: own.lost[d],
      low: Math.max(own.lost[d] - 2 * own.error[d], 0),
      high: own.lost[d] + 2 * own.error[d],
    }));
    const sort = [...rows].sort((a, b) => b.lost - a.lost).map((row) => row.domain);
    const y = {
      field: "domain",
      type: "nominal",
      sort,
      title: null,
      axis: { labelLimit: 130 },
    };
    return {
      ofLayer: true,
      data: { values: rows },
      height: 60 + 14 * rows.length,
      encoding: { y },
      layer: [
        {
          mark: { type: "point", filled: true, color: INK, aria: false, tooltip: true },
          encoding: { x: axis("lost", "share of its tokens") },
        },
        {
          mark: { type: "rule", aria: false },
          encoding: { x: axis("low", "share of its tokens"), x2: { field: "high" } },
        },
      ],
    };
  }

  consistency() {
    const own = this.data.facts.layers[this.state.now.layer].consistency;
    if (!own) return null;
    const rows = [];
    const segment = own.segments.at(-1);
    segment?.covered.forEach((y, i) =>
      rows.push({ x: i + 1, y, name: `best of ${segment.tokens} tokens` }),
    );
    segment?.chance.forEach((y, i) =>
      rows.push({ x: i + 1, y, name: "best, by chance" }),
    );
    own.lru_hit_rate.forEach((y, i) =>
      rows.push({ x: i + 1, y, name: "cache of the latest" }),
    );
    return { ...lines(rows, "experts kept", "share of choices"), ofLayer: true };
  }

  replay() {
    const layer = this.state.now.layer;
    const rows = this.data.facts.replay
      .filter((entry) => entry.setting.capacity_factor)
      .map(({ setting, layers }) => {
        const { capacity_factor: x, ...others } = setting;
        return {
          x,
          y: layers[layer].drop_fraction,
          name: Object.values(others).join(", ") || "drops",
        };
      });
    return new Set(rows.map((row) => row.x)).size > 1
      ? {
          ...lines(rows, "capacity factor", "dropped choices", {
            point: true,
            whole: false,
          }),
          ofLayer: true,
        }
      : null;
  }
}
