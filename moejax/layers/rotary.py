"""Rotary position embedding: turns pairs of a head's entries by the token's position.

Pair i of a head of A rotated entries turns by position * theta^(-2i/A). Context extension
changes these frequencies once, based on the config and not on the sequence.

Letters: B batch, S sequence, H heads, A head width.
Sources: RoPE, arXiv:2104.09864, equation 34 (neighbours are a pair); Llama and most
published weights pair the two halves of a head instead. The scalings cite theirs below.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.config.attention import head_widths, yarn_factor, yarn_temperature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
  """The rotation of one config; called on queries or keys and their positions."""

  size: int
  """Number of leading entries of a head that rotate; the others are unchanged."""
  theta: float
  interleaved: bool
  frequencies: tuple[float, ...] | None
  """Radians per position of each pair; None means theta^(-2i/size)."""
  factor: float
  """Multiplies rotated entries (YaRN's attention temperature)."""

  def __call__(
    self,
    x: Float[Array, "B S H A"],
    positions: Int[Array, "B S"],
    limit: int | None = None,
  ) -> Float[Array, "B S H A"]:
    """Rotates; angles and products are float32, the result has the dtype of x.

    Args:
      x: queries or keys.
      positions: of the tokens.
      limit: an exclusive upper bound of the positions, if known. Sine and cosine are then
        looked up in a table; XLA:CPU would recompute them for each entry of each head.
    """
    table = self._table()
    if limit is None:
      angle = positions.astype(jnp.float32)[:, :, None, None] * table[None, None, None]
      sin, cos = jnp.sin(angle), jnp.cos(angle)
    else:
      angle = jnp.arange(limit, dtype=jnp.float32)[:, None] * table[None]
      sin, cos = (f(angle)[positions][:, :, None] for f in (jnp.sin, jnp.cos))
    if self.factor != 1.0:
      sin, cos = sin * self.factor, cos * self.factor
    x, passed = (x, None) if self.size == x.shape[-1] else jnp.split(x, [self.size], -1)
    wide = x.astype(jnp.float32)
    if self.interleaved:
      first, second = wide[..., ::2], wide[..., 1::2]
    else:
      first, second = jnp.split(wide, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    if self.interleaved:
      out = jnp.stack(turned, axis=-1).reshape(wide.shape)
    else:
      out = jnp.concatenate(turned, axis=-1)
    out = out.astype(x.dtype)
    return out if passed is None else jnp.concatenate([out, passed], axis=-1)

  def _table(self) -> Float[Array, "half"]:
    half = self.size // 2
    if self.frequencies is None:
      return self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.asarray(self.frequencies, jnp.float32)


def make_rotary(config: ModelConfig) -> Rotary:
  """Returns the rotation of a config.

  Args:
    config: validated; with latent attention, only the rope part of a head is rotated.
  """
  size = head_widths(config).rotated
  scaled, factor = None, 1.0
  if config.rope_scaling != "none":
    scaled = tuple(float(f) for f in scaled_frequencies(config, size))
  if config.rope_scaling == "yarn":
    factor = config.rope_attention_factor
    if factor is None:
      factor = yarn_factor(config)
  return Rotary(
    size=size,
    theta=config.rope_theta,
    interleaved=config.rope_interleaved,
    frequencies=scaled,
    factor=factor,
  )


def logit_scale(config: ModelConfig) -> float | None:
  """Returns the factor of the attention logits; None means 1/sqrt(A).

  DeepSeek-V2 (its released code) moves a part of YaRN's temperature from the rotated
  entries to the logits, so that it also acts on entries that do not rotate.
  """
  moved = 1.0
  if config.rope_scaling == "yarn":
    moved = yarn_temperature(config.rope_factor, config.rope_mscale_all_dim) ** 2
  if not config.attention_scale and moved == 1.0:
    return None
  scale = config.attention_scale or head_widths(config).query ** -0.5
  return scale * moved


def scaled_frequencies(config: ModelConfig, size: int) -> Float[np.ndarray, "half"]:
  """Returns the frequencies under `rope_scaling`, in float64.

  linear (arXiv:2306.15595, equation 4): positions divided by the factor.
  llama3 (Llama 3.1, released code): frequencies below `rope_low_factor` turns in the
  original context are divided, above `rope_high_factor` kept, between them blended
  linearly in the number of turns.
  yarn (arXiv:2309.00071, section 3.2, "NTK-by-parts"): likewise, but the blend is linear
  in the index of the frequency, as in the authors' code, not in the number of turns.
  """
  half = size // 2
  kept = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
  divided = kept / config.rope_factor
  match config.rope_scaling:
    case "linear":
      return divided
    case "llama3":
      turns = config.rope_original * kept / (2 * math.pi)
      low, high = config.rope_low_factor, config.rope_high_factor
      share = np.clip((turns - low) / (high - low), 0, 1)
    case "yarn":
      low, high = _ramp(config, size)
      share = 1 - np.clip((np.arange(half) - low) / (high - low), 0, 1)
    case _:
      raise ValueError(f"--config.model.rope_scaling={config.rope_scaling!r} is unknown")
  return share * kept + (1 - share) * divided


def _ramp(config: ModelConfig, size: int) -> tuple[float, float]:
  """Returns the indices between which YaRN goes from kept to divided frequencies."""

  def index(turns: float) -> float:
    """Inverts turns = original * theta^(-2 index / size) / (2 pi)."""
    ratio = config.rope_original / (2 * math.pi * turns)
    return size * math.log(ratio) / (2 * math.log(config.rope_theta))

  low, high = index(config.rope_beta_fast), index(config.rope_beta_slow)
  if config.rope_truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  # A ramp without width is a step; the authors' code uses the same width.
  return low, high if high != low else high + 0.001
