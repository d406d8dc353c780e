"""What a report leaves unknown, and why, as sentences with their numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.sweep.report import analyses, capacity, quality, summary, words
from moejax.sweep.report.records import Records
from moejax.sweep.report.summary import Setting


def write(records: Records, found: Sequence[Setting], axes: Sequence[str]) -> list[str]:
  """Returns the sentences on what is unknown; see `sentences.write`."""
  names = summary.short_names(records.fields)
  return [
    *_unfinished(records),
    *_incomparable(records),
    *_seeds(found),
    *_unranked(found),
    *_close(found),
    *_uncertain_doublings(found, axes, names),
    *_capacities(records, found, axes, names),
    *_refused(found, records.fields, names),
    *_curves(found),
    *_step_times(records, found),
  ]


def _unfinished(records: Records) -> list[str]:
  out = []
  open_runs = [run for run in records.runs if not run.done]
  if open_runs:
    named = "; ".join(f"{r.values['run']}: {r.values['state']}" for r in open_runs[:5])
    more = f"; and {len(open_runs) - 5} more" if len(open_runs) > 5 else ""
    out.append(
      f"{len(open_runs)} of {len(records.runs)} runs are not finished and are in no "
      f"figure or sentence. {named}{more}."
    )
  lost = [run.values["run"] for run in summary.diverged(records)]
  if lost:
    have = "has" if len(lost) == 1 else "have"
    are = "is" if len(lost) == 1 else "are"
    out.append(
      f"{words.count(len(lost), 'finished run')} {have} no finite held-out loss and "
      f"{are} left out: {', '.join(lost[:5])}{' and more' if len(lost) > 5 else ''}."
    )
  return out


def _incomparable(records: Records) -> list[str]:
  out = []
  done = [run for run in records.runs if run.done]

  def distinct(column: str) -> list[Any]:
    found = {run.values[column] for run in done if column in run.values}
    return sorted(found)

  if len(tokens := distinct("eval_tokens")) > 1:
    out.append(
      f"Losses are of different held-out tokens ({tokens[0]:,} to {tokens[-1]:,}) and "
      "are only roughly comparable. Evaluate every run on the same ones, or train with "
      "--config.train.final_eval_tokens=0."
    )
  if len(distinct("dataset")) > 1:
    out.append("The runs read different texts: their losses are not comparable.")
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
    f"{which} one seed: nothing is known about the spread between seeds there, and a "
    f"difference may be chance. {advice}".rstrip()
  ]


def _unranked(found: Sequence[Setting]) -> list[str]:
  """Names the settings whose means are over fewer seeds than the others'."""
  seeds = {seed for setting in found for seed in setting.losses}
  short = [setting for setting in found if seeds - setting.losses.keys()]
  if not short:
    return []
  if len(short) == len(found):
    return [
      f"Which setting is best: none has {words.whole(len(seeds))}, and means over "
      "different seeds are only roughly comparable, since a seed orders the text for "
      "every setting alike."
    ]
  named = words.listed([f"{s.label} ({words.seeds_of(s)})" for s in short])
  return [
    f"How settings with fewer than {len(seeds)} seeds rank, since a mean over other "
    f"seeds is another draw: {named}. Differences are taken over common seeds."
  ]


def _close(found: Sequence[Setting]) -> list[str]:
  """Names the settings that cannot be distinguished from the best."""
  if len(found) < 2 or not summary.with_all_seeds(found):
    return []
  best = summary.best(found)
  near = summary.indistinguishable(found, best)
  if not near:
    return []
  near.sort(key=lambda setting: setting.mean)
  gaps = []
  for setting in near:
    gap = summary.paired(best, setting)
    assert gap is not None
    gaps.append(f"{setting.label} ({words.difference(gap)})")
  return [f"Whether {best.label} is better than {words.listed(gaps)}."]


def _uncertain_doublings(
  found: Sequence[Setting], axes: Sequence[str], names: Mapping[str, str]
) -> list[str]:
  said = summary.best(found) if summary.with_all_seeds(found) else None
  out, single = [], []
  for doubling in analyses.doublings(found, axes):
    what, gap = words.doubling(doubling, names)[0], doubling.difference
    if gap.n == 1:
      single.append(f"{what} ({gap.estimate:+.4f} nats/token)")
    elif gap.low == gap.high == 0:
      out.append(f"Whether going {what} changes the loss: {words.difference(gap)}.")
    # If there are only these two settings, `_close` has already said it.
    elif not gap.certain and not (len(found) == 2 and said is not None):
      out.append(
        f"Whether going {what} changes the loss: {words.difference(gap)} includes 0."
      )
  if single:
    out.append(
      "Whether more experts change the loss, since one seed in common has no interval: "
      f"going {words.listed(single)}."
    )
  return out


def _capacities(
  records: Records,
  found: Sequence[Setting],
  axes: Sequence[str],
  names: Mapping[str, str],
) -> list[str]:
  """Explains why no capacity factor is reported as sufficient, in a line per reason."""
  diverged = [run.settings for run in summary.diverged(records)]
  reasons: dict[str, list[str]] = {}
  for answer in capacity.sufficient(found, axes, diverged):
    if answer.refused:
      which = "Which capacity factor suffices"
      if answer.sufficient is not None:
        factor = answer.sufficient.values[analyses.CAPACITY]
        which = f"Whether a capacity factor below {factor:g} suffices"
      where = summary.label(answer.others, names) if answer.others else ""
      reasons.setdefault(f"{which}{{where}}: {answer.refused}.", []).append(where)
  return [
    text.format(where=f", with {words.listed(where)}" if where[0] else "")
    for text, where in reasons.items()
  ]


def _refused(
  found: Sequence[Setting], fields: Sequence[str], names: Mapping[str, str]
) -> list[str]:
  return [
    f"The best size at {curve.budget:.3g} training FLOPs"
    f"{words.where(curve.others, names)}: {curve.refused}."
    for curve in analyses.isoflops(found, fields)
    if curve.refused
  ]


def _curves(found: Sequence[Setting]) -> list[str]:
  out = quality.left_out(found)
  if not out:
    return []
  named = words.listed([s.label for s in out])
  return [
    f"Speed to quality of {named}: its seeds were evaluated at different steps, or "
    "only once."
  ]


def _step_times(records: Records, found: Sequence[Setting]) -> list[str]:
  untimed = [s.label for s in found if s.of(summary.STEP_TIME) is None]
  some_timed = len(untimed) < len(found)
  out = []
  if untimed and some_timed:
    out.append(
      f"Step times of {words.listed(untimed)}: not every run has one. Time each shape "
      "alone, with --time_steps=20."
    )
  return out + _sources(records, found)


def _sources(records: Records, found: Sequence[Setting]) -> list[str]:
  if not found:
    return []
  if not summary.is_steady(found):
    ratio = summary.unsteadiness(found)
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
    f"{some} times were logged while training: runs on the same machine slow each other "
    "down. A separate pass, --time_steps, times each shape alone."
  ]
