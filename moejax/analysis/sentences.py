"""The results of an analysis in three sentences: loads, preferences, and what matters.

Letters: E experts.
"""

from typing import Any

import numpy as np

_CLEAR = 0.1
"""Minimum distance from chance to call it a preference; both measures are 0 to 1."""


def sentences(found: dict[str, Any]) -> list[str]:
  """Returns three sentences, each with its numbers and what to compare them with.

  Args:
    found: content of analysis.json.
  """
  return [_loads(found), _preferences(found), _importance(found)]


def left_out(found: dict[str, Any]) -> str:
  """Returns a sentence on the parts of a text that were not read; empty if all were.

  Args:
    found: content of analysis.json.
  """
  own = found.get("left_out", {})
  words = []
  if own.get("duplicates"):
    what = "pieces" if own["is_cut"] else "documents"
    many, size = own["duplicates"], own["duplicate_bytes"]
    words.append(f"equal to earlier {what}: {many:,} ({size:,} bytes)")
  if own.get("skipped"):
    words.append(f"empty or not text: {own['skipped']:,}")
  return f"Left out of {found['text']}: {'; '.join(words)}." if words else ""


def _loads(found: dict[str, Any]) -> str:
  layers, num_experts = found["layers"], found["num_experts"]
  worst = max(layers, key=lambda layer: layer["load"]["max_ratio"])
  dead = sum(len(layer["load"]["dead"]) for layer in layers)
  load = worst["load"]
  used = "all experts are used"
  if dead:
    used = f"{dead} of {len(layers) * num_experts} experts never computed a token"
  busiest = f"expert {int(np.argmax(load['share']))} of layer {worst['layer']}"
  text = (
    f"The busiest expert has {load['max_ratio']:.2f} times an even load"
    f"{_most(found, worst)} ({busiest}), and {used}"
  )
  dropping = [
    (_drop_rate(layer), index) for index, layer in enumerate(layers) if "drops" in layer
  ]
  if not dropping or found.get("capacity_factor") is None:
    return text + "."
  rate, index = max(dropping)
  layer = layers[index]["layer"]
  capacity = f"the training capacity of {found['capacity_factor']:g}"
  if rate == 0:
    return f"{text}; {capacity} drops nothing."
  if "dropped" not in layers[index]["drops"]["place"]:
    missed = f"up to {rate:.1%} of the tokens without an expert"
    return f"{text}; {capacity} leaves {missed} (layer {layer})."
  return f"{text}; {capacity} drops up to {rate:.1%} of the choices (layer {layer})."


def _most(found: dict[str, Any], layer: dict[str, Any]) -> str:
  """Returns the largest possible load in words: E/K even loads, where tokens choose K."""
  if "ranks" in found["undefined"]:
    return ""
  stack = str(layer["layer"]).rpartition(".")[0]
  own = found["stacks"][stack] if stack else found
  return f", of at most {own['num_experts'] / own['num_selected']:.3g}"


def _drop_rate(layer: dict[str, Any]) -> float:
  own = layer["drops"]["place"]
  tokens = np.asarray(own["tokens"], float)
  rate = np.asarray(own.get("dropped", own["lost"]))
  return float((rate * tokens).sum() / max(tokens.sum(), 1.0))


def _preferences(found: dict[str, Any]) -> str:
  worded = [layer for layer in found["layers"] if "words" in layer]
  if not worded:
    reason = found["undefined"].get("words", "words were not counted")
    return f"Whether experts prefer words or domains cannot be said: {reason}."
  top = max(worded, key=lambda layer: _above(layer["words"]["input"], "favourite"))
  own = top["words"]["input"]
  verb = "follow" if _above(own, "favourite") > _CLEAR else "hardly follow"
  text = (
    f"Experts {verb} words: in layer {top['layer']} a word's favourite expert computes "
    f"{own['favourite']:.0%} of its tokens, where shuffled assignments give "
    f"{own['chance']:.0%}"
  )
  domains = [layer["domains"] for layer in worded if "domains" in layer]
  if not domains:
    return text + "."
  most = max(domains, key=lambda own: _above(own, "information_fraction"))
  return (
    f"{text}; knowing the expert removes at most {most['information_fraction']:.1%} of "
    "the uncertainty about the domain."
  )


def _above(own: dict[str, Any], name: str) -> float:
  return own[name] - own["chance"]


def _importance(found: dict[str, Any]) -> str:
  rows = found.get("knockout")
  if not rows and "knockout" in found["undefined"]:
    return (
      "Which experts matter is not visible here: no measure of a router is known to "
      "predict it."
    )
  if not rows:
    return (
      "Which experts matter is not visible here: no measure of a router is known to "
      "predict it, and --knockout measures it."
    )
  cost, error, layer, expert = max(
    (delta, row["error"][expert], row["layer"], expert)
    for row in rows
    for expert, delta in enumerate(row["delta"])
  )
  middle = float(np.median([delta for row in rows for delta in row["delta"]]))
  times = f", {cost / middle:.1f} times the median expert" if middle > 0 else ""
  return (
    f"The expert whose removal costs most is {expert} of layer {layer}: {cost:+.4f} "
    f"(± {2 * error:.4f}, two standard errors) nats per token{times}."
  )
