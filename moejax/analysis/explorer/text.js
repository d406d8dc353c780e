// Text: the sample, one element per token, coloured for a layer and a choice.

/** Makes a rule per expert: hues apart, one lightness per scheme, so that ink is readable. */
function expertColours(count) {
  const rules = [];
  for (let e = 0; e < count; e++) {
    const hue = count <= 12 ? (360 * e) / count + 20 : (e * 137.508) % 360;
    const level = count <= 12 ? 0 : e % 3;
    rules.push(
      `.e${e}{background-color:oklch(calc(var(--l) + ${level} * var(--step)) var(--c) ${hue.toFixed(1)}deg)}`,
    );
  }
  for (let g = 0; g < 5; g++)
    rules.push(
      `.g${g}{background-color:oklch(var(--l) ${(0.02 + g * 0.03).toFixed(2)} 230deg)}`,
    );
  const style = document.createElement("style");
  style.textContent = rules.join("\n");
  document.head.append(style);
}

class TextView {
  constructor(data, box, legend) {
    this.data = data;
    this.box = box;
    this.legend = legend;
    this.count = data.facts.sample.tokens;
    this.words = Array.from(data.text.string.values, (s) => data.facts.sample.strings[s]);
    this.spans = [];
    this.paragraphs = [];
    this.paragraphOf = new Uint32Array(this.count);
    this.hits = [];
    this.build();
  }

  build() {
    const { sequence, document: number, domain } = this.data.text,
      domains = this.data.facts.sample.domains;
    let paragraph = null;
    for (let i = 0; i < this.count; i++) {
      const starts = !i || sequence.values[i] !== sequence.values[i - 1];
      if (starts) {
        paragraph = document.createElement("p");
        paragraph.className = "sequence";
        this.paragraphs.push({ element: paragraph, first: i });
      }
      if (starts || number.values[i] !== number.values[i - 1]) {
        const mark = document.createElement("span");
        const name = domains[domain.values[i]];
        mark.className = "mark";
        mark.textContent =
          (starts ? `sequence ${sequence.values[i]}` : "next document") +
          (name ? ` · ${name}` : "");
        paragraph.append(mark);
      }
      const span = document.createElement("span");
      // A line ends after the token's number, which stands behind its text.
      const ends = this.words[i].endsWith("\n");
      span.textContent = ends ? this.words[i].slice(0, -1) : this.words[i];
      span.id = "t" + i;
      this.paragraphOf[i] = this.paragraphs.length - 1;
      this.spans.push(span);
      paragraph.append(span, ends ? "\n" : "");
    }
    this.box.append(...this.paragraphs.map((p) => p.element));
  }

  /** Class and small number of token i. */
  look(i, now, columns) {
    const n = this.count,
      facts = this.data.facts,
      k = now.choice - 1;
    const expert = columns.expert.values[k * n + i],
      none = expert >= facts.num_experts;
    if (now.colour === "expert") {
      if (none) return ["t dim", ""];
      const dropped = !isKept(columns, n, i, k);
      return [`t e${expert}${dropped ? " dropped" : ""}`, expert + (dropped ? "×" : "")];
    }
    if (now.colour === "gate") {
      if (none) return ["t dim", ""];
      const share = columns.gate.values[k * n + i] / 255,
        gate = share * share * facts.sample.gateScale[now.layer];
      return [`t g${Math.min(Math.floor(share * 5), 4)}`, String(Math.round(100 * gate))];
    }
    let dropped = 0,
      chosen = 0,
      rank = -1;
    for (let j = 0; j < facts.sample.choices; j++) {
      const e = columns.expert.values[j * n + i];
      if (e >= facts.num_experts) continue;
      chosen++;
      const lost = !isKept(columns, n, i, j);
      if (lost) dropped++;
      if (e === now.expert) rank = lost ? -2 - j : j;
    }
    if (now.colour === "dropped") {
      if (!dropped && chosen) return ["t", ""];
      return [
        `t dropped${dropped === chosen ? " lost" : ""}`,
        chosen > 1 ? "×" + dropped : "×",
      ];
    }
    if (rank === -1) return ["t dim", ""];
    return [
      `t e${now.expert}${rank < 0 ? " dropped" : ""}`,
      rank < 0 ? `${-1 - rank}×` : String(rank + 1),
    ];
  }

  paint(now) {
    const columns = this.data.layers[now.layer],
      hits = new Set(this.hits.flat());
    for (let i = 0; i < this.count; i++) {
      const [name, number] = this.look(i, now, columns),
        span = this.spans[i];
      span.className =
        name + (hits.has(i) ? " hit" : "") + (i === now.token ? " now" : "");
      if (number) span.dataset.n = number;
      else delete span.dataset.n;
    }
    this.box.classList.toggle("numbers", now.numbers === 1);
    this.explain(now);
  }

