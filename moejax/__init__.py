"""Sparse Mixture-of-Experts language models in JAX and Flax.

  from moejax import MoE, load_run
  y, aux = MoE(width=64, num_experts=8, num_selected=2, hidden=128, rngs=rngs)(x)
  logits = load_run("runs/default").logits(tokens)

Names are imported on first use: `import moejax` alone imports neither jax nor flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moejax.version import __version__

if TYPE_CHECKING:
  from moejax.config import Config
  from moejax.evaluate.load import LoadedRun, load_run
  from moejax.layers.standalone import MoE, is_trained
  from moejax.models.decoder import Decoder
  from moejax.routing.router import Router

_HOMES = {
  "Config": "moejax.config",
  "Decoder": "moejax.models.decoder",
  "LoadedRun": "moejax.evaluate.load",
  "MoE": "moejax.layers.standalone",
  "Router": "moejax.routing.router",
  "is_trained": "moejax.layers.standalone",
  "load_run": "moejax.evaluate.load",
}

__all__ = [
  "Config",
  "Decoder",
  "LoadedRun",
  "MoE",
  "Router",
  "__version__",
  "is_trained",
  "load_run",
]


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
  return vars(importlib.import_module(_HOMES[name]))[name]


def __dir__() -> list[str]:
  return __all__
