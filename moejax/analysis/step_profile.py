"""Traces some train steps and adds up where their time goes; see docs/profile.md.

The steps are those of training: the same compiled function, batches of the real text, the
parameters of a run or new ones. A few steps are timed without the profiler first, since
recording also costs time. With several processes all run the steps, and the first one
traces its own devices.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax

from moejax import data
from moejax.checkpoint.manager import restore_params
from moejax.config import Config
from moejax.config import devices as config_devices
from moejax.hlo import timeline
from moejax.models.loss import to_devices
from moejax.models.make import make_model
from moejax.models.placement import param_shardings
from moejax.run.progress import Reporter
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from moejax.train import state as state_lib
from moejax.train.optimizer import make_optimizer
from moejax.train.step import make_train_step

TRACE = "trace"
"""Directory of the trace, inside the results' directory."""

_WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
  """The host's time in a step, in milliseconds; the device may work meanwhile."""

  data: float
  """Waiting for the next batch."""
  placing: float
  """Putting the batch on the devices."""
  calling: float
  """Starting the step."""
  waiting: float
  """Waiting for the step's metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
  """The time of a step, by what it is spent on."""

  platform: str
  num_steps: int
  """Number of steps in the trace."""
  step_ms: float
  """Mean wall time of a step in the trace."""
  untraced_ms: float
  """Median wall time of a step without the profiler."""
  host: Host
  devices: tuple[timeline.Device, ...]
  trace: pathlib.Path


def profile(
  config: Config,
  out: pathlib.Path,
  *,
  num_steps: int,
  reporter: Reporter,
  workdir: pathlib.Path | None = None,
) -> Profile | None:
  """Compiles the train step of a config, runs and traces it; every process calls it.

  Args:
    config: validated.
    out: existing directory, where the first process writes `TRACE`.
    num_steps: number of steps to trace, and to time before that.
    reporter: reports progress.
    workdir: run whose newest parameters and tokenizer are used; nothing is written there.
      None makes new parameters, from the config's seed.

  Returns:
    The profile of the first process's devices; None in other processes.

  Raises:
    UserError: no text, no checkpoint, or a platform whose profiler records nothing.
  """
  chosen, left_out = config_devices.choose_devices(config, jax.devices())
  if left_out:
    reporter.message(left_out)
  mesh = make_mesh(config.mesh, chosen)
  dataset = data.load(config.data, workdir=workdir, store=False)
  dataset.check_batch_size(config.train.batch_size)
  stepper = _Stepper(config, dataset, mesh, workdir, reporter)
  recording: Any = contextlib.nullcontext()
  tells = jax.process_index() == 0
  if tells:
    options = timeline.trace_options()
    recording = jax.profiler.trace(str(out / TRACE), profiler_options=options)
  with jax.set_mesh(mesh):
    for _ in range(_WARM_UP):
      stepper()
    untraced = [sum(stepper()) for _ in range(num_steps)]
    with recording:
      hosts = [stepper() for _ in range(num_steps)]
  if not tells:
    return None
  with reporter.working("adding up the trace"):
    step_ms = 1e3 * sum(map(sum, hosts)) / num_steps
    devices = timeline.of_steps(
      stepper.text, out / TRACE, num_steps=num_steps, step_ms=step_ms
    )
  means = [1e3 * statistics.mean(column) for column in zip(*hosts, strict=True)]
  return Profile(
    platform=mesh.devices.flat[0].platform,
    num_steps=num_steps,
    step_ms=step_ms,
    untraced_ms=1e3 * statistics.median(untraced),
    host=Host(**dict(zip(("data", "placing", "calling", "waiting"), means, strict=True))),
    devices=devices,
    trace=timeline.newest(out / TRACE),
  )


class _Stepper:
  """Runs one step when called, and returns the host's time for each of its tasks."""

  def __init__(
    self,
    config: Config,
    dataset: data.Dataset,
    mesh: Any,
    workdir: pathlib.Path | None,
    reporter: Reporter,
  ):
    self._mesh = mesh
    model = make_model(
      config.model,
      config.moe,
      vocab_size=dataset.tokenizer.vocab_size,
      token_counts=lambda: dataset.token_counts("train"),
    )
    optimizer = make_optimizer(
      config.optimizer,
      num_steps=config.train.num_steps,
      axes=model.logical_axes(),
      trained=model.trained(),
    )
    with reporter.working("making the parameters"):
      init = state_lib.make_init(model, optimizer, mesh)
      state = init(jax.random.key(config.train.seed))
    if workdir is not None:
      with reporter.working(f"restoring {workdir}"):
        params, _, _ = restore_params(workdir, None, param_shardings(model, mesh))
      state = state_lib.replace_params(state, optimizer, params)
    self._batches = _batches(config, dataset, mesh)
    step = make_train_step(
      model, optimizer, config, mesh, token_bytes=dataset.token_bytes.astype("float32")
    )
    batch = to_devices(next(self._batches), mesh)
    with reporter.working("compiling the train step"), jax.set_mesh(mesh):
      self._step: Any = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    self._state: Any = state
    self.text: str = self._step.as_text()

  def __call__(self) -> tuple[float, float, float, float]:
    """Returns the seconds of data, placing, calling and waiting."""
    marks = [time.perf_counter()]
    with jax.profiler.TraceAnnotation("data"):
      batch = next(self._batches)
    marks.append(time.perf_counter())
    with jax.profiler.TraceAnnotation("host"):
      placed = to_devices(batch, self._mesh)
      marks.append(time.perf_counter())
      self._state, metrics = self._step(self._state, placed)
    marks.append(time.perf_counter())
    # Waits for everything: metrics may be ready before the parameters are.
    jax.block_until_ready((self._state, metrics))
    marks.append(time.perf_counter())
    first, second, third, fourth = (b - a for a, b in itertools.pairwise(marks))
    return first, second, third, fourth


def _batches(config: Config, dataset: data.Dataset, mesh: Any) -> Iterator[Any]:
  return iter(
    dataset.train_batches(
      config.train.batch_size,
      config.train.seed,
      start_step=0,
      rows=rules.local_rows(mesh, config.train.batch_size),
    )
  )


def as_json(found: Profile) -> dict[str, Any]:
  """Returns a profile as plain values; times in milliseconds per step."""
  out: dict[str, Any] = dataclasses.asdict(found) | {"trace": str(found.trace)}
  for device, values in zip(found.devices, out["devices"], strict=True):
    values["unattributed_share"] = device.unattributed_share
  return out
