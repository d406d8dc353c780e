"""The alarms that a run has raised, read from its log; see `moejax.alarms.watch`."""

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int | None]
"""Steps of the first log line with an alarm and of the first without; None if none."""


def spans(lines: Sequence[dict[str, Any]]) -> dict[str, list[Span]] | None:
  """Returns when each alarm was raised, over all starts of a run.

  An alarm that holds across a resume is counted once and is one span: the lines without
  it are those that the new start needed to raise it again.

  Args:
    lines: of metrics.jsonl.

  Returns:
    Spans by the alarm's name, in the order in which alarms were first raised; None if no
    line has alarms, because the model has no MoE layer or all alarms are off.
  """
  watched = [line for line in lines if "alarms_active" in line]
  if not watched:
    return None
  found: dict[str, list[Span]] = {}
  begun: dict[str, int] = {}
  raised = 0
  for line in watched:
    here = line.get("alarms", {})
    new = [name for name in here if name not in begun]
    again = _held(new, found, line.get("alarms_raised", raised + len(new)) - raised)
    raised = line.get("alarms_raised", raised + len(new))
    for name in new:
      begun[name] = found[name].pop()[0] if name in again else line["step"]
      found.setdefault(name, [])
    for name in begun.keys() - here.keys():
      found[name].append((begun.pop(name), line["step"]))
  for name, step in begun.items():
    found[name].append((step, None))
  return found


def _held(new: list[str], found: dict[str, list[Span]], counted: int) -> list[str]:
  """Returns the alarms of a line that held before a resume, which are not counted again.

  Args:
    new: alarms of the line that the line before does not have.
    found: spans so far.
    counted: how many of the new alarms were counted as raised.
  """
  earlier = [name for name in new if found.get(name)]
  # Alarms that held at the resume ended in the first line after it, so they ended last.
  earlier.sort(key=lambda name: -(found[name][-1][1] or 0))
  return earlier[: max(len(new) - counted, 0)]


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
