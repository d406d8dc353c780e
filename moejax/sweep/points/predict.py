"""Predicts the cost of a sweep: parameters, FLOPs, memory and time.

Parameters and FLOPs are exact (moejax/cost). Memory is the lower bound of
moejax/cost/memory.py. Time is FLOPs over a rate, whose basis is given: steps of this
sweep that were already taken, else 30% of the chip's peak, else 30% of the speed of a
matrix product on this machine. It covers only training steps, not starting, compiling
and evaluating.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from moejax import files
from moejax.config import Config
from moejax.cost import chips, memory
from moejax.cost.parameters import count_parameters, resolve_vocab_size
from moejax.models.frozen_count import count_frozen
from moejax.run.workdir import METRICS_FILE
from moejax.sweep.points import budget
from moejax.sweep.points.axes import SEED
from moejax.sweep.spec import RUNS, Point

UTILISATION = 0.3
"""Fraction of a matrix product's speed that a training step is assumed to reach. The
default config reaches 0.27 to 0.3 of it on two CPU cores; a well-tuned run on a chip, 0.3
to 0.5."""

_LEAST_RECORDS = 2
"""Log lines that a run needs; the first interval is left out, since it compiles."""
_PRODUCT = 1024
_ROUNDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
  """Training speed, in model FLOPs per second and run."""

  flops_per_second: float
  words: str
  """What it is based on, in words."""
  by_setting: Mapping[str, float] = dataclasses.field(default_factory=dict)
  """Measured speed of settings, by `setting_of`."""
  is_measured: bool = False
  """Whether it was measured in this sweep, with as many runs at once as there were."""
  is_per_device: bool = False
  """Whether it is that of one accelerator, not of a machine's cores."""

  def of(self, point: Point) -> float:
    """Returns the speed of a point: that of its own setting if measured."""
    return self.by_setting.get(setting_of(point), self.flops_per_second)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """The cost of one run."""

  point: Point
  total_parameters: int
  active_parameters: int
  """Parameters that a token uses."""
  flops_per_token: float
  """Training FLOPs per token."""
  tokens: int
  memory_bytes: int
  """Lower bound of a device's memory."""
  seconds: float

  @property
  def flops(self) -> float:
    """C, total training FLOPs."""
    return self.flops_per_token * self.tokens


def predict(
  points: Sequence[Point], rate: Rate, *, devices_per_run: int = 1
) -> list[Prediction]:
  """Returns the cost of every point.

  Args:
    points: of the sweep.
    rate: see `choose_rate`.
    devices_per_run: devices of each run; memory is that of one device, and a rate per
      device is multiplied by this number.
  """
  scale = devices_per_run if rate.is_per_device else 1
  return [_one(point, rate.of(point) * scale, devices_per_run) for point in points]


def _one(point: Point, flops_per_second: float, num_devices: int) -> Prediction:
  config = point.config
  vocab_size = resolve_vocab_size(config)
  total, active = count_parameters(config, vocab_size)
  flops_per_token, tokens = budget.token_flops(config), budget.num_tokens(config)
  mesh, frozen = mesh_of(config, num_devices), count_frozen(config)
  least = memory.least_bytes(config, mesh, vocab_size, frozen)
  return Prediction(
    point=point,
    total_parameters=total["total"],
    active_parameters=active["total"],
    flops_per_token=flops_per_token,
    tokens=tokens,
    memory_bytes=sum(least.values()),
    seconds=flops_per_token * tokens / flops_per_second,
  )


