"""Expert parallelism: sends tokens to the devices that hold their experts, and back.

Tokens are sharded over `data`, `fsdp` and `expert`, experts over `expert`, their hidden
width over `tensor`, their model width over `fsdp`. Inside one `jax.shard_map` each
device gathers its experts' weights over `fsdp` (whose gradient is reduce-scattered),
exchanges its groups' tokens over `expert`, and sums over `tensor`.

How tokens travel (`--config.moe.exchange`):

  all_to_all  capacity buffers [E, C] out and back, with static sizes
  ragged      dropless: exactly each expert's rows (see `ragged`)
  ring        every device of the expert axis gets all tokens of the axis and adds its
              experts' share: an all-gather and a reduce-scatter, which run as rings
  gspmd       no explicit exchange: dense masks and sharding constraints, from which the
              compiler derives all-to-alls. The readable reference, and the fallback if
              groups cannot be divided over the devices

Letters: G groups of this device, T tokens of a group, D width, E experts, P devices of
the expert axis, L = E/P local experts, C slots per expert and group, K choices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moejax.config.exchange_rule import choose
from moejax.dispatch import grouped
from moejax.dispatch.base import Dispatcher
from moejax.dispatch.gather import slot_moves
from moejax.exchange import ragged as exchange_lib
from moejax.experts import permute
from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.platform import target_platform
from moejax.routing.base import Routing
from moejax.sharding.mesh import (
  TOKEN_AXES,
  is_cut_over,
  mesh_in_scope,
  num_token_shards,
  shard_map,
)
from moejax.sharding.rules import RULES
from moejax.types import pytree

AXIS = "expert"
SAVED_NAME = "expert_exchange"
"""Name of values a remat policy saves, so that recomputation does not resend them."""

_TOKENS = PartitionSpec(TOKEN_AXES)
_WEIGHT_AXES = {
  "w_in": ("expert", "width", "hidden"),
  "w_gate": ("expert", "width", "hidden"),
  "w_out": ("expert", "hidden", "width"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeOptions:
  """How tokens travel between devices; see the flags of the same names."""

  exchange: str = "auto"
  exchange_buffer: float | None = None
  """ragged: rows a device can receive, as a multiple of an even load; None fits any
  load. Excess rows are dropped and counted."""
  exchange_chunks: int = 1
  """all_to_all: pieces sent one by one, so that communication overlaps computation."""
  expert_chunks: int = 1
  """ragged, ring: parts of the rows that are computed one after the other."""


@pytree
class Lost:
  """Counts of what did not fit a bounded buffer; in a `shard_map`, one row per device."""

  assignments: Float[Array, "*p E"]
  """Lost assignments by expert."""
  tokens: Float[Array, "*p"]
  """Tokens that had kept assignments and lost all of them."""


def over_groups(
  function: Callable[[Any, Any], Any], mapped: Any, shared: Any, num_groups: int
) -> Any:
  """Computes function(mapped, shared), each device on its own groups.

  Args:
    function: returns trees whose leaves have a leading axis of groups.
    mapped: tree whose leaves have a leading axis of groups.
    shared: tree shared by all groups; replicated.
    num_groups: groups in `mapped`. If not divisible by the devices, all compute all.
  """
  mesh = mesh_in_scope()
  if mesh is None or num_groups % num_token_shards(mesh):
    return function(mapped, shared)
  run = shard_map(function, in_specs=(_TOKENS, PartitionSpec()), out_specs=_TOKENS)
  return run(mapped, shared)


def resolve(
  options: ExchangeOptions, routing: Routing, *, dispatcher: str, mesh: AbstractMesh
) -> str:
  """Applies `choose` to a routing on a mesh."""
  return choose(
    options.exchange,
    dispatcher,
    devices=mesh.shape[AXIS],
    token_shards=num_token_shards(mesh),
    num_groups=routing.probs.shape[0],
    num_selected=routing.num_selected or 1,
    capacity=routing.capacity is not None,
    dense=routing.dense_dispatch is not None,
  )


def run(
  x: Float[Array, "G T D"],
  routing: Routing,
  weights: ExpertWeights,
  dispatcher: Dispatcher,
  *,
  activation: str,
  dispatcher_name: str,
  options: ExchangeOptions,
) -> tuple[Float[Array, "G T D"], Lost | None]:
  """Returns the experts' output, for any placement of experts on devices.

  Args:
    x: tokens of all groups.
    routing: of all groups.
    weights: of all experts.
    dispatcher: runs experts that are all on one device.
    activation: of the experts.
    dispatcher_name: as in the config.
    options: how tokens travel.

  Returns:
    The gate-weighted sum of each token's experts, and what did not fit a bounded buffer
    (None unless the exchange is ragged).
  """
  mesh = mesh_in_scope()
  if mesh is None:
    return dispatcher(x, routing, weights, activation=activation), None
  kind = resolve(options, routing, dispatcher=dispatcher_name, mesh=mesh)
  if kind == "gspmd":
    return _constrained(x, routing, weights, activation), None

  def on_device(x: Array, routing: Routing, weights: ExpertWeights) -> Any:
    # Everything varies over every axis: custom_vjp functions return such gradients, and
    # the sums over axes are then the transpose of these lines.
    x, routing = _vary((x, routing), "tensor")
    # Before the gather, so that gradients are scattered before they are summed.
    weights = _gather_width(_vary(weights, "data"))
    if kind == "none":
      y, lost = dispatcher(x, routing, weights, activation=activation), None
    else:
      y, lost = EXCHANGES[kind](x, routing, weights, activation, options)
    y = jax.lax.psum(y, "tensor")
    if lost is None:
      none = jnp.zeros_like(routing.load[:1], jnp.float32)
      lost = Lost(assignments=none, tokens=none[:, 0])
    return y, jax.tree.map(lambda leaf: jax.lax.pmax(leaf, "tensor"), lost)

  specs = jax.tree_util.tree_map_with_path(
    lambda path, _: RULES.spec(_WEIGHT_AXES[path[0].name]), weights
  )
  y, lost = shard_map(
    on_device, in_specs=(_TOKENS, _TOKENS, specs), out_specs=(_TOKENS, _TOKENS)
  )(x, routing, weights)
  if kind != "ragged":
    return y, None
  return y, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), lost)


def _vary(tree: Any, axis: str) -> Any:
  return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axis, to="varying"), tree)


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

  w_in, w_out = gather(weights.w_in, 1), gather(weights.w_out, 2)
  assert w_in is not None and w_out is not None
  return ExpertWeights(w_in=w_in, w_out=w_out, w_gate=gather(weights.w_gate, 1))


def _all_to_all(
  x: Array,
  routing: Routing,
  weights: ExpertWeights,
  activation: str,
  options: ExchangeOptions,
) -> tuple[Array, None]:
  """Exchanges slots [E, G*C] split by expert, runs the experts, and exchanges back."""
  num_groups, _, width = x.shape
  devices, slots = jax.lax.axis_size(AXIS), routing.num_slots
  local = routing.num_experts // devices
  moves = jax.vmap(slot_moves)(routing)
  rows = jax.vmap(permute.to_rows)(x, moves)
  rows = rows.reshape(num_groups, devices, local, slots, width)
  rows = rows.transpose(1, 2, 0, 3, 4).reshape(devices, local, num_groups * slots, width)

  def exchanged(rows: Array) -> Array:
    rows = jax.lax.all_to_all(rows, AXIS, split_axis=0, concat_axis=0, tiled=True)
    return checkpoint_name(rows, SAVED_NAME)

  def experts(rows: Array) -> Array:
    received = exchanged(rows).swapaxes(0, 1)
    flat = received.reshape(local, -1, width)
    out = apply_experts(flat, weights, activation).reshape(received.shape)
    return exchanged(out.swapaxes(0, 1))

  pieces = jnp.array_split(rows, options.exchange_chunks, axis=2)
  out = jnp.concatenate([experts(piece) for piece in pieces], axis=2)
  out = out.reshape(devices, local, num_groups, slots, width).transpose(2, 0, 1, 3, 4)
  out = out.reshape(num_groups, routing.num_experts * slots, width)
  return jax.vmap(permute.combine)(out, routing.gate, moves), None


def _ragged(
  x: Array,
  routing: Routing,
  weights: ExpertWeights,
  activation: str,
  options: ExchangeOptions,
) -> tuple[Array, Lost]:
  """Sends rows in expert order to their devices, run by run, and back."""
  moves, load = grouped.sorted_moves(routing)
  rows = permute.to_rows(x.reshape(-1, x.shape[-1]), moves)
  plan = exchange_lib.make_plan(
    load, AXIS, rows.shape[0], buffer_rows(rows.shape[0], options.exchange_buffer)
  )
  received = checkpoint_name(exchange_lib.send(rows, plan), SAVED_NAME)
  # Gates travel with their rows, so that outputs come back weighted and the backward
  # pass needs no output: recomputing and resending it would serve only the gate.
  gate = permute.gate_rows(routing.gate.reshape(-1), moves)
  gate = checkpoint_name(exchange_lib.send(gate, plan), SAVED_NAME)
  total = jnp.sum(plan.received, axis=0)
  if plan.received.shape[1] == 1 and target_platform() != "cpu":
    # With a single local expert all rows are its own, and already contiguous.
    out = apply_ragged_experts(
      received, total, weights, activation, gate=gate, chunks=options.expert_chunks
    )
  else:
    here = _in_experts_order(plan, total)
    out = grouped.run_rows(
      received,
      gate,
      here,
      total,
      weights,
      activation=activation,
      chunks=options.expert_chunks,
    )
  back = exchange_lib.send_back(out, plan)
  y = permute.add_up(back, moves).reshape(x.shape)
  return y, _count_lost(routing, moves, load, plan)


def _count_lost(
  routing: Routing, moves: permute.Moves, load: Int[Array, "E"], plan: exchange_lib.Plan
) -> Lost:
  """Counts losses: the last `Plan.lost` rows of each expert's run."""
  fits = jnp.cumsum(load) - plan.lost
  expert = routing.expert.reshape(-1)
  sent = moves.kept & (moves.place < fits[expert])
  num_groups, num_tokens = routing.probs.shape[:2]
  group = jnp.arange(num_groups, dtype=jnp.int32)[:, None] * num_tokens
  token = (routing.token + group).reshape(-1)

  def served(rows: Bool[Array, "A"]) -> Bool[Array, "T"]:
    none = jnp.zeros_like(rows, shape=(num_groups * num_tokens,))
    return none.at[token].max(rows)

  tokens = served(moves.kept) & ~served(sent)
  return Lost(
    assignments=plan.lost[None].astype(jnp.float32),
    tokens=jnp.sum(tokens.astype(jnp.float32))[None],
  )


