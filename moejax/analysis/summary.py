"""From sums to measures: the content of analysis.json for each layer.

Letters: L MoE layers, E experts, K choices per token, M vocabulary ids.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis import decide, streaks
from moejax.analysis.collect import NUM_CLASSES, TABLES, Arrays, Vocabulary
from moejax.analysis.measures import (
  choices,
  coactivation,
  consistency,
  drops,
  flow,
  load,
  specialisation,
  subsets,
)
from moejax.analysis.sides import DECODER, Routing

FORMAT = 2
"""Incremented when a field of analysis.json is renamed or changes meaning."""

KINDS = ("domain", "class", "place", "position")
"""Drops are counted by these: domain, frequency class of the token read, part of the
routing group, and position in the document by powers of two."""


def undefined(model: Routing) -> dict[str, str]:
  """Returns the measures that are undefined for a model's router, with reasons."""
  found, name = {}, model.moe.router
  chosen = decide.undecidable(model)
  if model.router.mixes:
    every = f"router {name} lets every expert compute a part of every token"
    parts = ("coactivation", "flow", "domains", "words", "consistency", "drops")
    found |= dict.fromkeys(parts, every)
  if not model.router.token_choice:
    found |= dict.fromkeys(("margin", "ties", "ranks", "gate"), chosen or "")
  if chosen:
    found["replay"] = chosen
  if model.router.token_choice and _selected(model) == 1:
    found["coactivation"] = "with K=1 no token has two experts"
  if len(model.moe_layers) < 2:
    found["flow"] = "there is only one MoE layer"
  return found


def _selected(model: Routing) -> int:
  moe = model.moe
  return model.router.selected(moe.fine_experts, moe.fine_selected)


def _per_token(sums: Arrays, index: int, model: Routing) -> int | None:
  """Returns K of a layer; None if a token may have any number of experts."""
  if not model.router.token_choice:
    return None
  return subsets.per_token(sums["load"][index], int(sums["tokens"]))


def summarise(
  sums: Arrays, model: Routing, words: Vocabulary, domains: list[str], pieces: list[bytes]
) -> dict[str, Any]:
  """Returns the measures, JSON-ready.

  Args:
    sums: from `collect.collect`.
    model: with at least one MoE layer.
    words: the rows of the tables by id.
    domains: names, indexed as in the sums.
    pieces: bytes of each vocabulary id.
  """
  missing, tokens = undefined(model), int(sums["tokens"])
  present = np.flatnonzero(sums["tokens_domain"])
  layers = [
    {"layer": layer} | _layer(sums, index, model, missing, present)
    for index, layer in enumerate(model.moe_layers)
  ]
  if "words" not in missing:
    for index, layer in enumerate(layers):
      layer["words"] = _words(sums, index, model, words, pieces)
  found: dict[str, Any] = {
    "format": FORMAT,
    "tokens": tokens,
    "loss": float(sums["loss"]) / tokens if "loss" in sums else None,
    "router": model.moe.router,
    "num_experts": model.moe.fine_experts,
    "num_selected": _selected(model),
    "capacity_factor": model.moe.capacity_factor,
    "domains": [domains[i] for i in present] if domains else [],
    "domain_tokens": sums["tokens_domain"][present].tolist(),
    "frequency_classes": NUM_CLASSES,
    "undefined": missing,
    "layers": layers,
  }
  if "flow" not in missing:
    found["flow"] = [
      {"from": here, "to": there}
      | flow.flow(
        *(sums["flow"][i], sums["load"][i], sums["load"][i + 1], tokens),
        _per_token(sums, i, model),
      )
      for i, (here, there) in enumerate(
        zip(model.moe_layers, model.moe_layers[1:], strict=False)
      )
    ]
  return found


NOT_OF_AN_ENCODER_DECODER = {
  "experts": "outputs of experts are compared only for decoder-only models",
  "knockout": "experts are removed only from decoder-only models",
  "text": "the page shows the text only for decoder-only models",
}
"""Measures missing from the summary of an encoder-decoder, with the reason."""


