"""The page holds what was found, is safe to open, and depends on nothing else."""

import importlib.util
import json
import re

import pytest

from moejax.cli import compare
from moejax.errors import UserError
from moejax.sweep.points import stored
from moejax.sweep.points.expand import expand
from moejax.sweep.report import page as report
from moejax.sweep.report import sentences, summary
from moejax.sweep.spec import Spec
from tests.sweep.report import report_cases as cases

figures = pytest.importorskip(
  "moejax.sweep.report.figures", reason="needs the extra report"
)
tables = pytest.importorskip(
  "moejax.sweep.report.tables", reason="needs the extra report"
)

ATTACK = "<script>alert(1)</script>"


def draw(runs):
  """(records, sentences, figures, tables) of runs."""
  found = cases.of(runs)
  settings = summary.settings(found)
  axes = summary.axes(settings, found.fields)
  return (
    found,
    sentences.write(found, settings, axes),
    figures.make(found, settings, axes),
    tables.make(found, settings, axes),
  )


def page(runs, title="A title", notes=""):
  return report.page(*draw(runs), title, notes)


def names(runs):
  return [figure.name for figure in draw(runs)[2]]


def test_a_grid_has_every_figure_of_a_grid():
  """E x capacity over two seeds carries all but the isoFLOP curves."""
  assert names(cases.grid()) == [
    "loss_vs_step_time",
    "heat_loss",
    "heat_drops",
    "heat_time",
    "drops_vs_capacity",
    "loss_curves",
    "main_effect_num_experts",
    "main_effect_capacity_factor",
  ]


def test_no_figure_without_its_data():
  """One setting has no trade-off, no axis and, without a log, no curve."""
  assert names([cases.record(3.0)]) == []
  # Two routers: no grid for a heat map, no capacity for drops.
  runs = [cases.record(3.0), cases.record(2.0, step_ms=20, moe__router="top2")]
  assert names(runs) == ["loss_vs_step_time", "main_effect_router"]


def test_a_grid_of_holes_has_no_heat_map():
  """Each size has its own number of steps, as in an isoFLOP sweep."""
  runs = [
    cases.record(3.0 + i, model__width=32 * (i + 1), train__num_steps=100 - i)
    for i in range(4)
  ]
  assert not any(name.startswith("heat") for name in names(runs))


def test_isoflop_curves_are_drawn_with_their_minima():
  """One diamond: the second budget's minimum is on the edge, and has none."""
  runs = []
  for budget, best in ((1e13, 5.0), (1e14, 9.0)):
    for i in range(5):
      x = 4 + i / 2
      values = {"active_parameters": 10**x, "training_flops": budget}
      run = cases.record(
        3 + (x - best) ** 2,
        values=values,
        model__width=32 * (i + 1),
        train__num_steps=int(budget / 1e11),
      )
      runs.append(run)
  (figure,) = [f for f in draw(runs)[2] if f.name == "isoflop"]
  spec = figure.chart.to_dict()
  diamonds = spec["datasets"][spec["layer"][-1]["data"]["name"]]
  assert [round(row["size"]) for row in diamonds] == [100_000]


def test_the_page_is_offline_escaped_and_the_same_every_time():
  """No address to load from, no text that runs, no date or random name; under 6 MB."""
  runs = cases.grid((4, 8), (1.0, None))
  text = page(runs, ATTACK, f"{ATTACK}\nsecond line")
  assert ATTACK not in text
  assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
  head = text[: text.index("<script>")]
  assert "default-src &#39;none&#39;" in head or "default-src 'none'" in head
  # In tags; the libraries' own code mentions addresses that it does not open.
  assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?http", text)
  assert len(text.encode()) < 6e6
  assert text == page(runs, ATTACK, f"{ATTACK}\nsecond line")


def test_a_name_of_a_run_cannot_leave_the_script_it_is_data_of():
  """Settings are words in the figures' JSON and in the tables."""
  runs = [cases.record(3.0 + i, data__text_field=f"</script>{i}<b>") for i in range(2)]
  text = page(runs)
  assert "</script>0<b>" not in text and "u003c/script" in text


def test_what_only_an_earlier_report_made_is_removed(tmp_path):
  """A figure of runs that have gone would be read as one of these; others' files stay."""
  wide = [cases.record(3.0), cases.record(2.0, step_ms=20, moe__router="top2")]
  report.draw(tmp_path, *_with_axes(wide), title="T")
  before = {p.name for p in tmp_path.rglob("*.*")}
  assert {"loss_vs_step_time.pdf", "main_effects.tex", "main_effects.csv"} <= before
  for mine in ("figures/mine.png", "tables/mine.tex", "tables/mine.csv"):
    (tmp_path / mine).write_text("mine")
  report.draw(tmp_path, *_with_axes(wide[:1]), title="T")
  after = {p.name for p in tmp_path.rglob("*.*")}
  assert not {"loss_vs_step_time.png", "loss_vs_step_time.pdf"} & after
  assert not {"main_effects.tex", "main_effects.csv"} & after
  assert {"mine.png", "mine.tex", "mine.csv", "runs.tex", "captions.md"} <= after


