"""A stack of blocks: rebuilt from plain parameters, scanned, rematerialised.

Layers follow a pattern: `dense_prefix` dense layers, then repeats of a unit of `every`
layers, one of them MoE, then the remaining layers. The repeats are one `jax.lax.scan`
over stacked parameters, so compile time does not grow with depth. Parameters of a stack:

  prefix / "0", "1", ...        one block each
  unit   / "0", "1", ...        one block of the unit each, stacked over repeats
  suffix / "0", ...             one block each
  relative_bias                 [buckets, H], under relative positions
  norm                          [D], of an encoder's output
  embedding / table             [V, D], of an encoder that has one of its own

Letters: B batch, S sequence, D width, H heads, R repeats, E experts, L layers.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import ModelConfig, MoEConfig
from moejax.config.pattern import Pattern, layer_pattern
from moejax.config.router import make_router
from moejax.layers.block import Block, BlockInputs
from moejax.layers.cache import KeyValueCache, LayerCache, empty_cache
from moejax.layers.embedding import TokenTable
from moejax.layers.moe import LayerInputs, MoEAux
from moejax.layers.norm import RMSNorm
from moejax.layers.relative_bias import RelativeBias
from moejax.layers.router import present_experts
from moejax.models.per_layer import PARTS, by_part, windowed_by_part
from moejax.models.shell import Shell
from moejax.models.unit import remat, unrolled
from moejax.routing.base import RouterStats
from moejax.sharding.rules import is_axes
from moejax.types import Params


class LayerPath(NamedTuple):
  """The place of a layer's parameters."""

  part: str
  name: str
  """Name of the block in its part."""
  repeat: int
  """Index of the unit's repeat; 0 in the other parts."""


def split_key(key: Key[Array, ""] | None, count: int) -> Key[Array, "R"] | None:
  return None if key is None else jax.random.split(key, count)


