// Main: opens the page, and lets the pointer and the keys change its state.

const byId = (id) => document.getElementById(id);

function options(select, values, label) {
  select.replaceChildren(
    ...values.map((value) => make("option", { value }, label(value))),
  );
}

function tools(data, state) {
  const { facts } = data,
    range = (n) => Array.from({ length: n }, (_, i) => i);
  options(byId("layer"), range(facts.layers.length), (index) =>
    String(state.numbers[index]),
  );
  options(byId("expert"), range(facts.num_experts), String);
  options(
    byId("choice"),
    range(state.most.choice).map((k) => k + 1),
    String,
  );
  byId("choice").parentElement.hidden = state.most.choice === 1;
  for (const name of ["layer", "expert", "choice", "colour"])
    byId(name).addEventListener("change", (event) =>
      state.change({ [name]: event.target.value }),
    );
  byId("numbers").addEventListener("change", (event) =>
    state.change({ numbers: event.target.checked ? 1 : 0 }),
  );
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
}

function showTools(now) {
  for (const name of ["layer", "expert", "choice", "colour", "search"])
    if (byId(name).value !== String(now[name])) byId(name).value = now[name];
  byId("numbers").checked = now.numbers === 1;
}

/** Pointer and keys of the text. */
function reading(view, panel, state) {
  const { box } = view,
    of = (event) => event.target.closest?.(".t");
  const indexOf = (element) => Number(element.id.slice(1));
  box.addEventListener(
    "pointerover",
    (event) => of(event) && panel.show(indexOf(of(event))),
  );
  box.addEventListener("pointerleave", () => panel.show(state.now.token));
  box.addEventListener(
    "click",
    (event) => of(event) && state.change({ token: indexOf(of(event)) }),
  );
  const moves = {
    ArrowRight: (i) => i + 1,
    ArrowLeft: (i) => i - 1,
    ArrowDown: (i) => view.besideLine(i, 1),
    ArrowUp: (i) => view.besideLine(i, -1),
    Home: (i) => view.endOfSequence(i, false),
    End: (i) => view.endOfSequence(i, true),
    PageDown: (i) => view.otherSequence(i, 1),
    PageUp: (i) => view.otherSequence(i, -1),
  };
  box.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    state.change({ token: move(state.now.token) });
    byId("said").textContent = sentenceOf(view, state, state.now.token);
  });
}

function searching(view, state) {
  const box = byId("search");
  const find = (direction) => {
    const hit = view.hitFrom(state.now.token, direction);
    if (hit < 0) return;
    state.change({ token: hit });
    view.scrollTo(hit);
    say();
  };
  const say = () => {
    const index = view.hits.findIndex((place) => place.includes(state.now.token));
    const count = view.hits.length;
    byId("hits").textContent = !state.now.search
      ? ""
      : index < 0
        ? `${count} found`
        : `${index + 1} of ${count}`;
  };
  let timer = 0;
  box.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => state.change({ search: box.value }), 150);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    clearTimeout(timer);
    state.change({ search: box.value });
    find(event.shiftKey ? -1 : 1);
    // From here on n and N go on, and are not written into the box.
    if (view.hits.length) byId("text").focus({ preventScroll: true });
  });
  byId("next").addEventListener("click", () => find(1));
  byId("previous").addEventListener("click", () => find(-1));
  state.listen((now, changed) => {
    if (changed.has("search")) view.search(now.search);
    if (changed.has("search") || changed.has("token")) say();
  });
  view.search(state.now.search);
  say();
  return find;
}

/** Keys that work wherever no text is written. */
function keys(data, state, find) {
  const step = (name, by) => state.change({ [name]: state.now[name] + by });
  const actions = { "[": () => step("layer", -1), "]": () => step("layer", 1) };
  if (find)
    Object.assign(actions, {
      ",": () => step("choice", -1),
      ".": () => step("choice", 1),
      c: () =>
        state.change({
          colour: COLOURS[(COLOURS.indexOf(state.now.colour) + 1) % COLOURS.length],
        }),
      e: () => {
        const chosen = decisionsOf(data, state.now.layer, state.now.token).choices[
          state.now.choice - 1
        ];
        if (chosen) state.change({ expert: chosen.expert });
      },
      "/": () => byId("search").focus(),
      n: () => find(1),
      N: () => find(-1),
    });
  addEventListener("keydown", (event) => {
    if (
      event.target.closest?.("input, select, textarea") ||
      event.ctrlKey ||
      event.metaKey ||
      event.altKey
    )
      return;
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

/** Buttons that name an expert or a token, wherever they are. */
function links(state, view) {
  document.addEventListener("click", (event) => {
    const { expert, layer, token } =
      event.target.closest?.("button[data-expert], button[data-token]")?.dataset ?? {};
    if (expert !== undefined)
      state.change(layer === undefined ? { expert } : { expert, layer });
    if (token !== undefined) {
      state.change({ token });
      view.scrollTo(state.now.token);
    }
  });
}

function openText(data, state) {
  expertColours(data.facts.num_experts);
  const view = new TextView(data, byId("text"), byId("legend"));
  const panel = new TokenPanel(view, state, byId("token"));
  reading(view, panel, state);
  const find = searching(view, state);
  let before = state.now.token;
  state.listen((now, changed) => {
    if (["layer", "choice", "colour", "numbers"].some((name) => changed.has(name)))
      view.paint(now);
    else if (changed.has("expert"))
      now.colour === "one" ? view.paint(now) : view.explain(now);
    if (changed.has("token")) view.mark(before, now.token, true);
    if (changed.has("token") || changed.has("layer")) panel.show(now.token);
    before = now.token;
  });
  view.paint(state.now);
  panel.show(state.now.token);
  return { view, find };
}

async function main() {
  const data = await load(),
    state = new State(data.facts);
  byId("explorer").hidden = false;
  tools(data, state);
  showTools(state.now);
  state.listen(showTools);
  let view = null,
    find = null;
  if (data.text) ({ view, find } = openText(data, state));
  else {
    for (const element of document.querySelectorAll(".of-text")) element.hidden = true;
    byId("no-text").hidden = false;
    const why = data.facts.undefined.text;
    byId("no-text").textContent = why
      ? `No tokens are shown: ${why}.`
      : "No tokens are shown: the analysis was made with --explore_tokens=0.";
  }
  if (data.facts.note) {
    byId("notice").hidden = false;
    byId("notice").textContent = data.facts.note;
  }
  links(state, view);
  keys(data, state, find);
  const card = new ExpertCard(data, view, state, byId("card"));
  card.show();
  state.listen(
    (_, changed) => (changed.has("layer") || changed.has("expert")) && card.show(),
  );
  if (view) view.mark(0, state.now.token, true);
  document.body.dataset.ready = "text";
  const library = await inflatedText("library");
  if (library) {
    const plots = new Plots(data, state, byId("plots"));
    await plots.start(library);
    await plots.pending;
  } else byId("plots").hidden = true;
  document.body.dataset.ready = "all";
}

main().catch((error) => {
  console.error(error);
  byId("notice").hidden = false;
  byId("notice").textContent =
    `This page could not be opened (${error.message}). It needs a browser from 2023 or later.`;
});
