"""Per-layer values, grouped by block like the decoder's parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from moejax.config import ModelConfig
from moejax.config.attention import layer_windows
from moejax.config.pattern import Pattern

PARTS = ("prefix", "unit", "suffix")


def by_part(values: Any, pattern: Pattern) -> dict[str, dict[str, Any]]:
  """Splits a tree with a leading axis of MoE layers into one tree per MoE block.

  Args:
    values: leaves [L, ...], the MoE layers in order.

  Returns:
    Trees by part and block name, MoE blocks only: leaves [...], or [R, ...] in the
    repeated unit.
  """
  result, used = {}, 0
  for part in PARTS:
    kinds = getattr(pattern, part)
    names = [str(index) for index, is_moe in enumerate(kinds) if is_moe]
    repeats = pattern.repeats if part == "unit" else 1
    here = slice(used, used + repeats * len(names))
    used += repeats * len(names)
    result[part] = {}
    for number, name in enumerate(names):

      def pick(
        leaf: Any,
        part: str = part,
        here: slice = here,
        step: int = len(names),
        number: int = number,
      ) -> Any:
        own = leaf[here][number::step]
        return own if part == "unit" else own[0]

      result[part][name] = jax.tree.map(pick, values)
  return result


def windowed_by_part(
  config: ModelConfig, pattern: Pattern
) -> dict[str, dict[str, Bool[Array, "..."]]]:
  """Returns whether each layer has the sliding window, like the decoder's parameters.

  Empty without a window pattern, under which all layers are alike.
  """
  if not config.window_pattern:
    return {part: {} for part in PARTS}
  windowed = np.asarray(layer_windows(config)) > 0
  result, used = {}, 0
  for part in PARTS:
    count = len(getattr(pattern, part))
    repeats = pattern.repeats if part == "unit" else 1
    here = windowed[used : used + repeats * count].reshape(repeats, count)
    used += repeats * count
    result[part] = {
      str(i): jnp.asarray(here[:, i] if part == "unit" else here[0, i])
      for i in range(count)
    }
  return result
