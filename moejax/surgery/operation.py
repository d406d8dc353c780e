"""The interface of an operation on experts: one class describes one completely.

An operation is a frozen dataclass. Its fields are its options, each a flag of
`tools.surgery`. It changes the config, chooses for each MoE layer which old experts
each new one is made of, and computes one new array of one layer from the old arrays of
that layer. The same rule makes the parameters and the optimizer's moments, so that both
stay those of one model. One line in `moejax.surgery.registry` registers it.

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
"""The arrays that an expert's output is linear in."""

EQUAL, CLOSE, DROP = "equal", "close", "will drop until trained"
"""What the loss does: the same function; nearly the same; worse at first."""

_EXPERT_AXES = ("expert", "router_expert")
_EXACT = 1e-5
"""Relative difference of gates that is rounding."""


class Kind(enum.Enum):
  """What an array holds, which decides how it scales."""

  VALUE = "parameter"
  GRADIENT = "gradient"
  """A gradient, a momentum or a first moment."""
  SQUARE = "squared gradient"
  """A second moment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """What the experts of one layer are made of."""

  parents: Sequence[tuple[int, ...]]
  """Of each new expert, the old ones, the most important first; empty if none."""
  scale: float = 1.0
  """Multiplies the output of every new expert."""
  weights: Sequence[tuple[float, ...]] | None = None
  """Of the parents; they sum to 1. None is even."""
  orders: Mapping[int, Int[np.ndarray, "F"]] | None = None
  """Of an old expert, the neurons in the order in which they enter a mean."""
  made: Sequence[str] | None = None
  """What each new expert without parents is made of, in words."""
  shared: tuple[int, ...] = ()
  """Old experts that become part of the shared expert."""
  shared_gates: tuple[float, ...] = ()
  """What their outputs are multiplied by."""
  rows: Float[np.ndarray, "D E"] | None = None
  """Router weights, where they are measured."""
  exact: bool = False
  """Whether what is left out or averaged was seen to change nothing, gates aside."""

  @property
  def sources(self) -> list[int]:
    """The first parent of each new expert."""
    return [parents[0] for parents in self.parents]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """The arrays of one layer, of which nothing is read before it is asked for."""

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
  """Of the new arrays."""
  choice: Choice
  kind: Kind = Kind.VALUE
  seed: int = 0
  initial: Callable[[], Mapping[str, Shaped[np.ndarray, "..."]]] = dict
  """Newly initialised arrays of the new router, by name below `moe.router.`."""

  def axis(self, name: str, *of: str) -> int | None:
    """Returns which axis of an array has one of the logical names."""
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

    If w' = c w, then dL/dw' = (1/c) dL/dw. Moments become zero where c is zero: the old
    ones say nothing of the new parameter.
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

    The gradients of copies sum to that of the original, so each has its part of it.

    Args:
      x: already repeated along `axis`.
      copies: how many copies the original of each has.
      axis: of the experts.
    """
    if self.kind is Kind.VALUE or np.all(copies == 1):
      return x
    power = 1 if self.kind is Kind.GRADIENT else 2
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(x, np.float32) / copies.reshape(shape).astype(np.float32) ** power


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """What an operation can look at before it chooses."""

  layers: Mapping[int, Layer]
  """The layers that it changes, by number."""
  measured: Measured
  """Statistics over a text, measured when they are asked for."""
  same_in_all: bool = False
  """Whether all layers must choose the same: one table gives every layer's experts."""
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation(abc.ABC):
  """Changes the experts of every MoE layer. Subclasses override what differs."""

  name: ClassVar[str]
  """Name on the command line."""
  summary: ClassVar[str]
  """One line, for --help."""
  reads: ClassVar[tuple[str, ...]] = ()
  """Fields of the config, or patterns of them, that change shapes and that the user may
  set for this operation."""
  needs_moe: ClassVar[bool] = True
  """Whether it changes MoE layers; if not, it makes them of dense ones."""

  keeps_moments: ClassVar[bool] = True
  """Whether an optimizer's state can go through it."""

  @property
  def reads_text(self) -> bool:
    """Whether it measures something over a text."""
    return False

  def may_set(self, field: str) -> bool:
    """Returns whether the user may set a field that changes shapes; see `reads`."""
    return any(fnmatch.fnmatch(field, pattern) for pattern in self.reads)

  def of_run(self, run: Opened) -> "Operation":
    """Returns the operation on a run, for those that compare it with other runs."""
    del run
    return self

  def check(self, old: Config) -> None:
    """Rejects a run that it cannot change.

    Raises:
      UserError: naming what stands in the way, and what would not.
    """
    del old

  @abc.abstractmethod
  def new_config(self, old: Config, asked: Config) -> Config:
    """Returns the config of the new run, not yet validated.

    Args:
      old: of the source.
      asked: the same with the fields that the user set.
    """

  @abc.abstractmethod
  def choose(self, source: Source) -> dict[int, Choice]:
    """Returns what the new experts of each layer are made of."""

  @abc.abstractmethod
  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    """Returns one new array of one layer.

    Args:
      name: of the array, below the block.
      layer: whose old arrays it is made of.
    """

  def copied(
    self, name: str, index: tuple[int, ...], x: Shaped[np.ndarray, "..."]
  ) -> Shaped[np.ndarray, "..."]:
    """Returns an array that is part of no changed feed-forward; as it is by default.

    Args:
      name: of the old array, with all prefixes.
      index: of its layer, where layers are stacked.
      x: the old array.
    """
    del name, index
    return x

  @property
  def other_sources(self) -> Sequence[tuple[Path, int]]:
    """Directories and steps of further runs that it reads."""
    return ()

  def scale(self, gates: Gates, choice: Choice) -> float:
    """Returns what multiplies the outputs of all experts; see `Choice.scale`."""
    del gates
    return choice.scale

  def expected(self, gates: Gates, choice: Choice) -> str:
    """Returns what the loss is expected to do: one of the constants above.

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
  """Returns an array of which each new expert is a copy of one old expert.

  Args:
    name: of an array that is there before and after.
    layer: whose choice has the parents and the scale.
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
  """Returns whether two arrays of gates differ by rounding only."""
  largest = float(np.max(np.abs(other), initial=0.0))
  return bool(np.max(np.abs(one - other), initial=0.0) <= _EXACT * max(largest, 1e-30))


def summed_over_copies(
  gates: Float[np.ndarray, "T e"], choice: Choice, num_experts: int
) -> Float[np.ndarray, "T E"]:
  """Returns the gates of old experts: of each, the sum over the experts made of it."""
  out = np.zeros((gates.shape[0], num_experts))
  for new, parents in enumerate(choice.parents):
    for parent in parents:
      out[:, parent] += gates[:, new]
  return out


def flat(moe: MoEConfig) -> MoEConfig:
  """Returns the same layer with segments counted as experts, and its sizes spelled out.

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
    copies: of every expert, side by side; a token chooses all copies of its experts.
  """
  options = make_router(moe).options_with_copies(copies)
  if options:
    moe.options = moe.options | {moe.router: moe.router_options | options}


def mapped_table(
  table: Int[np.ndarray, "V K"], choice: Choice, num_selected: int
) -> Int[np.ndarray, "V k"]:
  """Returns each id's new experts: those made of its old ones.

  Of several copies an id takes one by its number, or all of them if it has so many
  choices. An id whose expert is gone takes the next expert that it does not have.

  Args:
    table: of each vocabulary id.
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
