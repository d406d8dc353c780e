"""Maps tensors on disk to the parameters of a model, layer by layer.

The table of an architecture names the parameters of one layer. This module maps them to
the model's own tree, in which repeated layers are stacked.

Letters: R repeats of the unit, E experts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from moejax.config.pattern import Pattern
from moejax.errors import UserError
from moejax.interop.architecture import Architecture
from moejax.interop.table import Entry, Shape
from moejax.models.decoder import Decoder
from moejax.models.per_layer import PARTS
from moejax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafPart:
  """The place of one layer's parameter in the model's tree."""

  leaf: str
  """Dotted name of the leaf."""
  repeat: int | None
  """Index along its first axis, where layers are stacked."""
  shape: Shape
  """Shape in one layer, with the axis of experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One tensor on disk (or one for each expert), and the places of its parts."""

  theirs: str
  """Its name; `{expert}` where each expert has its own."""
  parts: tuple[LeafPart, ...]
  entry: Entry

  @property
  def num_experts(self) -> int | None:
    """E if the row is per expert, else None."""
    return self.parts[0].shape[0] if self.entry.per_expert else None

  @property
  def own_shapes(self) -> list[Shape]:
    """Shapes of our parameters as passed to its form: of one expert."""
    return [p.shape[1:] if self.entry.per_expert else p.shape for p in self.parts]

  def tensors(self) -> Iterator[tuple[str, Shape]]:
    """Yields the name and shape of each tensor on disk."""
    shape = self.entry.form.shape(self.own_shapes)
    if self.entry.stacked:
      yield self.theirs, (self.parts[0].shape[0], *shape)
    elif self.num_experts is not None:
      for expert in range(self.num_experts):
        yield self.theirs.format(expert=expert), shape
    else:
      yield self.theirs, shape


def rows(architecture: Architecture, model: Decoder) -> list[Row]:
  """Returns the rows of all layers, in order, and those of parameters outside them.

  Raises:
    UserError: the model has a parameter that the architecture has no name for.
  """
  shapes = flatten(model.shapes())
  outside = architecture.outside(model.config.tie_embeddings)
  found = list(_rows_of(outside, "", None, "", shapes))
  for name, stack in model.stacks.items():
    prefix, table = architecture.table(name)
    for layer, (repeat, below) in enumerate(_layers(stack.pattern)):
      below = f"{name}.{below}" if name else below
      found += _rows_of(table, prefix.format(layer=layer), repeat, below, shapes)
  _refuse_unnamed(architecture, found, shapes)
  return found


def _layers(pattern: Pattern) -> Iterator[tuple[int | None, str]]:
  """Yields each layer's index where it is stacked, and the prefix of its parameters."""
  for part in PARTS:
    repeats: Sequence[int | None] = [None]
    if part == "unit":
      repeats = range(pattern.repeats)
    for repeat in repeats:
      for index in range(len(getattr(pattern, part))):
        yield repeat, f"{part}.{index}."


def _rows_of(
  table: Sequence[Entry],
  prefix: str,
  repeat: int | None,
  below: str,
  shapes: dict[str, Any],
) -> Iterator[Row]:
  for entry in table:
    names = [below + name for name in entry.ours]
    if not all(name in shapes for name in names):
      continue
    whole = [tuple(shapes[name].shape) for name in names]
    parts = [
      LeafPart(leaf=name, repeat=repeat, shape=shape if repeat is None else shape[1:])
      for name, shape in zip(names, whole)
    ]
    yield Row(theirs=prefix + entry.theirs, parts=tuple(parts), entry=entry)


def _refuse_unnamed(
  architecture: Architecture, found: list[Row], shapes: dict[str, Any]
) -> None:
  named = {part.leaf for row in found for part in row.parts}
  unnamed = sorted(set(shapes) - named)
  if unnamed:
    more = f" and {len(unnamed) - 3} more" if len(unnamed) > 3 else ""
    raise UserError(
      f"{architecture.name} has no tensor for {', '.join(unnamed[:3])}{more}. Choose a "
      "model without these parameters."
    )


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
  """Returns the leaves of a nested dict by dotted name."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def nest(flat: dict[str, Any], like: Params) -> Params:
  """Inverts `flatten`, with the empty dicts of `like`."""

  def fill(node: Params, prefix: str) -> Params:
    return {
      key: fill(value, f"{prefix}{key}.")
      if isinstance(value, dict)
      else flat[prefix + key]
      for key, value in node.items()
    }

  return fill(like, "")
