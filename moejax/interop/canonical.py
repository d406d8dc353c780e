"""The canonical form of all configs that describe the same model in evaluation.

Two configs make the same dropless model if their canonical forms are equal: derived
sizes are written out, segments are experts, and fields that only training or the machine
reads have their defaults. Export uses it to find what an architecture cannot represent.
"""

import copy
import fnmatch
import math
from typing import Any

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.config import text as config_text
from moejax.config.attention import layer_windows, yarn_factor
from moejax.config.pattern import layer_pattern

_UNREAD = (
  "schema_version",
  "data.*",
  "optimizer.*",
  "train.*",
  "mesh.*",
  "model.dtype",
  "model.max_position",
  "model.remat",
  "model.scan_layers",
  "model.init_scale",
  "moe.dispatcher",
  "moe.exchange",
  "moe.exchange_buffer",
  "moe.exchange_chunks",
  "moe.expert_chunks",
  "moe.group_size",
  "moe.capacity_factor",
  "moe.min_capacity",
  "moe.priority",
  "moe.slot_order",
  "moe.slot_numbering",
  "moe.overflow",
  "moe.jitter",
  "moe.expert_dropout",
  "moe.allow_constant_gates",
  "moe.allow_future_leak",
  "moe.balance_*",
  "moe.z_weight",
  "moe.entropy_weight",
  "moe.router_init_scale",
  "moe.*.bias_update_rate",
  "moe.*.device_weight",
  "moe.*.communication_weight",
)
"""Fields that do not affect a model's logits if it is dropless or `has_slots`."""


def canonical(config: Config) -> Config:
  """Returns the canonical form of a config."""
  config = copy.deepcopy(config)
  model, moe = config.model, config.moe
  moe.shared_hidden, moe.num_shared = moe.shared_width, 0
  moe.num_experts, moe.num_selected = moe.fine_experts, moe.fine_selected
  moe.hidden, moe.segments = moe.fine_hidden, 1
  if moe.router == "switch":  # Top-k with K = 1, whose gate stays a probability.
    moe.router, moe.num_selected, moe.renormalize = "top_k", 1, "none"
    moe.options = {}
  _canonical_groups(moe)
  if has_slots(moe):
    slots = max(moe.min_capacity, math.ceil(moe.eval_capacity_factor or 1))
    moe.eval_capacity_factor = float(slots)
  else:
    moe.capacity_convention = MoEConfig().capacity_convention
  if moe.renormalize == "none":
    moe.renormalize_norm = 1.0
  moe.activation = moe.activation or model.activation
  if model.kind == "encoder_decoder":
    model.encoder_layers = model.encoder_layers or model.num_layers
    moe.encoder_every, moe.offset = moe.encoder_every or moe.every, moe.offset % moe.every
    moe.encoder_router = ""
  else:
    _canonical_pattern(model, moe)
  model.vocab_multiple = 1
  _canonical_attention(model)
  return config


def has_slots(moe: MoEConfig) -> bool:
  """Returns whether experts serve a fixed number of tokens, a sequence's first ones."""
  return (
    moe.eval_capacity_factor is not None
    and moe.capacity_convention == "slots"
    and moe.group_size == 0
    and moe.priority in ("arrival", "random")  # Random is arrival in evaluation.
    and moe.slot_order in ("choice_major", "token_major")
    and moe.overflow == "drop"
    and moe.num_selected * moe.segments == 1
  )


def _canonical_groups(moe: MoEConfig) -> None:
  """Removes a limit to groups that allows all of them."""
  options = dict(moe.router_options)
  if moe.router not in ("group_limited", "sigmoid_bias"):
    return
  if options.get("num_expert_groups", 1) > options.get("num_selected_groups", 1):
    return
  for name in ("num_expert_groups", "num_selected_groups", "group_best"):
    options.pop(name, None)
  if moe.router == "group_limited":
    moe.router, moe.options = "top_k", {}
  else:
    moe.use_router(moe.router, **options)


def _canonical_pattern(model: ModelConfig, moe: MoEConfig) -> None:
  """Writes the MoE layers as all layers except a list of dense ones."""
  kinds = layer_pattern(model.num_layers, moe).is_moe
  if all(kinds):
    model.hidden = Config().model.hidden  # There is no dense layer.
  moe.every, moe.offset, moe.dense_prefix = 1, 0, 0
  moe.dense_layers = ",".join(str(i) for i, is_moe in enumerate(kinds) if not is_moe)
  if all(kinds):
    model.activation = moe.activation


def _canonical_attention(model: ModelConfig) -> None:
  """Writes out derived fields of attention, and resets those that are not read."""
  plain = ModelConfig()
  if model.attention == "latent":
    model.head_dim = model.num_kv_heads = 0
    model.rope_fraction = plain.rope_fraction
  else:
    size = model.head_dim or model.width // model.num_heads
    model.head_dim, model.num_kv_heads = size, model.num_kv_heads or model.num_heads
    if math.isclose(model.attention_scale * size**0.5, 1.0, rel_tol=1e-9):
      model.attention_scale = 0.0
  if not model.qk_norm:
    model.qk_norm_scope = plain.qk_norm_scope
  windows = layer_windows(model)
  model.sliding_window = max(windows)
  model.window_pattern = ""
  if len(set(windows)) > 1:
    words = ("sliding" if window else "full" for window in windows)
    model.window_pattern = ",".join(words)
  if model.positions == "relative":
    model.rope_theta, model.rope_fraction = plain.rope_theta, plain.rope_fraction
    model.rope_interleaved = plain.rope_interleaved
  else:
    model.relative_buckets = plain.relative_buckets
    model.relative_distance = plain.relative_distance
  if model.rope_scaling == "none":
    model.rope_factor, model.rope_original = plain.rope_factor, plain.rope_original
  if model.rope_scaling == "yarn":
    factor = model.rope_attention_factor
    factor = yarn_factor(model) if factor is None else factor
    model.rope_attention_factor = round(factor, 12)
    model.rope_mscale = plain.rope_mscale


def differences(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
  """Returns the fields in which two models differ: dotted name, one's value, other's."""
  return changes(canonical(one), canonical(other))


def changes(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
  """Returns the same as `differences` without the canonical form, for any configs."""
  return [
    difference
    for difference in config_text.difference(one, other)
    if not any(fnmatch.fnmatch(difference[0], pattern) for pattern in _UNREAD)
  ]