class Stack:
  """The blocks of an encoder or a decoder, without their parameters."""

  def __init__(
    self,
    model: ModelConfig,
    moe: MoEConfig,
    *,
    is_encoder: bool = False,
    has_cross: bool = False,
    vocab_size: int = 0,
  ):
    """Defines a stack.

    Args:
      model: config, with the stack's number of layers.
      moe: config of the stack's MoE layers.
      is_encoder: whether attention sees later tokens, and the output is normalised.
      has_cross: whether each block attends to an encoder's output.
      vocab_size: V of the stack's own token table; 0 means it has none.
    """
    self.config, self.moe = model, moe
    self.router = make_router(moe)
    self.pattern = layer_pattern(model.num_layers, moe)

    def block(is_moe: bool) -> Shell:
      def make(key: Key[Array, ""]) -> Block:
        return Block(model, moe, is_moe, nnx.Rngs(params=key), cross=has_cross)

      return Shell(make)

    self._blocks = {is_moe: block(is_moe) for is_moe in set(self.pattern.is_moe)}
    self._others: dict[str, Shell] = {}
    if model.positions == "relative":
      self._others["relative_bias"] = Shell(
        lambda key: RelativeBias(model, nnx.Rngs(params=key), bidirectional=is_encoder)
      )
    if is_encoder:
      self._others["norm"] = Shell(lambda _: RMSNorm(model.width, epsilon=model.norm_eps))
    if vocab_size:
      self._others["embedding"] = Shell(
        lambda key: TokenTable(
          model, vocab_size, nnx.Rngs(params=jax.random.fold_in(key, 1))
        )
      )

  @property
  def moe_layers(self) -> tuple[int, ...]:
    """Indices of the MoE layers, counted within the stack."""
    if self.moe.dense_twin:
      return ()
    return tuple(i for i, is_moe in enumerate(self.pattern.is_moe) if is_moe)

  @property
  def paths(self) -> tuple[LayerPath, ...]:
    """The place of each layer's parameters, in order."""
    found = []
    for part in PARTS:
      repeats = self.pattern.repeats if part == "unit" else 1
      names = range(len(getattr(self.pattern, part)))
      found += [LayerPath(part, str(name), r) for r in range(repeats) for name in names]
    return tuple(found)

  def block(
    self, params: Params, inputs: BlockInputs, path: LayerPath
  ) -> tuple[Block, BlockInputs]:
    """Returns one block with its parameters, and the inputs as this layer reads them.

    Args:
      params: of the stack.
      inputs: shared by all blocks.
      path: of the layer; `repeat` may be traced, so that repeats share a program.
    """
    own = params[path.part][path.name]
    windowed = windowed_by_part(self.config, self.pattern)[path.part].get(path.name)
    if path.part == "unit":
      own, windowed = jax.tree.map(lambda leaf: leaf[path.repeat], (own, windowed))
    is_moe = getattr(self.pattern, path.part)[int(path.name)]
    return self._blocks[is_moe].merge(own), inputs.of_layer(windowed)

  def init(self, part_keys: Sequence[Key[Array, ""]]) -> Params:
    """Returns newly initialised parameters, from a key for each of `PARTS`."""
    params: Params = {}
    for part, part_key in zip(PARTS, part_keys, strict=True):
      params[part] = {}
      for index, is_moe in enumerate(getattr(self.pattern, part)):
        block, block_key = self._blocks[is_moe], jax.random.fold_in(part_key, index)
        if part == "unit":
          keys = jax.random.split(block_key, self.pattern.repeats)
          params[part][str(index)] = jax.vmap(block.init)(keys)
        else:
          params[part][str(index)] = block.init(block_key)
    # Disjoint from the keys of blocks, which fold in their index.
    key = jax.random.fold_in(part_keys[0], 2**31 - 1)
    return params | {name: shell.init(key) for name, shell in self._others.items()}

  def shapes(self) -> Params:
    """Returns the shape and dtype of every parameter: what `init` would allocate."""

    def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((self.pattern.repeats, *leaf.shape), leaf.dtype)

    return self._collected(
      lambda shell: shell.shapes, lambda block: jax.tree.map(stacked, block)
    )

  def logical_axes(self) -> Params:
    """Returns the dimension names of every parameter."""

    def stacked(block: Params) -> Params:
      return jax.tree.map(lambda names: ("layer", *names), block, is_leaf=is_axes)

    return self._collected(lambda shell: shell.axes, stacked)

  def trained(self) -> Params:
    """Returns which parameters are optimized, as a tree of bools."""
    return self._collected(lambda shell: shell.trained, lambda block: block)

  def _collected(
    self, of: Callable[[Shell], Params], stacked: Callable[[Params], Params]
  ) -> Params:
    """Returns what `of` says of each module; `stacked`, for the repeats of the unit."""
    found: Params = {}
    for part in PARTS:
      blocks = [of(self._blocks[is_moe]) for is_moe in getattr(self.pattern, part)]
      found[part] = {
        str(i): stacked(block) if part == "unit" else block
        for i, block in enumerate(blocks)
      }
    return found | {name: of(shell) for name, shell in self._others.items()}

  def update_routers(self, params: Params, stats: RouterStats) -> Params:
    """Updates the untrained router parameters; see `Decoder.update_routers`."""
    params = dict(params)
    for part, blocks in by_part(stats, self.pattern).items():
      params[part] = dict(params[part])
      for name, seen in blocks.items():
        block = params[part][name]
        router = block["moe"]["router"]
        router = router | self.router.update(router, seen)
        params[part][name] = block | {"moe": block["moe"] | {"router": router}}
    return params

  def present_experts(self, key: Key[Array, ""]) -> Bool[Array, "L E"] | None:
    """Samples the experts of each MoE layer that take part in a step; None means all."""
    if not self.moe.expert_dropout or not self.moe_layers:
      return None
    # Disjoint from the microbatch keys, which fold in the microbatch index.
    keys = jax.random.split(jax.random.fold_in(key, 2**31 - 1), len(self.moe_layers))
    return jax.vmap(lambda key: present_experts(key, self.moe))(keys)

  def unrolled(self) -> "Stack":
    """Returns the same stack with a separate block for every layer; see `unroll`."""
    stack = copy.copy(self)
    stack.pattern = Pattern(self.pattern.is_moe, (), (), 0)
    return stack

  def unroll(self, params: Params) -> Params:
    """Returns the parameters for `unrolled`: the same names, all blocks in the prefix."""
    blocks: list[Params] = []
    for part in PARTS:
      for repeat in range(self.pattern.repeats if part == "unit" else 1):
        for index in range(len(getattr(self.pattern, part))):
          block = params[part][str(index)]
          if part == "unit":
            block = jax.tree.map(lambda leaf, i=repeat: leaf[i], block)
          blocks.append(block)
    prefix = {str(index): block for index, block in enumerate(blocks)}
    return params | {"prefix": prefix, "unit": {}, "suffix": {}}

  def init_cache(self, batch: int, length: int) -> dict[str, dict[str, LayerCache]]:
    """Returns empty caches of self-attention."""
    layers: dict[str, dict[str, LayerCache]] = {}
    for part in PARTS:
      stack = (self.pattern.repeats,) if part == "unit" else ()
      layer = empty_cache(self.config, batch, length, *stack)
      layers[part] = {str(i): layer for i in range(len(getattr(self.pattern, part)))}
    return layers

  def remember(
    self, params: Params, memory: Float[Array, "B M D"]
  ) -> dict[str, dict[str, KeyValueCache]]:
    """Returns each block's cross-attention keys and values of the encoder's output."""
    layers: dict[str, dict[str, KeyValueCache]] = {}
    for part in PARTS:
      layers[part] = {}
      for index, is_moe in enumerate(getattr(self.pattern, part)):
        shell, name = self._blocks[is_moe], str(index)

        def one(block: Params, shell: Shell = shell) -> KeyValueCache:
          return shell.merge(block).cross_attention.remember(memory)

        own = params[part][name]
        layers[part][name] = jax.lax.map(one, own) if part == "unit" else one(own)
    return layers

  def bias(
    self,
    params: Params,
    num_queries: int,
    num_keys: int,
    offset: Int[Array, ""] | int = 0,
  ) -> Float[Array, "1 H S M"] | None:
    """Returns the bias of relative positions; None under other positions."""
    if "relative_bias" not in self._others:
      return None
    table = self._others["relative_bias"].merge(params["relative_bias"])
    return table(num_queries, num_keys, offset)

  def embedding(self, params: Params) -> TokenTable | None:
    """Returns the stack's own token table; None if it has none."""
    if "embedding" not in self._others:
      return None
    return self._others["embedding"].merge(params["embedding"])

  def normalise(self, params: Params, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Returns an encoder's output, given the output of its last block."""
    return self._others["norm"].merge(params["norm"])(x)

  def run(
    self,
    params: Params,
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    key: Key[Array, ""] | None,
    told: LayerInputs,
    *,
    cache: dict[str, dict[str, LayerCache]] | None = None,
    remembered: dict[str, dict[str, KeyValueCache]] | None = None,
  ) -> tuple[Float[Array, "B S D"], list[MoEAux], dict[str, dict[str, LayerCache]]]:
    """Runs prefix, repeated units and suffix.

    Args:
      params: of the stack.
      x: embedded tokens.
      inputs: shared by all blocks.
      key: randomness of this step.
      told: inputs of the MoE layers, with a leading axis of MoE layers.
      cache: of self-attention.
      remembered: from `remember`; None computes it in each block.

    Returns:
      The last block's output, aux with a leading axis of MoE layers, one for each part
      that has any, and the extended cache.
    """
    auxes: list[MoEAux] = []
    layers: dict[str, dict[str, LayerCache]] = {}
    windowed = windowed_by_part(self.config, self.pattern)
    by_layer = by_part(told, self.pattern)
    for number, part in enumerate(PARTS):
      kinds = getattr(self.pattern, part)
      part_key = None if key is None else jax.random.fold_in(key, number)
      repeats = self.pattern.repeats if part == "unit" else 1
      own = [{} if of is None else of[part] for of in (cache, remembered)]
      stacked = (params[part], own[0], by_layer[part], windowed[part], own[1])
      if part != "unit":
        stacked = jax.tree.map(lambda leaf: leaf[None], stacked)
      stacked = (*stacked, split_key(part_key, repeats))
      if not kinds:
        layers[part] = {}
        continue

      def unit(x: Any, layer: Any, kinds: tuple[bool, ...] = kinds) -> Any:
        return self._unit(kinds, x, inputs, *layer)

      in_scan = self.config.scan_layers and repeats > 1
      policy = self.config.remat if inputs.options.train else "none"
      unit = remat(unit, policy, in_scan=in_scan)
      if in_scan:
        x, (aux, new_cache) = jax.lax.scan(unit, x, stacked)
      else:
        x, (aux, new_cache) = unrolled(unit, x, stacked, repeats)
      # [repeats, MoE layers of the unit, ...] -> [MoE layers, ...]
      if aux is not None:
        auxes.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux))
      if part != "unit":
        new_cache = jax.tree.map(lambda leaf: leaf[0], new_cache)
      layers[part] = new_cache
    return x, auxes, layers

  def _unit(
    self,
    kinds: tuple[bool, ...],
    x: Float[Array, "B S D"],
    inputs: BlockInputs,
    params: Params,
    cache: dict[str, LayerCache],
    told: dict[str, LayerInputs],
    windowed: dict[str, Bool[Array, ""]],
    remembered: dict[str, KeyValueCache],
    key: Key[Array, ""] | None,
  ) -> tuple[Float[Array, "B S D"], tuple[MoEAux | None, dict[str, LayerCache]]]:
    """Runs the blocks of one repeat in order and stacks their aux."""
    auxes, new_cache = [], {}
    for index, is_moe in enumerate(kinds):
      name = str(index)
      block = self._blocks[is_moe].merge(params[name])
      block_key = None if key is None else jax.random.fold_in(key, index)
      own = inputs.of_layer(windowed.get(name))
      x, aux, layer = block(
        *(x, own),
        key=block_key,
        cache=cache.get(name),
        layer=told.get(name),
        remembered=remembered.get(name),
      )
      if aux is not None:
        auxes.append(aux)
      if layer is not None:
        new_cache[name] = layer
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *auxes) if auxes else None
    return x, (stacked, new_cache)
