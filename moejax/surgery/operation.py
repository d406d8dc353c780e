"""The interface of an operation on experts: one class describes one operation completely.

An operation is a frozen dataclass. Its fields are its options, each a flag of
`tools.surgery`. It changes the config, chooses for each MoE layer which old experts
each new one is made from, and computes one new array of one layer from the old arrays of
that layer. The same rule makes the parameters and the optimizer's moments, so that they
stay consistent. One line in `moejax.surgery.registry` registers it.

Names of a layer's arrays are those of a checkpoint below the block: `feed_forward.w_in`,
`moe.experts.w_out`, `moe.router.weight`.

Letters: D width, E experts, F expert hidden width, K choices per token, V vocabulary.
"""

import abc
import dataclasses
import enum
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int, Shaped

from moejax.config import Config, MoEConfig
from moejax.config.router import make_router
from moejax.surgery.gates import Gates
from moejax.surgery.measured import Measured
from moejax.surgery.source import Opened

EXPERTS, ROUTER, SHARED = "moe.experts.", "moe.router.", "moe.shared."
OUTPUTS = (f"{EXPERTS}w_out", f"{EXPERTS}out_bias")
"""The arrays in which an expert's output is linear."""

EQUAL, CLOSE, DROP = "equal", "close", "worse until trained"
"""What is expected of the loss: the same function; nearly the same; worse at first."""

_EXPERT_AXES = ("expert", "router_expert")
_EXACT = 1e-5
"""Relative difference of gates up to which it is rounding."""


