"""Checks that a job's processes were started alike, and writes the error if not.

Every process states facts: names as a user would write them (`--config.train.seed`,
`jax version`) and JSON values. Only process 0 compares them, so all processes end with
the same error. Pure functions; `meeting` transports the facts.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

Facts = dict[str, Any]
"""What must be the same on every process: name to JSON value."""

_SHOWN = 8
"""Most differences that an error names, and most values of each."""
_LONGEST = 200
"""Most characters of a value that an error shows."""


def disagreement(facts: Mapping[int, Facts]) -> str:
  """Returns the error about what differs between processes; empty if nothing does.

  Args:
    facts: of each process, by its index. A missing name counts as a different value.
  """
  names = dict.fromkeys(name for stated in facts.values() for name in stated)
  found = [line for name in names if (line := _difference(name, facts))]
  if not found:
    return ""
  more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
  return (
    f"The processes were not started alike: {'; '.join(found[:_SHOWN])}{more}. Start "
    "every process with the same command, code and versions."
  )


def missing(count: int, present: Iterable[int], waited: float, address: str) -> str:
  """Returns the error about processes that never connected."""
  absent = sorted(set(range(count)) - set(present))
  return (
    f"{processes(absent)} of {count} did not connect within {waited:g} s "
    f"(--join_timeout). Look at their own output, and check whether they reach {address}."
  )


def processes(indices: Iterable[int]) -> str:
  """Returns text such as "process 3" or "processes 0, 2-7"."""
  spans: list[list[int]] = []
  for index in sorted(indices):
    if spans and spans[-1][1] == index - 1:
      spans[-1][1] = index
    else:
      spans.append([index, index])
  text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
  single = len(spans) == 1 and spans[0][0] == spans[0][1]
  return f"process {text}" if single else f"processes {text}"


def _difference(name: str, facts: Mapping[int, Facts]) -> str:
  holders: dict[str, list[int]] = {}
  for index, stated in sorted(facts.items()):
    value = json.dumps(stated[name], sort_keys=True) if name in stated else "absent"
    holders.setdefault(value, []).append(index)
  if len(holders) < 2:
    return ""
  values = [f"{_cut(value)} on {processes(who)}" for value, who in holders.items()]
  if len(values) > _SHOWN:
    values[_SHOWN - 1 :] = [f"{len(values) - _SHOWN + 1} other values"]
  return f"{name} is {', '.join(values[:-1])} and {values[-1]}"


def _cut(value: str) -> str:
  return value if len(value) <= _LONGEST else value[:_LONGEST] + "..."
