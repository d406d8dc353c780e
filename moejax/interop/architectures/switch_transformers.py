"""Switch Transformer (arXiv:2101.03961): a T5 encoder-decoder with top-1 experts.

T5 has no attention scale, a bias for buckets of distances in each stack, and a head of
scale D^-0.5 where it is tied to the embedding. Capacity is a number of slots per expert
and sequence, for any length; overflowing tokens are dropped, in training and after.

The class keeps three tables: the encoder's, the decoder's, and `shared`. With a tied head
all are one. Otherwise each stack reads its own and nothing reads `shared`, which is
exported as a copy of the decoder's. In earlier versions the stacks always used `shared`,
so files of that time may have only that table.
"""

import math
from collections.abc import Mapping
from typing import Any

from moejax.config import Config
from moejax.errors import UserError
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.table import FLAT, LINEAR, SAME, Entry, Linear, entry

_CLASS = "SwitchTransformersForConditionalGeneration"

_SEQUENCE = 512
"""Sequence length, in tokens, that T5 and Switch were trained with."""

_DROPLESS = 2**16
"""expert_capacity of a model that drops nothing: more tokens than any sequence has."""


def _attention(ours: str, theirs: str) -> tuple[Entry, ...]:
  return (
    entry(f"{ours}.query", f"{theirs}.q.weight", LINEAR),
    entry(f"{ours}.key", f"{theirs}.k.weight", LINEAR),
    entry(f"{ours}.value", f"{theirs}.v.weight", LINEAR),
    entry(f"{ours}.out", f"{theirs}.o.weight", Linear(inputs=2)),
  )


def _feed_forward(theirs: str) -> tuple[Entry, ...]:
  expert = f"{theirs}.mlp.experts.expert_{{expert}}"
  router = f"{theirs}.mlp.router.classifier"
  return (
    entry("feed_forward_norm.scale", f"{theirs}.layer_norm.weight", FLAT),
    entry("feed_forward.w_in", f"{theirs}.mlp.wi.weight", LINEAR),
    entry("feed_forward.w_out", f"{theirs}.mlp.wo.weight", LINEAR),
    entry("moe.router.weight", f"{router}.weight", LINEAR),
    entry("moe.router.logit_bias", f"{router}.bias", FLAT),
    entry("moe.experts.w_in", f"{expert}.wi.weight", LINEAR),
    entry("moe.experts.w_out", f"{expert}.wo.weight", LINEAR),
  )


_SELF = (
  entry("attention_norm.scale", "layer.0.layer_norm.weight", FLAT),
  *_attention("attention", "layer.0.SelfAttention"),
)
_CROSS = (
  entry("cross_attention_norm.scale", "layer.1.layer_norm.weight", FLAT),
  *_attention("cross_attention", "layer.1.EncDecAttention"),
)
_DECODERS, _ENCODERS = "decoder.embed_tokens.weight", "encoder.embed_tokens.weight"
"""The stacks' own tables."""

_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
"""Stored in the first layer of a stack, and used by all layers."""

MODEL = (
  entry("embedding.table", "shared.weight", SAME),
  entry("embedding.norm.scale", "decoder.final_layer_norm.weight", FLAT),
  entry("embedding.head", "lm_head.weight", LINEAR),
  entry("encoder.embedding.table", _ENCODERS, SAME),
  entry("encoder.norm.scale", "encoder.final_layer_norm.weight", FLAT),
  entry("encoder.relative_bias.bias", f"encoder.{_BIAS}", SAME),
  entry("decoder.relative_bias.bias", f"decoder.{_BIAS}", SAME),
)


