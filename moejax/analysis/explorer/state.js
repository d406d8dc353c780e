// State: what is shown, kept in the URL's fragment, so that a view can be shared.

const COLOURS = ["expert", "one", "dropped", "gate"];
const INITIAL = {
  layer: 0,
  choice: 1,
  colour: "expert",
  expert: 0,
  token: 0,
  search: "",
  numbers: 1,
};

/** The state of the page; `layer` counts MoE layers, in the fragment it is the model's layer. */
class State {
  constructor(facts) {
    this.numbers = facts.layers.map((layer) => layer.layer);
    this.most = {
      layer: facts.layers.length - 1,
      choice: facts.sample ? facts.sample.choices : 1,
      expert: facts.num_experts - 1,
      token: facts.sample ? facts.sample.tokens - 1 : 0,
      numbers: 1,
    };
    this.now = { ...INITIAL };
    this.listeners = [];
    this.timer = 0;
    this.read();
    addEventListener("hashchange", () => this.change(this.parsed()));
    addEventListener("pagehide", () => this.write());
  }

  /** Calls `listener(now, changed names)` after each change. */
  listen(listener) {
    this.listeners.push(listener);
  }

  /** Changes some values; what is out of range is brought to its end. */
  change(part) {
    const before = this.now;
    this.now = this.checked({ ...before, ...part });
    const changed = Object.keys(INITIAL).filter(
      (name) => before[name] !== this.now[name],
    );
    if (!changed.length) return;
    for (const listener of this.listeners) listener(this.now, new Set(changed));
    clearTimeout(this.timer);
    // A browser counts changes of its address: one after a burst of keys is enough.
    this.timer = setTimeout(() => this.write(), 200);
  }

  checked(values) {
    const out = { ...values };
    for (const [name, most] of Object.entries(this.most)) {
      const least = name === "choice" ? 1 : 0;
      const value = Math.trunc(Number(values[name]));
      out[name] = Number.isFinite(value)
        ? Math.min(Math.max(value, least), most)
        : INITIAL[name];
    }
    if (!COLOURS.includes(out.colour)) out.colour = INITIAL.colour;
    out.search = String(out.search);
    return out;
  }

  parsed() {
    const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    const found = { ...INITIAL };
    for (const name of Object.keys(INITIAL)) if (name in given) found[name] = given[name];
    if ("layer" in given)
      found.layer = Math.max(this.numbers.map(String).indexOf(given.layer), 0);
    return found;
  }

  read() {
    this.now = this.checked(this.parsed());
  }

  write() {
    clearTimeout(this.timer);
    const words = new URLSearchParams();
    for (const [name, value] of Object.entries(this.now))
      if (value !== INITIAL[name])
        words.set(name, name === "layer" ? this.numbers[value] : value);
    const fragment = words.toString();
    if (fragment !== location.hash.slice(1))
      history.replaceState(null, "", "#" + fragment);
  }
}
