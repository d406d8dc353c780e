"""Restores parameters without training, from a run's directory alone.

Nothing is renamed here, since the run may still be training: a damaged step is skipped
and logged.
"""

import functools
from typing import Any

import jax
import numpy as np
from absl import logging

from moejax.checkpoint.read import (
  DamagedCheckpointError,
  as_target,
  mismatches,
  read_meta,
  read_step,
)
from moejax.config import Config, MoEConfig
from moejax.config import text as config_text
from moejax.config.router import make_router
from moejax.errors import ConfigError, UserError, program
from moejax.models.decoder import TABLE
from moejax.run.files import DIRECTORY, list_steps
from moejax.storage.paths import RunPath, resolved, run_path
from moejax.types import Params


def peek(
  workdir: RunPath | str, step: int | None = None
) -> tuple[Params, Config, dict[str, Any]]:
  """Returns the same as `restore_params`, with shapes in place of arrays.

  Used to build the model before choosing shardings for its parameters. Reads only meta:
  the arrays may still be damaged, and `restore_params` then uses an older step.

  Raises:
    UserError: as `restore_params`.
  """
  directory, candidates = _candidates(workdir, step)
  reasons = []
  for candidate in candidates:
    try:
      meta = read_meta(directory / str(candidate))
      return params_target(meta), config_text.from_dict(meta["config"]), meta
    except DamagedCheckpointError as e:
      reasons.append(f"step {candidate}: {e}")
  raise _none_whole(directory, reasons)


def restore_params(
  workdir: RunPath | str, step: int | None = None, shardings: Any = None
) -> tuple[Params, Config, dict[str, Any]]:
  """Restores the parameters of a run from its directory alone.

  Args:
    workdir: of a training run; its `checkpoints` directory is accepted too.
    step: which checkpoint; None means the newest intact one.
    shardings: tree like the parameters, or one sharding for all, or None for the
      first local device.

  Returns:
    The parameters, the config they were trained with (migrated to the current schema),
    and the step's meta.

  Raises:
    UserError: there is no checkpoint (the message lists what is there), no such step, or
      all are damaged.
  """
  directory, candidates = _candidates(workdir, step)
  reasons = []
  for candidate in candidates:
    try:
      state, meta = read_step(
        directory / str(candidate),
        lambda meta: {"params": params_target(meta, shardings)},
      )
      config = config_text.from_dict(meta["config"])
      if problem := damaged_table(state["params"], config.moe):
        logging.warning("%s, step %s: %s.", directory, candidate, problem)
      return state["params"], config, meta
    except DamagedCheckpointError as e:
      reasons.append(f"step {candidate}: {e}")
      logging.warning("%s: checkpoint is damaged, %s", directory, reasons[-1])
  raise _none_whole(directory, reasons)


def _candidates(workdir: RunPath | str, step: int | None) -> tuple[RunPath, list[int]]:
  """Returns the checkpoint directory and the steps to try, the best one first."""
  directory = checkpoint_directory(workdir)
  steps = list_steps(directory)
  if step is None:
    return directory, steps[::-1]
  if step not in steps:
    raise UserError(
      f"--step={step} is not in {directory}, which has {_numbers_in_words(steps)}."
    )
  return directory, [step]


def damaged_table(params: Params, moe: MoEConfig) -> str | None:
  """Returns what is wrong with a router's table; see `Router.table_damage`."""
  if TABLE not in params:
    return None
  # The table is replicated, also across processes.
  table = np.asarray(params[TABLE].addressable_data(0))
  return make_router(moe).table_damage(table, moe.fine_experts)


def _none_whole(directory: RunPath, reasons: list[str]) -> UserError:
  return UserError(
    f"{directory} has no intact checkpoint. {'. '.join(reasons)}. "
    "Choose another --step, or train again."
  )


def checkpoint_directory(workdir: RunPath | str) -> RunPath:
  """Returns the directory of a workdir's checkpoints, which must exist.

  The path is absolute, since Orbax requires that and users type runs/default.

  Raises:
    UserError: there are none; the message lists what is there instead.
  """
  workdir = run_path(workdir)
  for directory in (workdir / DIRECTORY, workdir):
    if list_steps(directory):
      return resolved(directory)
  if not workdir.is_dir():
    raise UserError(f"--workdir={workdir} is not a directory.")
  found = sorted(p.name for p in workdir.iterdir())
  if "config.json" in found and any(name.endswith(".safetensors") for name in found):
    convert = program("convert", "experiments.convert")
    raise UserError(
      f"--workdir={workdir} holds a published model, not a run. First: {convert} "
      f"--from_hf={workdir} --workdir=RUN."
    )
  inside = f"it holds {', '.join(found[:10])}" if found else "it is empty"
  if len(found) > 10:
    inside += f" and {len(found) - 10} more"
  raise UserError(
    f"--workdir={workdir} has no checkpoint: {inside}. Give the directory that "
    f"{program('train', 'experiments.train')} was given, after its first checkpoint."
  )


def params_target(meta: dict[str, Any], shardings: Any = None) -> Params:
  """Returns the shapes of a checkpoint's parameters, as a nested dict.

  Raises:
    DamagedCheckpointError: they do not form a tree, so no save of ours wrote them.
  """
  try:
    target = _shapes(meta)
  except (AttributeError, TypeError) as e:
    raise DamagedCheckpointError("its table of arrays is not a tree of parameters") from e
  if shardings is None:
    return target
  if isinstance(shardings, jax.sharding.Sharding):
    one = shardings
    shardings = jax.tree.map(lambda _: one, target)
  return jax.tree.map(
    lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), target, shardings
  )


def _shapes(meta: dict[str, Any]) -> Params:
  target: Params = {}
  for name, leaf in meta["leaves"].items():
    keys = name.split(".")
    if keys[0] != "params":
      continue
    node = functools.reduce(lambda n, key: n.setdefault(key, {}), keys[1:-1], target)
    node[keys[-1]] = jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
  for name in meta.get("empty", []):
    functools.reduce(lambda n, key: n.setdefault(key, {}), name.split(".")[1:], target)
  return target


def init_from(source: RunPath | str, target: Params, step: int | None = None) -> Params:
  """Returns the parameters of another run, to start a new one from.

  Args:
    source: the other run's workdir, --init_from.
    target: the new model's parameters, shapes with shardings (or arrays).

  Raises:
    ConfigError: the shapes differ; names the leaves.
    UserError: as `restore_params`.
  """
  directory = checkpoint_directory(source)
  newest = list_steps(directory)[-1] if step is None else step
  try:
    meta = read_meta(directory / str(newest))
  except DamagedCheckpointError:
    meta = {}
  problems = mismatches(meta["leaves"], target, prefix="params.") if meta else []
  if problems:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    raise ConfigError(
      f"--init_from={source} does not fit the model of --config: "
      f"{'; '.join(problems[:5])}{more}. Give both the same model and moe fields."
    )
  shardings = jax.tree.map(lambda leaf: leaf.sharding, as_target(target))
  return restore_params(source, step, shardings)[0]


def _numbers_in_words(steps: list[int]) -> str:
  if not steps:
    return "none"
  return f"step{'s' * (len(steps) > 1)} {', '.join(str(s) for s in steps)}"
