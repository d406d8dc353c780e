// Token: everything that is known of one token, in the panel beside the text.

/** An element with a class, children that are nodes or text, and attributes. */
function make(name, { cls = "", ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  if (cls) element.className = cls;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function expertButton(expert, layer = null) {
  const attributes = {
    cls: "link",
    type: "button",
    "data-expert": expert,
    "aria-label": `Expert ${expert}`,
  };
  if (layer !== null) attributes["data-layer"] = layer;
  return make("button", attributes, String(expert));
}

/** A number for people: some digits, and a real minus. */
function shown(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  const text =
    Math.abs(value) >= 1000
      ? Math.round(value).toLocaleString("en")
      : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}

const percent = (value) =>
  Number.isFinite(value) ? `${shown(100 * value, value < 0.1 ? 2 : 3)}%` : "-";

/** What is said of a token's choices in a layer, for a screen reader. */
function sentenceOf(view, state, i) {
  const { choices } = decisionsOf(view.data, state.now.layer, i);
  const told = choices.map(
    (c) => `${c.expert}${c.kept ? "" : " dropped"}, ${Math.round(100 * c.gate)} percent`,
  );
  return `${view.words[i]}: expert ${told.join("; ") || "none"}`;
}

class TokenPanel {
  constructor(view, state, panel) {
    this.view = view;
    this.state = state;
    this.panel = panel;
  }

  show(i) {
    const { data } = this.view,
      { text, facts } = data,
      now = this.state.now;
    const token = text.token.values[i],
      domain = facts.sample.domains[text.domain.values[i]];
    const bytes = facts.sample.bytes[token];
    const where = `id ${token}${bytes ? `, bytes ${bytes}` : ""}; token ${i} of the sample, position ${text.position.values[i]} of its document${domain ? `, ${domain}` : ""}`;
    this.panel.dataset.token = i;
    this.panel.replaceChildren(
      make("p", { cls: "word" }, this.view.words[i]),
      make("p", { cls: "faint" }, where),
      make("h3", {}, `Layer ${this.state.numbers[now.layer]}`),
      this.choices(i),
      facts.layers.length > 1 ? make("h3", {}, "All layers") : null,
      facts.layers.length > 1 ? this.layers(i) : null,
    );
  }

  choices(i) {
    const facts = this.view.data.facts,
      now = this.state.now;
    const { choices, alternatives } = decisionsOf(this.view.data, now.layer, i);
    const table = make("table", { cls: "choices" });
    const kind = facts.tokensChoose ? "weight" : "probability";
    table.append(
      make(
        "tr",
        {},
        ...["", "expert", kind, "slot"].map((text) => make("th", { scope: "col" }, text)),
      ),
    );
    const most = facts.sample.gateScale[now.layer];
    choices.forEach((c, k) => {
      const bar = make("span", { cls: "bar", "aria-hidden": "true" });
      bar.style.width = `${(4 * c.gate) / most}em`;
      const slot = c.kept
        ? make("td", { cls: "left" }, "kept")
        : make("td", { cls: "left bad" }, "× dropped");
      const row = make(
        "tr",
        { "data-expert": c.expert, "data-kept": c.kept },
        make("td", {}, String(k + 1)),
      );
      row.append(
        make("td", {}, expertButton(c.expert)),
        make("td", { cls: "left" }, c.gate.toFixed(3) + " ", bar),
        slot,
      );
      table.append(row);
    });
    if (!choices.length)
      table.append(
        make("tr", {}, make("td", { colspan: 4 }, "No expert computes this token.")),
      );
    for (const a of alternatives) {
      const row = make(
        "tr",
        { cls: "alternative", "data-other": a.expert },
        make("td", {}, "–"),
      );
      row.append(
        make("td", {}, expertButton(a.expert)),
        make("td", { cls: "left" }, a.probability.toFixed(3)),
        make("td", { cls: "left" }, facts.tokensChoose ? "not chosen" : "not computed"),
      );
      table.append(row);
    }
    return make("div", { cls: "wide" }, table);
  }

  layers(i) {
    const table = make("table", { cls: "layers" });
    this.state.numbers.forEach((number, layer) => {
      const cell = make("td", { cls: "left" });
      for (const c of decisionsOf(this.view.data, layer, i).choices) {
        const chip = make(
          "span",
          { cls: `chip e${c.expert}` },
          expertButton(c.expert, layer),
          c.kept ? "" : "×",
        );
        cell.append(chip, " ");
      }
      if (!cell.childNodes.length) cell.append("none");
      table.append(make("tr", {}, make("th", { scope: "row" }, String(number)), cell));
    });
    return table;
  }
}
