"""The optimizer's state of a run after an operation.

reset      no state: the new run starts at step 0, and training begins with --init_from
keep       the operation is also applied to the moments; those of new parameters are zero.
           Training continues in the new directory, at the same step
broadcast  like keep, but experts made from a dense layer get its moments
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moejax.checkpoint import fingerprint
from moejax.checkpoint.lazy import LazyArray
from moejax.checkpoint.read import DamagedCheckpointError, read_state
from moejax.checkpoint.slices import Slices
from moejax.errors import UserError
from moejax.surgery.change import Change
from moejax.surgery.operation import Choice, Kind
from moejax.train.optimizer import make_optimizer

RESET, KEEP, BROADCAST = MODES = ("reset", "keep", "broadcast")

_KINDS = {
  "mu": Kind.GRADIENT,
  "trace": Kind.GRADIENT,
  "nu": Kind.SQUARE,
}
"""The kind of an optimizer's arrays, by their name in optax."""

_SMALL = ("step", "key", "bad_steps")


def opt_state_shapes(change: Change) -> Any:
  """Returns the shapes of the new optimizer state."""
  optimizer = make_optimizer(
    change.new.optimizer,
    num_steps=change.new.train.num_steps,
    axes=change.new_model.logical_axes(),
    trained=change.new_model.trained(),
  )
  return jax.eval_shape(optimizer.init, change.shapes)


def check(change: Change, slices: Slices, mode: str) -> None:
  """Rejects a state that the operation cannot be applied to.

  Raises:
    UserError: the checkpoint has none, or the optimizer keeps more than moments.
  """
  if mode == RESET:
    return
  if not change.operation.keeps_moments:
    raise UserError(
      f"--optimizer={mode}: operation {change.operation.name} joins several runs, and "
      "each has a state of its own. Use --optimizer=reset."
    )
  if frozen := change.old.train.frozen or change.new.train.frozen:
    raise UserError(
      f"--optimizer={mode}: with --config.train.frozen={frozen} some parameters have no "
      "moments. Use --optimizer=reset."
    )
  if not slices.names("opt_state."):
    raise UserError(
      f"--optimizer={mode}: this checkpoint has no optimizer state. Use "
      "--optimizer=reset."
    )
  for name, leaf in fingerprint.named_leaves(opt_state_shapes(change)).items():
    split(change, slices, name, leaf.shape)


def split(
  change: Change, slices: Slices, name: str, shape: tuple[int, ...]
) -> tuple[str, str, Kind] | None:
  """Returns the prefix, the parameter and the kind of a moment; None for a count.

  Args:
    change: the operation's change.
    slices: the source.
    name: name of a new array, below `opt_state.`.
    shape: shape of that array.

  Raises:
    UserError: it is neither a moment shaped like its parameter nor a number.
  """
  if not shape and f"opt_state.{name}" in slices.leaves:
    return None
  params = fingerprint.named_leaves(change.shapes)
  words = name.split(".")
  for cut in range(1, len(words)):
    param = ".".join(words[cut:])
    kind = _KINDS.get(words[cut - 1])
    if param in params and kind is not None and params[param].shape == shape:
      prefix = f"opt_state.{'.'.join(words[:cut])}."
      if slices.names(prefix):
        return prefix, param, kind
  raise UserError(
    f"--optimizer=keep: the state of optimizer {change.new.optimizer.name} is not a "
    f"moment for each parameter ({name}), so the operation cannot change it. Use "
    "--optimizer=reset."
  )


def others(
  change: Change, slices: Slices, choices: Mapping[int, Choice], mode: str
) -> dict[str, Any]:
  """Returns the rest of the new train state: step, key, counts and moments.

  Raises:
    UserError: as for `check`, or the source is damaged.
  """
  drops_new = mode == KEEP and not change.operation.needs_moe
  makers: dict[str, Any] = {}

  def leaf(path: Any, shape: Any) -> LazyArray:
    name = fingerprint.leaf_name(path)
    found = split(change, slices, name, shape.shape)
    if found is None:
      return _stored(slices, f"opt_state.{name}")
    prefix, param, kind = found
    if drops_new and _is_new(change, param):
      return _zeros(shape)
    if prefix not in makers:
      makers[prefix] = change.maker(slices, choices, prefix, kind)
    return makers[prefix](param, shape)

  small = _small(slices)
  shapes = opt_state_shapes(change)
  return small | {"opt_state": jax.tree_util.tree_map_with_path(leaf, shapes)}


def _is_new(change: Change, name: str) -> bool:
  """Returns whether a parameter belongs to a newly made feed-forward."""
  blocks = {change.new_layers[number].block for number in change.made}
  return any(name.startswith(f"{block}.moe.") for block in blocks)


def _stored(slices: Slices, name: str) -> LazyArray:
  return LazyArray(
    shape=slices.shape(name),
    dtype=slices.dtype(name),
    read=lambda index: np.asarray(slices.read(name)[index]),
  )


def _zeros(shape: Any) -> LazyArray:
  def read(index: tuple[slice, ...]) -> np.ndarray:
    sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape.shape, strict=True)]
    return np.zeros(sizes, shape.dtype)

  return LazyArray(
    shape=shape.shape,
    dtype=np.dtype(shape.dtype),
    read=read,
    stacked=min(1, len(shape.shape)),
  )


def _small(slices: Slices) -> dict[str, Any]:
  """Returns the step, the random key and the counts of bad steps, as jax arrays."""
  number = jax.ShapeDtypeStruct((), np.int32)
  target = {
    "step": number,
    "key": jax.eval_shape(lambda: jax.random.key(0)),
    "bad_steps": {"total": number, "in_a_row": number},
  }
  try:
    return read_state(slices.directory, slices.meta, target)
  except DamagedCheckpointError as e:
    raise UserError(f"{slices.directory} is damaged: {e}. Choose another --step.") from e
