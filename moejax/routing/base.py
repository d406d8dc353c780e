"""Routing: the one contract between a router and a dispatcher.

A router decides, for one group of T tokens, which (token, expert) pairs are
computed, in which slot and with what weight. It returns a `Routing`; a
dispatcher takes it and never asks which router made it. Everything here is a
function on one group; a batch of groups is `jax.vmap` of it, which gives every
array a leading G.

Letters: T tokens of one group, E experts, K choices per token, C slots per
expert, N assignments (T*K for token choice, E*C for expert choice).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.types import pytree, static_field

Priority = Literal["arrival", "gate", "random"]
Overflow = Literal["drop", "next_best", "none"]
Renormalize = Literal["none", "before_drop", "after_drop"]
SlotOrder = Literal["choice_major", "token_major", "by_gate", "batch_priority"]


@pytree
class RouterStats:
  """What the router did, as sums, so that groups, devices and steps just add.

  Ratios (drop fraction, entropy per token, max-load ratio, dead experts) are
  made from these sums once, in `moejax.run.metrics`, never averaged.
  """

  num_valid: Float[Array, "*g"]
  """Tokens that are not padding."""
  chosen: Float[Array, "*g E"]
  """Assignments the router asked for, before capacity."""
  load: Float[Array, "*g E"]
  """Assignments that were kept, and so computed."""
  importance: Float[Array, "*g E"]
  """Sum over valid tokens of the router's probability."""
  entropy: Float[Array, "*g"]
  """Sum over valid tokens of the entropy of the router's probabilities, in nats."""
  dropped_tokens: Float[Array, "*g"]
  """Valid tokens of which no assignment was kept, or none arrived."""
  lost: Float[Array, "*g"] | None = None
  """Assignments that did not fit a bounded exchange between devices; not in `load`."""
  present: Float[Array, "*g E"] | None = None
  """expert_dropout only: above 0 for the experts that took part in this step."""
  extra: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
  """Sums that one router alone has, for its `Router.update`."""


@pytree
class Routing:
  """Who goes where, for one group (or, after `vmap`, for G groups).

  Dropped assignments stand in the arrays with `kept` False and `gate` 0, so
  every dispatcher adds exactly zero for them.
  """

  token: Int[Array, "*g N"]
  """The assignment's token, in [0, T)."""
  expert: Int[Array, "*g N"]
  """The expert that serves it, in [0, E)."""
  slot: Int[Array, "*g N"]
  """Position in the expert's queue: where kept, exactly 0 .. load - 1 of each expert;
  elsewhere C (T if dropless)."""
  gate: Float[Array, "*g N"]
  """float32 combine weight; differentiable; 0 where not kept."""
  kept: Bool[Array, "*g N"]
  """Whether the assignment is computed. Never for padding."""
  order: Int[Array, "*g N"]
  """Assignment indices sorted by (expert, slot), kept ones first, dropped ones last."""
  load: Int[Array, "*g E"]
  """Kept assignments per expert: the lengths of the runs in `order`."""
  probs: Float[Array, "*g T E"]
  """The router's probabilities, for losses and analysis; differentiable."""
  stats: RouterStats
  first: Int[Array, "*g T"] | None = None
  """Each token's first choice, before overflow moved it; None where tokens choose
  nothing."""
  losses: dict[str, Float[Array, "*g"]] | None = None
  """Terms that only this router has, each a value of one group, by name; the
  balance and z-losses, which every router has, are made from `probs` by the layer."""
  dense_dispatch: Float[Array, "*g T E C"] | None = None
  """Soft MoE only: weights of tokens in slots. The arrays over N are then empty."""
  dense_combine: Float[Array, "*g T E C"] | None = None
  """Soft MoE only: weights of slots in tokens."""
  capacity: int | None = static_field()
  """C, slots per expert; None when dropless."""
  num_selected: int | None = static_field()
  """K where assignments are token-major (`token == arange(T*K) // K`), else None."""

  @property
  def num_tokens(self) -> int:
    return self.probs.shape[-2]

  @property
  def num_experts(self) -> int:
    return self.probs.shape[-1]

  @property
  def num_slots(self) -> int:
    """C, or T when dropless (a token visits an expert at most once)."""
    return self.num_tokens if self.capacity is None else self.capacity

  def dispatch_mask(self) -> Bool[Array, "T E C"]:
    """Dense form of one group, for tests, pictures and interop. Large."""
    if self.dense_dispatch is not None:
      return self.dense_dispatch != 0
    shape = (self.num_tokens, self.num_experts, self.num_slots)
    mask = jnp.zeros(shape, bool)
    return mask.at[self.token, self.expert, self.slot].max(self.kept, mode="drop")

  def dispatch_weights(self) -> Float[Array, "T E C"]:
    """Dense form of one group: how much of a token each slot holds, 0 or 1 if sparse."""
    if self.dense_dispatch is not None:
      return self.dense_dispatch
    return self.dispatch_mask().astype(jnp.float32)

  def combine_weights(self) -> Float[Array, "T E C"]:
    """Dense form of one group: the gate at each kept (token, expert, slot)."""
    if self.dense_combine is not None:
      return self.dense_combine
    shape = (self.num_tokens, self.num_experts, self.num_slots)
    gate = jnp.where(self.kept, self.gate, 0.0)
    weights = jnp.zeros(shape, jnp.float32)
    return weights.at[self.token, self.expert, self.slot].add(gate, mode="drop")