def mesh_of(config: Config, num_devices: int) -> dict[str, int]:
  """Returns devices per axis; the axis of size -1 gets all that the others leave."""
  mesh = config.mesh
  sizes = {axis: getattr(mesh, axis) for axis in ("data", "fsdp", "expert", "tensor")}
  taken = 1
  for size in sizes.values():
    taken *= max(size, 1)
  rest = max(num_devices // taken, 1)
  return {axis: rest if size == -1 else size for axis, size in sizes.items()}


def sweep_seconds(predictions: Sequence[Prediction], rate: Rate, slots: int) -> float:
  """Returns the time of the whole sweep, in seconds.

  Args:
    predictions: of its runs.
    rate: the rate that they were made with.
    slots: number of runs at once that do not slow each other; see `slots`.
  """
  total = sum(prediction.seconds for prediction in predictions)
  longest = max((prediction.seconds for prediction in predictions), default=0.0)
  return max(total / slots, longest)


def slots(rate: Rate, jobs: int) -> int:
  """Returns how many runs at once do not slow each other.

  It is all of them if the rate was measured with others running, or if each has its own
  accelerator; one if they share the cores of a machine.
  """
  return jobs if rate.is_measured or rate.is_per_device else 1


# --------------------------------------------------------------------------------- rate


def choose_rate(workdir: Path | None, points: Sequence[Point]) -> Rate:
  """Returns the most reliable rate: measured, else the chip's, else a calibration.

  Args:
    workdir: of the sweep; None and a directory without runs are allowed.
    points: of the sweep.
  """
  found = measured(workdir, points) if workdir is not None else None
  return found or expected()


def setting_of(point: Point) -> str:
  """Returns a text that is equal for the seeds of one setting."""
  settings = {key: value for key, value in point.settings.items() if key != SEED}
  return json.dumps(settings)


def measured(workdir: Path, points: Sequence[Point]) -> Rate | None:
  """Returns the rate of the runs in a sweep's directory; None if there are none."""
  speeds: dict[str, list[float]] = {}
  runs = 0
  for point in points:
    speed = _logged_speed(Path(workdir) / RUNS / point.directory / METRICS_FILE)
    if speed is not None:
      runs += 1
      speeds.setdefault(setting_of(point), []).append(speed)
  if not runs:
    return None
  by_setting = {setting: statistics.median(found) for setting, found in speeds.items()}
  middle = statistics.median(by_setting.values())
  rest = len({setting_of(point) for point in points} - by_setting.keys())
  words = f"measured in {runs} run{'s' * (runs > 1)} of this sweep"
  if rest:
    words += f"; {rest} other setting{'s' * (rest > 1)} at their median, {spoken(middle)}"
  return Rate(
    flops_per_second=middle, words=words, by_setting=by_setting, is_measured=True
  )


def _logged_speed(path: Path) -> float | None:
  """Returns a run's median model FLOPs per second; None if too little is logged."""
  found = []
  try:
    with files.open_regular(path) as file:
      lines = file.read().decode("utf-8", "replace").splitlines()
  except OSError:
    return None
  for line in lines:
    try:
      value = json.loads(line).get("model_flops_per_second")
    except (ValueError, AttributeError):  # A line that was being written.
      continue
    if isinstance(value, int | float) and value > 0:
      found.append(float(value))
  return statistics.median(found[1:]) if len(found) >= _LEAST_RECORDS else None


def expected() -> Rate:
  """Returns the rate of this machine's devices, from their peak or a calibration."""
  import jax

  kind = jax.devices()[0].device_kind
  chip = chips.per_device(kind)
  if chip is not None and chip.flops is not None:
    return Rate(
      flops_per_second=UTILISATION * chip.flops,
      words=f"{UTILISATION:.0%} of the bfloat16 peak of {kind}, {spoken(chip.flops)}",
      is_per_device=True,
    )
  speed = product_speed()
  return Rate(
    flops_per_second=UTILISATION * speed,
    words=f"{UTILISATION:.0%} of a float32 matrix product just timed on this machine, "
    f"{spoken(speed)}",
  )


def product_speed() -> float:
  """Returns the best FLOPs per second of a float32 matrix product on one device."""
  import jax
  import jax.numpy as jnp

  matrix = jnp.ones((_PRODUCT, _PRODUCT), jnp.float32)
  multiply = jax.jit(jnp.matmul)
  jax.block_until_ready(multiply(matrix, matrix))
  best = float("inf")
  for _ in range(_ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready(multiply(matrix, matrix))
    best = min(best, time.perf_counter() - start)
  return 2 * _PRODUCT**3 / best


def spoken(flops_per_second: float) -> str:
  """Returns a speed with its unit: `38.2 GFLOP/s`."""
  for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
    if flops_per_second >= size:
      return f"{flops_per_second / size:.3g} {unit}FLOP/s"
  return f"{flops_per_second:.3g} FLOP/s"
