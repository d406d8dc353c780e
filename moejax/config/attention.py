"""Values derived from the attention fields: head widths, windows, YaRN's temperature.

Letters: A width of a query or key head, Z width of a value head.
"""

import dataclasses
import math

from moejax.config.schema import ModelConfig

WINDOW_WORDS = ("sliding", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadWidths:
  """Widths of one attention head."""

  query: int
  """A, of a query or a key."""
  value: int
  """Z."""
  rotated: int
  """Entries of a query or key that rotate with its position."""


def head_widths(model: ModelConfig) -> HeadWidths:
  """Returns the widths of a head, deriving those that are 0 in the configuration."""
  if model.attention == "latent":
    return HeadWidths(
      query=model.nope_head_dim + model.rope_head_dim,
      value=model.value_head_dim,
      rotated=model.rope_head_dim,
    )
  size = model.head_dim or model.width // model.num_heads
  return HeadWidths(query=size, value=size, rotated=int(size * model.rope_fraction))


def yarn_temperature(factor: float, mscale: float) -> float:
  """Returns 0.1 * mscale * ln(factor) + 1 (arXiv:2309.00071, section 3.4).

  1 for a factor below 1, as in the authors' code.
  """
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_factor(model: ModelConfig) -> float:
  """Returns the factor of rotated entries, from the two mscales."""
  rotated = yarn_temperature(model.rope_factor, model.rope_mscale)
  return rotated / yarn_temperature(model.rope_factor, model.rope_mscale_all_dim)


def layer_windows(model: ModelConfig) -> tuple[int, ...]:
  """Returns the sliding window of each layer in order; 0 means none."""
  if not model.window_pattern:
    return (model.sliding_window,) * model.num_layers
  words = [word.strip() for word in model.window_pattern.split(",")]
  return tuple(
    model.sliding_window if words[index % len(words)] == "sliding" else 0
    for index in range(model.num_layers)
  )


def cache_width(model: ModelConfig) -> int:
  """Returns how many numbers a cache holds per token and layer."""
  if model.attention == "latent":
    return model.kv_rank + model.rope_head_dim
  return 2 * (model.num_kv_heads or model.num_heads) * head_widths(model).query
