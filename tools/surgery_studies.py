"""Tables and figures of the studies of expert surgery, which no sweep's report has.

  python -m tools.surgery_studies upcycle runs/upcycle

Copies results.csv of the study's sweep, with results of the study's other runs, to
experiments/STUDY, and makes tables and figures from them. Without the last argument it
only remakes the tables and figures. In a sweep's own results a run begins at its first
step, whatever was spent on its start.

Intervals are 90%, of Student's t over seeds; differences are paired by seed.
"""

import argparse
import collections
import csv
import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

import experiments
from experiments.apart import base as apart_base
from experiments.prune import base as prune_base
from experiments.upcycle import base as upcycle_base
from experiments.upcycle import spec as upcycle_spec
from moejax import files
from moejax.errors import UserError
from moejax.sweep.report import charts, summary, tables

ROOT = pathlib.Path(experiments.__file__).parent

Rows = list[dict[str, Any]]
BySeed = Mapping[int, float]
"""A loss by seed, nats per token."""


def read_csv(path: pathlib.Path) -> Rows:
  with open(path) as file:
    return list(csv.DictReader(file))


def read(study: str, name: str = "results.csv") -> Rows:
  return read_csv(ROOT / study / name)


def by_seed(rows: Iterable[Mapping[str, Any]], column: str, *keys: str) -> dict[Any, Any]:
  """Returns a column by the cells of some others, and then by seed."""
  found: dict[Any, dict[int, float]] = collections.defaultdict(dict)
  for row in rows:
    key = tuple(row[name] for name in keys)
    found[key if len(keys) > 1 else key[0]][int(row["seed"])] = float(row[column])
  return found


def mean(name: str, losses: BySeed, less: BySeed | None = None) -> dict[str, Any]:
  """Returns cells of a mean over seeds, or of that of differences, with its interval."""
  values = [losses[s] - (less[s] if less else 0.0) for s in sorted(losses)]
  found = summary.student(values)
  return {name: found.estimate, f"{name}, low": found.low, f"{name}, high": found.high}


# ------------------------------------------------------------------------- figures


def point(
  x: Any, colour: str, losses: BySeed, less: BySeed | None = None
) -> dict[str, Any]:
  """Returns a point of a figure: a mean with its interval."""
  cells = mean("loss", losses, less)
  return {"x": x, "colour": colour, **{n.rpartition(" ")[2]: v for n, v in cells.items()}}


