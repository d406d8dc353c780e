"""Saturation: how early in training a router's choices equal its final ones.

Two checkpoints of one run route the same tokens, each in its own model.

Letters: L MoE layers, B batch, S sequence, E experts, K choices per token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from moejax.analysis.measures import saturation as measure
from moejax.analysis.sums import add
from moejax.evaluate import groups, perplexity
from moejax.launch import hang
from moejax.models.decoder import Decoder
from moejax.models.placement import param_shardings
from moejax.sharding import rules
from moejax.types import Params

MAX_BATCHES = 16
"""Default number of batches compared: shares of overlap need few tokens."""


def make_step(model: Decoder, mesh: Mesh) -> Callable[[Params, Params, Any], Any]:
  """Returns a jitted (params, later params, batch) -> sums by layer."""
  factor = groups.least_factor(model)

  def routes(params: Params, batch: Any) -> Any:
    # Logits over the vocabulary are not used, and not computed.
    return model(
      params,
      batch["inputs"],
      segment_ids=batch["segment_ids"],
      positions=batch["positions"],
      capacity_factor=factor,
      return_routes=True,
    ).routes

  def step(params: Params, later: Params, batch: Any) -> dict[str, Array]:
    ours, theirs = routes(params, batch), routes(later, batch)
    valid = batch["segment_ids"] > 0
    both = ours.served & theirs.served
    sums = {
      "tokens": jnp.sum(valid, dtype=jnp.int32),
      "both": jnp.sum(both, axis=(1, 2, 3), dtype=jnp.int32),
      "load": jnp.sum(ours.served, axis=(1, 2), dtype=jnp.int32),
      "later_load": jnp.sum(theirs.served, axis=(1, 2), dtype=jnp.int32),
    }
    if ours.expert is not None:
      same = (ours.expert[..., 0] == theirs.expert[..., 0]) & valid[None]
      sums["same_first"] = jnp.sum(same, axis=(1, 2), dtype=jnp.int32)
    return sums

  shardings = param_shardings(model, mesh)
  return jax.jit(
    step,
    in_shardings=(shardings, shardings, rules.batch_sharding(mesh)),
    out_shardings=rules.replicated(mesh),
  )


def compare(
  step: Callable[[Params, Params, Any], Any],
  model: Decoder,
  params: Params,
  later: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  limit: int = 0,
) -> list[dict[str, Any]]:
  """Returns, by layer, the share of a checkpoint's choices that another one also makes.

  Args:
    step: from `make_step`, shared by all checkpoints.
    model: of both.
    params: of the earlier checkpoint.
    later: parameters of the other.
    dataset: from `moejax.data.load`.
    split: train, validation or test.
    mesh: of the evaluation.
    batch_size: sequences per step.
    limit: maximum number of batches; 0 means `MAX_BATCHES`.
  """
  total: dict[str, np.ndarray] = {}
  batches = perplexity.device_batches(
    dataset, split, mesh=mesh, batch_size=batch_size, limit=limit or MAX_BATCHES
  )
  with jax.set_mesh(mesh):
    for batch in batches:
      add(total, step(params, later, batch))
      hang.progress()
  return [
    {"layer": layer}
    | measure.saturation(
      int(total["both"][i]),
      total["load"][i],
      total["later_load"][i],
      int(total["tokens"]),
      int(total["same_first"][i]) if "same_first" in total else None,
    )
    for i, layer in enumerate(model.moe_layers)
  ]