def _in_experts_order(plan: exchange_lib.Plan, total: Int[Array, "L"]) -> permute.Moves:
  """Returns the moves that sort received rows, ordered by sender, into expert order."""
  place, row, used = exchange_lib.by_expert(plan)
  index = jnp.arange(plan.num_received, dtype=jnp.int32)
  return permute.Moves(
    token=index,
    place=place,
    kept=used,
    assignment=row,
    used=index < jnp.sum(total),
    num_tokens=plan.num_received,
    num_selected=1,
  )


def buffer_rows(num_rows: int, factor: float | None) -> int:
  """Returns R, the rows that a device can receive when it sends `num_rows`."""
  devices = jax.lax.axis_size(AXIS)
  if factor is None:
    return devices * num_rows
  return min(devices * num_rows, max(1, round(factor * num_rows)))


def _ring(
  x: Array,
  routing: Routing,
  weights: ExpertWeights,
  activation: str,
  options: ExchangeOptions,
) -> tuple[Array, None]:
  """Gathers all tokens of the expert axis, runs local experts, reduce-scatters sums."""
  local = routing.num_experts // jax.lax.axis_size(AXIS)
  first = jax.lax.axis_index(AXIS) * local

  def gather(array: Array) -> Array:
    return jax.lax.all_gather(array, AXIS, axis=0, tiled=True)

  everyone = checkpoint_name(gather(x), SAVED_NAME)
  expert = gather(routing.expert) - first
  mine = gather(routing.kept) & (expert >= 0) & (expert < local)
  load = jax.lax.dynamic_slice_in_dim(gather(routing.load), first, local, axis=1)
  moves, total = grouped.line_up(
    gather(routing.token),
    jnp.clip(expert, 0, local - 1),
    gather(routing.slot),
    mine,
    load,
    num_tokens=x.shape[1],
    num_selected=routing.num_selected,
  )
  flat, gate = everyone.reshape(-1, x.shape[-1]), gather(routing.gate).reshape(-1)
  out = grouped.run_rows(
    flat,
    gate,
    moves,
    total,
    weights,
    activation=activation,
    chunks=options.expert_chunks,
  )
  y = jax.lax.psum_scatter(out, AXIS, scatter_dimension=0, tiled=True)
  return checkpoint_name(y.reshape(x.shape), SAVED_NAME), None


EXCHANGES: Mapping[str, Callable[..., tuple[Array, Lost | None]]] = {
  "all_to_all": _all_to_all,
  "ragged": _ragged,
  "ring": _ring,
}


def _constrained(
  x: Float[Array, "G T D"], routing: Routing, weights: ExpertWeights, activation: str
) -> Float[Array, "G T D"]:
  """Runs the einsum dispatcher with sharding constraints on its slots."""

  def at(array: Array, *axes: Any) -> Array:
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*axes))

  mask = jax.vmap(Routing.dispatch_weights)(routing).astype(x.dtype)
  combine = jax.vmap(Routing.combine_weights)(routing).astype(x.dtype)
  mesh = mesh_in_scope()
  assert mesh is not None
  divided = x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
  slots = (AXIS, ("data", "fsdp") if divided else None, None, None)
  rows = at(jnp.einsum("gtec,gtd->egcd", mask, x), *slots)
  out = at(apply_experts(rows, weights, activation), *slots)
  return jnp.einsum("gtec,egcd->gtd", combine, out)
