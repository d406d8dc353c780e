"""Parameters for the planner: their shapes, mesh axes, and how each is used.

They are read from the model's shapes and logical axes, so a new layer is counted without
an entry here. They depend on the model alone: one list serves all candidates of a search.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from moejax.config import Config
from moejax.cost.parameters import resolve_vocab_size
from moejax.models.make import make_model
from moejax.sharding.rules import RULES, is_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
  """One parameter, or the stacked parameters of repeated layers."""

  path: str
  """Dotted path."""
  part: str
  """experts, router, feed_forward, attention, embedding, head or other."""
  shape: tuple[int, ...]
  names: tuple[str | None, ...]
  """Logical dimensions; see `sharding.rules`."""
  axes: tuple[str, ...]
  """Mesh axes that cut it."""
  cut_last: bool
  """Whether `fsdp` cuts its last dimension."""
  itemsize: int
  """Bytes per number in storage."""
  is_matrix: bool
  """Whether it has more than one dimension within a layer."""
  trained: bool

  def held(self, mesh: Mapping[str, int]) -> int:
    """Returns how many numbers a device holds."""
    return math.prod(self.shape) // math.prod(mesh[axis] for axis in self.axes)

  def gathered(self, mesh: Mapping[str, int]) -> int:
    """Returns how many numbers a device holds after gathering over `fsdp`."""
    return self.held(mesh) * (mesh["fsdp"] if "fsdp" in self.axes else 1)

  @property
  def repeats(self) -> int:
    """Number of layers that are stacked in it."""
    return self.shape[0] if self.path.startswith("unit.") else 1


_MARKS = {
  "experts": ("experts",),
  "router": ("router", "shared_gate"),
  "feed_forward": ("shared", "feed_forward", "second"),
  "attention": ("attention",),
  "head": ("head",),
  "embedding": ("table",),
}


def part_of(path: str) -> str:
  """Returns the part of a model that a parameter belongs to, by its dotted path."""
  names = path.split(".")
  found = (part for part, marks in _MARKS.items() if any(n in marks for n in names))
  return next(found, "other")


def weights_of(config: Config) -> tuple[Weight, ...]:
  """Returns every parameter of a config's model, without creating any."""
  model = make_model(config.model, config.moe, vocab_size=resolve_vocab_size(config))
  axes = jax.tree.leaves(model.logical_axes(), is_leaf=is_axes)
  trained = jax.tree.leaves(model.trained())
  shapes = jax.tree_util.tree_leaves_with_path(model.shapes())
  found = []
  for (path, leaf), names, learns in zip(shapes, axes, trained, strict=True):
    own = [name for name in names if name != "layer"]
    spec = RULES.spec(names)
    found.append(
      Weight(
        path=(dotted := jax.tree_util.keystr(path, simple=True, separator=".")),
        part=part_of(dotted),
        shape=tuple(leaf.shape),
        names=names,
        axes=tuple(axis for axis in spec if axis is not None),
        cut_last=bool(spec) and spec[-1] == "fsdp",
        itemsize=np.dtype(leaf.dtype).itemsize,
        is_matrix=len(own) > 1,
        trained=bool(learns),
      )
    )
  return tuple(found)


def optimizer_bytes(name: str, weights: Sequence[Weight], mesh: Mapping[str, int]) -> int:
  """Returns the bytes of an optimizer's moments on one device.

  Args:
    name: of the optimizer. adamw keeps two float32 numbers per parameter, and lion one;
      muon keeps one for a hidden matrix and two for the rest; adafactor keeps sums over
      rows and columns, and every device holds all of them.
    weights: of the model.
    mesh: devices per axis.
  """
  total = 0
  for weight in weights:
    if not weight.trained:
      continue
    hidden = weight.is_matrix and weight.part in ("experts", "feed_forward", "attention")
    if name == "adafactor":
      rest, last = math.prod(weight.shape[:-2]), weight.shape[-2:]
      total += 4 * rest * (sum(last) if weight.is_matrix else math.prod(last))
    else:
      copies = {"adamw": 2, "lion": 1, "muon": 1 if hidden else 2}[name]
      total += 4 * copies * weight.held(mesh)
  return total


@dataclasses.dataclass(frozen=True)
class Shares:
  """The parameters of a model on one device of a mesh; sums that a search reuses."""

  weights: tuple[Weight, ...]
  mesh: Mapping[str, int]
  optimizer: str

  @functools.cached_property
  def parameters(self) -> float:
    """Bytes."""
    return float(sum(w.itemsize * w.held(self.mesh) for w in self.weights))

  @functools.cached_property
  def gradients(self) -> float:
    """Bytes, in float32."""
    return 4.0 * sum(w.held(self.mesh) for w in self.weights if w.trained)

  @functools.cached_property
  def moments(self) -> float:
    """Bytes."""
    return float(optimizer_bytes(self.optimizer, self.weights, self.mesh))

  @functools.cached_property
  def gathered(self) -> Mapping[str, int]:
    """Count of numbers by part, over all layers, after gathering over `fsdp`."""
    return self._sums(lambda weight: weight.gathered(self.mesh))

  @functools.cached_property
  def layer(self) -> Mapping[str, int]:
    """The same for one repeated layer."""
    return self._sums(
      lambda weight: (
        weight.gathered(self.mesh) // weight.repeats
        if weight.path.startswith("unit.")
        else 0
      )
    )

  def _sums(self, measure: Callable[[Weight], int]) -> Mapping[str, int]:
    sums = dict.fromkeys((*_MARKS, "other"), 0)
    for weight in self.weights:
      sums[weight.part] += measure(weight)
    return sums
