"""Knock-out: the change of the loss when an expert is removed.

No measure of the router alone has been found to predict this (arXiv:2606.10703), so it is
measured: for each expert in turn, or for sets of experts, on the whole text.

  next_best  the router cannot choose the expert; its tokens go to their next best.
             Exactly a run in which the expert's logit is -inf
  none       the expert computes zero; choices and gates stay

Layers below the removed expert are computed once, and so is the attention of its own
layer.

Letters: L MoE layers, E experts, Z sequences.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax.analysis.layerwise import Layerwise, Removed
from moejax.errors import UserError
from moejax.evaluate import groups, perplexity
from moejax.launch import hang
from moejax.models.decoder import Decoder
from moejax.sharding import rules
from moejax.types import Params

FALLBACKS = ("next_best", "none")

Sets = Mapping[int, Sequence[tuple[int, ...]]]
"""For each layer of the model, the sets of experts that are removed in turn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
  """The loss of every sequence, with all experts and with each set removed."""

  tokens: Int[np.ndarray, "Z"]
  base: Float[np.ndarray, "Z"]
  """Summed over the tokens of the sequence, in nats."""
  removed: dict[int, Float[np.ndarray, "n Z"]]
  """By layer, in the order of its sets."""


def check(model: Decoder, fallback: str, largest: int) -> None:
  """Rejects a removal that the router does not support.

  Raises:
    UserError: it does not choose by logits, or has too few experts.
  """
  if fallback == "none":
    return
  moe, name = model.moe, model.moe.router
  selected = model.router.selected(moe.fine_experts, moe.fine_selected)
  if not (model.router.by_logits and model.router.token_choice):
    raise UserError(
      f"--knockout_tokens=next_best: router {name} does not choose by logits, so its "
      "tokens have no next best expert. Use --knockout_tokens=none."
    )
  if selected + largest > moe.fine_experts:
    raise UserError(
      f"--knockout_tokens=next_best: each token has {selected} of {moe.fine_experts} "
      f"experts, so with {largest} removed there is no next best. Use "
      "--knockout_tokens=none."
    )


def knock_out(
  model: Decoder,
  params: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  sets: Sets,
  fallback: str = "next_best",
  limit: int = 0,
  progress: Callable[[int], None] | None = None,
) -> Losses:
  """Evaluates the model with all experts and with each set of experts removed.

  Args:
    model: from `groups.make_model`.
    params: its parameters.
    dataset: from `moejax.data.load`.
    split: train, validation or test.
    mesh: of the evaluation.
    batch_size: sequences per step, from `groups.batch_size`.
    sets: the sets of experts to remove, by layer.
    fallback: one of `FALLBACKS`.
    limit: maximum number of batches; 0 means all.
    progress: called with the number of tokens done.

  Raises:
    UserError: as `check`.
  """
  check(model, fallback, max(len(s) for of in sets.values() for s in of))
  run = Layerwise(model, params, mesh, groups.least_factor(model))
  tokens, base = [], []
  changed: dict[int, list[np.ndarray]] = {layer: [] for layer in sets}
  batches = perplexity.device_batches(
    dataset, split, mesh=mesh, batch_size=batch_size, limit=limit
  )
  count = jax.jit(
    lambda ids: jnp.sum(ids > 0, axis=1), out_shardings=rules.replicated(mesh)
  )
  with jax.set_mesh(mesh):
    for batch in batches:
      found = batch_losses(run, batch, sets, fallback), count(batch["segment_ids"])
      (plain, found), number = jax.device_get(found)
      hang.progress()
      tokens.append(number)
      base.append(plain)
      for layer, losses in found.items():
        changed[layer].append(np.stack(losses))
      if progress is not None:
        progress(int(sum(n.sum() for n in tokens)))
  whole = np.concatenate(tokens)
  some = whole > 0  # Empty rows of the last batch.

  def joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=-1).astype(np.float64)[..., some]

  return Losses(
    tokens=whole[some],
    base=joined(base),
    removed={layer: joined(parts) for layer, parts in changed.items()},
  )