def chart(rows: Rows, x: Any, title: str = charts.LOSS, *, lines: bool = False) -> Any:
  """Returns points with intervals, joined by lines or side by side."""
  levels = list(dict.fromkeys(row["colour"] for row in rows))
  colour = charts.colour("colour", levels, {"colour": ""})
  base = alt.Chart(charts.data(rows)).encode(x=x, color=colour)
  if not lines:
    base = base.encode(xOffset=alt.XOffset("colour:N", sort=levels))
  scale = alt.Scale(zero=False, padding=12)
  y = alt.Y("loss:Q", title=title, scale=scale)
  layers = [base.mark_point(size=60, filled=True, opacity=0.9).encode(y=y)]
  layers += [base.mark_line().encode(y=y)] if lines else []
  bars = base.transform_filter("isValid(datum.low)").mark_rule(opacity=0.6)
  layers.append(bars.encode(y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"))
  return alt.layer(*layers).properties(height=charts.HEIGHT)


def figure(name: str, title: str, drawn: Any) -> charts.Figure:
  return charts.Figure(name=name, title=title, caption="", chart=drawn)


# ------------------------------------------------------------------------- upcycle


def upcycle() -> tuple[tables.Table, charts.Figure]:
  """Loss over all training FLOPs, those of dense models included."""
  losses = by_seed(read("upcycle"), "loss", "variant")
  cost = upcycle_spec.flops_per_step(sparse=False)
  curve = {
    upcycle_spec.sparse_steps(total): losses[upcycle_spec.best_name(f"scratch, {total}")]
    for total in upcycle_base.TOTALS
  }
  rows, points = [], []
  for total in upcycle_base.TOTALS:
    for side, settings in upcycle_spec.sides(total).items():
      words = side.partition(",")[0]
      found = losses[upcycle_spec.best_name(side)]
      scratch = losses[upcycle_spec.best_name(f"scratch, {total}")]
      rows.append(
        {"side": words, "budget, dense steps": total}
        | mean("loss", found)
        | mean("loss - scratch", found, scratch)
        | _steps(settings, found, curve)
      )
      colour = words.replace("upcycle ", "upcycled at dense step ")
      points.append(point(total * cost, colour, found))
  x = alt.X(
    "x:Q",
    title="training FLOPs, those of the dense model included",
    scale=charts.scale([p["x"] for p in points]),
    axis=alt.Axis(format="~s"),
  )
  table = tables.Table(name="upcycle", title="Loss at equal FLOPs", rows=tuple(rows))
  drawn = chart(points, x, lines=True)
  return table, figure("upcycle", "Upcycled and from scratch", drawn)


def _steps(
  settings: Mapping[str, Any], found: BySeed, curve: Mapping[int, BySeed]
) -> dict[str, Any]:
  """Returns an upcycled run's sparse steps, and those from scratch to its mean loss.

  Between the budgets, the loss from scratch is taken as linear in the logarithm of steps.
  """
  cells: dict[str, Any] = {"sparse steps": None, "as from scratch": None}
  if "train.init_from" not in settings:
    return cells
  steps = list(curve)
  losses = [float(np.mean(list(of.values()))) for of in curve.values()]
  own = float(np.mean(list(found.values())))
  if losses[-1] <= own <= losses[0]:
    logs = np.log(steps)
    cells["as from scratch"] = round(math.exp(np.interp(-own, -np.array(losses), logs)))
  return cells | {"sparse steps": settings["train.num_steps"]}


# --------------------------------------------------------------------------- prune

_PRUNED, _TRAINED = "pruned", "and trained for 10% more"


def gather_prune(workdir: pathlib.Path) -> Rows:
  """Returns the losses that `tools.surgery` measured before and after pruning."""
  rows = []
  for path in sorted((workdir / "starts").glob("by=*")):
    words = dict(word.split("=") for word in path.name.split(","))
    loss = files.read_json(path / "run.json")["surgery"][-1]["loss"]
    rows.append({**words, "whole": loss["before"], "pruned": loss["after"]})
  return rows


def prune() -> tuple[tables.Table, charts.Figure]:
  """Rise of the loss by criterion, before and after more training."""
  before = read("prune", "losses.csv")
  whole = by_seed(before, "whole", "by", "experts")
  pruned = by_seed(before, "pruned", "by", "experts")
  trained = by_seed(read("prune"), "loss", "variant")
  names = {e: f", rate {rate:g}" for e, rate in prune_base.BEST.items()}
  base = trained[f"whole{names[prune_base.EXPERTS]}"]
  rows, points = [], []
  for experts in prune_base.LEFT:
    after = {
      by: trained[f"{by}, {experts}{names[experts]}"] for by in prune_base.CRITERIA
    }
    control = pruned["random", str(experts)]
    for by in prune_base.CRITERIA:
      key = (by, str(experts))
      row = {"by": by, "experts": experts}
      row |= mean(f"loss - whole, {_PRUNED}", pruned[key], whole[key])
      row |= mean(f"loss - whole, {_TRAINED}", after[by], base)
      row |= mean(f"loss - random, {_PRUNED}", pruned[key], control)
      row |= mean(f"loss - random, {_TRAINED}", after[by], after["random"])
      rows.append(row)
      words = f"{experts} of {prune_base.EXPERTS} left, "
      points.append(point(by, words + _PRUNED, pruned[key], whole[key]))
      points.append(point(by, words + _TRAINED, after[by], base))
  x = alt.X("x:N", title="", sort=list(prune_base.CRITERIA))
  drawn = chart(points, x, "rise of the held-out loss, nats/token")
  table = tables.Table(name="prune", title="Rise of the loss", rows=tuple(rows))
  return table, figure("prune", "Loss of pruning", drawn)


# --------------------------------------------------------------------------- apart

_SEEDS, _BRANCHES = "seed model", "branches, each on its own domain"


def gather_apart(workdir: pathlib.Path) -> Rows:
  """Returns the losses of final evaluations by domain, of the best rate of each side."""
  best = {f"{side}, rate {rate:g}": side for side, rate in apart_base.RATES.items()}
  rows = []
  for folder in ("seeds", "branches", "sweep"):
    for run in read_csv(workdir / folder / "results.csv"):
      seed = int(run["seed"])
      if folder == "seeds":
        side, seed = _SEEDS, seed - apart_base.FIRST_SEED
      elif folder == "branches":
        rate = float(run["optimizer.learning_rate"])
        side = _BRANCHES if rate == apart_base.RATES["branch"] else ""
      else:
        side = best.get(run["variant"], "")
      if not side:
        continue
      path = workdir / folder / "runs" / run["run"]
      # The own evaluation of a branch is of other text than the others'.
      file = next(path.glob("eval_*_first_*.json")) if folder == "branches" else None
      domains = files.read_json(file or path / "eval.json")["results"][0]["domains"]
      for domain, own in domains.items():
        if domain == run.get("data.domains", domain):
          row = {"side": side, "seed": seed, "domain": domain}
          rows.append(row | {"loss": own["loss"], "tokens": own["tokens"]})
  return rows


def apart() -> tuple[tables.Table, charts.Figure]:
  """Loss by domain of every side."""
  found = by_seed(read("apart", "losses.csv"), "loss", "side", "domain")
  own = {side: {d: found[side, d] for d in apart_base.DOMAINS} for side, _ in found}
  for losses in own.values():
    seeds = losses[apart_base.DOMAINS[0]]
    losses["mean"] = {s: sum(f[s] for f in losses.values()) / len(losses) for s in seeds}
  rows, points = [], []
  for side, losses in own.items():
    for domain, by in losses.items():
      rows.append(
        {"side": side, "domain": domain}
        | mean("loss", by)
        | mean("loss - joined", by, own["joined"][domain])
      )
      points.append(point(domain, side, by))
  x = alt.X("x:N", title="", sort=[*apart_base.DOMAINS, "mean"])
  table = tables.Table(name="apart", title="Loss by domain", rows=tuple(rows))
  return table, figure("apart", "Trained apart and joined", chart(points, x))


# ---------------------------------------------------------------------------------

DRAWN: dict[str, Callable[[], tuple[tables.Table, charts.Figure]]] = {
  "upcycle": upcycle,
  "prune": prune,
  "apart": apart,
}
GATHERED = {"prune": gather_prune, "apart": gather_apart}


def write_rows(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  with files.replacing(path) as temporary, open(temporary, "w", newline="") as file:
    sheet = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(rows)


def main(study: str, workdir: pathlib.Path | None = None) -> None:
  """Writes a study's tables and figures.

  Args:
    study: one of `DRAWN`.
    workdir: of the study's runs, whose results are taken over first.

  Raises:
    UserError: there is no finished sweep in it.
  """
  if workdir is not None:
    results = workdir / "sweep" / "results.csv"
    if not results.exists():
      raise UserError(f"{results} does not exist. Run experiments/{study}/run.sh first.")
    shutil.copy(results, ROOT / study)
    if study in GATHERED:
      write_rows(ROOT / study / "losses.csv", GATHERED[study](workdir))
  table, drawn = DRAWN[study]()
  for name in ("tables", "figures"):
    (ROOT / study / name).mkdir(exist_ok=True)
  tables.write(ROOT / study / "tables", [table])
  charts.save(drawn, ROOT / study / "figures")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("study", choices=list(DRAWN))
  parser.add_argument(
    "workdir", nargs="?", type=pathlib.Path, help="directory of the study's runs"
  )
  given = parser.parse_args()
  try:
    main(given.study, given.workdir)
  except UserError as error:
    parser.error(str(error))
