"""Sums of a trace, from events made by hand."""

import pytest

from moejax.hlo.parts import Label
from moejax.hlo.timeline import UNKNOWN, Event, busy, by_part

MS = 1_000_000


def event(operation, start, end, thread="a", device=0) -> Event:
  return Event(device, thread, operation, start * MS, end * MS)


def spent(*events, control=("loop",)) -> dict[str, float]:
  [times] = busy(events, set(control)).values()
  return {name: time / MS for name, time in times.items() if time}


def test_of_nested_operations_only_the_innermost_counts():
  """A loop of ten with two bodies of three keeps four for itself."""
  times = spent(event("loop", 0, 10), event("dot", 1, 4), event("dot", 5, 8))
  assert times == {"loop": 4, "dot": 6}


def test_threads_share_the_time_in_which_both_work():
  """Two threads for four, then one for two: six in all, not ten."""
  times = spent(event("dot", 0, 4), event("add", 0, 6, thread="b"))
  assert times == {"dot": 2, "add": 4}


def test_a_loop_has_nothing_while_another_thread_runs_what_it_called():
  times = spent(event("loop", 0, 10), event("dot", 2, 9, thread="b"))
  assert times == {"loop": 3, "dot": 7}


def test_neighbours_that_touch_do_not_overlap():
  times = spent(event("dot", 0, 4), event("add", 4, 5), event("dot", 5, 6))
  assert times == {"dot": 5, "add": 1}


def test_parts_add_up_to_the_busy_time_and_the_rest_is_waiting():
  """Two steps of 10 ms on two devices; a fusion of two parts is split by its shares."""
  events = [event("dot", 0, 6), event("mix", 6, 10), event("what", 12, 14)]
  events += [event("dot", 0, 2, device=1), event("all-reduce", 2, 8, device=1)]
  labels = {
    "dot": {Label("experts", True): 1.0},
    "mix": {Label("norm", False): 0.75, Label("experts", False): 0.25},
    "all-reduce": {Label("optimizer", False): 1.0},
  }
  first, second = by_part(
    busy(events, set()),
    labels,
    ("norm", "experts", "optimizer"),
    collectives={"all-reduce"},
    num_steps=2,
    step_ms=10,
  )
  found = {part.name: (part.forward, part.backward) for part in first.parts}
  assert found == {"norm": (1.5, 0), "experts": (0.5, 3), UNKNOWN.part: (1, 0)}
  assert (first.busy, first.waiting, first.mixed, first.collectives) == (6, 4, 2, 0)
  assert first.unattributed == (("what", 1.0),)
  assert first.unattributed_share == pytest.approx(1 / 6)
  assert (second.index, second.busy, second.waiting, second.collectives) == (1, 4, 6, 3)