class Kind(enum.Enum):
  """The kind of values in an array, which decides how it scales."""

  VALUE = "parameter"
  GRADIENT = "gradient"
  """A gradient, a momentum or a first moment."""
  SQUARE = "squared gradient"
  """A second moment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """What the experts of one layer are made from."""

  parents: Sequence[tuple[int, ...]]
  """The old experts of each new one, most important first; empty if none."""
  scale: float = 1.0
  """Multiplies the output of every new expert."""
  weights: Sequence[tuple[float, ...]] | None = None
  """Weights of the parents, which sum to 1; None means equal weights."""
  orders: Mapping[int, Int[np.ndarray, "F"]] | None = None
  """For an old expert, the order in which its neurons enter a mean."""
  made: Sequence[str] | None = None
  """The origin of each new expert without parents, in words."""
  shared: tuple[int, ...] = ()
  """Old experts that become part of the shared expert."""
  shared_gates: tuple[float, ...] = ()
  """The factors of their outputs."""
  rows: Float[np.ndarray, "D E"] | None = None
  """Router weights, if they are measured."""
  exact: bool = False
  """Whether leaving out or averaging experts was found to change nothing but gates."""

  @property
  def sources(self) -> list[int]:
    """The first parent of each new expert."""
    return [parents[0] for parents in self.parents]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """The arrays of one layer, each read on first use."""

  number: int
  """Index of the layer in the model."""
  width: int
  """D."""
  old: MoEConfig
  new: MoEConfig
  arrays: Mapping[str, Shaped[np.ndarray, "..."]]
  """The old arrays."""
  axes: Mapping[str, tuple[str | None, ...]]
  """Logical axis names of the old and new arrays."""
  shapes: Mapping[str, tuple[int, ...]]
  """Shapes of the new arrays."""
  choice: Choice
  kind: Kind = Kind.VALUE
  seed: int = 0
  initial: Callable[[], Mapping[str, Shaped[np.ndarray, "..."]]] = dict
  """Newly initialised arrays of the new router, by name below `moe.router.`."""

  def axis(self, name: str, *of: str) -> int | None:
    """Returns the index of an array's axis that has one of the logical names."""
    own = self.axes[name]
    found = [i for i, axis in enumerate(own) if axis in (of or _EXPERT_AXES)]
    return found[0] if found else None

  def random(self, *words: int) -> np.random.Generator:
    """Returns a generator, the same for the same layer, seed and words."""
    return np.random.default_rng([self.seed, self.number, *words])

  def fresh(self, name: str) -> Shaped[np.ndarray, "..."]:
    """Returns a newly initialised array of the router; its moments are zero."""
    if self.kind is not Kind.VALUE:
      return self.zeros(name)
    return self.initial()[name.removeprefix(ROUTER)]

  def zeros(self, name: str) -> Float[np.ndarray, "..."]:
    """Returns zeros of a new array's shape."""
    return np.zeros(self.shapes[name], np.float32)

  def scaled(self, x: Shaped[np.ndarray, "..."], factor: float) -> np.ndarray:
    """Returns a parameter times a factor, or the moments of such a parameter.

    If w' = c w, then dL/dw' = (1/c) dL/dw. If c is zero, moments become zero, since the
    old ones do not apply to the new parameter.
    """
    if factor == 1:
      return x
    if self.kind is Kind.VALUE:
      return np.asarray(x, np.float32) * np.float32(factor)
    if factor == 0:
      return np.zeros(x.shape, np.float32)
    power = 1 if self.kind is Kind.GRADIENT else 2
    return np.asarray(x, np.float32) / np.float32(factor**power)

  def weighted(self, x: Shaped[np.ndarray, "..."], part: float) -> np.ndarray:
    """Returns the moments of a parameter through which a part of the output flows."""
    if self.kind is Kind.VALUE or part == 1:
      return x
    power = 1 if self.kind is Kind.GRADIENT else 2
    return np.asarray(x, np.float32) * np.float32(part**power)

  def shared_out(
    self, x: Shaped[np.ndarray, "..."], copies: Float[np.ndarray, "E"], axis: int
  ) -> np.ndarray:
    """Returns copies of a parameter, or their moments.

    The gradients of copies sum to that of the original, so each gets its share of it.

    Args:
      x: already repeated along `axis`.
      copies: for each copy, the number of copies of its original.
      axis: axis of the experts.
    """
    if self.kind is Kind.VALUE or np.all(copies == 1):
      return x
    power = 1 if self.kind is Kind.GRADIENT else 2
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(x, np.float32) / copies.reshape(shape).astype(np.float32) ** power


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """The data that an operation can use for its choice."""

  layers: Mapping[int, Layer]
  """The layers that it changes, by number."""
  measured: Measured
  """Statistics over a text, measured on first use."""
  same_in_all: bool = False
  """Whether all layers must choose the same, since one table gives the experts of all."""
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation(abc.ABC):
  """Changes the experts of every MoE layer. Subclasses override the defaults."""

  name: ClassVar[str]
  """Name on the command line."""
  summary: ClassVar[str]
  """One line, for --help."""
  reads: ClassVar[tuple[str, ...]] = ()
  """Fields of the config, or patterns of them, that change shapes and that the user may
  set for this operation."""
  needs_moe: ClassVar[bool] = True
  """Whether it changes MoE layers; if not, it makes them from dense ones."""

  keeps_moments: ClassVar[bool] = True
  """Whether it can also be applied to an optimizer's state."""

  @property
  def reads_text(self) -> bool:
    """Whether it takes measurements over a text."""
    return False

  def may_set(self, field: str) -> bool:
    """Returns whether the user may set a field that changes shapes; see `reads`."""
    return any(fnmatch.fnmatch(field, pattern) for pattern in self.reads)

  def of_run(self, run: Opened) -> "Operation":
    """Returns the operation for a run; for those that compare it with other runs."""
    del run
    return self

  def check(self, old: Config) -> None:
    """Rejects a run that it cannot change.

    Raises:
      UserError: it cannot; the message names the obstacle, and what would work.
    """
    del old

  @abc.abstractmethod
  def new_config(self, old: Config, asked: Config) -> Config:
    """Returns the config of the new run, not yet validated.

    Args:
      old: the source's config.
      asked: the same, with the fields that the user set.
    """

  @abc.abstractmethod
  def choose(self, source: Source) -> dict[int, Choice]:
    """Returns what the new experts of each layer are made from."""

  @abc.abstractmethod
  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    """Returns one new array of one layer.

    Args:
      name: of the array, below the block.
      layer: the layer with the old arrays that it is made from.
    """

  def copied(
    self, name: str, index: tuple[int, ...], x: Shaped[np.ndarray, "..."]
  ) -> Shaped[np.ndarray, "..."]:
    """Returns an array outside the changed feed-forwards; by default, unchanged.

    Args:
      name: of the old array, with all prefixes.
      index: index of its layer, if layers are stacked.
      x: the old array.
    """
    del name, index
    return x

  @property
  def other_sources(self) -> Sequence[tuple[Path, int]]:
    """Directories and steps of the other runs that it reads."""
    return ()

  def scale(self, gates: Gates, choice: Choice) -> float:
    """Returns the factor of all experts' outputs; see `Choice.scale`."""
    del gates
    return choice.scale

  def expected(self, gates: Gates, choice: Choice) -> str:
    """Returns what is expected of the loss: one of the constants above.

    Args:
      gates: of one layer's router on the same tokens, before and after.
      choice: of that layer.
    """
    del gates, choice
    return DROP

  def table(
    self, table: Int[np.ndarray, "V K"], choice: Choice, num_selected: int
  ) -> Int[np.ndarray, "V k"]:
    """Returns the new table of a router that has one; see `mapped_table`."""
    return mapped_table(table, choice, num_selected)


