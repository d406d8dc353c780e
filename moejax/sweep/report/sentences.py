"""Sentences from a sweep's numbers: what it found, and what remains unknown.

A sentence is written only if the data support it: finished runs, enough seeds, an
interval that excludes 0. Otherwise the question is listed as unknown, with its numbers.
"""

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence

from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import program
from moejax.options import show
from moejax.routing.registry import ENV, ROUTERS
from moejax.sweep.report import analyses, capacity, evaluated, quality, summary, words
from moejax.sweep.report import unknown as unknown_lib
from moejax.sweep.report.records import Records
from moejax.sweep.report.summary import Setting

_NOT_TO_COPY = (
  "schema_version",
  *(f"data.{name}" for name in ("cache_dir", "num_workers", "prefetch")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A sentence that the data support."""

  topic: str
  text: str
  command: str = ""
  """A command line to copy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences:
  """The top of a report."""

  findings: tuple[Finding, ...]
  unknown: tuple[str, ...]
  """Sentences on what remains unknown, and why."""

  def show(self) -> None:
    """Prints them."""
    for finding in self.findings:
      print(f"{finding.topic}: {finding.text}")
      if finding.command:
        print(f"  {finding.command}")
    for text in self.unknown:
      print(f"Unknown: {text}")


def write(
  records: Records,
  found: Sequence[Setting],
  axes: Sequence[str],
  base: Config | None = None,
) -> Sentences:
  """Returns the sentences of a report.

  Args:
    records: all runs.
    found: their settings, from `summary.settings`.
    axes: the fields that were varied.
    base: the config that `train` uses without flags; None gives a command that sets every
      field.
  """
  names = summary.short_names(records.fields)
  findings = [
    *_pareto(found),
    *_doubling(found, axes, names),
    *_capacity(records, found, axes, names),
    *_isoflop(found, records.fields, names),
    *_quality(found),
    *_evaluated(found),
    *_best(found, base),
  ]
  unknown = unknown_lib.write(records, found, axes)
  return Sentences(findings=tuple(findings), unknown=tuple(unknown))


def _pareto(found: Sequence[Setting]) -> list[Finding]:
  out = []
  units = {"step_ms_p50": "{:,.4g} ms", "training_flops": "{:.3g} FLOP"}
  for cost in summary.costs(found):
    front, title = summary.pareto(found, cost), summary.COSTS[cost]
    ranked = [s for s in summary.with_all_seeds(found) if s.of(cost) is not None]
    if len(ranked) < 2:
      continue
    listed = words.listed(
      [f"{s.label} ({units[cost].format(s.of(cost))}, {words.spread(s)})" for s in front]
    )
    only = "1 is" if len(front) == 1 else f"{len(front)} are"
    out.append(
      Finding(
        topic=f"Loss against {title}",
        text=f"Of {len(ranked)} settings{words.all_seeds(found)}, {only} not beaten in "
        f"mean loss at equal or lower {title}, from the cheapest: {listed}.",
      )
    )
  return out


def _doubling(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Finding]:
  out = []
  for doubling in analyses.doublings(found, axes):
    if doubling.difference.certain:
      what, slower = words.doubling(doubling, names)
      gap = words.difference(doubling.difference)
      text = f"Going {what} changes the loss by {gap}{slower}."
      out.append(Finding(topic="Doubling the experts", text=text))
  return out


def _capacity(
  records: Records,
  found: Sequence[Setting],
  axes: Sequence[str],
  names: Mapping[str, str],
) -> list[Finding]:
  out = []
  diverged = [run.settings for run in summary.diverged(records)]
  for answer in capacity.sufficient(found, axes, diverged):
    if answer.dropless is None or (answer.refused and answer.sufficient is None):
      continue
    than = (
      f"dropless ({words.spread(answer.dropless)}){words.where(answer.others, names)}"
    )
    if answer.sufficient is None:
      text = (
        f"The largest capacity factor tried, {answer.largest:g}, has a loss more than "
        f"one standard error above {than}, so no smaller one is considered sufficient."
      )
    else:
      factor = answer.sufficient.values[analyses.CAPACITY]
      text = (
        f"From {factor:g} on, every capacity factor tried has a loss "
        f"({answer.sufficient.mean:.4f} at {factor:g}) within one standard error of "
        f"{than}."
      )
      gap = summary.paired(answer.dropless, answer.sufficient)
      if gap is not None and gap.certain:
        text += f" Seed by seed, it still differs: {words.difference(gap)}."
    out.append(Finding(topic="Sufficient capacity", text=text))
  return out


def _quality(found: Sequence[Setting]) -> list[Finding]:
  answers = quality.speedups(found)
  if not answers:
    return []
  return [Finding(topic="Speed to quality", text=quality.in_words(answers))]


def _isoflop(
  found: Sequence[Setting], fields: Sequence[str], names: Mapping[str, str]
) -> list[Finding]:
  out = []
  for curve in analyses.isoflops(found, fields):
    if curve.minimum is None:
      continue
    at = curve.minimum
    interval = ""
    if at.low is not None and at.high is not None:
      interval = f" ({summary.LEVEL:.0%} interval {at.low:.3g} to {at.high:.3g})"
    text = (
      f"At {curve.budget:.3g} training FLOPs{words.where(curve.others, names)}, the "
      f"loss is lowest, {curve.loss:.4f}, at {at.estimate:.3g} active parameters"
      f"{interval}."
    )
    out.append(Finding(topic="Best size for a budget", text=text))
  return out


def _evaluated(found: Sequence[Setting]) -> list[Finding]:
  return [
    Finding(topic=f"Evaluated on {name}", text=text)
    for name in evaluated.names(found)
    if (text := evaluated.in_words(found, name))
  ]


def _best(found: Sequence[Setting], base: Config | None) -> list[Finding]:
  ranked = summary.with_all_seeds(found)
  if len(found) < 2 or not ranked:
    return []
  best = summary.best(found)
  spread = f"{words.spread(best)} nats/token"
  text = f"{best.label} has the lowest mean loss: {spread} ({words.seeds_of(best)})."
  if all_seeds := words.all_seeds(found):
    text = f"Of {len(ranked)} settings{all_seeds}, {text}"
  if len(ranked) == 1:
    seeds = words.whole(best.n)
    text = f"Only {best.label} has {seeds}, with a mean loss of {spread}."
  if lower := _lower(found, best):
    return [Finding(topic="Lowest loss", text=f"{text} {lower}")]
  text += _cheaper(found, best)
  config = best.runs[0].config
  return [Finding(topic="Lowest loss", text=text, command=command(config, base))]


def _lower(found: Sequence[Setting], best: Setting) -> str:
  """Names the settings with fewer seeds that beat the best over the seeds they share."""
  gaps = []
  for setting in found:
    gap = summary.paired(best, setting)
    if gap is not None and gap.estimate < 0 and setting.n < best.n:
      gaps.append(f"{setting.label} by {words.difference(gap)}")
  listed = words.listed(gaps)
  return f"Lower over the seeds they share: {listed}." if gaps else ""


def _cheaper(found: Sequence[Setting], best: Setting) -> str:
  """Names the cheapest setting that may be as good as the best."""
  own = best.of(summary.STEP_TIME)
  if own is None or summary.STEP_TIME not in summary.costs(found):
    return ""
  cheaper = [
    (cost, setting)
    for setting in summary.indistinguishable(found, best)
    if (cost := setting.of(summary.STEP_TIME)) is not None and cost < own
  ]
  if not cheaper:
    return ""
  cost, setting = min(cheaper, key=lambda pair: pair[0])
  gap = summary.paired(best, setting)
  assert gap is not None
  return (
    f" {setting.label} cannot be distinguished from it, {words.difference(gap)}, and "
    f"takes {1 - cost / own:.0%} less time per step."
  )


def command(config: Config, base: Config | None = None) -> str:
  """Returns the command line that trains a config.

  Args:
    config: of a run.
    base: the config that `train` uses without flags; None sets every field.
  """
  ours = config_text.leaves(config)
  theirs = {} if base is None else config_text.leaves(base)
  flags = [
    f"--config.{name}={show(value)}"
    for name, value in ours.items()
    if name not in _NOT_TO_COPY and (name not in theirs or theirs[name] != value)
  ]
  # A router of one's own is not known to the program without the file that adds it.
  added = os.pathsep.join(ROUTERS.files()) if config.moe.router in ROUTERS.added() else ""
  start = f"{ENV}={shlex.quote(added)} " if added else ""
  start += f"{program('train', 'experiments.train')} --workdir=runs/best "
  return start + " ".join(shlex.quote(flag) for flag in flags)
