"""A router's decisions from its logits alone, with the routing functions of the library.

The decisions of a token-choice router depend on its logits, on its own small parameters
(a bias) and on ids and positions, but not on the width of the model. So decisions under
another capacity, priority, overflow, slot order, group size, K or renormalisation can be
computed without running an expert. They equal those of the model exactly if the logits
would be the same: always at the first MoE layer, and at later ones only if nothing
changed before.

Letters: L MoE layers, B batch, S sequence, G routing groups, T tokens of a group, E
experts, K choices per token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.analysis.sides import Routing
from moejax.config import MoEConfig
from moejax.config.router import capacity, make_router, sizes, slot_policy
from moejax.layers.routes import Routes, routes_of
from moejax.models.decoder import TABLE
from moejax.models.per_layer import PARTS
from moejax.routing.base import RouterInputs
from moejax.types import Params, pytree


@pytree
class Recorded:
  """The inputs of the decisions for one batch."""

  logits: Float[Array, "L B S E"]
  valid: Bool[Array, "B S"]
  token_ids: Int[Array, "B S"]
  positions: Int[Array, "B S"]
  assigned: Int[Array, "B S K"] | None = None
  """The experts of each token, if given by a table."""


def undecidable(model: Routing) -> str | None:
  """Returns why decisions cannot be made from logits, in a sentence; None if they can."""
  router, name = model.router, model.moe.router
  if router.mixes:
    return f"router {name} mixes all tokens of a group and chooses none"
  if not router.token_choice:
    return f"under router {name} experts choose tokens, so that no token is queued"
  declared = router.parameters(sizes(model.moe, model.config.width, 1))
  if any(not about.by_group for about in declared.values()):
    return f"router {name} reads the tokens themselves, not only their logits"
  return None


def router_params(model: Routing, params: Params) -> dict[str, Float[Array, "L ..."]]:
  """Returns the router's own parameters of all MoE layers, such as its bias."""
  names = model.router.parameters(sizes(model.moe, model.config.width, 1))
  found: dict[str, list[Array]] = {name: [] for name in names}
  for part in PARTS:
    kinds = getattr(model.pattern, part)
    blocks = [str(i) for i, is_moe in enumerate(kinds) if is_moe]
    for name in names:
      own = [params[part][block]["moe"]["router"][name] for block in blocks]
      if not own:
        continue
      if part == "unit":  # [repeats, blocks of the unit, ...], in the order of layers.
        stacked = jnp.stack(own, axis=1)
        found[name].append(stacked.reshape(-1, *stacked.shape[2:]))
      else:
        found[name].append(jnp.stack(own))
  return {name: jnp.concatenate(parts) for name, parts in found.items()}


def assigned_experts(
  model: Routing, params: Params, token_ids: Int[Array, "B S"]
) -> Int[Array, "B S K"] | None:
  """Returns the experts that the router's table gives each token, if it has one."""
  if TABLE not in params or not model.router.has_table:
    return None
  return params[TABLE][token_ids].astype(jnp.int32)


def recorded(model: Routing, params: Params, routes: Routes, batch: Any) -> Recorded:
  """Returns the inputs of the decisions, from the routes of a batch."""
  return Recorded(
    logits=routes.logits,
    valid=batch["segment_ids"] > 0,
    token_ids=batch["inputs"],
    positions=batch["positions"],
    assigned=assigned_experts(model, params, batch["inputs"]),
  )


def decide(
  moe: MoEConfig,
  recorded: Recorded,
  params: dict[str, Float[Array, "L ..."]],
  capacity_factor: float | None,
) -> Routes:
  """Routes all tokens of a batch again, as in evaluation.

  Args:
    moe: of the layers, with other options if wanted; `group_size` counts tokens, 0 is a
      sequence.
    recorded: of a batch that holds whole groups.
    params: from `router_params`.
    capacity_factor: None means dropless.

  Returns:
    Routes with a leading axis of layers.
  """
  router = make_router(moe)
  batch, length = recorded.valid.shape
  size = moe.group_size or length
  groups = batch if capacity_factor is None else batch * length // size
  policy = slot_policy(moe, capacity(moe, batch * length // groups, capacity_factor))

  def grouped(x: Any) -> Any:
    return None if x is None else x.reshape(groups, -1, *x.shape[2:])

  def layer(logits: Float[Array, "B S E"], own: dict[str, Array]) -> Routes:
    inputs = RouterInputs(
      logits=grouped(logits),
      valid=grouped(recorded.valid),
      token_ids=grouped(recorded.token_ids),
      positions=grouped(recorded.positions),
      assigned=grouped(recorded.assigned),
    )

    def route(group: RouterInputs) -> Any:
      return router(dataclasses.replace(group, params=own), policy)

    return routes_of(inputs.logits, jax.vmap(route)(inputs), batch, length)

  return jax.vmap(layer)(recorded.logits, params)
