"""Routing analysis: which experts serve which domains and which tokens.

Counts the computed assignments of a split per layer, by domain and by vocabulary id,
dropless unless the router needs a capacity. An expert's `lift` for a token is the rate
at which it serves that token over its rate for all tokens: 1 is no preference. (Mixtral,
arXiv:2401.04088, section 5, analyses domains; Switch and ST-MoE, arXiv:2202.08906,
section 7, tokens.)

Letters: L MoE layers, E experts, R domains, V vocabulary.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from moejax import files
from moejax.analysis import collect
from moejax.errors import UserError
from moejax.models.decoder import Decoder
from moejax.types import Params

MIN_COUNT = 20
"""Tokens that occur less often get no lift: they are too few to show a preference."""

MAX_DOMAINS = 24
"""Maximum columns of the plot; the file has all domains."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """Counts of computed assignments and of tokens."""

  by_domain: Int[np.ndarray, "L E R"]
  by_token: Int[np.ndarray, "L E V"]
  domain: Int[np.ndarray, "R"]
  """Valid tokens of each domain."""
  token: Int[np.ndarray, "V"]
  """Occurrences of each id in the inputs, without padding."""


def count(
  model: Decoder,
  params: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  limit: int = 0,
) -> Counts:
  """Runs the model on a split and counts; arguments as in `perplexity.evaluate`."""
  sums = collect.collect(
    model,
    params,
    dataset,
    split=split,
    mesh=mesh,
    batch_size=batch_size,
    words=collect.every_id(model.vocab_size),
    limit=limit,
    tables=("input",),
  )
  return Counts(
    by_domain=sums["by_domain"],
    by_token=sums["by_input"][..., :-1],
    domain=sums["tokens_domain"],
    token=sums["seen_input"][:-1],
  )


def analyse(
  model: Decoder,
  params: Params,
  dataset: Any,
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  limit: int = 0,
  top: int = 10,
) -> dict[str, Any]:
  """Returns loads per domain and top tokens per expert, JSON-ready.

  Args:
    model: from `groups.make_model`; others as in `perplexity.evaluate`.
    params: its parameters.
    dataset: from `moejax.data.load`.
    split: train, validation or test.
    mesh: of the evaluation.
    batch_size: sequences per step.
    limit: maximum number of batches; 0 means all.
    top: tokens listed per expert.

  Returns:
    split, tokens, domains (names of those with tokens), domain_tokens and `layers`,
    each with layer (index in the model), domain_load (per domain, each expert's
    share of its assignments) and top_tokens (per expert: token, lift, count).

  Raises:
    UserError: the model has no MoE layer, or the split has no text.
  """
  if not model.moe_layers:
    raise UserError("--routing: this model has no MoE layer, so nothing is routed.")
  counts = count(
    model,
    params,
    dataset,
    split=split,
    mesh=mesh,
    batch_size=batch_size,
    limit=limit,
  )
  present = np.flatnonzero(counts.domain)
  pieces = dataset.tokenizer.pieces
  layers = []
  for index, layer in enumerate(model.moe_layers):
    load = _shares(counts.by_domain[index][:, present])
    layers.append(
      {
        "layer": layer,
        "domain_load": np.round(load.T, 5).tolist(),
        "top_tokens": _top_tokens(counts.by_token[index], counts.token, pieces, top),
      }
    )
  return {
    "split": split,
    "tokens": int(counts.domain.sum()),
    "domains": [dataset.domains[i] for i in present],
    "domain_tokens": counts.domain[present].tolist(),
    "layers": layers,
  }


def _shares(load: Float[np.ndarray, "E R"] | Int[np.ndarray, "E R"]) -> np.ndarray:
  """Returns each column divided by its sum."""
  return load / np.maximum(load.sum(axis=0, keepdims=True), 1)


def _top_tokens(
  served: Int[np.ndarray, "E V"],
  seen: Int[np.ndarray, "V"],
  pieces: list[bytes],
  top: int,
) -> list[list[dict[str, Any]]]:
  """Returns the tokens of highest lift per expert, in descending order."""
  share = served.sum(axis=1, keepdims=True) / max(int(seen.sum()), 1)
  rate = served / np.maximum(seen, 1)[None, :]
  lift = np.divide(rate, share, out=np.zeros_like(rate), where=share > 0)
  lift[:, seen < MIN_COUNT] = 0
  best = np.argsort(-lift, axis=1, kind="stable")[:, :top]
  return [
    [
      {
        "token": _show(pieces, int(token)),
        "lift": round(float(lift[expert, token]), 3),
        "count": int(served[expert, token]),
      }
      for token in row
      if lift[expert, token] > 0
    ]
    for expert, row in enumerate(best)
  ]


def _show(pieces: list[bytes], token: int) -> str:
  piece = pieces[token] if token < len(pieces) else b""
  return piece.decode("utf-8", "backslashreplace") if piece else f"<{token}>"


def draw(analysis: dict[str, Any], path: pathlib.Path) -> None:
  """Draws a heat map per MoE layer: expert load over even load, by domain."""
  # Not pyplot, which keeps figures alive and selects a display.
  from matplotlib.figure import Figure

  layers, names = analysis["layers"], analysis["domains"]
  largest = np.argsort(-np.asarray(analysis["domain_tokens"]), kind="stable")
  shown = largest[:MAX_DOMAINS]
  figure = Figure(figsize=(2 + 0.35 * len(shown), 1 + 2.6 * len(layers)))
  axes = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
  for axis, layer in zip(axes, layers, strict=True):
    load = np.asarray(layer["domain_load"])[shown].T
    image = axis.imshow(
      load * load.shape[0], aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0
    )
    axis.set_ylabel(f"layer {layer['layer']}\nexpert")
    axis.set_xticks([])
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, label="load / even load")
  axes[-1].set_xticks(range(len(shown)), [names[i] for i in shown], rotation=90)
  axes[0].set_title(f"Expert load by domain ({analysis['split']})")
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")
