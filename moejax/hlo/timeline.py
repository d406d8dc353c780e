"""Where the time of a traced step goes: the events of a trace, added up by part.

At each moment the operations that run on a device share the time equally, and of nested
ones (such as a loop and its body) only the innermost counts. So the parts of a device add
up to the time in which it ran anything, however many threads it used. The rest of the
wall time is waiting.

Loops, calls and conditionals only get the time in which none of their contents runs.
"""

import collections
import dataclasses
import heapq
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax import parts as parts_lib
from moejax.errors import UserError
from moejax.hlo import parts as hlo_parts
from moejax.hlo.parse import Program
from moejax.hlo.parts import Label, Shares, is_mixed

UNKNOWN = Label("unattributed", False)

TRAIN_STEP = "jit_step"
"""Name of the compiled train step in a trace."""

_DEVICE = re.compile(r"/device:\w+:(\d+)")


@dataclasses.dataclass(frozen=True)
class Event:
  """One execution of one instruction."""

  device: int
  thread: str
  operation: str
  """Name of the instruction in the compiled program."""
  start: float
  """Nanoseconds."""
  end: float


def trace_options() -> Any:
  """Returns options of `jax.profiler.trace` that record operations and little else."""
  import jax

  options = jax.profiler.ProfileOptions()
  # Tracing every Python call would make the host several times slower.
  options.python_tracer_level = 0
  options.host_tracer_level = 2
  return options


def of_steps(
  text: str, directory: pathlib.Path, *, num_steps: int, step_ms: float
) -> tuple["Device", ...]:
  """Returns where the time of traced train steps went, for each device.

  Args:
    text: of the compiled train step.
    directory: where `jax.profiler.trace` wrote; its newest trace is read.
    num_steps: number of steps in the trace.
    step_ms: wall time of a step.

  Raises:
    UserError: the profiler recorded none of the step's operations.
  """
  program = Program(text)
  spent = busy(read(newest(directory), TRAIN_STEP), hlo_parts.control(program))
  return tuple(
    by_part(
      spent,
      hlo_parts.labels(program),
      parts_lib.PARTS,
      collectives=hlo_parts.collectives(program),
      num_steps=num_steps,
      step_ms=step_ms,
    )
  )


def newest(directory: pathlib.Path) -> pathlib.Path:
  """Returns the newest `.xplane.pb` below a directory."""
  return max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def read(file: pathlib.Path, module: str) -> list[Event]:
  """Returns the events of one compiled program in a trace.

  On a CPU they are recorded for a device's threads, elsewhere for its streams.

  Args:
    file: the `.xplane.pb` that `jax.profiler.trace` wrote.
    module: name of the program, such as jit_step.

  Raises:
    UserError: the trace holds no event of the program.
  """
  from jax.profiler import ProfileData

  found = []
  for plane in ProfileData.from_file(str(file)).planes:
    on_device = _DEVICE.match(plane.name)
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if "hlo_op" not in stats or stats.get("hlo_module") != module:
          continue
        device = int(on_device[1]) if on_device else int(stats.get("device_ordinal", 0))
        end = event.start_ns + event.duration_ns
        name = str(stats["hlo_op"])
        found.append(Event(device, line.name, name, event.start_ns, end))
  if not found:
    raise UserError(
      f"{file}: the profiler recorded no operation of {module}. It can on CPUs, and on "
      "GPUs with XLA_FLAGS=--xla_gpu_enable_command_buffer= ."
    )
  return found


def busy(events: Sequence[Event], control: set[str]) -> dict[int, dict[str, float]]:
  """Returns how long each instruction ran on each device, alone or shared, nanoseconds.

  Args:
    events: of any number of steps.
    control: names of loops, calls and conditionals.
  """
  by_device: dict[int, list[Event]] = collections.defaultdict(list)
  for event in events:
    by_device[event.device].append(event)
  return {device: _shared(by_device[device], control) for device in sorted(by_device)}


