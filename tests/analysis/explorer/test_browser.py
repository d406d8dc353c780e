"""The explorer in a real browser: it opens offline, and says what the arrays say.

`make test-browser` runs these, and fails where there is no Chromium.
"""

import random
import time

import numpy as np
import pytest

from moejax.analysis import sentences
from moejax.analysis.explorer import facts
from moejax.analysis.explorer import page as explorer
from tests import chromium
from tests.analysis.explorer import cases

pytestmark = pytest.mark.browser

SIZES = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]

_TEXTS = "p,li,h1,h2,h3,th,td,button,.t,.chip,figcaption,dd,summary,label"

_CONTRAST = """(texts) => {
  const canvas = new OffscreenCanvas(1, 1);
  const draw = canvas.getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    draw.clearRect(0, 0, 1, 1);
    draw.fillStyle = colour;
    draw.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "white";
  };
  const low = [];
  for (const e of document.querySelectorAll(texts)) {
    if (!e.checkVisibility() || !e.textContent.trim()) continue;
    const pair = [getComputedStyle(e).color, background(e)].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) low.push(`${e.className || e.tagName} ${ratio.toFixed(2)}`);
  }
  return [...new Set(low)];
}"""


def _written(directory, made):
  found, tokens, names = made
  text = explorer.render(found, sentences.sentences(found), tokens, names, {})
  path = directory / "index.html"
  path.write_text(text, encoding="utf-8")
  return path


@pytest.fixture(scope="module")
def made():
  return cases.synthetic(layers=3, experts=20, choices=3, tokens=3000)


@pytest.fixture(scope="module")
def file(tmp_path_factory, made):
  return _written(tmp_path_factory.mktemp("page"), made)


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
  return _written(tmp_path_factory.mktemp("attack"), cases.attack())


@pytest.fixture(scope="module")
def browser():
  with chromium.launched() as found:
    yield found