def batch_losses(
  run: Layerwise, batch: Any, sets: Sets, fallback: str
) -> tuple[Any, dict[int, Any]]:
  """Returns each sequence's loss: with all experts, and by layer for each set."""
  experts, found = run.model.moe.fine_experts, {}
  x, inputs = run.begin(batch)
  last, at = x, -1
  for layer, before, after, _ in run.to_moe_layers(x, inputs):
    last, at = after, layer
    losses = []
    for removed in sets.get(layer, ()):
      mask = np.ones(experts, bool)
      mask[list(removed)] = False
      how = Removed(present=mask) if fallback == "next_best" else Removed(sounding=mask)
      changed, _ = run.feed(layer, before, inputs, how)
      losses.append(run.losses(run.rest(layer, changed, inputs), batch))
    if losses:
      found[layer] = losses
  return run.losses(run.rest(at, last, inputs), batch), found


def effect(
  base: Float[np.ndarray, "Z"],
  changed: Float[np.ndarray, "Z"],
  tokens: Int[np.ndarray, "Z"],
) -> tuple[float, float]:
  """Returns the change of the loss in nats per token, and its standard error.

  The change is sum_z (changed_z - base_z) / sum_z tokens_z. Sequences, not tokens, are
  assumed independent: the error is that of a ratio of means over Z sequences,
  sqrt(Z / (Z-1) sum_z (d_z - change n_z)^2) / sum_z n_z (Cochran 1977, section 2.11).
  """
  difference, total = changed - base, tokens.sum()
  change = difference.sum() / total
  count = len(tokens)
  spread = np.sum(np.square(difference - change * tokens))
  error = np.sqrt(count / max(count - 1, 1) * spread) / total
  return float(change), float(error) if count > 1 else float("nan")


def singles(model: Decoder, layers: Sequence[int]) -> Sets:
  """Returns each expert of each layer on its own."""
  return {layer: [(e,) for e in range(model.moe.fine_experts)] for layer in layers}


def pairs(losses: Losses, count: int) -> Sets:
  """Returns, by layer, the pairs of experts whose single removals cost most."""
  found = {}
  for layer, removed in losses.removed.items():
    cost = (removed - losses.base).sum(axis=1)
    experts = len(cost)
    every = [(i, j) for i in range(experts) for j in range(i + 1, experts)]
    found[layer] = sorted(every, key=lambda pair: -cost[list(pair)].sum())[:count]
  return found


def table(losses: Losses, fallback: str) -> list[dict[str, Any]]:
  """Returns the effect of each single expert, by layer, JSON-ready."""
  rows = []
  for layer, removed in losses.removed.items():
    found = [effect(losses.base, row, losses.tokens) for row in removed]
    rows.append(
      {
        "layer": layer,
        "tokens_go_to": fallback,
        "delta": [change for change, _ in found],
        "error": [error for _, error in found],
      }
    )
  return rows


def pair_table(single: Losses, double: Losses, sets: Sets) -> list[dict[str, Any]]:
  """Returns the effect of pairs, and by how much it exceeds the sum of the single ones.

  `interaction` is delta(i, j) - delta(i) - delta(j): above 0, each can stand in for the
  other.
  """
  rows = []
  for layer, of_layer in sets.items():
    for (i, j), row in zip(of_layer, double.removed[layer], strict=True):
      alone = single.removed[layer][i] + single.removed[layer][j] - single.base
      change, error = effect(double.base, row, double.tokens)
      extra, extra_error = effect(alone, row, double.tokens)
      rows.append(
        {
          "layer": layer,
          "experts": [i, j],
          "delta": change,
          "error": error,
          "interaction": extra,
          "interaction_error": extra_error,
        }
      )
  return rows