def joined(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
  """Returns one summary of the stacks of an encoder-decoder, the encoder's layers first.

  Args:
    found: the summary of each stack that has MoE layers, by its name.

  Returns:
    The decoder's summary (the encoder's, if only that has MoE layers) with the layers of
    both, and their differences under `stacks`.
  """
  parts = list(found.values())
  first = DECODER if DECODER in found else next(iter(found))
  whole = dict(found[first])
  named = ("router", "num_experts", "num_selected", "tokens", "capacity_factor")
  whole["layers"] = [layer for part in parts for layer in part["layers"]]
  whole["stacks"] = {
    name: {key: part[key] for key in named} for name, part in found.items()
  }
  if flows := [row for part in parts for row in part.get("flow", [])]:
    whole["flow"] = flows
  whole["undefined"] = dict(whole["undefined"])
  for name, part in found.items():
    if name != first:
      whole["undefined"] |= {
        f"{measure} of the {name}": why for measure, why in part["undefined"].items()
      }
  whole["undefined"] |= NOT_OF_AN_ENCODER_DECODER
  return whole


def _layer(
  sums: Arrays,
  index: int,
  model: Routing,
  missing: dict[str, str],
  present: np.ndarray,
) -> dict[str, Any]:
  """Returns the measures of one layer, except for words."""

  def of(name: str) -> Any:
    return sums[name][index]

  tokens, counts = int(sums["tokens"]), of("load")
  selected, per_token = _selected(model), _per_token(sums, index, model)
  found = {
    "load": load.load(counts, of("importance"), tokens),
    "choices": choices.certainty(
      float(of("entropy")), of("entropy_bins"), tokens, len(counts)
    ),
  }
  if "loss_by_expert" in sums:
    found["loss_by_expert"] = (of("loss_by_expert") / np.maximum(counts, 1)).tolist()
  if "margin" in sums:
    found["choices"] |= choices.margin(
      float(of("margin")), of("margin_bins"), int(of("ties")), tokens
    )
  if "by_rank" in sums:
    found["load"]["by_rank"] = load.by_rank(of("by_rank"))
    found["load"]["gate"] = (of("gate") / np.maximum(counts, 1)).tolist()
  if "coactivation" not in missing:
    found["coactivation"] = coactivation.coactivation(of("pairs"), tokens, per_token)
  if "domains" not in missing and len(present) > 1:
    served = of("by_domain")[:, present]
    found["domains"] = specialisation.by_domain(served, per_token)
  if "consistency" not in missing:
    found["consistency"] = _consistency(sums, index, per_token)
  if "drops" not in missing:
    found["drops"] = _drops(sums, index, selected, present)
  return found


def _consistency(sums: Arrays, index: int, per_token: int | None) -> dict[str, Any]:
  counts = sums["load"][index]
  return {
    "segments": [
      consistency.best_set(
        sums[f"covered_{size}"][index],
        counts,
        size=size,
        segments=int(sums[f"segments_{size}"]),
        choices=per_token,
      )
      for size in streaks.SEGMENTS
      if f"covered_{size}" in sums and sums[f"segments_{size}"]
    ],
    "lru_hit_rate": consistency.hit_rates(sums["distance"][index]).tolist(),
  }


def _drops(
  sums: Arrays, index: int, selected: int, present: np.ndarray
) -> dict[str, Any]:
  found = {}
  for kind in KINDS:
    where = present if kind == "domain" else slice(None)
    dropped = sums.get(f"dropped_{kind}")
    found[kind] = drops.drops(
      sums[f"tokens_{kind}"][where],
      sums[f"lost_{kind}"][index][where],
      None if dropped is None else dropped[index][where],
      selected,
    )
  return found


def _words(
  sums: Arrays, index: int, model: Routing, words: Vocabulary, pieces: list[bytes]
) -> dict[str, Any]:
  """Returns specialisation by input id, target and predicted id, and top words."""
  tokens, found = int(sums["tokens"]), {}
  for name in (name for name in TABLES if f"by_{name}" in sums):
    # The last row is shared by many ids.
    served = sums[f"by_{name}"][index][:, :-1]
    seen = sums[f"seen_{name}"][:-1]
    if name == "input":
      best = specialisation.top_words(served, seen, tokens)
      found["top"] = [
        [
          {"token": show(pieces, int(words.ids[j])), "lift": lift, "count": count}
          for j, lift, count in row
        ]
        for row in best
      ]
    found[name] = specialisation.by_word(served, seen, _per_token(sums, index, model))
  return found


def show(pieces: list[bytes], token: int) -> str:
  """Returns a vocabulary id as readable text."""
  piece = pieces[token] if token < len(pieces) else b""
  return piece.decode("utf-8", "backslashreplace") if piece else f"<{token}>"
