"""Routing: the inputs and outputs of a router.

A router decides, for one group of T tokens, which (token, expert) pairs are
computed, in which slot and with what weight: the `placement` of its `Routing`, which
the experts execute without knowing which router made it. Everything here works
on one group; `jax.vmap` applies it to a batch of groups, adding a leading axis G
to every array.

Letters: T tokens of one group, E experts, K choices per token, C slots per
expert, N assignments (T*K for token choice, E*C for expert choice).
"""

import dataclasses
from typing import Literal

from jaxtyping import Array, Bool, Float, Int, Key

from moejax.routing.placement import Assignments, Placement
from moejax.types import pytree

Priority = Literal["arrival", "gate", "random"]
Overflow = Literal["drop", "next_best", "none"]
Renormalize = Literal["none", "before_drop", "after_drop"]
SlotOrder = Literal["choice_major", "token_major", "by_gate", "batch_priority"]


@pytree
class RouterStats:
  """Router statistics, as sums that add up over groups, devices and steps.

  Ratios (drop fraction, entropy per token, max-load ratio, dead experts) are
  computed once from the sums, in `moejax.run.metrics`, never averaged.
  """

  num_valid: Float[Array, "*g"]
  """Tokens that are not padding."""
  chosen: Float[Array, "*g E"]
  """Assignments the router requested, before capacity."""
  load: Float[Array, "*g E"]
  """Assignments that were kept and computed."""
  importance: Float[Array, "*g E"]
  """Sum over valid tokens of the router's probability."""
  entropy: Float[Array, "*g"]
  """Sum over valid tokens of the entropy of the router's probabilities, in nats."""
  dropped_tokens: Float[Array, "*g"]
  """Valid tokens with no assignment kept, or with all of them lost in the exchange."""
  lost: Float[Array, "*g"] | None = None
  """Assignments that did not fit a bounded exchange between devices; not in `load`."""
  present: Float[Array, "*g E"] | None = None
  """expert_dropout only: above 0 for the experts that took part in this step."""
  top_gate: Float[Array, "*g"] | None = None
  """Training only: sum over valid tokens of a token's largest score, before any choice
  or renormalisation: softmax of its logits, or sigmoid (`Router.by_sigmoid`)."""
  top_logit: Float[Array, "*g"] | None = None
  """Training only: sum over valid tokens of a token's largest absolute logit."""
  extra: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
  """Router-specific sums, for its `Router.update`."""


@pytree
class Routing:
  """A router's result for one group (or, after `vmap`, for G groups)."""

  placement: Placement
  """Which token is computed by which expert, in which slot and with what weight."""
  probs: Float[Array, "*g T E"]
  """The router's probabilities, for losses and analysis; differentiable."""
  stats: RouterStats
  first: Int[Array, "*g T"] | None = None
  """Each token's first choice, before overflow moved it; None if tokens do not
  choose."""
  losses: dict[str, Float[Array, "*g"]] | None = None
  """Router-specific loss terms of the group, by name. The layer computes those that
  every router has: the balance loss and the z-loss."""

  @property
  def assignments(self) -> Assignments:
    """The placement of a router that places whole tokens."""
    assert isinstance(self.placement, Assignments), "this router mixes tokens"
    return self.placement


@pytree
class RouterInputs:
  """The inputs available to a router, for one group. Absent ones are None."""

  logits: Float[Array, "*g T E"]
  """float32 router logits."""
  valid: Bool[Array, "*g T"]
  """False for padding, which is not routed, takes no slot and counts in no loss."""
  key: Key[Array, "*g"] | None = None
  """PRNG key of this group; None in evaluation, where routing is deterministic."""
  token_ids: Int[Array, "*g T"] | None = None
  """Vocabulary ids, for routers that use the token and not its embedding."""
  assigned: Int[Array, "*g T K"] | None = None
  """The experts of each token, looked up in the router's table by `token_ids`."""
  step: Int[Array, "*g"] | None = None
  """Optimizer steps taken, for annealing; None outside training. Shared by all
  groups."""
  positions: Int[Array, "*g T"] | None = None
  """Position of each token in its document. A deterministic router counts by it, since
  in generation a group is whatever one call passes."""
  present: Bool[Array, "*g E"] | None = None
  """expert_dropout: the experts that take part in this step; only their logits are
  above `scores.ABSENT`. None means all. Shared by all groups."""
  features: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
  """From `Router.features`."""
  params: dict[str, Float[Array, "..."]] = dataclasses.field(default_factory=dict)
  """The router's own parameters; shared by all groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotPolicy:
  """How many experts a token chooses and which assignments get slots, for any router."""

  num_experts: int
  """E."""
  num_selected: int = 1
  """K."""
  capacity: int | None = None
  """C, from `capacity.capacity_of`; None means dropless."""
  renormalize: Renormalize = "none"
  """Whether the K gates of a token are scaled to norm 1, and before or after drops."""
  allow_constant_gates: bool = False
  """Whether K = 1 may be renormalised, though every gate is then 1."""
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
  """Whether slots are numbered in queue order or in token order (DeepSpeed)."""
  gate_scale: float = 1.0
  """Multiplies every gate at the end (DeepSeek's routed_scaling_factor)."""
  ranking: Literal["sort", "count"] = "sort"
  """How assignments are sorted by expert; the result is the same. Counting suits
  TPUs, see `queueing.line_up`."""