  explain(now) {
    const facts = this.data.facts,
      parts = [];
    const chip = (name, text) => {
      const span = document.createElement("span");
      span.className = "chip " + name;
      span.textContent = text;
      parts.push(span);
    };
    if (now.colour === "expert") {
      for (let e = 0; e < facts.num_experts; e++) {
        const button = document.createElement("button");
        button.type = "button";
        button.className = "e" + e;
        button.dataset.expert = e;
        button.textContent = e;
        button.title = "Expert " + e;
        button.setAttribute("aria-pressed", e === now.expert);
        parts.push(button);
      }
      chip("dropped", "7× no slot");
    } else if (now.colour === "one") {
      chip("e" + now.expert, `computed by expert ${now.expert}; 1, 2, ... which choice`);
      chip("e" + now.expert + " dropped", "1× chosen, no slot");
    } else if (now.colour === "dropped") {
      chip("dropped", "× some choice has no slot");
      chip("dropped lost", "× no expert computes it");
    } else {
      const most = facts.sample.gateScale[now.layer];
      for (let g = 0; g < 5; g++)
        chip(
          "g" + g,
          `${Math.round(100 * most * (g / 5) ** 2)}-${Math.round(100 * most * ((g + 1) / 5) ** 2)}%`,
        );
    }
    this.legend.replaceChildren(...parts);
  }

  /** Moves the mark of the current token. */
  mark(before, now, scroll) {
    this.spans[before]?.classList.remove("now");
    this.spans[now]?.classList.add("now");
    for (const [index, { element }] of this.paragraphs.entries())
      element.classList.toggle("here", index === this.paragraphOf[now]);
    if (scroll) this.scrollTo(now);
  }

  /** Scrolls the box, and not the page, to a token, where the window shows the box. */
  scrollTo(i) {
    const paragraph = this.paragraphs[this.paragraphOf[i]].element;
    const inside = (element) => element.getBoundingClientRect();
    const { top, bottom } = inside(this.box),
      fold = Math.min(bottom, innerHeight);
    const box = { top, bottom: fold - top > 120 ? fold : bottom };
    // Rendering its paragraph first gives the token its place.
    if (inside(paragraph).bottom < box.top || inside(paragraph).top > box.bottom)
      this.box.scrollTop += inside(paragraph).top - box.top;
    const span = inside(this.spans[i]);
    if (span.top < box.top + 30) this.box.scrollTop += span.top - box.top - 60;
    else if (span.bottom > box.bottom - 10)
      this.box.scrollTop += span.bottom - box.bottom + 60;
  }

  /** The nearest token one line up (-1) or down (1). */
  besideLine(i, direction) {
    const from = this.spans[i].getBoundingClientRect();
    let best = i,
      distance = Infinity,
      line = null;
    for (let j = i + direction; j >= 0 && j < this.count; j += direction) {
      const to = this.spans[j].getBoundingClientRect();
      const apart = direction > 0 ? to.top - from.top : from.top - to.top;
      if (apart < from.height / 2) continue;
      if (line === null) line = to.top;
      else if (Math.abs(to.top - line) > from.height / 2) break;
      const gap = Math.abs(to.left - from.left);
      if (gap < distance) [best, distance] = [j, gap];
    }
    return best;
  }

  endOfSequence(i, last) {
    const index = this.paragraphOf[i],
      next = this.paragraphs[index + 1];
    return last ? (next ? next.first : this.count) - 1 : this.paragraphs[index].first;
  }

  otherSequence(i, direction) {
    const index = this.paragraphOf[i] + direction;
    return this.paragraphs[Math.min(Math.max(index, 0), this.paragraphs.length - 1)]
      .first;
  }

  /** Finds a text across tokens, or an id as #12; returns the number of places. */
  search(wanted) {
    for (const i of this.hits.flat()) this.spans[i].classList.remove("hit");
    this.hits = [];
    if (/^#\d+$/.test(wanted)) {
      const id = Number(wanted.slice(1));
      for (let i = 0; i < this.count; i++)
        if (this.data.text.token.values[i] === id) this.hits.push([i]);
    } else if (wanted.length) this.hits = this.places(wanted.toLowerCase());
    for (const i of this.hits.flat()) this.spans[i].classList.add("hit");
    return this.hits.length;
  }

  places(wanted) {
    const found = [];
    for (const [index, { first }] of this.paragraphs.entries()) {
      const end =
        index + 1 < this.paragraphs.length
          ? this.paragraphs[index + 1].first
          : this.count;
      const words = this.words.slice(first, end).map((word) => word.toLowerCase());
      const whole = words.join("");
      if (!whole.includes(wanted)) continue;
      const starts = [];
      words.reduce((at, word) => (starts.push(at), at + word.length), 0);
      let token = 0;
      for (
        let at = whole.indexOf(wanted);
        at >= 0;
        at = whole.indexOf(wanted, at + wanted.length)
      ) {
        while (token + 1 < starts.length && starts[token + 1] <= at) token++;
        const place = [];
        for (let j = token; j < starts.length && starts[j] < at + wanted.length; j++)
          place.push(first + j);
        found.push(place);
      }
    }
    return found;
  }

  /** The first token of the next (1) or previous (-1) place; -1 if there is none. */
  hitFrom(i, direction) {
    if (!this.hits.length) return -1;
    const firsts = this.hits.map((place) => place[0]);
    if (direction > 0) return firsts.find((first) => first > i) ?? firsts[0];
    return firsts.findLast((first) => first < i) ?? firsts[firsts.length - 1];
  }
}