def _with_axes(runs):
  found = cases.of(runs)
  settings = summary.settings(found)
  axes = summary.axes(settings, found.fields)
  return found, settings, axes, sentences.write(found, settings, axes)


def test_the_page_names_what_is_unknown():
  """Under a heading of its own, and findings with the command to copy."""
  text = page(cases.grid((4, 8), (1.0, None), 1))
  assert "What cannot be said yet" in text and "has one seed" in text
  assert "What the runs say" in text and "--workdir=runs/best" in text


def test_tables_are_csv_and_booktabs(tmp_path):
  """The rows of the first, with LaTeX's special characters escaped in the second."""
  *_, sheets = draw(cases.grid())
  tables.write(tmp_path, sheets)
  lines = (tmp_path / "settings.csv").read_text().splitlines()
  assert lines[0].startswith("num_experts,capacity_factor,seeds,loss,sd,se")
  assert lines[1].startswith("4,1,2,3.0050,0.0212,0.0150")
  assert lines[3].startswith("4,dropless,2,2.9050")
  latex = (tmp_path / "settings.tex").read_text()
  assert r"\toprule" in latex and r"num\_experts" in latex
  assert {path.stem for path in tmp_path.iterdir()} == {
    "settings",
    "runs",
    "main_effects",
    "capacity",
  }


def test_runs_of_no_sweep_are_compared(tmp_path, monkeypatch, capsys):
  """From directories alone: results, page, figures and tables, and the same in words."""
  for factor, loss in ((1.0, 3.2), (2.0, 3.0)):
    for seed in (0, 1):
      config = cases.make_config(moe__capacity_factor=factor, train__seed=seed)
      path = tmp_path / "sweep" / "runs" / f"c{factor:g}s{seed}"
      cases.write_run(path, config, loss=loss + seed / 10)
  out = tmp_path / "out"
  line = ["compare", str(tmp_path / "sweep"), f"--out={out}", "--by=moe.capacity_factor"]
  monkeypatch.setattr("sys.argv", line)
  assert compare.main() == 0
  printed = capsys.readouterr().out
  assert "Lowest loss: capacity_factor=2 has the lowest mean loss: 3.0500" in printed
  assert str(out / "report.html") in printed
  files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
  assert {"report.html", "results.csv", "results.json", "tables/settings.tex"} <= files
  png, pdf = out / "figures/loss_curves.png", out / "figures/loss_curves.pdf"
  assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes()[:5] == b"%PDF-"


def test_variants_of_a_sweep_keep_their_names(tmp_path, monkeypatch, capsys):
  """Compared later, a variant stands for its fields as in the sweep's own report."""
  variants = {"small": {"moe.num_experts": 4}, "large": {"moe.num_experts": 16}}
  base = cases.make_config()
  base.train.eval_every = base.train.checkpoint_every = base.train.num_steps
  spec = Spec(base=base, variants=variants)
  points = expand(spec).points
  for point, loss in zip(points, (3.2, 3.0), strict=True):
    cases.write_run(tmp_path / "runs" / point.directory, point.config, loss=loss)
  (tmp_path / "spec.json").write_text(json.dumps(stored.to_json(spec, points)))
  monkeypatch.setattr("sys.argv", ["compare", str(tmp_path), f"--out={tmp_path / 'out'}"])
  assert compare.main() == 0
  assert "variant=large has the lowest mean loss" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (["nowhere"], "nowhere does not exist"),
    (["{tmp}"], "has no config.json"),
    (["{tmp}/a", "{tmp}/a"], "is given twice"),
    (["{tmp}/a", "--by=moe.experts"], "Did you mean --config.moe.num_experts"),
    (["{tmp}/a", "--out={tmp}/a/eval.json"], "is a file. Give another directory"),
  ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, arguments, says):
  """Before anything is written."""
  cases.write_run(tmp_path / "a")
  words = [word.format(tmp=tmp_path) for word in arguments]
  if not any(word.startswith("--out") for word in words):
    words.append(f"--out={tmp_path / 'out'}")
  monkeypatch.setattr("sys.argv", ["compare", *words])
  with pytest.raises(UserError) as caught:
    compare.main()
  assert says in str(caught.value) and "\n" not in str(caught.value)
  assert not list(tmp_path.glob("out/*"))


def test_results_are_written_without_the_extra(tmp_path, monkeypatch):
  """The numbers need no library; what is missing is one line with the remedy."""
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *a: None if name == "altair" else find(name)
  )
  run = cases.write_run(tmp_path / "a")
  with pytest.raises(UserError, match=r"altair.*pip install 'moejax\[report\]'"):
    report.write(tmp_path, [run], "A title")
  assert (tmp_path / "results.csv").exists()
  assert not (tmp_path / "report.html").exists()