def _shared(events: Sequence[Event], control: set[str]) -> dict[str, float]:
  """Returns the time of each instruction, by a sweep over one device's events."""
  spent: dict[str, float] = collections.defaultdict(float)
  running: dict[str, list[tuple[float, str]]] = collections.defaultdict(list)
  before = 0.0
  for moment, begins, event in _edges(events):
    _share(spent, running, moment - before, control)
    before = moment
    stack = running[event.thread]
    if begins:
      # The innermost is the one that began last.
      heapq.heappush(stack, (-event.start, event.operation))
    else:
      stack.remove((-event.start, event.operation))
      heapq.heapify(stack)
      if not stack:
        del running[event.thread]
  return spent


def _edges(events: Sequence[Event]) -> Iterator[tuple[float, bool, Event]]:
  edges = [(e.start, True, e) for e in events] + [(e.end, False, e) for e in events]
  # Ends before beginnings, since neighbours do not overlap. Of events that begin at the
  # same time, the longer one is outside.
  edges.sort(key=lambda edge: (edge[0], edge[1], -edge[2].end))
  yield from edges


def _share(
  spent: dict[str, float],
  running: Mapping[str, list[tuple[float, str]]],
  time: float,
  control: set[str],
) -> None:
  innermost = [stack[0][1] for stack in running.values()]
  working = [name for name in innermost if name not in control] or innermost
  for name in working:
    spent[name] += time / len(working)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """The time of one part on one device, milliseconds per step."""

  name: str
  forward: float
  backward: float

  @property
  def total(self) -> float:
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """Where the time of one device goes, milliseconds per step."""

  index: int
  parts: tuple[Part, ...]
  """Those that ran, in the order of `labels`' parts; `unattributed` is last."""
  busy: float
  """Time in which it ran anything: the sum of the parts."""
  waiting: float
  """The rest of the step: waiting for the host, or for other devices to begin."""
  mixed: float
  """Part of `busy` in fusions of several parts, whose time is split by elements."""
  collectives: float
  """Part of `busy` in transfers between devices, including waiting for the others."""
  unattributed: tuple[tuple[str, float], ...]
  """The longest instructions without a part."""

  @property
  def unattributed_share(self) -> float:
    """Fraction of the busy time that belongs to no part."""
    lost = sum(part.total for part in self.parts if part.name == UNKNOWN.part)
    return lost / self.busy if self.busy else 0.0


_NAMED = 5


def by_part(
  spent: Mapping[int, Mapping[str, float]],
  labels: Mapping[str, Shares],
  names: Sequence[str],
  *,
  collectives: set[str],
  num_steps: int,
  step_ms: float,
) -> list[Device]:
  """Adds up the time of instructions by their parts.

  Args:
    spent: from `busy`.
    labels: of instructions, from `hlo.parts.labels`.
    names: of all parts, in the order to report them.
    collectives: names of the instructions that move data between devices.
    num_steps: number of steps in the trace.
    step_ms: wall time of a step.
  """
  devices = []
  for index, times in spent.items():
    sums: dict[tuple[str, bool], float] = collections.defaultdict(float)
    mixed, moved, lost = 0.0, 0.0, []
    for operation, nanoseconds in times.items():
      ms = nanoseconds / 1e6 / num_steps
      shares = labels.get(operation, {UNKNOWN: 1.0})
      for label, share in shares.items():
        sums[label.part, label.backward] += ms * share
      mixed += ms * is_mixed(shares)
      moved += ms * (operation in collectives)
      if UNKNOWN in shares:
        lost.append((operation, ms))
    parts = tuple(
      Part(name=name, forward=sums[name, False], backward=sums[name, True])
      for name in (*names, UNKNOWN.part)
      if sums[name, False] + sums[name, True] > 0
    )
    total = sum(part.total for part in parts)
    devices.append(
      Device(
        index=index,
        parts=parts,
        busy=total,
        waiting=max(step_ms - total, 0.0),
        mixed=mixed,
        collectives=moved,
        unattributed=tuple(sorted(lost, key=lambda row: -row[1])[:_NAMED]),
      )
    )
  return devices
