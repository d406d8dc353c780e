"""Sentences made of a sweep's numbers: what it found, and what it cannot say.

A sentence is written only if the data carry it: finished runs, enough seeds, an interval
that excludes 0. What fails one of these is listed as unknown, with its numbers.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import program
from moejax.options import show
from moejax.sweep.report import analyses, quality, summary
from moejax.sweep.report.records import Records
from moejax.sweep.report.summary import Interval, Setting

_MOST = 8
"""Settings named in one sentence; the figures and tables have all."""

_NOT_TO_COPY = (
  "schema_version",
  *(f"data.{name}" for name in ("cache_dir", "num_workers", "prefetch")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A sentence that the data carry."""

  topic: str
  text: str
  command: str = ""
  """A command line to copy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences:
  """The top of a report."""

  findings: tuple[Finding, ...]
  unknown: tuple[str, ...]
  """What cannot be said, and why."""

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
    base: the config that `train` has without flags; None gives a command that sets
      every field.
  """
  names = summary.short_names(records.fields)
  findings = [
    *_pareto(found),
    *_doubling(found, axes, names),
    *_capacity(found, axes, names),
    *_isoflop(found, records.fields, names),
    *_quality(found),
    *_best(found, base),
  ]
  unknown = [
    *_unfinished(records),
    *_incomparable(records),
    *_seeds(found),
    *_unranked(found),
    *_close(found),
    *_uncertain_doublings(found, axes, names),
    *_refused(found, records.fields, names),
    *_step_times(records, found),
  ]
  return Sentences(findings=tuple(findings), unknown=tuple(unknown))


def spread(setting: Setting) -> str:
  """Returns a mean loss with its standard error, if there is one."""
  if setting.se is None:
    return f"{setting.mean:.4f}"
  return f"{setting.mean:.4f} +- {setting.se:.4f}"


def difference(interval: Interval) -> str:
  """Returns a difference in loss with its interval and number of seeds."""
  if interval.n > 1 and interval.low == interval.high == 0:
    return f"no difference in any of {interval.n} seeds"
  text = f"{interval.estimate:+.4f} nats/token"
  if interval.low is None or interval.high is None:
    return f"{text} (one seed)"
  return (
    f"{text} ({summary.LEVEL:.0%} interval {interval.low:+.4f} to {interval.high:+.4f}, "
    f"{interval.n} seeds)"
  )


