"""Analyses made up for the page: large ones, and ones whose words are attacks."""

from typing import Any

import numpy as np

from moejax.analysis.explorer.facts import Names
from moejax.analysis.explorer.sample import Sample

ATTACKS = (
  b"</script>",
  b"<img src=x onerror=alert(1)>",
  b"'\"`${1}",
  b"&amp;",
  "\u202e\u200b\x00\x1b".encode(),
  "\U0001f600".encode(),
  "\U0001f600".encode()[:2],
  "\U0001f600".encode()[2:],
  b"\xff",
  b"\n",
  "\u0301".encode(),
  "\u05e9\u05dc".encode(),
  b" the",
  b"",
)


def synthetic(
  *, layers: int, experts: int, choices: int, tokens: int, seed: int = 0
) -> tuple[dict[str, Any], Sample, Names]:
  """An analysis of uniform choices and Zipf-like words."""
  rng = np.random.default_rng(seed)
  pieces = [f"w{i}".encode() for i in range(5000)]
  order = np.argsort(rng.random((layers, tokens, experts), np.float32), axis=-1)
  weights = -np.sort(-rng.dirichlet(np.full(choices, 2.0), (layers, tokens)), axis=-1)
  rest = max(min(2, experts - choices), 1)
  length = 128
  drawn = Sample(
    token=np.minimum(rng.zipf(1.3, tokens), 4999),
    sequence=np.arange(tokens) // length * 3,
    document=1 + np.arange(tokens) % length // 50,
    position=np.arange(tokens) % length % 50,
    domain=rng.integers(0, 4, tokens) * 0 + np.arange(tokens) // length % 4,
    expert=order[..., :choices],
    gate=weights,
    kept=rng.random(weights.shape) < 0.9,
    other=order[..., choices : choices + rest],
    other_probability=rng.random((layers, tokens, rest)) * 0.1,
  )
  names = Names(pieces=pieces, domains=[f"domain {i}" for i in range(4)])
  return _found(layers, experts, choices, tokens, rng), drawn, names


def attack() -> tuple[dict[str, Any], Sample, Names]:
  """Few tokens, whose words and domains are `ATTACKS`."""
  found, drawn, _ = synthetic(layers=2, experts=4, choices=2, tokens=400)
  drawn.token[:] = np.arange(400) % len(ATTACKS)
  bad = "</script><b>\"'<img src=x onerror=alert(1)>"
  domains = [f"{bad}{i}" for i in range(4)]
  found |= {"domains": domains, "workdir": f"runs/{bad}"}
  for layer in found["layers"]:
    layer["words"]["top"][0] = [{"token": bad, "lift": 2.0, "count": 30}]
  return found, drawn, Names(pieces=ATTACKS, domains=domains)


def _found(
  layers: int, experts: int, choices: int, tokens: int, rng: np.random.Generator
) -> dict[str, Any]:
  rows = [_layer(i, experts, choices, rng) for i in range(layers)]
  steps = (100, 200, 300)
  history = [
    {"saturation": step / 300, "chance": 0.2, "load": rng.dirichlet(np.full(experts, 9))}
    for step in steps
  ]
  history = [row | {"load": row["load"].tolist()} for row in history]
  return {
    "workdir": "runs/synthetic",
    "step": 300,
    "split": "validation",
    "text": None,
    "router": "top_k",
    "num_selected": choices,
    "num_experts": experts,
    "capacity_factor": 1.25,
    "tokens": tokens,
    "loss": 2.5,
    "domains": [f"domain {i}" for i in range(4)],
    "domain_tokens": [tokens // 4] * 4,
    "frequency_classes": 5,
    "undefined": {"nothing": "everything is there"},
    "layers": rows,
    "flow": [
      {
        "from": rows[i]["layer"],
        "to": rows[i + 1]["layer"],
        "conditional": _matrix(experts, rng),
      }
      for i in range(layers - 1)
    ],
    "saturation": [
      {"step": step, "layers": [row] * layers}
      for step, row in zip(steps, history, strict=True)
    ],
    "knockout": [
      {
        "layer": 2 * i + 1,
        "delta": (rng.random(experts) * 0.1).tolist(),
        "error": [0.01] * experts,
      }
      for i in range(layers)
    ],
    "replay": [
      {
        "setting": {"capacity_factor": factor, "overflow": overflow},
        "layers": [{"layer": 1, "exact": True, "drop_fraction": 0.2 / factor}] * layers,
      }
      for factor in (1.0, 2.0)
      for overflow in ("drop", "next_best")
    ],
    "super_experts": {},
  }


def _matrix(experts: int, rng: np.random.Generator) -> list[list[float]]:
  return rng.dirichlet(np.full(experts, 2.0), experts).tolist()


def _layer(
  index: int, experts: int, choices: int, rng: np.random.Generator
) -> dict[str, Any]:
  share = rng.dirichlet(np.full(experts, 20.0))
  word = {"favourite": 0.7, "chance": 0.2}

  def drops(count: int) -> dict[str, Any]:
    lost = np.linspace(0, 0.3, count).tolist()
    about = {"tokens": [100] * count, "error": [0.01] * count, "dropped": lost}
    return about | {"lost": [value / 2 for value in lost]}

  lift = rng.gamma(5, 0.2, (experts, experts))
  return {
    "layer": 2 * index + 1,
    "load": {
      "share": share.tolist(),
      "importance": share.tolist(),
      "max_ratio": float(share.max() * experts),
      "min_ratio": float(share.min() * experts),
      "dead": [],
      "gate": [0.1] * experts,
    },
    "choices": {"entropy_fraction": 0.5, "margin": 0.1, "tied_fraction": 0.0},
    "loss_by_expert": [2.5] * experts,
    "coactivation": {"over_chance": (lift / 0.9).tolist()},
    "words": dict.fromkeys(("input", "target", "predicted"), word)
    | {
      "top": [
        [
          {"token": f"w{int(j)}", "lift": 5.0 - k / 3, "count": 20 + k}
          for k, j in enumerate(rng.integers(0, 5000, 10))
        ]
        for _ in range(experts)
      ]
    },
    "domains": {
      "information_fraction": 0.05,
      "chance": 0.01,
      "lift": rng.gamma(9, 0.1, (4, experts)).tolist(),
    },
    "experts": {
      "cka": rng.random((experts, experts)).tolist(),
      "cka_shuffled": {"mean": 0.001, "std": 0.01},
      "largest_output": rng.random(experts).tolist(),
    },
    "drops": {
      "place": drops(16),
      "position": drops(16),
      "class": drops(5),
      "domain": drops(4),
    },
    "consistency": {
      "segments": [
        {
          "tokens": 64,
          "covered": np.linspace(0.1, 1, experts).tolist(),
          "chance": np.linspace(0.05, 1, experts).tolist(),
        }
      ],
      "lru_hit_rate": np.linspace(0, 1, experts).tolist(),
    },
  }