def read(keys: Keys) -> Config:
  config = Config()
  model, moe, data = config.model, config.moe, config.data
  keys.only("is_encoder_decoder", True)
  keys.only("is_gated_act", False)
  # The class reads dense_act_fn instead.
  keys.only("feed_forward_proj", "relu", None)
  keys.only("router_dtype", "float32")
  keys.only("router_type", "tokens_masked", None)
  if (slots := keys.take("expert_capacity", int, 64)) < 1:
    raise UserError(
      f"{keys.path}: expert_capacity={slots} drops every token. Give a positive number."
    )
  # Without effect in the class, despite their names.
  keys.skip("router_ignore_padding_tokens", "batch_prioritized_routing")
  keys.skip("dropout_rate", "n_positions", "max_position_embeddings", "add_router_probs")
  model.kind, data.objective, data.tokenizer = "encoder_decoder", "span_corruption", "hf"
  model.encoder_layers = fields.take_layers(keys, "num_layers")
  model.num_layers = fields.take_layers(
    keys, "num_decoder_layers", 12, null=model.encoder_layers
  )
  model.width = keys.take("d_model", int)
  model.num_heads = model.num_kv_heads = keys.take("num_heads", int)
  model.head_dim = keys.take("d_kv", int)
  model.hidden = moe.hidden = keys.take("d_ff", int)
  model.activation = keys.only("dense_act_fn", "relu")
  model.vocab_size = keys.take("vocab_size", int)
  model.norm_eps = keys.take("layer_norm_epsilon", float, 1e-6)
  model.positions, model.attention_scale = "relative", 1.0
  model.relative_buckets = keys.take("relative_attention_num_buckets", int, 32)
  model.relative_distance = keys.take("relative_attention_max_distance", int, 128)
  model.tie_embeddings = keys.take("tie_word_embeddings", bool, True)
  model.encoder_embedding = not model.tie_embeddings
  if model.tie_embeddings:
    model.logits_divisor = math.sqrt(max(model.width, 1))
  dtype = keys.values.get("dtype") or keys.values.get("torch_dtype")
  model.dtype = model.param_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
  moe.num_experts = keys.take("num_experts", int)
  moe.router_bias = keys.take("router_bias", bool, False)
  moe.capacity_convention = "slots"
  moe.capacity_factor = None if slots >= _DROPLESS else float(slots)
  moe.eval_capacity_factor = moe.capacity_factor
  moe.encoder_every = _step(keys, "encoder", model.encoder_layers)
  moe.every = _step(keys, "decoder", model.num_layers)
  # Theirs is layer 1 of each step, and every layer if the step is 1.
  moe.offset = 1
  data.sequence_length = model.max_position = _SEQUENCE
  config.train.batch_size = 8
  return config


def _step(keys: Keys, stack: str, layers: int) -> int:
  """Reads how often a layer is sparse: from the step, or else from their number."""
  sparse = keys.take(f"num_sparse_{stack}_layers", int, 3)
  # For zero sparse layers, the class still makes one, the second.
  derived = layers // sparse if sparse > 0 else layers
  step = keys.take(f"{stack}_sparse_step", int, derived)
  if step < 1:
    raise UserError(
      f"{keys.path}: {stack}_sparse_step={step} (or {layers} layers by "
      f"num_sparse_{stack}_layers={sparse}) makes no layer sparse. Give a step above 0."
    )
  return step


def write(config: Config) -> dict[str, Any]:
  model, moe = config.model, config.moe
  if model.tie_embeddings and model.encoder_embedding:
    raise UserError(
      "--config.model.encoder_embedding=true: with tie_embeddings the class has one table"
    )
  every, layers = moe.encoder_every or moe.every, model.encoder_layers
  return {
    "architectures": [_CLASS],
    "is_encoder_decoder": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "d_ff": moe.hidden,
    "d_kv": model.head_dim,
    "d_model": model.width,
    "dense_act_fn": "relu",
    "dropout_rate": 0.0,
    "dtype": model.param_dtype,
    "torch_dtype": model.param_dtype,
    "encoder_sparse_step": every,
    "decoder_sparse_step": moe.every,
    "num_sparse_encoder_layers": layers // every,
    "num_sparse_decoder_layers": model.num_layers // moe.every,
    "expert_capacity": int(moe.eval_capacity_factor or _DROPLESS),
    "layer_norm_epsilon": model.norm_eps,
    "num_decoder_layers": model.num_layers,
    "num_experts": moe.num_experts,
    "num_heads": model.num_heads,
    "num_layers": layers,
    "relative_attention_max_distance": model.relative_distance,
    "relative_attention_num_buckets": model.relative_buckets,
    "router_bias": moe.router_bias,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": model.tie_embeddings,
    "use_cache": True,
    "vocab_size": model.vocab_size,
  }


def remarks(config: Mapping[str, Any]) -> list[str]:
  """Returns which tokens are dropped, here as in Transformers."""
  slots = config.get("expert_capacity", 64)
  if slots >= _DROPLESS:
    return []
  return [
    f"expert_capacity={slots}: as in Transformers, an expert computes the first {slots} "
    "of a sequence's tokens that choose it. Give --config.moe.eval_capacity_factor=none "
    "to the program that uses the run to drop none."
  ]


ARCHITECTURE = Architecture(
  name="switch_transformers",
  class_name=_CLASS,
  layer=(*_SELF, *_CROSS, *_feed_forward("layer.2")),
  layer_prefix="decoder.block.{layer}.",
  encoder=(*_SELF, *_feed_forward("layer.1")),
  encoder_prefix="encoder.block.{layer}.",
  model=MODEL,
  read=read,
  write=write,
  embedding="shared.weight",
  copies=(_ENCODERS, _DECODERS),
  untied=(_DECODERS, _ENCODERS),
  remarks=remarks,
)
