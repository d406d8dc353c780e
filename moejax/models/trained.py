"""Splits the parameters into trained and untrained ones, and joins them again.

A model's parameters are one tree, so that a checkpoint holds all of them. An optimizer
must not touch some of them: a table that routes by token id, a bias that the train step
updates by its own rule, whatever `train.frozen` selects. Gradients and the optimizer see
only the trained part, so nothing can decay, clip or move the rest.

In an array that stacks experts, some may be trained and others not. The array is then cut
along that axis into two.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from moejax.types import Params

Mask = dict[str, Any]
"""A nested dict like the parameters: True for each trained leaf, False for others, `Rows`
for a leaf that is trained in part."""


@dataclasses.dataclass(frozen=True)
class Rows:
  """Which rows of an array are trained: at least one, and not all."""

  axis: int
  trained: tuple[bool, ...]
  """One for each row."""

  @classmethod
  def of(cls, axis: int, trained: Bool[np.ndarray, "E"]) -> "Rows | bool":
    """Returns the rows, or a bool where all or none are trained."""
    if trained.all() or not trained.any():
      return bool(trained.all())
    return cls(axis, tuple(bool(row) for row in trained))

  def cut(self, value: Shaped[Any, "..."]) -> tuple[Array, Array]:
    """Returns the trained and the other rows, each in order."""
    parts: dict[bool, list[Array]] = {True: [], False: []}
    for start, stop, is_trained in self._runs():
      part = jax.lax.slice_in_dim(value, start, stop, axis=self.axis)
      parts[is_trained].append(part)
    trained, others = (jnp.concatenate(parts[k], axis=self.axis) for k in (True, False))
    return trained, others

  def weave(self, trained: Array, others: Array) -> Array:
    """Inverts `cut`."""
    used, parts = {True: 0, False: 0}, []
    for start, stop, is_trained in self._runs():
      source, begin = trained if is_trained else others, used[is_trained]
      used[is_trained] = begin + stop - start
      part = jax.lax.slice_in_dim(source, begin, used[is_trained], axis=self.axis)
      parts.append(part)
    return jnp.concatenate(parts, axis=self.axis)

  def _runs(self) -> list[tuple[int, int, bool]]:
    """Returns (start, stop, whether it is trained) of each run of rows of one kind."""
    found, start = [], 0
    for is_trained, run in itertools.groupby(self.trained):
      stop = start + len(list(run))
      found.append((start, stop, is_trained))
      start = stop
    return found


def split(params: Params, trained: Mask) -> tuple[Params, Params]:
  """Returns the trained and the untrained parameters as two trees.

  An array that is trained in part is in both, with its rows. Dicts that the split empties
  are omitted: a stored state has no entry for them.

  Raises:
    ValueError: the mask's keys differ from the parameters'.
  """
  _same_keys(params, trained)
  learned: Params = {}
  kept: Params = {}
  for name, value in params.items():
    entry = trained[name]
    if isinstance(value, dict):
      parts = split(value, entry)
      for tree, part in zip((learned, kept), parts):
        if part or not value:
          tree[name] = part
    elif isinstance(entry, Rows):
      learned[name], kept[name] = entry.cut(value)
    elif entry:
      learned[name] = value
    else:
      kept[name] = value
  return learned, kept


def join(learned: Params, kept: Params, trained: Mask) -> Params:
  """Joins what `split` returned under the same mask."""
  both = dict(learned)
  for name, value in kept.items():
    if isinstance(value, dict):
      both[name] = join(both.get(name, {}), value, trained[name])
    elif isinstance(trained[name], Rows):
      both[name] = trained[name].weave(both[name], value)
    else:
      both[name] = value
  return both


def of_trained(tree: Params, trained: Mask) -> Params:
  """Returns the leaves that belong to trained parameters, whole.

  Args:
    tree: like the parameters, with leaves without rows, such as axis names or shardings.
    trained: the mask.

  Raises:
    ValueError: the mask's keys differ from the tree's.
  """
  _same_keys(tree, trained)
  found: Params = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      below = of_trained(value, trained[name])
      if below or not value:
        found[name] = below
    elif trained[name]:
      found[name] = value
  return found


def shapes(params: Params, trained: Mask) -> Params:
  """Returns shapes and dtypes of the trained parameters, from those of all parameters."""
  return jax.eval_shape(lambda p: split(p, trained)[0], params)


def restore(new: Params, old: Params, free: Mask) -> Params:
  """Returns new parameters, with the old values wherever `free` is not True."""
  return join(split(new, free)[0], split(old, free)[1], free)


def names(mask: Mask, prefix: str = "") -> list[str]:
  """Returns the dotted names of the parameters that are not trained, even in part."""
  found: list[str] = []
  for name, value in mask.items():
    if isinstance(value, dict):
      found += names(value, f"{prefix}{name}.")
    elif not value:
      found.append(prefix + name)
  return found


def _same_keys(params: Params, trained: Mask) -> None:
  if params.keys() != trained.keys():
    raise ValueError(f"parameters {sorted(params)} with a mask for {sorted(trained)}")
