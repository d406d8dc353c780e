"""The table of a sweep that is not started, for `--dry_run`."""

import pathlib
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from moejax.storage.paths import is_url
from moejax.sweep.points.expand import Skipped
from moejax.sweep.points.predict import Prediction, Rate

_COLUMNS = (
  "parameters",
  "active",
  "FLOPs/token",
  "steps",
  "tokens",
  "FLOPs",
  "memory",
  "time",
)
_WIDTH = 200
"""Width in columns if the output is not a terminal."""


def show(
  predictions: Sequence[Prediction],
  skipped: Sequence[Skipped],
  *,
  rate: Rate,
  seconds: float,
  jobs: int,
) -> None:
  """Prints every run with its cost, the totals, and what they are based on.

  Args:
    predictions: of all runs.
    skipped: points that were left out.
    rate: the rate used to predict time.
    seconds: time of the whole sweep.
    jobs: --jobs.
  """
  console = Console()
  console = console if console.is_terminal else Console(width=_WIDTH)
  console.print(make_table(predictions, seconds))
  for line in summary(predictions, skipped, rate=rate, seconds=seconds, jobs=jobs):
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def make_table(predictions: Sequence[Prediction], seconds: float) -> Table:
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column("run", overflow="fold")
  for header in _COLUMNS:
    table.add_column(header, justify="right", no_wrap=True)
  for p in predictions:
    table.add_row(
      p.point.name,
      short(p.total_parameters),
      short(p.active_parameters),
      f"{p.flops_per_token:,.0f}",
      f"{p.point.config.train.num_steps:,}",
      short(p.tokens),
      f"{p.flops:.4g}",
      memory(p.memory_bytes),
      duration(p.seconds),
    )
  table.add_section()
  table.add_row(
    f"{len(predictions)} run{'s' * (len(predictions) != 1)}",
    "",
    "",
    "",
    f"{sum(p.point.config.train.num_steps for p in predictions):,}",
    short(sum(p.tokens for p in predictions)),
    f"{sum(p.flops for p in predictions):.4g}",
    memory(max(p.memory_bytes for p in predictions)),
    duration(seconds),
    style="bold",
  )
  return table


def summary(
  predictions: Sequence[Prediction],
  skipped: Sequence[Skipped],
  *,
  rate: Rate,
  seconds: float,
  jobs: int,
) -> list[str]:
  """Returns the lines below the table."""
  beside = f"--jobs={jobs}: " if jobs > 1 else ""
  lines = [
    f"{beside}{len(predictions)} run{'s' * (len(predictions) != 1)} in "
    f"{duration(seconds)}, at a rate {rate.words}. Training steps only; starting, "
    "compiling and evaluating are extra.",
    "FLOPs are of training, by the conventions of moejax/cost/flops.py. Memory is the "
    "least that a device needs (the last row: the largest); a run needs more.",
  ]
  if skipped:
    lines.append(f"Left out, {len(skipped)} impossible:")
    lines += [f"  {point.name}: {point.reason}" for point in skipped]
  lines += missing_starts([p.point.config.train.init_from for p in predictions])
  return [*lines, "Nothing was written and nothing started (--dry_run)."]


def missing_starts(starts: Sequence[str]) -> list[str]:
  """Returns a line on initial runs that do not exist yet, if there are any.

  Args:
    starts: `train.init_from` of each run; those in buckets are not checked.
  """
  local = [start for start in starts if start and not is_url(start)]
  missing = [start for start in local if not pathlib.Path(start).exists()]
  if not missing:
    return []
  others = len(set(missing)) - 1
  more = f" and {others} more" if others else ""
  return [
    f"{len(missing)} of the runs start from directories that do not exist yet "
    f"(--config.train.init_from={missing[0]}{more}). Create these first: until then such "
    "a run fails."
  ]


def short(count: float) -> str:
  """Returns a count with three digits: 1.23M."""
  for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if count >= 0.9995 * size:
      return f"{count / size:.3g}{unit}"
  return f"{count:.0f}"


def memory(size: int) -> str:
  """Returns bytes in GB or MB."""
  return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
  """Returns a time in its two largest units: `2 h 05 min`."""
  if seconds < 60:
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2g} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  hours, minutes = divmod(minutes, 60)
  if hours < 48:
    return f"{hours} h {minutes:02d} min"
  days, hours = divmod(hours, 24)
  return f"{days} days {hours:02d} h"
