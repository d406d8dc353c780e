"""Probe: runs every expert of a layer on the same tokens, to compare the experts.

A few batches suffice. As many tokens as fit are taken at equal distances, beginning with
the first of the batch.

Letters: L MoE layers, E experts, n tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from moejax.analysis import streaks
from moejax.analysis.layerwise import Layerwise
from moejax.analysis.measures import outliers, similarity
from moejax.evaluate import groups, perplexity
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.models.decoder import Decoder
from moejax.sharding import rules
from moejax.types import Params

BATCHES = 4

_MOST_VALUES = 1 << 26
"""Maximum values in the outputs of all experts: 256 MiB."""

_GRAM_TOKENS = 256
"""Number of tokens of a batch whose outputs are compared with each other."""


def hsic(
  outputs: Float[Array, "E n D"],
  valid: Bool[Array, "n"],
  others: Float[Array, "E n D"] | None = None,
) -> Float[Array, "E E"]:
  """Returns the unbiased HSIC of every two experts' outputs, with linear kernels.

  Song et al. 2012, equation 5: for kernels K and L with zero diagonal and n tokens,
  (tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n (n-3)).

  Args:
    outputs: of all experts for the same tokens.
    valid: False for padding.
    others: outputs of the second expert of each pair, if they are not `outputs`.
  """

  def kernels(outputs: Float[Array, "E n D"]) -> Float[Array, "E n n"]:
    outputs = outputs.astype(jnp.float32) * valid[None, :, None].astype(jnp.float32)
    gram = jnp.einsum("ead,ebd->eab", outputs, outputs)
    return gram * (1 - jnp.eye(gram.shape[-1]))[None]

  first = kernels(outputs)
  second = first if others is None else kernels(others)
  n = jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 4.0)
  rows, columns = jnp.sum(first, axis=-1), jnp.sum(second, axis=-1)
  trace = jnp.einsum("iab,jab->ij", first, second)
  total = jnp.sum(rows, axis=-1)[:, None] * jnp.sum(columns, axis=-1)[None, :]
  cross = 2.0 / (n - 2) * (rows @ columns.T)
  return (trace + total / ((n - 1) * (n - 2)) - cross) / (n * (n - 3))


def shuffled(
  outputs: Float[Array, "E n D"], valid: Bool[Array, "n"]
) -> Float[Array, "E n D"]:
  """Returns outputs with the valid tokens in random order, the same for all experts."""
  draws = jax.random.uniform(jax.random.key(0), valid.shape)
  order = jnp.argsort(jnp.where(valid, draws, 2.0))
  place = jnp.argsort(~valid, stable=True)
  return outputs[:, jnp.zeros_like(order).at[place].set(order)]


def cosine(weights: ExpertWeights) -> Float[Array, "E E"]:
  """Returns the cosine of every two experts' weights, all matrices as one vector.

  Hidden units can be permuted without changing an expert, so experts with independent
  initial weights have a cosine near 0 (of size 1/sqrt(number of weights)) even if they
  compute the same. A larger one shows that experts started as copies (upcycling).
  """
  matrices = [m for m in (weights.w_in, weights.w_gate, weights.w_out) if m is not None]
  flat = [m.astype(jnp.float32).reshape(m.shape[0], -1) for m in matrices]
  dot = sum(jnp.einsum("ia,ja->ij", m, m) for m in flat)
  norm = jnp.sqrt(jnp.diagonal(dot))
  return dot / jnp.maximum(norm[:, None] * norm[None, :], 1e-30)


def cache_sizes(model: Decoder) -> tuple[int, ...]:
  """Returns the sizes of caches: K, 2K and 4K experts; none if tokens do not choose."""
  moe, router = model.moe, model.router
  if not router.token_choice:
    return ()
  selected = router.selected(moe.fine_experts, moe.fine_selected)
  return tuple(s for s in (selected, 2 * selected, 4 * selected) if s <= moe.fine_experts)


def cache_hits(model: Decoder, mesh: Mesh) -> Callable[[Array, Array], Array]:
  """Returns (served [B, S, E], segment_ids) -> hits of the best cache of each size.

  The last number is that of all requests.
  """

  def hits(served: Array, segment_ids: Array) -> Array:
    valid = segment_ids > 0
    found = [
      streaks.best_hits(served[None], valid, size)[0] for size in cache_sizes(model)
    ]
    return jnp.stack([*found, jnp.sum(served, dtype=jnp.int32)])

  return jax.jit(hits, out_shardings=rules.replicated(mesh))


def probe(
  model: Decoder,
  params: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
) -> dict[str, Any]:
  """Returns the similarity of experts by layer, and super experts, JSON-ready.

  Args:
    model: from `groups.make_model`.
    params: its parameters.
    dataset: from `moejax.data.load`.
    split: train, validation or test.
    mesh: of the evaluation.
    batch_size: sequences per step, from `groups.batch_size`.
  """
  run = Layerwise(model, params, mesh, groups.least_factor(model))
  activation = model.moe.activation or model.config.activation
  hits = cache_hits(model, mesh)
  most = max(_MOST_VALUES // (model.moe.fine_experts * model.config.width), _GRAM_TOKENS)

  def look(x: Array, weights: Any, served: Array, segment_ids: Array) -> Any:
    stride = -(-segment_ids.size // most)
    rows, valid = x.reshape(-1, x.shape[-1])[::stride], segment_ids.reshape(-1)[::stride]
    served = served.reshape(-1, served.shape[-1])[::stride]
    shape = (served.shape[-1], *rows.shape)
    outputs = apply_experts(jnp.broadcast_to(rows[None], shape), weights, activation)
    size = jnp.max(jnp.abs(outputs.astype(jnp.float32)), axis=-1)
    few = -(-valid.size // _GRAM_TOKENS)
    fewer, counted = outputs[:, ::few], valid[::few] > 0
    both = hsic(fewer, counted), hsic(fewer, counted, shuffled(fewer, counted))
    return (
      jnp.stack(both),
      jnp.max(jnp.where(served.T, size, 0.0), axis=-1),
      cosine(weights),
    )

  look = jax.jit(look, out_shardings=rules.replicated(mesh))
  batches = perplexity.device_batches(
    dataset, split, mesh=mesh, batch_size=batch_size, limit=BATCHES
  )
  totals: dict[int, list[np.ndarray]] = {}
  with jax.set_mesh(mesh):
    for batch in batches:
      x, inputs = run.begin(batch)
      for layer, before, _, routes in run.to_moe_layers(x, inputs):
        what = look(*run.read(layer, before, inputs), routes.served, batch["segment_ids"])
        what = (*what, hits(routes.served, batch["segment_ids"]))
        found = [np.asarray(a, np.float64) for a in jax.device_get(what)]
        old = totals.get(layer, [0.0, 0.0, 0.0, 0.0])
        most_yet = np.maximum(old[1], found[1])
        totals[layer] = [old[0] + found[0], most_yet, found[2], old[3] + found[3]]
  largest = np.stack([totals[layer][1] for layer in model.moe_layers])
  return {
    "layers": [
      {
        "layer": layer,
        "cka": similarity.cka(totals[layer][0][0]).tolist(),
        "cka_shuffled": similarity.chance(*totals[layer][0]),
        "weight_cosine": totals[layer][2].tolist(),
        "largest_output": totals[layer][1].tolist(),
        "best_hit_rate": dict(
          zip(
            map(str, cache_sizes(model)),
            (totals[layer][3][:-1] / max(totals[layer][3][-1], 1.0)).tolist(),
            strict=True,
          )
        ),
      }
      for layer in model.moe_layers
    ],
    "super_experts": outliers.super_experts(largest, model.moe_layers),
  }
