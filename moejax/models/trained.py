"""Splits the parameters into trained and untrained ones, and joins them again.

A model's parameters are one tree, so that a checkpoint holds all of them. An optimizer
must not touch some of them: a table that routes by token id, a bias that the train step
updates by its own rule. Each parameter is marked where it is declared; gradients and the
optimizer then see only the trained part, so nothing can decay, clip or move the rest.
"""

from typing import Any

from moejax.types import Params

Mask = dict[str, Any]
"""A nested dict like the parameters, True for each trained leaf."""


def split(params: Params, trained: Mask) -> tuple[Params, Params]:
  """Returns the trained and the untrained parameters as two trees.

  Dicts that the split empties are omitted: a stored state has no entry for them.

  Raises:
    ValueError: the mask's keys differ from the parameters'.
  """
  if params.keys() != trained.keys():
    raise ValueError(f"parameters {sorted(params)} under a mask of {sorted(trained)}")
  learned: Params = {}
  kept: Params = {}
  for name, value in params.items():
    if isinstance(value, dict):
      parts = split(value, trained[name])
      for tree, part in zip((learned, kept), parts):
        if part or not value:
          tree[name] = part
    elif trained[name]:
      learned[name] = value
    else:
      kept[name] = value
  return learned, kept


def join(learned: Params, kept: Params) -> Params:
  """Joins what `split` returned."""
  both = dict(learned)
  for name, value in kept.items():
    both[name] = join(both.get(name, {}), value) if isinstance(value, dict) else value
  return both


def names(mask: Mask, prefix: str = "") -> list[str]:
  """Returns the dotted names of the parameters that are not trained."""
  found: list[str] = []
  for name, value in mask.items():
    if isinstance(value, dict):
      found += names(value, f"{prefix}{name}.")
    elif not value:
      found.append(prefix + name)
  return found
