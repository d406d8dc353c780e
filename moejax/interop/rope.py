"""Rotary position embedding in config.json, in both spellings and both directions.

Transformers 5 writes one dict, rope_parameters; earlier versions write separate keys
rope_theta, rope_scaling and partial_rotary_factor. If both are present, rope_scaling
takes precedence, as in Transformers.
"""

import math
from typing import Any

from moejax.config import Config, ModelConfig
from moejax.config.attention import yarn_factor, yarn_temperature
from moejax.errors import UserError
from moejax.interop.keys import Keys

_READ = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
  ),
  "yarn": (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
  ),
}
"""Keys of each type, in addition to those of any type."""

_ANY = ("rope_theta", "rope_type", "type", "partial_rotary_factor")


def read(
  keys: Keys,
  config: Config,
  *,
  theta: float,
  fraction: float | None = None,
  scales_logits: bool = False,
) -> None:
  """Sets the rope fields.

  Args:
    keys: of the config.json.
    config: with max_position.
    theta: the class's default of rope_theta.
    fraction: the class's default of partial_rotary_factor; None for a class that rotates
      whole heads only.
    scales_logits: whether the class multiplies attention logits by the square of the
      temperature that mscale_all_dim gives (DeepSeek).

  Raises:
    UserError: a type or key that is not understood.
  """
  model = config.model
  scaling, given = (
    keys.take("rope_scaling", dict, {}),
    keys.take("rope_parameters", dict, {}),
  )
  rope = Keys(scaling or given, f"{keys.path}: rope_parameters")
  own_theta = keys.take("rope_theta", float, theta)
  own_fraction = keys.take("partial_rotary_factor", float, fraction or 1.0)
  model.rope_theta = rope.take("rope_theta", float, own_theta)
  model.rope_fraction = rope.take("partial_rotary_factor", float, own_fraction)
  kind = _read_type(keys, rope)
  if fraction is None and model.rope_fraction != 1:
    # Only the functions of scaled types read it, and with those the class fails.
    remedy = (
      "has no effect. Remove it."
      if kind == "default"
      else f"cannot be combined with {kind!r}. Give the config.json of these weights."
    )
    raise UserError(
      f"{keys.path}: heads of this architecture rotate as a whole, so that "
      f"partial_rotary_factor={model.rope_fraction} {remedy}"
    )
  # Outside the dict it takes precedence, unlike the other keys.
  original = keys.take("original_max_position_embeddings", int, 0)
  if kind == "default":
    return
  model.rope_scaling = kind
  if kind != "linear":
    model.rope_original = original or rope.take(
      "original_max_position_embeddings", int, model.max_position
    )
    if model.rope_original < 1:
      raise UserError(
        f"{rope.path}: original_max_position_embeddings={model.rope_original} is not "
        "positive. Give the context before it was extended, in tokens."
      )
  if kind == "yarn" and rope.values.get("factor") is None:
    model.rope_factor = model.max_position / model.rope_original
  else:
    model.rope_factor = rope.take("factor", float)
  if model.rope_factor == 1 and rope.values.get("attention_factor") in (None, 1):
    # A factor of 1 does not extend the context, so there is no scaling.
    model.rope_scaling, model.rope_original = "none", 0
    return
  if kind == "llama3":
    model.rope_low_factor = rope.take("low_freq_factor", float)
    model.rope_high_factor = rope.take("high_freq_factor", float)
  if kind == "yarn" and model.rope_theta <= 1:
    raise UserError(
      f"{rope.path}: rope_theta={model.rope_theta} makes all frequencies the same, which "
      "YaRN cannot tell apart. Give one above 1."
    )
  if kind == "yarn":
    _read_yarn(rope, model, scales_logits)


def _read_type(keys: Keys, rope: Keys) -> str:
  """Returns the type of scaling; rejects an unsupported type, or key of a type."""
  kind = rope.take("rope_type", str, rope.take("type", str, "default"))
  if kind not in _READ:
    raise UserError(
      f"{keys.path}: rope_scaling of type {kind!r} changes the computation and is not "
      f"supported; {', '.join(_READ)} are."
    )
  unknown = sorted(set(rope.values) - set(_READ[kind]) - set(_ANY))
  if unknown:
    raise UserError(
      f"{rope.path}: {', '.join(unknown)} is not understood for type {kind!r} and may "
      "change the computation. Remove it if it does not."
    )
  return kind


def _read_yarn(rope: Keys, model: ModelConfig, scales_logits: bool) -> None:
  """Sets the fields of YaRN, so that both temperatures are those of Transformers."""
  # There, too, 0 means absent.
  model.rope_beta_fast = rope.take("beta_fast", float, 32.0) or 32.0
  model.rope_beta_slow = rope.take("beta_slow", float, 1.0) or 1.0
  model.rope_truncate = rope.take("truncate", bool, True, null=False)
  mscale, all_dim = (
    rope.take("mscale", float, 0.0),
    rope.take("mscale_all_dim", float, 0.0),
  )
  given = rope.take("attention_factor", float, None)
  model.rope_mscale, model.rope_mscale_all_dim = 1.0, 0.0
  rotated = yarn_temperature(model.rope_factor, 1.0)
  if mscale and all_dim:
    rotated = yarn_temperature(model.rope_factor, mscale)
    rotated /= yarn_temperature(model.rope_factor, all_dim)
  if scales_logits:
    model.rope_mscale_all_dim = all_dim
    if mscale and all_dim:
      model.rope_mscale = mscale
  model.rope_attention_factor = given
  if given is None and not math.isclose(rotated, yarn_factor(model), rel_tol=1e-9):
    model.rope_attention_factor = rotated


def write(config: Config) -> dict[str, Any]:
  """Returns the keys that `read` reads."""
  model = config.model
  rope: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_type": "default"}
  if model.rope_fraction != 1:
    rope["partial_rotary_factor"] = model.rope_fraction
  if model.rope_scaling != "none":
    rope |= {"rope_type": model.rope_scaling, "factor": model.rope_factor}
  if model.rope_scaling in ("llama3", "yarn"):
    rope["original_max_position_embeddings"] = model.rope_original
  if model.rope_scaling == "llama3":
    rope["low_freq_factor"] = model.rope_low_factor
    rope["high_freq_factor"] = model.rope_high_factor
  if model.rope_scaling == "yarn":
    rope |= {
      "beta_fast": model.rope_beta_fast,
      "beta_slow": model.rope_beta_slow,
      "truncate": model.rope_truncate,
    }
    if model.rope_mscale_all_dim:
      rope |= {
        "mscale": model.rope_mscale,
        "mscale_all_dim": model.rope_mscale_all_dim,
      }
    if model.rope_attention_factor is not None:
      rope["attention_factor"] = model.rope_attention_factor
  # Earlier versions read rope_theta outside the dict.
  return {"rope_parameters": rope, "rope_theta": model.rope_theta}
