"""Runs the experts, on one device or spread over a mesh.

Tokens are sharded over `data`, `fsdp` and `expert`, experts over `expert`, their hidden
width over `tensor`, their model width over `fsdp`. Inside one `jax.shard_map` each
device gathers its experts' weights over `fsdp` (whose gradient is reduce-scattered),
exchanges its groups' tokens over `expert`, and sums over `tensor`.

Ways to exchange tokens (`--config.moe.exchange`):

  all_to_all  slots [E, C] out and back, with static sizes
  ragged      exactly each expert's sorted rows
  ring        every device of the expert axis gets all tokens of the axis and adds its
              experts' share
  gspmd       no explicit exchange: dense weights and sharding constraints

Each carries the rows of a layout (`--config.moe.dispatcher`), whichever router placed the
tokens; docs/sharding.md has a table of the valid combinations.

Letters: G groups, T tokens of a group, D width, E experts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import parts
from moejax.config.exchange_rule import choose
from moejax.dispatch.registry import DISPATCHERS
from moejax.exchange.all_to_all import all_to_all
from moejax.exchange.base import AXIS, Exchange, Lost, Options, none
from moejax.exchange.gspmd import gspmd
from moejax.exchange.ragged import ragged
from moejax.exchange.ring import ring
from moejax.experts.weights import ExpertWeights
from moejax.platform import target_platform
from moejax.routing.placement import Mixture, Placement
from moejax.sharding.mesh import (
  TOKENS,
  is_cut_over,
  mesh_in_scope,
  num_token_shards,
  shard_map,
)
from moejax.sharding.rules import RULES

EXCHANGES: Mapping[str, Exchange] = {
  "none": none,
  "all_to_all": all_to_all,
  "ragged": ragged,
  "ring": ring,
}
_WEIGHT_AXES = {
  "w_in": ("expert", "width", "hidden"),
  "w_gate": ("expert", "width", "hidden"),
  "w_out": ("expert", "hidden", "width"),
  "b_in": ("expert", "hidden"),
  "b_gate": ("expert", "hidden"),
  "b_out": ("expert", "width"),
}


@parts.of_part(parts.DISPATCH)
def run(
  x: Float[Array, "G T D"],
  placement: Placement,
  weights: ExpertWeights,
  options: Options,
) -> tuple[Float[Array, "G T D"], Lost | None]:
  """Returns the experts' output, for any placement of experts on devices.

  Args:
    x: tokens of all groups.
    placement: of all groups.
    weights: of all experts.
    options: how experts are run and tokens are exchanged.

  Returns:
    The gate-weighted sum of each token's experts, and what did not fit a bounded buffer
    (None unless the exchange is ragged).

  Raises:
    ConfigError: this exchange cannot carry this layout, or this placement.
  """
  mesh = mesh_in_scope()
  kind, dispatcher = choose(
    "auto" if mesh is None else options.exchange,
    options.dispatcher,
    devices=1 if mesh is None else mesh.shape[AXIS],
    token_shards=1 if mesh is None else num_token_shards(mesh),
    num_groups=placement.num_groups,
    num_selected=options.num_selected,
    capacity=placement.capacity is not None,
    mixes=isinstance(placement, Mixture),
    platform=target_platform(),
  )
  layout = DISPATCHERS[dispatcher]
  if mesh is None:
    return none(x, placement, layout, weights, options)
  if kind == "gspmd":
    return gspmd(x, placement, weights, options.activation), None

  def on_device(x: Array, placement: Placement, weights: ExpertWeights) -> Any:
    # Everything varies over every axis: custom_vjp functions return such gradients, and
    # the sums over axes are then the transpose of these lines.
    x, placement = _vary((x, placement), "tensor")
    # Before the gather, so that gradients are scattered before they are summed.
    weights = _gather_width(_vary(weights, "data"))
    y, lost = EXCHANGES[kind](x, placement, layout, weights, options)
    lost = jax.tree.map(lambda leaf: jax.lax.pmax(leaf, "tensor"), lost)
    with parts.scope(parts.EXCHANGE):
      return jax.lax.psum(y, "tensor"), lost

  specs = jax.tree_util.tree_map_with_path(
    lambda path, _: RULES.spec(_WEIGHT_AXES[path[0].name]), weights
  )
  y, lost = shard_map(
    on_device, in_specs=(TOKENS, TOKENS, specs), out_specs=(TOKENS, TOKENS)
  )(x, placement, weights)
  return y, jax.tree.map(lambda leaf: leaf.sum(axis=0), lost)


def _vary(tree: Any, axis: str) -> Any:
  return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis, to="varying"), tree)


@parts.of_part(parts.EXCHANGE)
def _gather_width(weights: ExpertWeights) -> ExpertWeights:
  """Gathers weights sharded over `fsdp`; the gradient is reduce-scattered."""

  def gather(w: Array | None, axis: int) -> Array | None:
    if w is None or not is_cut_over("fsdp"):
      return w
    if w.shape[0] == 1:
      # The TPU compiler scatters gradients with a leading dimension of one by an
      # all-reduce, at twice the bytes.
      return jax.lax.all_gather(w[0], "fsdp", axis=axis - 1, tiled=True)[None]
    return jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)

  def varying(bias: Array | None, axis: str) -> Array | None:
    return None if bias is None else _vary(bias, axis)

  w_in, w_out = gather(weights.w_in, 1), gather(weights.w_out, 2)
  assert w_in is not None and w_out is not None
  b_out = varying(gather(weights.b_out, 1), "tensor")
  if b_out is not None:
    # The sum over `tensor` must count the bias once.
    b_out = jnp.where(jax.lax.axis_index("tensor") == 0, b_out, jnp.zeros_like(b_out))
  return ExpertWeights(
    w_in=w_in,
    w_out=w_out,
    w_gate=gather(weights.w_gate, 1),
    b_in=varying(weights.b_in, "fsdp"),
    b_gate=varying(weights.b_gate, "fsdp"),
    b_out=b_out,
  )