@pytree
class RouterInputs:
  """What a router may look at, for one group. Absent things are None."""

  logits: Float[Array, "*g T E"]
  """float32 router logits."""
  valid: Bool[Array, "*g T"]
  """False for padding, which is never routed, takes no slot, counts in no loss."""
  key: Key[Array, "*g"] | None = None
  """Randomness of this group; None in evaluation, where routing is deterministic."""
  token_ids: Int[Array, "*g T"] | None = None
  """Vocabulary ids, for routers that look at the token and not at its embedding."""
  assigned: Int[Array, "*g T K"] | None = None
  """The experts of each token, read out of the router's table by `token_ids`."""
  step: Int[Array, "*g"] | None = None
  """Optimizer steps taken, for what anneals; None outside training. The same for all
  groups."""
  positions: Int[Array, "*g T"] | None = None
  """Of each token in its document. What a router without randomness may count by: in
  generation, a group is whatever one call brings."""
  present: Bool[Array, "*g E"] | None = None
  """expert_dropout: the experts that take part in this step, whose logits alone are
  above `scores.ABSENT`. None is all. The same for all groups."""
  features: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
  """From `Router.features`."""
  params: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
  """The router's own parameters; the same for all groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotPolicy:
  """How many experts a token chooses, and who gets a slot: the same for all routers."""

  num_experts: int
  """E."""
  num_selected: int = 1
  """K."""
  capacity: int | None = None
  """C, from `capacity.capacity_of`; None is dropless."""
  renormalize: Renormalize = "none"
  """Whether the K gates of a token are scaled to norm 1, and before or after drops."""
  renormalize_norm: float = 1.0
  """p of that norm: 1 makes their sum 1, 2 the sum of their squares (MegaBlocks)."""
  priority: Priority = "arrival"
  overflow: Overflow = "drop"
  slot_order: SlotOrder = "choice_major"
  """How a token's choices are interleaved in the queue for slots. choice_major: all
  first choices before any second; token_major: all choices of the earlier token;
  by_gate: the largest gate of any rank; batch_priority: choice_major with
  priority=gate."""
  slot_numbering: Literal["queue", "arrival"] = "queue"
  """Slots are numbered as they were given, or afterwards in token order (DeepSpeed)."""
  gate_scale: float = 1.0
  """Multiplies every gate at the end (DeepSeek's routed_scaling_factor)."""
  ranking: Literal["sort", "count"] = "sort"
  """How assignments are lined up expert by expert; the result is the same. Counting
  suits TPUs, see `queueing.line_up`."""


def entropy(probs: Float[Array, "... E"]) -> Float[Array, "..."]:
  """Entropy in nats of each distribution; 0 log 0 = 0, with a finite gradient."""
  safe = jnp.where(probs > 0, probs, 1.0)
  return -jnp.sum(probs * jnp.log(safe), axis=-1)


def sum_groups(stats: RouterStats) -> RouterStats:
  """Adds up the leading group axis of every field."""
  return jax.tree.map(lambda a: jnp.sum(a, axis=0), stats)
