"""Timing of functions: pinning, interleaved runs, ratios.

jax is not imported here, so that cores can be pinned before its thread pools
are made: XLA:CPU makes as many threads as the process may use cores.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


def prepare(cores: int) -> int:
  """Pins the process, and gives it the memory settings that training runs under.

  Returns:
    The number of cores that it may use now.
  """
  from moejax.launch import host_memory

  available = pin(cores)
  host_memory.keep_freed_pages()
  return available


def pin(cores: int) -> int:
  """Restricts this process to its first `cores` cores; 0 means all.

  Returns:
    The number of cores that it may use now: all of them if the system cannot pin (macOS).
  """
  if not hasattr(os, "sched_setaffinity"):
    return os.cpu_count() or 1
  allowed = sorted(os.sched_getaffinity(0))
  if cores:
    allowed = allowed[:cores]
    os.sched_setaffinity(0, allowed)
  return len(allowed)


class Ratio(NamedTuple):
  """Time relative to the baseline, over paired runs."""

  median: float
  q1: float
  q3: float
  of_minima: float
  """Ratio of the fastest runs, the least affected by other load on the machine."""


def interleave(
  functions: Mapping[str, Callable[[], Any]], *, seconds: float, min_rounds: int = 7
) -> dict[str, list[float]]:
  """Runs all functions in turn, round after round, and returns their times.

  They are interleaved, so that a slow spell of the machine affects all of them.

  Args:
    functions: each runs to completion when called.
    seconds: time to spend, beyond one warm-up round.
  """
  for function in functions.values():
    function()
  times: dict[str, list[float]] = {name: [] for name in functions}
  start = time.perf_counter()
  rounds = 0
  while rounds < min_rounds or time.perf_counter() - start < seconds:
    for name, function in functions.items():
      before = time.perf_counter()
      function()
      times[name].append(time.perf_counter() - before)
    rounds += 1
  return times


def compare(times: list[float], baseline: list[float]) -> Ratio:
  """Returns ratios of the paired runs of each round."""
  ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
  q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
  return Ratio(median, q1, q3, min(times) / min(baseline))
