"""The change that an operation makes: how every new array is made from old ones.

A change maps a source of arrays to the tree of a new run. Its arrays are made layer by
layer when they are written. Layers keep their number, but their place in the checkpoint
may change, since another pattern of layers stacks them differently. Arrays outside the
feed-forwards are copied.

Letters: V vocabulary, E experts, K choices per token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Shaped

from moejax.checkpoint import fingerprint
from moejax.checkpoint.lazy import LazyArray
from moejax.config import Config, MoEConfig
from moejax.errors import ConfigError
from moejax.models.decoder import TABLE, Decoder
from moejax.sharding.rules import is_axes
from moejax.surgery.gates import initial_router
from moejax.surgery.operation import ROUTER, Choice, Kind, Layer, Operation
from moejax.surgery.where import Where, layers_of
from moejax.types import Params

FEED_FORWARD = ("moe.", "feed_forward.")
"""The arrays of a block that an operation makes."""


@runtime_checkable
class Arrays(Protocol):
  """Arrays by dotted name, read part by part."""

  def names(self, prefix: str = "") -> list[str]: ...

  def read(self, name: str, index: tuple[Any, ...] = ()) -> Shaped[np.ndarray, "..."]: ...


class InMemory:
  """The arrays of a tree, for tests and notebooks."""

  def __init__(self, tree: Any):
    self._leaves = fingerprint.named_leaves(tree)

  def names(self, prefix: str = "") -> list[str]:
    return [name for name in self._leaves if name.startswith(prefix)]

  def read(self, name: str, index: tuple[Any, ...] = ()) -> Shaped[np.ndarray, "..."]:
    return np.array(self._leaves[name])[(*index, ...)]


class _LayerArrays(Mapping[str, np.ndarray]):
  """The arrays of one block below a prefix, each read on first use."""

  def __init__(self, arrays: Arrays, prefix: str, where: Where):
    self._arrays, self._where = arrays, where
    self._prefix = f"{prefix}{where.block}."

  def __getitem__(self, name: str) -> np.ndarray:
    if name not in self:
      raise KeyError(name)
    repeat = self._where.repeat
    index = () if repeat is None else (repeat,)
    return self._arrays.read(self._prefix + name, index)

  def __iter__(self) -> Iterator[str]:
    names = self._arrays.names(self._prefix)
    return (name.removeprefix(self._prefix) for name in names)

  def __len__(self) -> int:
    return len(self._arrays.names(self._prefix))

  def __contains__(self, name: object) -> bool:
    return self._prefix + str(name) in self._arrays.names(self._prefix + str(name))


def layer_arrays(
  arrays: Arrays, prefix: str, where: Where
) -> Mapping[str, Shaped[np.ndarray, "..."]]:
  """Returns the arrays of one layer by their names below the block, not yet read."""
  return _LayerArrays(arrays, prefix, where)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """An operation on a run, before any array is read."""

  operation: Operation
  old: Config
  new: Config
  old_model: Decoder
  new_model: Decoder
  seed: int = 0

  @functools.cached_property
  def old_layers(self) -> list[Where]:
    return layers_of(self.old_model)

  @functools.cached_property
  def new_layers(self) -> list[Where]:
    return layers_of(self.new_model)

  @functools.cached_property
  def shapes(self) -> Params:
    """Shapes and dtypes of the new parameters."""
    return self.new_model.shapes()

  @functools.cached_property
  def made(self) -> tuple[int, ...]:
    """Numbers of the layers whose feed-forward the operation makes."""
    return self.new_model.moe_layers

  @functools.cached_property
  def _names(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Old shapes, new shapes and axes of both, by dotted name."""
    axes: dict[str, Any] = {}
    for model in (self.old_model, self.new_model):
      flat = jax.tree_util.tree_leaves_with_path(model.logical_axes(), is_leaf=is_axes)
      axes |= {fingerprint.leaf_name(path): names for path, names in flat}
    old = fingerprint.named_leaves(self.old_model.shapes())
    return old, fingerprint.named_leaves(self.shapes), axes

  def check(self) -> None:
    """Rejects a change of shapes that is not the operation's.

    Raises:
      ConfigError: an array outside the feed-forwards would have another shape.
    """
    old, new, _ = self._names
    for number, where in enumerate(self.new_layers):
      source = self.old_layers[number]
      for name in self._below(new, where):
        was, now = old.get(f"{source.block}.{name}"), new[f"{where.block}.{name}"]
        if name.startswith(FEED_FORWARD) and number in self.made:
          continue
        self._same(name, was, now, source, where)

  def _same(self, name: str, was: Any, now: Any, source: Where, where: Where) -> None:
    sizes = [
      None if leaf is None else leaf.shape[of.repeat is not None :]
      for leaf, of in ((was, source), (now, where))
    ]
    if sizes[0] != sizes[1]:
      raise ConfigError(
        f"{name} is {sizes[0]} in the run and would be {sizes[1]}: the operation "
        f"{self.operation.name} does not change it. Leave out the --config flags that "
        "change the model."
      )

  def _below(self, leaves: Mapping[str, Any], where: Where) -> list[str]:
    prefix = f"{where.block}."
    return [n.removeprefix(prefix) for n in leaves if n.startswith(prefix)]

  def layer(
    self,
    number: int,
    arrays: Arrays,
    choice: Choice | None = None,
    prefix: str = "params.",
    kind: Kind = Kind.VALUE,
  ) -> Layer:
    """Returns one layer.

    Args:
      number: number of a changed layer.
      arrays: the arrays of the old run.
      choice: None before it is made.
      prefix: prefix of the arrays to use, such as `opt_state.0.mu.`.
      kind: what these arrays hold.
    """
    _, new, axes = self._names
    source, where = self.old_layers[number], self.new_layers[number]
    own: dict[str, tuple[str | None, ...]] = {}
    for of in (source, where):
      for name in self._below(axes, of):
        own[name] = axes[f"{of.block}.{name}"][of.repeat is not None :]
    shapes = {
      name: new[f"{where.block}.{name}"].shape[where.repeat is not None :]
      for name in self._below(new, where)
    }
    moe = self.new_model.stacks[where.stack].moe
    width = self.new_model.config.width
    return Layer(
      number=number,
      width=width,
      old=self.old_model.stacks[source.stack].moe,
      new=moe,
      arrays=_LayerArrays(arrays, prefix, source),
      axes=own,
      shapes=shapes,
      choice=choice or Choice(parents=[]),
      kind=kind,
      seed=self.seed,
      initial=functools.partial(_initial, moe, width, self.seed, number),
    )

  def arrays(self, source: Arrays, choices: Mapping[int, Choice]) -> Params:
    """Returns the new parameters, as arrays that are made when they are read.

    Args:
      source: the old arrays.
      choices: the choices of the changed layers.
    """
    make = self.maker(source, choices)
    return jax.tree_util.tree_map_with_path(
      lambda path, shape: make(fingerprint.leaf_name(path), shape), self.shapes
    )

  def maker(
    self,
    source: Arrays,
    choices: Mapping[int, Choice],
    prefix: str = "params.",
    kind: Kind = Kind.VALUE,
  ) -> Callable[[str, Any], LazyArray]:
    """Returns a function from the name and shape of a new parameter to an array.

    Args:
      source: the old arrays.
      choices: the choices of the changed layers.
      prefix: prefix of the old arrays: parameters, or moments like them.
      kind: what these arrays hold.
    """
    made = {
      number: self.layer(number, source, choices[number], prefix, kind)
      for number in self.made
    }
    by_block: dict[str, list[int]] = {}
    for number, where in enumerate(self.new_layers):
      by_block.setdefault(where.block, []).append(number)

    def make(name: str, shape: Any) -> LazyArray:
      for block, numbers in by_block.items():
        if name.startswith(f"{block}."):
          below = name.removeprefix(f"{block}.")
          one = functools.partial(self._one, source, prefix, below, made)
          stacked = self.new_layers[numbers[0]].repeat is not None
          return _lazy(shape, numbers, one, stacked)
      if name == TABLE:
        return self._table(source, choices, shape)
      return _whole(shape, functools.partial(self._copied, source, prefix + name))

    return make

  def _one(
    self, source: Arrays, prefix: str, name: str, made: Mapping[int, Layer], number: int
  ) -> np.ndarray:
    """Returns one new array of one layer."""
    if number in made and name.startswith(FEED_FORWARD):
      return self.operation.leaf(name, made[number])
    where = self.old_layers[number]
    index = () if where.repeat is None else (where.repeat,)
    return self._copied(source, f"{prefix}{where.block}.{name}", index)

  def _copied(self, source: Arrays, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    return self.operation.copied(name, index, source.read(name, index))

  def _table(
    self, source: Arrays, choices: Mapping[int, Choice], shape: Any
  ) -> LazyArray:
    """Returns the new table, read at once since it is small."""
    selected = self.new.moe.fine_selected

    def read() -> np.ndarray:
      if not source.names(f"params.{TABLE}"):
        return new_table(self.new_model).astype(np.float32)
      old = source.read(f"params.{TABLE}").astype(np.int32)
      choice = next(iter(choices.values()))
      return self.operation.table(old, choice, selected).astype(np.float32)

    return _whole(shape, read)


@functools.lru_cache(maxsize=2)
def _initial_cached(key: "_Key") -> dict[str, np.ndarray]:
  return initial_router(key.moe, key.width, key.seed)


@dataclasses.dataclass(frozen=True)
class _Key:
  """Arguments of `initial_router`, since a config itself cannot be a cache key."""

  seed: int
  width: int
  text: str
  moe: MoEConfig = dataclasses.field(compare=False)


def _initial(moe: MoEConfig, width: int, seed: int, number: int) -> dict[str, np.ndarray]:
  key = int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
  return _initial_cached(_Key(key, width, repr(moe), moe))


def _whole(shape: Any, read: Callable[[], np.ndarray]) -> LazyArray:
  """Returns an array that is read at once."""
  return LazyArray(
    shape=shape.shape,
    dtype=np.dtype(shape.dtype),
    read=lambda index: np.asarray(np.asarray(read()).astype(shape.dtype)[index]),
  )


def _lazy(
  shape: Any, numbers: list[int], one: Callable[[int], np.ndarray], stacked: bool
) -> LazyArray:
  """Returns an array of one layer, or of several that are made one by one."""

  def read(index: tuple[slice, ...]) -> np.ndarray:
    if not stacked:
      return _checked(one(numbers[0]), shape.shape, shape.dtype)[index]
    rows = [
      _checked(one(number), shape.shape[1:], shape.dtype)[index[1:]]
      for number in numbers[index[0]]
    ]
    return np.stack(rows)

  return LazyArray(
    shape=shape.shape,
    dtype=np.dtype(shape.dtype),
    read=read,
    stacked=1 if stacked else 0,
  )


def _checked(x: np.ndarray, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  if x.shape != tuple(shape):
    raise ValueError(f"an operation made {x.shape} where {tuple(shape)} is wanted")
  return np.asarray(x).astype(dtype)


def new_table(model: Decoder) -> np.ndarray:
  """Returns the table of a table-based router, made without counts of a text: [V, K]."""
  moe = model.moe
  return model.router.table(model.vocab_size, moe.fine_experts, moe.fine_selected, None)


def router_arrays(operation: Operation, layer: Layer) -> dict[str, np.ndarray]:
  """Returns the new arrays of a layer's router, by name below `moe.router.`."""
  return {
    name.removeprefix(ROUTER): operation.leaf(name, layer)
    for name in layer.shapes
    if name.startswith(ROUTER)
  }
