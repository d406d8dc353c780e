"""Whether the processes of a job were started alike, and the sentence if they were not.

Every process states facts: a name as its user would write it (`--config.train.seed`,
`jax version`) and a JSON value. Sorting out happens in one place, process 0, so that
all processes end with the same words. Pure functions; `meeting` carries the facts.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

Facts = dict[str, Any]
"""What must be the same on every process: name to JSON value."""

_SHOWN = 8
"""Differences that an error names, and values of each."""
_LONGEST = 200
"""Characters of a value that an error shows."""


def disagreement(facts: Mapping[int, Facts]) -> str:
  """What differs between processes, as one error; empty if nothing does.

  Args:
    facts: of each process, by its index. A name that a process lacks counts as a
      value of its own.
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
  """The error about processes that never came."""
  absent = sorted(set(range(count)) - set(present))
  return (
    f"{processes(absent)} of {count} did not come within {waited:g} s "
    f"(--join_timeout). Look at their own output, and whether they reach {address}."
  )


def processes(indices: Iterable[int]) -> str:
  """Such as "process 3" or "processes 0, 2-7"."""
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
