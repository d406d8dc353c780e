"""Everything a run needs before its first step, built in an order that fails early.

First the device mesh (which needs only flags), then the run's directory, which is locked,
then the data, then the model, and last the state, which takes memory.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float

from moejax import data
from moejax.checkpoint import init_from as init_from_lib
from moejax.checkpoint import manager as checkpoint
from moejax.checkpoint.emergency import EmergencyCheckpoints
from moejax.config import Config
from moejax.config import devices as config_devices
from moejax.config.spans import target_length
from moejax.cost import flops, memory, parameters
from moejax.data.dataset import Dataset
from moejax.errors import UserError
from moejax.models import trained as trained_lib
from moejax.models.decoder import Decoder
from moejax.models.frozen_count import count_frozen
from moejax.models.make import make_model
from moejax.models.placement import check_rows
from moejax.run import disk
from moejax.run import workdir as workdir_lib
from moejax.run.emergency_dir import Wish
from moejax.run.files import DIRECTORY, list_steps
from moejax.run.progress import Reporter, Silent
from moejax.sharding.mesh import make_mesh
from moejax.storage.paths import RunPath
from moejax.train import restore
from moejax.train import state as state_lib
from moejax.train.optimizer import Optimizer, make_optimizer
from moejax.train.state import State


@dataclasses.dataclass(kw_only=True)
class Run:
  """The input of `loop.fit`, which changes only `state`."""

  config: Config
  workdir: RunPath
  mesh: Mesh
  dataset: Dataset
  token_bytes: Float[np.ndarray, "V"]
  """Number of text bytes of each vocabulary id."""
  model: Decoder
  optimizer: Optimizer
  checkpointer: checkpoint.Checkpointer
  state: State
  start_step: int
  resumed: bool
  flops_per_token: float
  """Model FLOPs of training one token, forward and backward."""
  emergency: EmergencyCheckpoints | None = None


def set_up(
  config: Config,
  workdir: RunPath,
  init_from: str = "",
  devices: Sequence[Any] | None = None,
  reporter: Reporter | None = None,
  ignore_memory: bool = False,
  emergency: Wish | None = None,
) -> Run:
  """Builds or restores a run.

  Args:
    config: validated.
    workdir: the run's directory; created if missing.
    init_from: directory of a run whose parameters a new run starts from; ignored when
      resuming. Empty means `train.init_from`.
    devices: jax devices; None means all.
    reporter: reports what is being set up.
    ignore_memory: start even if the run cannot fit into memory.
    emergency: checkpoints on this machine's own disk, between those of `workdir`.

  Raises:
    ConfigError, UserError: any error the user can fix; nothing is half-written.
  """
  reporter = reporter or Silent()
  init_from = init_from or config.train.init_from
  devices = jax.devices() if devices is None else devices
  devices, left_out = config_devices.choose_devices(config, devices)
  mesh = make_mesh(config.mesh, devices)
  frozen = _check_frozen(config, mesh)
  if not ignore_memory:
    memory.check(config, mesh, mesh.local_devices, frozen)
  begun = list_steps(workdir / DIRECTORY)
  if init_from and not begun:
    init_from_lib.check(init_from, config)
  # Called twice: here to fail before minutes of data preparation, and again below
  # with the data's fingerprints.
  workdir_lib.prepare(workdir, config, mesh=mesh.shape)
  if left_out:
    reporter.message(left_out)
  _announce(reporter, config, workdir, mesh, frozen, init_from=init_from, begun=begun)
  dataset = _load_data(config, workdir, init_from)
  workdir_lib.prepare(
    *(workdir, config, dataset.fingerprint, mesh.shape, dataset.corpus_fingerprint),
    init_from="" if begun else init_from,
  )
  model, optimizer = _build(config, dataset)
  checkpointer = _open_checkpoints(config, workdir, dataset, model)
  try:
    local = _open_emergency(emergency, config, workdir, dataset)
    found = checkpointer.latest()
    what = "making the parameters" if found is None else f"restoring checkpoint {found}"
    with reporter.working(what):
      state = make_state(
        config, model, optimizer, mesh, checkpointer, init_from, local=local
      )
  except BaseException:
    checkpointer.close()
    raise
  start = int(state["step"])
  if local is not None and start > (found or 0):
    reporter.message(f"Step {start} comes from {local.directory}.")
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    dataset=dataset,
    token_bytes=dataset.token_bytes.astype(np.float32),
    model=model,
    optimizer=optimizer,
    checkpointer=checkpointer,
    state=state,
    start_step=start,
    resumed=start > 0,
    emergency=local,
    flops_per_token=flops.flops_per_token(config, model.vocab_size)["total"],
  )


def _announce(
  reporter: Reporter,
  config: Config,
  workdir: RunPath,
  mesh: Mesh,
  frozen: dict[str, int],
  *,
  init_from: str,
  begun: Sequence[int],
) -> None:
  """Reports what will be trained, the disk space it needs, and an unused --init_from.

  Args:
    begun: steps of the existing checkpoints, ascending.
  """
  reporter.message(describe(config, mesh, frozen.get("total", 0)))
  if not begun or begun[-1] < config.train.num_steps:
    size = memory.state_bytes(config, parameters.resolve_vocab_size(config), frozen)
    reporter.message(disk.foresee(config, workdir, size, begun))
  if init_from and begun:
    reporter.message(
      f"Note: --init_from={init_from} is not read, since {workdir} has parameters of its "
      f"own (step {begun[-1]})."
    )


def _check_frozen(config: Config, mesh: Mesh) -> dict[str, int]:
  """Checks the frozen parameters against model and mesh; returns their count by part."""
  if not config.train.frozen:
    return {}
  vocab_size = parameters.resolve_vocab_size(config)
  check_rows(_model(config, vocab_size), mesh)
  return count_frozen(config)


def _load_data(config: Config, workdir: RunPath, init_from: str) -> Dataset:
  """Loads the tokenized text; rejects text other than the one the run started with."""
  dataset = data.load(
    config.data,
    workdir=workdir,
    like=init_from or None,
    store=jax.process_index() == 0,
    check_corpus=functools.partial(workdir_lib.check_corpus, workdir),
  )
  dataset.check_batch_size(config.train.batch_size)
  return dataset


def _build(config: Config, dataset: Dataset) -> tuple[Decoder, Optimizer]:
  """Builds the model and its optimizer, without parameters."""
  model = _model(
    config,
    dataset.tokenizer.vocab_size,
    token_counts=functools.partial(dataset.token_counts, "train"),
  )
  optimizer = make_optimizer(
    config.optimizer,
    num_steps=config.train.num_steps,
    axes=model.logical_axes(),
    trained=model.trained(),
  )
  return model, optimizer


def _model(config: Config, vocab_size: int, **others: Any) -> Decoder:
  return make_model(
    *(config.model, config.moe),
    vocab_size=vocab_size,
    frozen=config.train.frozen,
    **others,
  )


def _open_checkpoints(
  config: Config, workdir: RunPath, dataset: Dataset, model: Decoder
) -> checkpoint.Checkpointer:
  return checkpoint.Checkpointer(
    workdir / DIRECTORY,
    keep_last=config.train.keep_last,
    keep_best=config.train.keep_best,
    config=config,
    metadata={
      "dataset_fingerprint": dataset.fingerprint,
      "corpus_fingerprint": dataset.corpus_fingerprint,
    },
    logical_axes=model.logical_axes(),
    untrained=trained_lib.names(model.trained()),
  )


def _open_emergency(
  wish: Wish | None, config: Config, workdir: RunPath, dataset: Dataset
) -> EmergencyCheckpoints | None:
  if wish is None:
    return None
  return EmergencyCheckpoints(
    wish,
    workdir=workdir,
    config=config,
    metadata={"dataset_fingerprint": dataset.fingerprint},
  )


def describe(config: Config, mesh: Mesh, frozen: int = 0) -> str:
  """Describes a run's devices, model and batch in one line."""
  vocab_size = parameters.resolve_vocab_size(config)
  total, active = parameters.count_parameters(config, vocab_size)
  device = mesh.devices.flat[0]
  axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  kind = device.platform.upper()
  if device.device_kind != device.platform:
    kind += f" ({device.device_kind})"
  train = config.train
  return (
    f"{mesh.size} x {kind}{f', mesh {axes}' if axes else ''}; "
    f"{total['total']:,} parameters, {active['total']:,} of them active for a token"
    f"{f', {frozen:,} frozen' if frozen else ''}; "
    f"{train.batch_size * target_length(config.data):,} tokens a step, "
    f"{train.num_steps:,} steps."
  )


