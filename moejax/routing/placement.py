"""Placements: which token is computed by which expert, in which slot, with what weight.

A router returns one of two. `Assignments` place whole tokens; a `Mixture` fills each slot
with a weighted mean of all tokens (Soft MoE). Both can be written as dense weights
[T, E, C]; a layout of `moejax.dispatch` reads whichever form it needs. Everything here
works on one group; `jax.vmap` applies it to G groups, adding a leading axis G to every
array.

Letters: T tokens of one group, E experts, K choices per token, C slots per expert, N
assignments (T*K for token choice, E*C for expert choice).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.types import pytree, static_field


@pytree
class Assignments:
  """Whole tokens in their experts' slots.

  Dropped assignments stay in the arrays with `kept` False and `gate` 0, so every layout
  adds exactly zero for them.
  """

  token: Int[Array, "*g N"]
  """The assignment's token, in [0, T)."""
  expert: Int[Array, "*g N"]
  """The assignment's expert, in [0, E)."""
  slot: Int[Array, "*g N"]
  """Position in the expert's queue: if kept, 0 .. load - 1, each exactly once per
  expert; otherwise C (T if dropless)."""
  gate: Float[Array, "*g N"]
  """float32 combine weight; differentiable; 0 where not kept."""
  kept: Bool[Array, "*g N"]
  """Whether the assignment is computed. Always False for padding."""
  order: Int[Array, "*g N"]
  """Assignment indices sorted by (expert, slot), kept ones first, dropped ones last."""
  load: Int[Array, "*g E"]
  """Kept assignments per expert: the lengths of the runs in `order`."""
  num_tokens: int = static_field()
  """T."""
  capacity: int | None = static_field()
  """C, slots per expert; None when dropless."""
  num_selected: int | None = static_field()
  """K if assignments are token-major (`token == arange(T*K) // K`), else None."""

  @property
  def num_experts(self) -> int:
    return self.load.shape[-1]

  @property
  def num_groups(self) -> int:
    return self.load.shape[0]

  @property
  def num_slots(self) -> int:
    """C, or T if dropless (a token visits an expert at most once)."""
    return self.num_tokens if self.capacity is None else self.capacity

  def dispatch_mask(self) -> Bool[Array, "T E C"]:
    """Returns which token is in which slot, of one group. Large."""
    shape = (self.num_tokens, self.num_experts, self.num_slots)
    mask = jnp.zeros(shape, bool)
    return mask.at[self.token, self.expert, self.slot].max(self.kept, mode="drop")

  def dispatch_weights(self) -> Float[Array, "T E C"]:
    """Returns `dispatch_mask` as 0 and 1."""
    return self.dispatch_mask().astype(jnp.float32)

  def combine_weights(self) -> Float[Array, "T E C"]:
    """Returns the gate at each kept (token, expert, slot) of one group."""
    shape = (self.num_tokens, self.num_experts, self.num_slots)
    gate = jnp.where(self.kept, self.gate, 0.0)
    weights = jnp.zeros(shape, jnp.float32)
    return weights.at[self.token, self.expert, self.slot].add(gate, mode="drop")

  def served(self) -> Bool[Array, "T E"]:
    """Returns which experts compute each token of one group."""
    served = jnp.zeros((self.num_tokens, self.num_experts), bool)
    return served.at[self.token, self.expert].max(self.kept)

  def window(self, first: Int[Array, ""], count: int) -> "Assignments":
    """Returns one group's assignments to the experts [first, first + count).

    These experts are numbered from 0; assignments to the others are not kept.
    """
    expert = self.expert - first
    kept = self.kept & (expert >= 0) & (expert < count)
    experts = jnp.arange(self.num_experts, dtype=jnp.int32)
    before = jnp.sum(jnp.where(experts < first, self.load, 0))
    # The experts' runs come first; those of the others follow, and are dropped.
    index = jnp.arange(self.order.shape[0], dtype=jnp.int32) + before
    order = self.order.at[index % max(index.shape[0], 1)].get(mode="promise_in_bounds")
    return dataclasses.replace(
      self,
      expert=jnp.clip(expert, 0, count - 1),
      slot=jnp.where(kept, self.slot, self.num_slots),
      gate=jnp.where(kept, self.gate, 0.0),
      kept=kept,
      order=order,
      load=jax.lax.dynamic_slice_in_dim(self.load, first, count),
    )


@pytree
class Mixture:
  """Slots are weighted means of all tokens; outputs are weighted means of all slots."""

  dispatch: Float[Array, "*g T E C"]
  """Weight of each token in each slot."""
  combine: Float[Array, "*g T E C"]
  """Weight of each slot in each token."""

  @property
  def num_experts(self) -> int:
    return self.dispatch.shape[-2]

  @property
  def num_groups(self) -> int:
    return self.dispatch.shape[0]

  @property
  def capacity(self) -> int:
    """C."""
    return self.dispatch.shape[-1]

  def dispatch_weights(self) -> Float[Array, "T E C"]:
    return self.dispatch

  def combine_weights(self) -> Float[Array, "T E C"]:
    return self.combine

  def served(self) -> Bool[Array, "T E"]:
    """Returns which experts compute a part of each token of one group."""
    return jnp.any(self.dispatch != 0, axis=-1)

  def window(self, first: Int[Array, ""], count: int) -> "Mixture":
    """Returns one group's weights, of the experts [first, first + count) only."""

    def part(weights: Float[Array, "T E C"]) -> Float[Array, "T n C"]:
      return jax.lax.dynamic_slice_in_dim(weights, first, count, axis=1)

    return Mixture(dispatch=part(self.dispatch), combine=part(self.combine))


Placement = Assignments | Mixture


def whole_tokens(placement: Placement, dispatcher: str) -> Assignments:
  """Returns the placement, for a layout that cannot read mixtures.

  Raises:
    TypeError: it is a mixture; checks of the config and the exchange reject it earlier.
  """
  if not isinstance(placement, Assignments):
    kind = type(placement).__name__
    raise TypeError(f"the layout of {dispatcher} reads Assignments, not {kind}")
  return placement
