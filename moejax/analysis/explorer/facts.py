"""The data of the page: the part of an analysis that it shows, small enough to embed.

Letters: L MoE layers, E experts, K choices shown per token, A alternatives shown, R
domains, n tokens of the sample.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.explorer import pack, words
from moejax.analysis.explorer.sample import Sample

MAX_DOMAINS = 24
"""Maximum domains on an expert's card: those with the most tokens. The text has all."""

_DIGITS = 4
"""Significant digits of a number on the page; analysis.json has all."""

_KEPT = (
  ("router", "num_experts", "num_selected", "capacity_factor", "step", "tokens")
  + ("workdir", "split", "text", "loss", "undefined", "frequency_classes")
  + ("saturation", "knockout", "super_experts")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
  """The meaning of ids."""

  pieces: Sequence[bytes] = ()
  """Bytes of each vocabulary id."""
  domains: Sequence[str] = ()
  """All domains of the dataset, including those without a token in the text."""


def facts(found: dict[str, Any], sample: Sample | None, names: Names) -> Any:
  """Returns everything except long columns, JSON-ready.

  Args:
    found: content of analysis.json.
    sample: tokens to be shown; None for a page without text.
    names: of ids.
  """
  known = {name: found[name] for name in _KEPT if name in found}
  domains = found.get("domains", [])
  largest = _largest(found)
  known |= {
    "layers": [_layer(layer, largest) for layer in found["layers"]],
    "domains": [words.visible(name) for name in domains],
    "cardDomains": largest,
    "replay": [
      {name: entry[name] for name in ("setting", "layers")}
      for entry in found.get("replay", [])
    ],
  }
  why = found["undefined"].get("ranks", "")
  known |= {"tokensChoose": not why, "note": _note(why) if sample and why else ""}
  if sample is not None:
    known["sample"] = _sample_facts(sample, names)
  return _short(known)


def _note(why: str) -> str:
  return (
    f"{why[0].upper()}{why[1:]}. This page shows the most probable of the experts that "
    "compute a token, with the router's probability in place of a weight."
  )


def _largest(found: dict[str, Any]) -> list[int]:
  tokens = np.asarray(found.get("domain_tokens", []))
  if len(found.get("domains", [])) < 2:
    return []
  return np.argsort(-tokens, kind="stable")[:MAX_DOMAINS].tolist()


def _layer(layer: dict[str, Any], domains: list[int]) -> dict[str, Any]:
  """Returns a layer without its matrices, which are in `matrices`."""
  names = ("layer", "load", "choices", "drops", "consistency", "loss_by_expert")
  known = {name: layer[name] for name in names if name in layer}
  if "words" in layer:
    own = layer["words"]
    known["words"] = {
      name: own[name] for name in ("input", "target", "predicted") if name in own
    }
    known["top"] = [
      [[words.visible(word["token"]), word["lift"], word["count"]] for word in row]
      for row in own.get("top", [])
    ]
  if "domains" in layer:
    own = layer["domains"]
    known["domainInformation"] = [own["information_fraction"], own["chance"]]
    known["domainLift"] = np.asarray(own["lift"])[domains].T.tolist()  # [E, R]
  if "experts" in layer:
    known["largestOutput"] = layer["experts"]["largest_output"]
    if "cka_shuffled" in layer["experts"]:
      known["ckaShuffled"] = layer["experts"]["cka_shuffled"]
  return known


def matrices(found: dict[str, Any]) -> pack.Columns:
  """Returns the measures between two experts, [E, E] for each layer, where measured."""
  columns = {}
  for index, layer in enumerate(found["layers"]):
    if "coactivation" in layer:
      columns[f"lift{index}"] = layer["coactivation"]["over_chance"]
    if "cka" in layer.get("experts", {}):
      columns[f"cka{index}"] = layer["experts"]["cka"]
  place = {layer["layer"]: index for index, layer in enumerate(found["layers"])}
  for row in found.get("flow", []):
    columns[f"flow{place[row['from']]}"] = row["conditional"]
  return {
    name: pack.rounded(np.asarray(value, np.float32)) for name, value in columns.items()
  }


def _sample_facts(sample: Sample, names: Names) -> dict[str, Any]:
  """Returns the text of the sample: distinct words, and the bytes of odd ones."""
  pieces = names.pieces
  strings = sorted(set(token_texts(sample, pieces)))
  odd = {}
  for token in np.unique(sample.token).tolist():
    piece = pieces[token] if token < len(pieces) else b""
    try:
      piece.decode("utf-8")
    except UnicodeDecodeError:
      odd[token] = piece.hex(" ")
  return {
    "tokens": sample.num_tokens,
    "choices": sample.expert.shape[-1],
    "alternatives": sample.other.shape[-1],
    "strings": strings,
    "bytes": odd,
    "domains": [words.visible(name) for name in names.domains],
    "gateScale": [pack.quantized(gate)[1] for gate in sample.gate],
    "otherScale": [pack.quantized(p)[1] for p in sample.other_probability],
  }


def token_texts(sample: Sample, pieces: Sequence[bytes]) -> list[str]:
  starts = np.flatnonzero(np.diff(sample.sequence)) + 1
  return words.texts(sample.token, pieces, starts.tolist())


def text_columns(sample: Sample, pieces: Sequence[bytes]) -> pack.Columns:
  """Returns ids, places and words of the tokens."""
  shown = token_texts(sample, pieces)
  number = {text: index for index, text in enumerate(sorted(set(shown)))}
  columns = {
    "string": np.array([number[text] for text in shown]),
    "token": sample.token,
    "sequence": sample.sequence,
    "document": sample.document,
    "position": sample.position,
    "domain": sample.domain,
  }
  return {
    name: pack.ids(values, int(values.max(initial=0))) for name, values in columns.items()
  }


def layer_columns(sample: Sample, index: int, num_experts: int) -> pack.Columns:
  """Returns the choices of one layer, [K, n] and [A, n]; `kept` has a bit per choice.

  Args:
    sample: of the tokens.
    index: of the MoE layer.
    num_experts: E, which means "no expert".
  """
  kept = np.packbits(sample.kept[index], axis=1, bitorder="little")
  return {
    "expert": pack.ids(sample.expert[index].T, num_experts),
    "gate": pack.quantized(sample.gate[index].T)[0],
    "kept": np.ascontiguousarray(kept.T),
    "other": pack.ids(sample.other[index].T, num_experts),
    "otherProbability": pack.quantized(sample.other_probability[index].T)[0],
  }


def _short(value: Any) -> Any:
  """Returns JSON with numbers of `_DIGITS` digits, and None for non-finite ones."""
  if isinstance(value, dict):
    return {str(key): _short(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_short(inner) for inner in value]
  if isinstance(value, float):
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
  return value