def make_state(
  config: Config,
  model: Decoder,
  optimizer: Optimizer,
  mesh: Mesh,
  checkpointer: checkpoint.Checkpointer,
  init_from: str,
  *,
  local: EmergencyCheckpoints | None = None,
) -> State:
  """Returns the newest state that was saved, or a new one.

  Raises:
    ConfigError, UserError: as `restore.newest`, or for the run of `init_from`.
  """
  if checkpointer.latest() is not None or local is not None:
    shapes = state_lib.state_shapes(model, optimizer, mesh)
    restored = restore.newest(checkpointer, local, shapes, config.moe)
    if restored is not None:
      return restored
  params = None
  if init_from:
    # Before creating the state: a wrong directory should not cost a compilation.
    shapes = state_lib.state_shapes(model, optimizer, mesh)["params"]
    params = checkpoint.init_from(init_from, shapes)
    if problem := checkpoint.damaged_table(params, config.moe):
      raise UserError(f"--init_from={init_from}: {problem}.")
    logging.info("Starting from the parameters of %s.", init_from)
  init = state_lib.make_init(model, optimizer, mesh)
  state = init(jax.random.key(config.train.seed))
  if params is not None:
    state = state_lib.replace_params(state, optimizer, params)
    # So that resuming needs neither the other directory nor the flag.
    checkpointer.save(0, state, position={"step": 0, "seed": config.train.seed})
  return state
