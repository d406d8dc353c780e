// Card: what is known of one expert.

const CONTEXTS = 10;
const NEIGHBOURS = 6;

/** A word alone: its spaces are to be seen, and it has one line. */
const spaced = (word) => word.replaceAll("\n", "").replaceAll(" ", "\u2423");

class ExpertCard {
  constructor(data, view, state, element) {
    Object.assign(this, { data, view, state, element });
  }

  show() {
    const { layer, expert } = this.state.now,
      facts = this.data.facts;
    const own = facts.layers[layer],
      number = this.state.numbers[layer];
    const parts = make("div", { cls: "parts" });
    parts.append(
      ...[
        this.numbers(own, layer, expert),
        this.words(own, expert),
        this.domains(own, expert),
        this.neighbours(layer, expert),
        this.contexts(layer, expert),
      ].filter(Boolean),
    );
    this.element.replaceChildren(
      make("h2", {}, `Expert ${expert} of layer ${number}`),
      parts,
    );
  }

  numbers(own, layer, expert) {
    const facts = this.data.facts,
      number = this.state.numbers[layer],
      table = make("table");
    const add = (name, value) =>
      table.append(
        make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)),
      );
    const share = own.load.share[expert];
    add("load", `${percent(share)}, ${shown(share * facts.num_experts)}× even`);
    if (own.load.dead.includes(expert)) add("dead", "computed no token");
    add("mean probability", percent(own.load.importance[expert]));
    if (own.load.gate) add("mean weight", shown(own.load.gate[expert]));
    if (own.loss_by_expert)
      add("loss of its tokens", `${shown(own.loss_by_expert[expert], 4)} nats`);
    if (own.largestOutput) add("largest output", shown(own.largestOutput[expert]));
    const removed = (facts.knockout ?? []).find((row) => row.layer === number);
    const cost =
      removed &&
      `${shown(removed.delta[expert])} ± ${shown(2 * removed.error[expert], 2)} nats`;
    const how = facts.undefined.knockout ? "" : " (--knockout)";
    add("loss without it rises by", cost || `not measured${how}`);
    const error = cost && make("p", { cls: "faint" }, "± is two standard errors.");
    const parts = [table, error, this.history(layer, expert)].filter(Boolean);
    return make("div", {}, make("h3", {}, "Numbers"), ...parts);
  }

  /** Load at each checkpoint, if several were read. */
  history(layer, expert) {
    const rows = (this.data.facts.saturation ?? []).filter(
      (row) => row.layers[layer].load,
    );
    if (rows.length < 2) return null;
    const table = make("table");
    const most = Math.max(...rows.map((row) => row.layers[layer].load[expert]), 1e-9);
    for (const row of rows) {
      const value = row.layers[layer].load[expert],
        bar = make("span", { cls: "bar", "aria-hidden": "true" });
      bar.style.width = `${(6 * value) / most}em`;
      table.append(
        make(
          "tr",
          {},
          make("th", { scope: "row" }, String(row.step)),
          make("td", {}, percent(value)),
          make("td", { cls: "left" }, bar),
        ),
      );
    }
    return make("div", { cls: "history" }, make("h3", {}, "Load over training"), table);
  }

  words(own, expert) {
    if (!own.top) return null;
    const list = make("table");
    list.append(
      make(
        "tr",
        {},
        ...["word", "lift", "times"].map((text) => make("th", { scope: "col" }, text)),
      ),
    );
    for (const [word, lift, count] of own.top[expert])
      list.append(
        make(
          "tr",
          {},
          make("td", { cls: "left" }, make("code", {}, spaced(word))),
          make("td", {}, `${shown(lift)}×`),
          make("td", {}, shown(count)),
        ),
      );
    const none = own.top[expert].length
      ? null
      : make("p", { cls: "faint" }, "No word is seen often enough.");
    return make("div", {}, make("h3", {}, "Words it prefers"), none ?? list);
  }

  domains(own, expert) {
    const facts = this.data.facts;
    if (!own.domainLift) return null;
    const rows = facts.cardDomains.map((domain, index) => [
      facts.domains[domain],
      own.domainLift[expert][index],
    ]);
    rows.sort((a, b) => b[1] - a[1]);
    const table = make("table");
    for (const [name, lift] of rows.slice(0, CONTEXTS))
      table.append(
        make(
          "tr",
          {},
          make("td", { cls: "left" }, name),
          make("td", {}, `${shown(lift)}×`),
        ),
      );
    return make("div", {}, make("h3", {}, "Domains, over its load"), table);
  }

  /** The largest entries of an expert's row, itself left out. */
  nearest(name, expert, itself) {
    const matrix = this.data.matrices[name];
    if (!matrix) return null;
    const size = matrix.shape[1],
      row = Array.from(matrix.values.subarray(expert * size, (expert + 1) * size));
    return row
      .map((value, other) => [other, value])
      .filter(([other]) => itself || other !== expert)
      .sort((a, b) => b[1] - a[1])
      .slice(0, NEIGHBOURS);
  }

  neighbours(layer, expert) {
    const next = this.state.numbers[layer + 1];
    const kinds = [
      [
        `lift${layer}`,
        "computes the same tokens as",
        (v) => `${shown(v)}× chance`,
        false,
        null,
      ],
      [
        `cka${layer}`,
        "computes similar outputs to (CKA)",
        (v) => shown(v, 2),
        false,
        null,
      ],
      [
        `flow${layer}`,
        `in layer ${next}, its tokens go to`,
        percent,
        true,
        layer + 1,
      ],
    ];
    const parts = [];
    for (const [name, title, format, itself, target] of kinds) {
      const found = this.nearest(name, expert, itself);
      if (!found) continue;
      const line = make("p", {}, make("span", { cls: "faint" }, title + " "));
      found.forEach(([other, value], index) =>
        line.append(
          index ? ", " : "",
          expertButton(other, target),
          ` (${format(value)})`,
        ),
      );
      parts.push(line);
    }
    return parts.length ? make("div", {}, make("h3", {}, "Neighbours"), ...parts) : null;
  }

  /** The tokens of highest weight, different ones, with what stands around them. */
  contexts(layer, expert) {
    if (!this.view) return null;
    const { facts, layers } = this.data,
      n = facts.sample.tokens,
      columns = layers[layer];
    const found = [];
    for (let k = 0; k < facts.sample.choices; k++)
      for (let i = 0; i < n; i++)
        if (columns.expert.values[k * n + i] === expert)
          found.push([columns.gate.values[k * n + i], i]);
    found.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    const seen = new Set(),
      list = make("div", { cls: "context" });
    for (const [, i] of found) {
      if (seen.size === CONTEXTS) break;
      if (seen.has(this.view.words[i])) continue;
      seen.add(this.view.words[i]);
      list.append(this.context(i));
    }
    if (!found.length)
      list.append(make("p", { cls: "faint" }, "It computes none of the tokens shown."));
    return make(
      "div",
      { cls: "contexts" },
      make(
        "h3",
        {},
        `Tokens of highest weight (it computes ${shown(found.length)} of the ${shown(n)} shown)`,
      ),
      list,
    );
  }

  context(i) {
    const words = this.view.words,
      around = this.view.paragraphOf[i];
    const part = (from, to) => {
      const inside = [];
      for (let j = Math.max(from, 0); j < Math.min(to, words.length); j++)
        if (this.view.paragraphOf[j] === around)
          inside.push(words[j].replaceAll("\n", ""));
      return inside.join("");
    };
    const blank = !words[i].trim();
    const word = make(
      "mark",
      {},
      blank ? spaced(words[i]) : words[i].replaceAll("\n", ""),
    );
    return make(
      "button",
      { type: "button", "data-token": i },
      part(i - 9, i),
      word,
      part(i + 1, i + 7),
    );
  }
}
