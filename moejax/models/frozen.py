"""Parameters that training does not change, selected by `train.frozen`.

They are untrained like a routing table (`moejax.models.trained`): they have no gradient,
no moments, no weight decay and no share in the gradient norm. The rule by which the train
step updates a router's bias does not apply to them either.
"""

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moejax.config.selectors import Selector, parse
from moejax.errors import ConfigError
from moejax.models.trained import Mask, Rows
from moejax.types import Params

EXPERT_AXES = ("expert", "router_expert")
"""Logical axes along which a selector may name rows."""

_FLAG = "--config.train.frozen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masks:
  """Two masks over all parameters."""

  trained: Mask
  """The parameters that the optimizer updates."""
  free: Mask
  """The parameters that are not frozen."""
  by_rule: Mask
  """As `free` where the train step may update a parameter by a rule; else True.
  What the optimizer updates is not restored a second time."""


def masks(text: str, declared: Mask, axes: Params, shapes: Params) -> Masks:
  """Returns the masks if the parameters that `text` selects are frozen.

  Args:
    text: the selectors, see `moejax.config.selectors`.
    declared: which parameters a model trains if nothing is frozen.
    axes: their logical axes.
    shapes: anything with a `.shape`.

  Raises:
    ConfigError: a selector matches nothing, or rows that do not exist, or nothing is left
      to train.
  """
  selectors = parse(text)
  found = dict(_leaves(shapes))
  names_of, is_declared = dict(_leaves(axes)), dict(_leaves(declared))
  for selector in selectors:
    _check(text, selector, found, names_of)
  trained, free, by_rule = {}, {}, {}
  for name, leaf in found.items():
    axis = expert_axis(names_of[name])
    frozen = _frozen(name, None if axis is None else leaf.shape[axis], selectors)
    # Without an expert axis there is one row, and so a bool.
    free[name] = Rows.of(axis or 0, ~frozen)
    trained[name] = is_declared[name] and free[name]
    by_rule[name] = is_declared[name] or free[name]
  if not any(trained.values()):
    raise ConfigError(
      f"{_FLAG}={text} freezes every parameter, and nothing is left to train. Take some "
      "back with a further selector, such as !embedding.*."
    )
  return Masks(
    trained=_nested(trained, shapes),
    free=_nested(free, shapes),
    by_rule=_nested(by_rule, shapes),
  )


def expert_axis(names: tuple[str | None, ...]) -> int | None:
  """Returns the expert axis of a parameter; None if it has none."""
  found = [i for i, name in enumerate(names) if name in EXPERT_AXES]
  return found[0] if found else None


def frozen_numbers(masks: Masks, shapes: Params) -> dict[str, int]:
  """Returns how many numbers of each parameter are frozen, omitting zeros."""
  sizes = dict(_leaves(shapes))
  found = {}
  for name, entry in _leaves(masks.free):
    size = math.prod(sizes[name].shape)
    if isinstance(entry, Rows):
      found[name] = size // len(entry.trained) * entry.trained.count(False)
    elif not entry:
      found[name] = size
  return found


def _check(
  text: str,
  selector: Selector,
  shapes: Mapping[str, Any],
  axes: Mapping[str, tuple[str | None, ...]],
) -> None:
  """Rejects a selector that does not fit the model."""
  matched = [name for name in shapes if fnmatch.fnmatchcase(name, selector.pattern)]
  if not matched:
    raise ConfigError(
      f"{_FLAG}={text}: no parameter is named {selector.pattern}. The nearest is "
      f"{difflib.get_close_matches(selector.pattern, shapes, 1, cutoff=0.0)[0]}."
    )
  if selector.rows is None:
    return
  for name in matched:
    axis = expert_axis(axes[name])
    if axis is None:
      raise ConfigError(
        f"{_FLAG}={text}: {selector.text} also matches {name}, which belongs to no "
        "expert and has no rows. Narrow the name, for example *.moe.experts.*"
        f"{selector.text[selector.text.index('[') :]}."
      )
    size = shapes[name].shape[axis]
    if not max(selector.rows.start, (selector.rows.stop or 0) - 1) < size:
      raise ConfigError(
        f"{_FLAG}={text}: {name} has rows 0 to {size - 1}, but {selector.text} names "
        "others. Lower them."
      )


def _frozen(name: str, size: int | None, selectors: list[Selector]) -> np.ndarray:
  """Returns which rows of a parameter are frozen; one without rows counts as one row."""
  frozen = np.full(size or 1, selectors[0].takes_back)
  for selector in selectors:
    if fnmatch.fnmatchcase(name, selector.pattern):
      frozen[selector.rows or slice(None)] = not selector.takes_back
  return frozen


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _nested(flat: Mapping[str, Any], like: Params, prefix: str = "") -> Mask:
  return {
    name: _nested(flat, value, f"{prefix}{name}.")
    if isinstance(value, dict)
    else flat[prefix + name]
    for name, value in like.items()
  }
