"""Settings ranked by another evaluation: another split, or another capacity factor.

`sweep --evaluate` evaluates a finished run's checkpoint again. Each such evaluation gives
another ranking, by the same means, intervals and common seeds as the runs' own loss.
"""

import dataclasses
from collections.abc import Sequence

from moejax.sweep.report import records, summary, words
from moejax.sweep.report.summary import Setting


def names(found: Sequence[Setting]) -> list[str]:
  """Returns the evaluations that differ from the runs' own loss, such as `test@1.25`.

  Args:
    found: settings.
  """
  runs = [run for setting in found for run in setting.runs]
  return [
    name
    for name in records.evaluation_names(runs)
    if any(
      r.evaluations[name][0] != r.values["loss"] for r in runs if name in r.evaluations
    )
  ]


def settings(found: Sequence[Setting], name: str) -> list[Setting]:
  """Returns the settings with the losses of one evaluation, over the runs that have it.

  Args:
    found: settings.
    name: of the evaluation.
  """
  out = []
  for setting in found:
    runs = [
      dataclasses.replace(run, values={**run.values, "loss": run.evaluations[name][0]})
      for run in setting.runs
      if name in run.evaluations
    ]
    if runs:
      out.append(dataclasses.replace(setting, runs=tuple(runs)))
  return out


def drops(setting: Setting, name: str) -> float | None:
  """Returns the dropped fraction of an evaluation, mean over seeds; None if unknown."""
  found = [run.evaluations[name][1] for run in setting.runs if name in run.evaluations]
  known = [value for value in found if value is not None]
  return sum(known) / len(known) if known and len(known) == len(found) else None


def in_words(found: Sequence[Setting], name: str) -> str:
  """Describes which setting has the lowest loss, and which may be equally good.

  Args:
    found: settings.
    name: of the evaluation.

  Returns:
    Sentences; empty with fewer than two settings or two seeds to compare.
  """
  own = settings(found, name)
  ranked = summary.with_all_seeds(own)
  if len(ranked) < 2 or ranked[0].n < 2:
    return ""
  best = summary.best(own)
  near = []
  for setting in summary.indistinguishable(own, best):
    gap = summary.paired(best, setting)
    assert gap is not None
    near.append(f"{setting.label}, {words.difference(gap)}")
  rest = f"Not distinguishable from it: {words.listed(near)}." if near else ""
  if not near and len(ranked) == len(own):
    rest = f"Every other setting is higher, with {summary.LEVEL:.0%} intervals above 0."
  return (
    f"Of {len(ranked)} settings{words.all_seeds(own)}, {best.label} has the lowest mean "
    f"loss: {words.spread(best)} nats/token ({words.count(best.n, 'seed')}). {rest}"
  ).rstrip()
