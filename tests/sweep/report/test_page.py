"""The page in a real browser: nothing fails, nothing is fetched, tables work.

`make test-browser` runs these, and fails where there is no Chromium. They look for it on
the PATH, or at the path in the variable CHROMIUM.
"""

import re

import pytest

from moejax.sweep.report import page as report
from moejax.sweep.report import sentences, summary
from tests import chromium
from tests.sweep.report import report_cases as cases

pytestmark = pytest.mark.browser

SIZES = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """The page of a grid, with a title that is an attack."""
  directory = tmp_path_factory.mktemp("page")
  found = cases.of(cases.grid())
  settings = summary.settings(found)
  axes = summary.axes(settings, found.fields)
  said = sentences.write(found, settings, axes)
  title = "<script>document.title = 'broken'</script>"
  report.draw(directory, found, settings, axes, said, title)
  return directory / report.PAGE_FILE


@pytest.fixture(scope="module")
def browser():
  with chromium.launched() as found:
    yield found


@pytest.fixture
def opened(browser, file):
  """Opens the page at a width and in a colour scheme; fails on errors and requests."""
  contexts, problems = [], []

  def open_page(width=1280, scheme="light"):
    context = browser.new_context(
      viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    contexts.append(context)
    page = context.new_page()
    problems.append(chromium.watched(page, file.as_uri()))
    page.goto(file.as_uri())
    page.wait_for_selector("#runs .dt-search")
    page.wait_for_function(
      "[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg'))"
    )
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert not any(problems), problems


def column(page, table, name):
  """The shown cells of a column."""
  # Beside it lies a plain table, hidden, for a browser without scripts.
  drawn = page.locator(f"#table-{table}")
  headers = drawn.locator("thead th").all_inner_texts()
  index = [header.strip() for header in headers].index(name)
  return drawn.locator(f"tbody tr td:nth-child({index + 1})").all_inner_texts()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_opens_whole(opened, width, scheme):
  """Every figure is drawn inside the page, and text stands out from its background."""
  page = opened(width, scheme)
  assert page.evaluate("document.documentElement.scrollWidth") <= width
  wide = page.evaluate(
    "[...document.querySelectorAll('main svg, h1, h2, h3, p, dd, li, pre, figcaption')]"
    ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
  )
  assert wide == []
  assert page.locator(".chart svg").count() == 8
  assert "document.title" in page.title()
  colours = page.evaluate(
    "['color', 'backgroundColor'].map(c => getComputedStyle(document.documentElement)[c])"
  )
  ink, paper = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colours)
  assert (ink > paper + 300) if scheme == "dark" else (paper > ink + 300)
  label = page.locator(".chart svg .role-axis-label text").first
  assert label.evaluate("e => getComputedStyle(e).fill") == colours[0]


def test_sorting_and_filtering_change_the_rows(opened):
  """A click on a header sorts by number; a search and a column's filter leave fewer."""
  page = opened()
  before = [float(cell) for cell in column(page, "runs", "loss")]
  assert len(before) == 18 and before != sorted(before)
  header = page.locator("#table-runs thead th", has_text=re.compile("^loss"))
  header.click()
  page.wait_for_timeout(500)
  assert [float(cell) for cell in column(page, "runs", "loss")] == sorted(before)
  page.locator("#runs .dt-search input").fill("dropless")
  page.wait_for_timeout(500)
  assert column(page, "runs", "capacity_factor") == ["dropless"] * 6
  page.locator("#table-runs tfoot input").first.press_sequentially("16")
  page.wait_for_timeout(500)
  assert column(page, "runs", "num_experts") == ["16", "16"]


def test_print_is_black_on_white(opened):
  """Also from a dark screen, and without what only a screen can use."""
  page = opened(800, "dark")
  page.emulate_media(media="print")
  style = "getComputedStyle(document.documentElement)"
  assert page.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
  assert page.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
  assert not page.locator("#runs").is_visible()
  assert page.locator(".chart svg").first.is_visible()