@pytest.fixture
def opened(browser, file):
  """Opens a page; fails on any message, error or request."""
  contexts, problems = [], []

  def open_page(width=1280, scheme="light", path=file, fragment=""):
    context = browser.new_context(
      viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    contexts.append(context)
    page = context.new_page()
    problems.append(chromium.watched(page, path.as_uri()))
    page.goto(path.as_uri() + fragment)
    page.wait_for_selector("body[data-ready=all]", timeout=60_000)
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert not any(problems), problems


def _told(page):
  """The panel: (expert, kept) of each choice, and the alternatives."""
  rows = page.locator("#token .choices tr[data-expert]")
  chosen = rows.evaluate_all(
    "rows => rows.map(r => [Number(r.dataset.expert), r.dataset.kept === 'true'])"
  )
  others = page.locator("#token .choices tr[data-other]")
  return chosen, others.evaluate_all("rows => rows.map(r => Number(r.dataset.other))")


def _arrays(made, layer, token):
  """The same from the sample."""
  drawn = made[1]
  pairs = zip(drawn.expert[layer, token], drawn.kept[layer, token], strict=True)
  chosen = [[int(expert), bool(kept)] for expert, kept in pairs]
  return chosen, drawn.other[layer, token].tolist()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_opens_whole(opened, attack, width, scheme):
  """Words that are attacks stay words; nothing is wider than the screen, all is drawn.

  Every text has a contrast of 4.5 or more (WCAG 2.2, 1.4.3) in all kinds of colour.
  """
  page = opened(width, scheme, attack)
  assert page.evaluate("document.documentElement.scrollWidth") <= width
  assert page.locator("#plots .chart svg").count() == 12
  assert page.locator(".findings li").count() == 3
  assert page.locator("#text img, #card img, h1 b").count() == 0
  for kind in ("expert", "one", "dropped", "gate"):
    page.select_option("#colour", kind)
    assert page.evaluate(_CONTRAST, _TEXTS) == []


def test_pointer_and_keys_tell_what_the_arrays_say(opened, made):
  """Choices, drops and alternatives of the same tokens, in two layers."""
  page = opened()
  for layer in (0, 2):
    page.select_option("#layer", index=layer)
    for token in (5, 17, 40):
      page.hover(f"#t{token}")
      assert page.get_attribute("#token", "data-token") == str(token)
      assert _told(page) == _arrays(made, layer, token)
  page.mouse.move(2, 2)
  page.click("#t3")
  page.mouse.move(2, 2)
  for step in range(1, 15):
    page.keyboard.press("ArrowRight")
    assert _told(page) == _arrays(made, 2, 3 + step)
  said = page.inner_text("#said")
  assert said.startswith(facts.token_texts(made[1], made[2].pieces)[17])
  assert f"expert {made[1].expert[2, 17, 0]}" in said
  page.keyboard.press("[")
  assert _told(page) == _arrays(made, 1, 17)


def test_lines_and_sequences_by_key(opened, made):
  """Down and up come back to the line; Page Down goes to the next sequence's start."""
  page = opened()
  now = "Number(document.querySelector('.t.now').id.slice(1))"
  top = f"document.getElementById('t' + {now}).getBoundingClientRect().top"
  page.click("#t2")
  first = page.evaluate(top)
  page.keyboard.press("ArrowDown")
  assert page.evaluate(top) > first + 10
  page.keyboard.press("ArrowUp")
  assert abs(page.evaluate(top) - first) < 5
  page.keyboard.press("PageDown")
  starts = np.flatnonzero(np.diff(made[1].sequence)) + 1
  assert page.evaluate(now) == starts[0]
  page.keyboard.press("End")
  assert page.evaluate(now) == starts[1] - 1


def test_drops_are_told_without_colour(opened, made):
  """A cross beside every dropped token, and beside no other."""
  page = opened(fragment="#colour=dropped&layer=3")
  numbers = page.evaluate(
    "[...document.querySelectorAll('.t')].map(e => e.dataset.n ?? '')"
  )
  marked = ["\u00d7" in number for number in numbers]
  assert marked == (~made[1].kept[1]).any(axis=-1).tolist()


def test_search_finds_every_place(opened, made):
  """A text over tokens, counted as Python counts it; an id; and from one to the next."""
  words = facts.token_texts(made[1], made[2].pieces)
  page = opened()
  page.fill("#search", "w12")
  page.press("#search", "Enter")
  breaks = np.flatnonzero(np.diff(made[1].sequence)) + 1
  parts = np.split(np.array(words, object), breaks)
  count = sum("".join(part).count("w12") for part in parts)
  assert page.inner_text("#hits") == f"1 of {count}"
  page.press("#search", "Enter")
  assert page.inner_text("#hits") == f"2 of {count}"
  assert "w12" in page.inner_text(".t.now.hit")
  page.keyboard.press("n")
  assert page.inner_text("#hits") == f"3 of {count}"
  assert page.input_value("#search") == "w12"
  page.keyboard.press("N")
  assert page.inner_text("#hits") == f"2 of {count}"
  number = int(made[1].token[100])
  page.fill("#search", f"#{number}")
  page.press("#search", "Enter")
  assert page.inner_text("#hits").endswith(f"of {(made[1].token == number).sum()}")
  page.fill("#search", "not there")
  page.wait_for_function("document.getElementById('hits').textContent === '0 found'")


def test_a_view_is_shared_by_its_address(opened, made):
  """Layer, choice, colour, expert, token and search are the same after a reload."""
  page = opened()
  page.select_option("#layer", index=2)
  page.select_option("#choice", "2")
  page.select_option("#colour", "one")
  page.select_option("#expert", "7")
  page.fill("#search", "w3")
  page.press("#search", "Enter")
  page.uncheck("#numbers")
  page.wait_for_function("location.hash.includes('numbers=0')")
  told, title = _told(page), page.inner_text("#card h2")
  token = page.get_attribute("#token", "data-token")
  page.reload()
  page.wait_for_selector("body[data-ready=all]")
  other = opened(width=400, fragment=page.evaluate("location.hash"))
  for same in (page, other):
    assert _told(same) == told == _arrays(made, 2, int(token))
    assert same.inner_text("#card h2") == title == "Expert 7 of layer 5"
    assert same.input_value("#colour") == "one" and same.input_value("#choice") == "2"
    assert same.input_value("#search") == "w3" and not same.is_checked("#numbers")


def test_a_wrong_address_is_no_error(opened):
  """Numbers out of range, words for numbers and unknown names are put right."""
  page = opened(fragment="#layer=99&expert=-4&token=1e9&choice=x&colour=red&z=1")
  assert page.inner_text("#card h2") == "Expert 0 of layer 1"
  assert page.get_attribute("#token", "data-token") == "2999"


def test_an_expert_is_chosen_from_plot_and_text(opened, made):
  """A cell of the load, a number in the panel, and the key e; its tokens are listed."""
  page = opened()
  cell = page.locator("#plot-load svg .mark-rect path").nth(25)
  cell.click()
  assert page.inner_text("#card h2") == "Expert 5 of layer 3"
  shown = page.inner_text("#card .contexts h3")
  assert f"computes {(made[1].expert[1] == 5).sum()} of" in shown
  page.click("#t9")
  page.keyboard.press("e")
  assert page.inner_text("#card h2") == f"Expert {made[1].expert[1, 9, 0]} of layer 3"
  page.click("#card .context button >> nth=0")
  token = int(page.get_attribute("#token", "data-token"))
  assert made[1].expert[1, 9, 0] in made[1].expert[1, token]


def test_the_card_says_by_how_much_the_loss_rises(opened, made):
  """The change, and two standard errors as in the plot."""
  page = opened()
  row = page.locator("#card tr", has_text="loss without it rises by")
  found = made[0]["knockout"][0]
  change, error = row.locator("td").inner_text().split(" nats")[0].split(" ± ")
  assert float(change) == pytest.approx(found["delta"][0], rel=0.01)
  assert float(error) == pytest.approx(2 * found["error"][0], rel=0.05)
  assert "± is two standard errors" in page.inner_text("#card")


def test_no_line_of_a_plot_joins_encoder_and_decoder(opened, made, tmp_path):
  """Of four kinds of lines, one for each stack."""
  layers = [
    layer | {"layer": name}
    for layer, name in zip(
      [*made[0]["layers"], made[0]["layers"][0]],
      ("encoder.1", "encoder.3", "decoder.1", "decoder.3"),
      strict=True,
    )
  ]
  stack = {name: made[0][name] for name in ("router", "num_experts", "num_selected")}
  stacks = dict.fromkeys(("encoder", "decoder"), stack | {"tokens": 9})
  empty = {"flow": [], "knockout": [], "saturation": [], "replay": []}
  found = made[0] | {"layers": layers, "stacks": stacks} | empty
  page = opened(path=_written(tmp_path, (found, None, made[2])))
  lines = page.locator("#plot-specialisation .mark-line path")
  assert lines.count() == 2 * len({"favourite", "shuffled", "told", "by chance"})


def test_print_is_black_on_white_and_short(opened):
  """From a dark screen: no tools, and of the text the sequence that is read."""
  page = opened(800, "dark")
  page.emulate_media(media="print")
  style = "getComputedStyle(document.documentElement)"
  assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
  assert not page.locator("#tools").is_visible()
  assert page.locator(".sequence:visible").count() == 1
  assert page.locator(".chart svg").first.is_visible()


def test_a_page_without_text_says_so(opened, made, tmp_path):
  """Cards and plots are there, and keys of the text do nothing."""
  page = opened(path=_written(tmp_path, (made[0], None, made[2])))
  assert "--explore_tokens=0" in page.inner_text("#no-text")
  for key in ("]", "n", "e", "c", "/"):
    page.keyboard.press(key)
  assert page.inner_text("#card h2") == "Expert 0 of layer 3"
  assert page.locator("#plots .chart svg").count() == 12


def test_the_largest_page_opens_in_seconds(opened, tmp_path):
  """64 experts, 16 layers, 20,000 tokens: text within 10 s, as does another layer."""
  made = cases.synthetic(layers=16, experts=64, choices=8, tokens=20_000)
  path = _written(tmp_path, made)
  start = time.monotonic()
  page = opened(path=path)
  assert time.monotonic() - start < 20
  start = time.monotonic()
  page.select_option("#layer", index=9)
  assert _told(page) == _arrays(made, 9, 0)
  assert time.monotonic() - start < 5
  print(f"{path.stat().st_size / 1e6:.2f} MB")


@pytest.mark.parametrize("width", [1280, 400])
def test_random_clicks_and_keys_end_without_an_error(opened, width):
  """60 s of them, 30 at each width; the page still answers."""
  page = opened(width)
  rng, keys = random.Random(width), [*"[].,cenN/", "Enter", "Escape", "Tab", "x"]
  keys += [f"Arrow{side}" for side in ("Up", "Down", "Left", "Right")]
  keys += ["PageDown", "PageUp", "Home", "End", "Shift+Tab", "Space", "Backspace"]
  end = time.monotonic() + 30
  while time.monotonic() < end:
    if rng.random() < 0.5:
      page.mouse.click(rng.randrange(width), rng.randrange(900))
    else:
      page.keyboard.press(rng.choice(keys))
    if rng.random() < 0.1:
      page.mouse.wheel(0, rng.randrange(-1500, 1500))
  page.select_option("#layer", index=1)
  page.select_option("#expert", "3")
  assert page.inner_text("#card h2") == "Expert 3 of layer 3"
