"""Measurements of experts on a text: how often and strongly each is used, and its worth.

One pass over a split, dropless, with the unchanged model. Sums are float64 on the host.

  load          tokens that chose the expert
  gate          their gates, summed
  norm          norms of the expert's outputs on these tokens, summed
  gated_norm    the same, each times its gate divided by the sum of the token's gates
  outputs       the expert's output summed over all tokens, chosen or not
  logits        products of router logits of two experts, summed over all tokens

Letters: L MoE layers, B batch, S sequence, T tokens of a batch, D width, E experts, K
choices per token.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from moejax.analysis import knockout
from moejax.analysis.layerwise import Layerwise, Removed
from moejax.errors import UserError
from moejax.evaluate import groups, perplexity
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.layers.routes import Routes
from moejax.models import trained
from moejax.models.decoder import Decoder
from moejax.models.loss import token_losses
from moejax.surgery.where import layers_of
from moejax.types import Params

MOST_SUBSETS = 2000
"""Most subsets of experts that are tried in a layer."""

Sums = dict[str, Float[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """A model, its parameters, and the part of a text that it is run on."""

  model: Decoder
  params: Params
  dataset: Any
  split: str
  mesh: Mesh
  batch_size: int
  limit: int
  """Maximum number of batches; 0 means all."""

  def arguments(self) -> dict[str, Any]:
    """Returns the arguments of every pass over the text."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def batches(self) -> Any:
    return perplexity.device_batches(
      self.dataset,
      self.split,
      mesh=self.mesh,
      batch_size=self.batch_size,
      limit=self.limit,
    )

  def loss(self) -> float:
    """Returns the loss in nats per token, under the configured evaluation capacity."""
    factor = self.model.moe.eval_capacity_factor
    found = perplexity.evaluate(**self.arguments(), capacity_factors=(factor,))
    return found["results"][0]["loss"]


class Measured:
  """Measurements over a text, each made on first use."""

  def __init__(self, text: Text | None = None, sums: dict[int, Sums] | None = None):
    """Takes a text, or finished sums by layer.

    Args:
      text: None if there is none; any measurement is then an error.
      sums: sums measured elsewhere, in the form of `sums`.
    """
    self._text = text
    if sums is not None:
      self.sums = sums

  @property
  def text(self) -> Text:
    if self._text is None:
      raise UserError(
        "This operation measures something over a text, and none was given."
      )
    if self._text.model.config.kind == "encoder_decoder":
      raise UserError(
        "An encoder-decoder routes two texts, and experts can be measured on a decoder "
        "only. Use a criterion that needs no text."
      )
    return self._text

  @functools.cached_property
  def sums(self) -> dict[int, Sums]:
    """Sums of each MoE layer; see the module's docstring."""
    text, total = self.text, {}
    run = Layerwise(text.model, text.params, text.mesh, groups.least_factor(text.model))
    activation = text.model.moe.activation or text.model.config.activation
    step = jax.jit(functools.partial(batch_sums, activation=activation))
    with jax.set_mesh(text.mesh):
      for batch in text.batches():
        x, inputs = run.begin(batch)
        for layer, before, _, routes in run.to_moe_layers(x, inputs):
          normed, weights = run.read(layer, before, inputs)
          found = jax.device_get(step(normed, weights, routes, batch["segment_ids"] > 0))
          old = total.get(layer)
          found = jax.tree.map(lambda a: np.asarray(a, np.float64), found)
          total[layer] = (
            found
            if old is None
            else jax.tree.map(lambda a, b: np.asarray(a + b), old, found)
          )
    return total

  def removal(self) -> dict[int, Float[np.ndarray, "E"]]:
    """Returns the rise of the loss without each expert, in nats per token."""
    text = self.text
    sets = knockout.singles(text.model, text.model.moe_layers)
    losses = knockout.knock_out(**text.arguments(), sets=sets)
    return {
      layer: np.array(
        [knockout.effect(losses.base, row, losses.tokens)[0] for row in rows]
      )
      for layer, rows in losses.removed.items()
    }

  def gradients(self) -> dict[int, Float[np.ndarray, "E"]]:
    """Returns the squared gradient of the loss of each expert, summed over batches.

    The gradient is that of a batch's mean loss with respect to all matrices of an expert.
    """
    text = self.text
    step = jax.jit(functools.partial(squared_gradients, text.model))
    total: dict[int, np.ndarray] = {}
    with jax.set_mesh(text.mesh):
      for batch in text.batches():
        for layer, found in jax.device_get(step(text.params, batch)).items():
          total[layer] = np.asarray(total.get(layer, 0.0) + found.astype(np.float64))
    return total

  def best_subsets(self, keep: int) -> dict[int, tuple[int, ...]]:
    """Returns, for each layer, the experts that best reproduce the output of all.

    Of all subsets of `keep` experts, it is the one that minimises the summed squared
    difference of the layer's output (NAEE, arXiv:2402.14800, equation 4).

    Raises:
      UserError: the router does not choose by logits, or there are too many subsets.
    """
    text = self.text
    experts = text.model.moe.fine_experts
    if (number := math.comb(experts, keep)) > MOST_SUBSETS:
      raise UserError(
        f"--by=subset: there are {number:,} subsets of {keep} of {experts} experts, and "
        f"at most {MOST_SUBSETS:,} can be tried. Use --by=reap."
      )
    knockout.check(text.model, "next_best", experts - keep)
    subsets = list(itertools.combinations(range(experts), keep))
    total = {layer: np.zeros(len(subsets)) for layer in text.model.moe_layers}
    run = Layerwise(text.model, text.params, text.mesh, groups.least_factor(text.model))
    with jax.set_mesh(text.mesh):
      for batch in text.batches():
        valid = batch["segment_ids"] > 0
        x, inputs = run.begin(batch)
        for layer, before, after, _ in run.to_moe_layers(x, inputs):
          for number, subset in enumerate(subsets):
            mask = np.zeros(experts, bool)
            mask[list(subset)] = True
            changed, _ = run.feed(layer, before, inputs, Removed(present=mask))
            total[layer][number] += float(_distance(changed, after, valid))
    return {layer: subsets[int(np.argmin(found))] for layer, found in total.items()}