def where(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
  """Returns `, with top_k=2` for the axes held fixed; empty if there is none."""
  return f", with {summary.label(values, names)}" if values else ""


def _pareto(found: Sequence[Setting]) -> list[Finding]:
  out = []
  units = {"step_ms_p50": "{:,.4g} ms", "training_flops": "{:.3g} FLOP"}
  for cost in summary.costs(found):
    front, title = summary.pareto(found, cost), summary.COSTS[cost]
    listed = "; ".join(
      f"{s.label} ({units[cost].format(s.of(cost))}, {spread(s)})" for s in front[:_MOST]
    )
    more = f"; and {len(front) - _MOST} more" if len(front) > _MOST else ""
    only = "1 is" if len(front) == 1 else f"{len(front)} are"
    out.append(
      Finding(
        topic=f"Loss against {title}",
        text=f"Of {len(summary.ranked(found))} settings, {only} not beaten in mean loss "
        f"at equal or lower {title}, from the cheapest: {listed}{more}.",
      )
    )
  return out


def _doubling_words(
  doubling: analyses.Doubling, names: Mapping[str, str]
) -> tuple[str, str]:
  """Returns what is compared, and what is added about its step time."""
  what = f"from {doubling.experts} to {2 * doubling.experts} experts"
  if doubling.also:
    changed = (
      f"{names.get(field, field)} from {summary.short(a)} to {summary.short(b)}"
      for field, (a, b) in doubling.also.items()
    )
    what += f" (and {', '.join(changed)})"
  if doubling.step_ms is not None:
    what += f" at equal step time ({doubling.step_ms:,.4g} ms, interpolated)"
  slower = ""
  if doubling.slower is not None:
    slower = f", and the step time by {doubling.slower:+.0%}"
  return what + where(doubling.others, names), slower


def _doubling(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Finding]:
  out = []
  for doubling in analyses.doublings(found, axes):
    if doubling.difference.certain:
      what, slower = _doubling_words(doubling, names)
      text = (
        f"Going {what} changes the loss by {difference(doubling.difference)}{slower}."
      )
      out.append(Finding(topic="Doubling the experts", text=text))
  return out


def _uncertain_doublings(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[str]:
  return [
    f"Whether going {_doubling_words(doubling, names)[0]} changes the loss: "
    f"{difference(doubling.difference)} includes 0."
    for doubling in analyses.doublings(found, axes)
    if doubling.difference.n > 1 and not doubling.difference.certain
  ]


def _capacity(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[Finding]:
  out = []
  for answer in analyses.sufficient_capacity(found, axes):
    if answer.margin is None:
      continue
    than = f"dropless ({spread(answer.dropless)}){where(answer.others, names)}"
    if answer.sufficient is None:
      text = (
        f"The largest capacity factor tried, {answer.largest:g}, has a loss more than "
        f"one standard error above {than}, so that no smaller one is taken to suffice."
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
        text += f" Seed by seed it differs all the same: {difference(gap)}."
    out.append(Finding(topic="Capacity that suffices", text=text))
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
      f"At {curve.budget:.3g} training FLOPs{where(curve.others, names)}, the loss is "
      f"lowest, {curve.loss:.4f}, at {at.estimate:.3g} active parameters{interval}."
    )
    out.append(Finding(topic="Best size for a budget", text=text))
  return out


def _refused(
  found: Sequence[Setting], fields: Sequence[str], names: Mapping[str, str]
) -> list[str]:
  return [
    f"The best size at {curve.budget:.3g} training FLOPs{where(curve.others, names)}: "
    f"{curve.refused}."
    for curve in analyses.isoflops(found, fields)
    if curve.refused
  ]


def _best(found: Sequence[Setting], base: Config | None) -> list[Finding]:
  if len(found) < 2:
    return []
  best = summary.best(found)
  text = (
    f"{best.label} has the lowest mean loss: {spread(best)} nats/token "
    f"({_seeds_of(best)})."
  )
  cheaper = [
    (cost, setting)
    for setting in _indistinguishable(found, best)
    if (cost := setting.of(summary.STEP_TIME) or 0.0) < _step_ms(best)
  ]
  if cheaper and summary.STEP_TIME in summary.costs(found):
    cost, setting = min(cheaper, key=lambda pair: pair[0])
    gap = summary.paired(best, setting)
    assert gap is not None
    share = 1 - cost / _step_ms(best)
    text += (
      f" {setting.label} cannot be told from it, {difference(gap)}, and takes "
      f"{share:.0%} less time per step."
    )
  config = best.runs[0].config
  return [Finding(topic="Lowest loss", text=text, command=command(config, base))]


def _step_ms(setting: Setting) -> float:
  return setting.of(summary.STEP_TIME) or 0.0


def _indistinguishable(found: Sequence[Setting], best: Setting) -> list[Setting]:
  """Returns the settings whose difference to the best has an interval around 0."""
  out = []
  for setting in found:
    gap = summary.paired(best, setting) if setting is not best else None
    if gap is not None and gap.n > 1 and not gap.certain:
      out.append(setting)
  return out


def command(config: Config, base: Config | None = None) -> str:
  """Returns the command line that trains a config.

  Args:
    config: of a run.
    base: what `train` has without flags; None sets every field.
  """
  ours = config_text.leaves(config)
  theirs = {} if base is None else config_text.leaves(base)
  flags = [
    f"--config.{name}={show(value)}"
    for name, value in ours.items()
    if name not in _NOT_TO_COPY and (name not in theirs or theirs[name] != value)
  ]
  return f"{program('train', 'experiments.train')} --workdir=runs/best " + " ".join(
    shlex.quote(flag) for flag in flags
  )


def _unfinished(records: Records) -> list[str]:
  out = []
  open_runs = [run for run in records.runs if not run.done]
  if open_runs:
    named = ", ".join(f"{r.values['run']} ({r.values['state']})" for r in open_runs[:5])
    more = f" and {len(open_runs) - 5} more" if len(open_runs) > 5 else ""
    out.append(
      f"{len(open_runs)} of {len(records.runs)} runs are not finished and count in no "
      f"figure or sentence: {named}{more}."
    )
  lost = [run.values["run"] for run in records.runs if run.done and not _has_loss(run)]
  if lost:
    out.append(
      f"{len(lost)} finished run(s) have no finite held-out loss and are left out: "
      f"{', '.join(lost[:5])}{' and more' if len(lost) > 5 else ''}."
    )
  return out


def _has_loss(run: Any) -> bool:
  return isinstance(run.values.get("loss"), int | float)


def _incomparable(records: Records) -> list[str]:
  out = []
  done = [run for run in records.runs if run.done]

  def distinct(column: str) -> list[Any]:
    found = {run.values[column] for run in done if column in run.values}
    return sorted(found)

  if len(tokens := distinct("eval_tokens")) > 1:
    out.append(
      f"Losses are of different held-out tokens ({tokens[0]:,} to {tokens[-1]:,}) and "
      "compare only roughly. Evaluate every run on the same ones, or train with "
      "--config.train.final_eval_tokens=0."
    )
  if len(distinct("dataset")) > 1:
    out.append("The runs read different texts: their losses do not compare.")
  if len(distinct("revision")) > 1:
    out.append(f"The runs are of {len(distinct('revision'))} revisions of the code.")
  if len(distinct("num_steps")) > 1 and len(distinct("dropped_tail")) > 1:
    steps = distinct("num_steps")
    out.append(
      f"Runs have {steps[0]:,} to {steps[-1]:,} steps: drops are read at the same "
      "fraction of each schedule, but a longer run has had longer to balance."
    )
  return out


def _seeds(found: Sequence[Setting]) -> list[str]:
  single = [setting for setting in found if setting.n == 1]
  if not single or len(found) < 2:
    return []
  which = f"{len(single)} settings have" if len(single) > 1 else "1 setting has"
  if len(single) == len(found):
    which = "Every setting has"
  advice = "Add seeds with --seeds=3." if len(single) == len(found) else ""
  return [
    f"{which} one seed: nothing is known of the spread between seeds there, and a "
    f"difference may be chance. {advice}".rstrip()
  ]


def _unranked(found: Sequence[Setting]) -> list[str]:
  """Names the settings whose means are of fewer seeds than the others'."""
  seeds = {seed for setting in found for seed in setting.losses}
  short = [setting for setting in found if seeds - setting.losses.keys()]
  if not short:
    return []
  if len(short) == len(found):
    return [
      "No setting has all seeds: means over different seeds compare only roughly, since "
      "a seed orders the text for every setting alike."
    ]
  named = "; ".join(f"{s.label} ({_seeds_of(s)})" for s in short[:_MOST])
  more = f"; and {len(short) - _MOST} more" if len(short) > _MOST else ""
  return [
    f"How settings with fewer than {len(seeds)} seeds rank, since a mean over other "
    f"seeds is of another draw: {named}{more}. Differences are taken over common seeds."
  ]


def _seeds_of(setting: Setting) -> str:
  return "1 seed" if setting.n == 1 else f"{setting.n} seeds"


def _close(found: Sequence[Setting]) -> list[str]:
  """Says which settings cannot be told from the best."""
  if len(found) < 2:
    return []
  best = summary.best(found)
  near = _indistinguishable(found, best)
  if not near:
    return []
  near.sort(key=lambda setting: setting.mean)
  gaps = []
  for setting in near[:_MOST]:
    gap = summary.paired(best, setting)
    assert gap is not None
    gaps.append(f"{setting.label} ({difference(gap)})")
  more = f"; and {len(near) - _MOST} more" if len(near) > _MOST else ""
  return [f"Whether {best.label} is better than {'; '.join(gaps)}{more}."]


def _step_times(records: Records, found: Sequence[Setting]) -> list[str]:
  if (ratio := summary.unsteadiness(found)) > summary.STEADY:
    return [
      f"Step times: those of one setting differ {ratio:.1f}-fold between its seeds, "
      "which do the same work, so no settings are compared by time. Time each shape "
      "alone on a quiet machine, with --time_steps=20."
    ]
  sources = {run.values.get("step_time_source") for run in records.runs} - {None}
  if "logged" not in sources:
    return []
  some = "Some step" if "timed" in sources else "Step"
  return [
    f"{some} times were logged while training: runs beside each other slow each other. "
    "A separate pass, --time_steps, times each shape alone."
  ]
