"""What alarms a run has raised, read from its log; see `moejax.alarms.watch`."""

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int | None]
"""Steps of the first log line with an alarm and of the first without; None if none."""


def spans(lines: Sequence[dict[str, Any]]) -> dict[str, list[Span]] | None:
  """Returns when each alarm was raised, over all starts of a run.

  Args:
    lines: of metrics.jsonl.

  Returns:
    By the alarm's name, in the order of the first time; None if no line has alarms,
    because the model has no MoE layer or all alarms are off.
  """
  watched = [line for line in lines if "alarms_active" in line]
  if not watched:
    return None
  found: dict[str, list[Span]] = {}
  begun: dict[str, int] = {}
  for line in watched:
    here = line.get("alarms", {})
    for name in here:
      begun.setdefault(name, line["step"])
      found.setdefault(name, [])
    for name in begun.keys() - here.keys():
      found[name].append((begun.pop(name), line["step"]))
  for name, step in begun.items():
    found[name].append((step, None))
  return found


def sentence(found: dict[str, list[Span]]) -> str:
  """Returns the alarms of a run on one line."""
  if not found:
    return "none"
  return ", ".join(
    f"{name} (steps {', '.join(_shown(*span) for span in times)})"
    for name, times in found.items()
  )


def _shown(first: int, after: int | None) -> str:
  return f"{first} to the end" if after is None else f"{first} to {after}"