def taken(
  name: str, layer: Layer, sources: Sequence[int] | None = None
) -> Shaped[np.ndarray, "..."]:
  """Returns an array in which each new expert is a copy of one old expert.

  Args:
    name: name of an array that exists before and after.
    layer: the layer; its choice has the parents and the scale.
    sources: the old experts; default the first parent of each new expert.
  """
  x, axis = layer.arrays[name], layer.axis(name)
  if axis is None:
    return x
  sources = layer.choice.sources if sources is None else sources
  copies = np.bincount(sources, minlength=x.shape[axis])[np.asarray(sources)]
  out = layer.shared_out(np.take(x, sources, axis), copies.astype(float), axis)
  return layer.scaled(out, layer.choice.scale) if name in OUTPUTS else out


def is_close(one: Float[np.ndarray, "..."], other: Float[np.ndarray, "..."]) -> bool:
  """Returns whether two arrays of gates differ only by rounding."""
  largest = float(np.max(np.abs(other), initial=0.0))
  return bool(np.max(np.abs(one - other), initial=0.0) <= _EXACT * max(largest, 1e-30))


def summed_over_copies(
  gates: Float[np.ndarray, "T e"], choice: Choice, num_experts: int
) -> Float[np.ndarray, "T E"]:
  """Returns the gates of old experts: for each, the sum over the experts made from it."""
  out = np.zeros((gates.shape[0], num_experts))
  for new, parents in enumerate(choice.parents):
    for parent in parents:
      out[:, parent] += gates[:, new]
  return out


def flat(moe: MoEConfig) -> MoEConfig:
  """Returns the same layer with segments counted as experts, and explicit sizes.

  For operations after which E need not be a multiple of `segments`.
  """
  return dataclasses.replace(
    moe,
    num_experts=moe.fine_experts,
    num_selected=moe.fine_selected,
    hidden=moe.fine_hidden,
    shared_hidden=moe.shared_width,
    segments=1,
  )


def set_copies(moe: MoEConfig, copies: int) -> None:
  """Sets the options of the router for a model in which every expert has copies.

  Args:
    moe: changed in place.
    copies: copies of every expert, next to each other; a token chooses all copies of its
      experts.
  """
  options = make_router(moe).options_with_copies(copies)
  if options:
    moe.options = moe.options | {moe.router: moe.router_options | options}


def mapped_table(
  table: Int[np.ndarray, "V K"], choice: Choice, num_selected: int
) -> Int[np.ndarray, "V k"]:
  """Returns each id's new experts: those made from its old ones.

  Of several copies, an id gets the one given by its number, or all of them if K grows. An
  id whose expert is gone gets the next expert that it does not have yet.

  Args:
    table: the experts of each vocabulary id.
    choice: the same for all layers.
    num_selected: K afterwards.
  """
  num_new = len(choice.parents)
  children: dict[int, list[int]] = {}
  for new, parents in enumerate(choice.parents):
    for parent in parents:
      children.setdefault(parent, []).append(new)
  out = np.zeros((table.shape[0], num_selected), np.int32)
  for token, row in enumerate(table):
    found: list[int] = []
    for expert in row:
      copies = children.get(int(expert), [])
      if copies and num_selected <= len(row):
        copies = [copies[token % len(copies)]]
      found += [new for new in copies if new not in found]
    following = token % num_new
    while len(found) < num_selected:
      if following not in found:
        found.append(following)
      following = (following + 1) % num_new
    out[token] = found[:num_selected]
  return out
