"""What is trained, and what is only kept: the parameters cut in two, and joined again.

A model's parameters are one tree, so that a checkpoint holds all of them. Some are no
business of an optimizer: a table that routes by token id, a bias that the train step
moves by a rule of its own. Each parameter says so where it is made; the gradient and the
optimizer then see the trained part alone, so that nothing can decay, clip or move the
rest.
"""

from typing import Any

from moejax.types import Params

Mask = dict[str, Any]
"""A nested dict like the parameters, with True where a leaf is trained."""


def split(params: Params, trained: Mask) -> tuple[Params, Params]:
  """The trained parameters and the others, each a tree of its own.

  A dict of which nothing is left is left out: a stored state has no place for it.

  Raises:
    ValueError: the mask is of another tree.
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
  """The inverse of `split`."""
  both = dict(learned)
  for name, value in kept.items():
    both[name] = join(both.get(name, {}), value) if isinstance(value, dict) else value
  return both


def names(mask: Mask, prefix: str = "") -> list[str]:
  """Dotted names of the parameters that are not trained."""
  found: list[str] = []
  for name, value in mask.items():
    if isinstance(value, dict):
      found += names(value, f"{prefix}{name}.")
    elif not value:
      found.append(prefix + name)
  return found