@jax.jit
def _distance(
  one: Float[Array, "B S D"], other: Float[Array, "B S D"], valid: Bool[Array, "B S"]
) -> Float[Array, ""]:
  square = jnp.sum(jnp.square(one.astype(jnp.float32) - other.astype(jnp.float32)), -1)
  return jnp.sum(jnp.where(valid, square, 0.0))


def squared_gradients(
  model: Decoder, params: Params, batch: Any
) -> dict[int, Float[Array, "E"]]:
  """Returns the squared norm of each expert's gradient, by the number of its layer."""

  def loss(params: Params) -> Float[Array, ""]:
    losses, _ = token_losses(
      model, params, batch, capacity_factor=groups.least_factor(model)
    )
    count = jnp.sum((batch["segment_ids"] > 0).astype(jnp.float32))
    return jnp.sum(losses) / jnp.maximum(count, 1.0)

  mask = model.trained()
  learned, kept = trained.split(params, mask)
  gradient = jax.grad(lambda learned: loss(trained.join(learned, kept, mask)))(learned)
  found = {}
  for number, where in enumerate(layers_of(model)):
    if number not in model.moe_layers:
      continue
    block = gradient
    for name in where.block.split("."):
      block = block[name]
    parts = [
      jnp.sum(jnp.square(own.astype(jnp.float32)), axis=tuple(range(1, own.ndim)))
      for leaf in jax.tree.leaves(block["moe"]["experts"])
      for own in (leaf if where.repeat is None else leaf[where.repeat],)
    ]
    found[number] = sum(parts[1:], start=parts[0])
  return found


def batch_sums(
  normed: Float[Array, "B S D"],
  weights: ExpertWeights,
  routes: Routes,
  valid: Bool[Array, "B S"],
  *,
  activation: str,
) -> dict[str, Float[Array, "..."]]:
  """Returns the sums of one layer over one batch.

  Every expert is applied to every token, one expert after another, at E / K times the
  cost of the layer.
  """
  tokens = normed.reshape(-1, normed.shape[-1])
  counted = valid.reshape(-1).astype(jnp.float32)
  gate = _dense_gates(routes) * counted[:, None]
  chosen = (gate != 0).astype(jnp.float32)
  share = gate / jnp.maximum(jnp.sum(jnp.abs(gate), -1, keepdims=True), 1e-30)
  logits = routes.logits.reshape(tokens.shape[0], -1) * counted[:, None]

  def of_expert(one: Any) -> Any:
    weights, chosen, share = one
    weights = jax.tree.map(lambda leaf: leaf[None], weights)
    out = apply_experts(tokens[None], weights, activation)[0].astype(jnp.float32)
    norm = jnp.linalg.norm(out, axis=-1)
    return {
      "norm": jnp.sum(chosen * norm),
      "gated_norm": jnp.sum(share * norm),
      "outputs": counted @ out,
    }

  by_expert = jax.lax.map(of_expert, (weights, chosen.T, share.T))
  return by_expert | {
    "tokens": jnp.sum(counted),
    "load": jnp.sum(chosen, axis=0),
    "gate": jnp.sum(gate, axis=0),
    "logits": logits.T @ logits,
  }


def _dense_gates(routes: Routes) -> Float[Array, "T E"]:
  """Returns each token's gate for each expert, 0 where it was not chosen."""
  num_experts = routes.probs.shape[-1]
  if routes.expert is None or routes.gate is None:
    served = routes.served.reshape(-1, num_experts).astype(jnp.float32)
    return served * routes.probs.reshape(-1, num_experts)
  one_hot = jax.nn.one_hot(routes.expert, num_experts, dtype=jnp.float32)
  return jnp.einsum("bsk,bske->bse", routes.gate, one_hot).reshape(-1, num_experts)
