"""The common part of the config.json of most decoders, in both directions.

`read_decoder` and `write_decoder` are the shared part of an architecture's `read` and
`write`; the architecture adds its own keys. Defaults are those of its class in
Transformers, which apply there to an absent or null key.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moejax.config import Config
from moejax.config.attention import layer_windows
from moejax.config.pattern import layer_pattern
from moejax.errors import UserError
from moejax.interop import rope
from moejax.interop.keys import Keys

SEQUENCE = 1024
"""Maximum tokens of a sequence that an imported model is evaluated on by default."""

_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
_WRITTEN = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
"""Our activation of a gated layer, and its hidden_act."""

_MOST_LAYERS = 10_000

_MOST_FURTHER = 100
"""Maximum layers for multi-token prediction to look for."""


def read_decoder(
  keys: Keys,
  *,
  theta: float = 10_000.0,
  eps: float = 1e-6,
  fraction: float | None = None,
  kv_heads: int | None = None,
  positions: int = 4096,
  latent: bool = False,
) -> Config:
  """Returns a dropless MoE decoder with the sizes of a config.json.

  Args:
    keys: of the config.json.
    theta: the class's default of rope_theta.
    eps: the class's default of rms_norm_eps.
    fraction: the class's default of partial_rotary_factor; None if it has no such key.
    kv_heads: the class's default of num_key_value_heads; None means one for each head.
    positions: the class's default of max_position_embeddings.
    latent: whether attention is multi-head latent attention.

  Raises:
    UserError: a key is missing or not understood.
  """
  config = Config()
  model, moe = config.model, config.moe
  model.num_layers = take_layers(keys, "num_hidden_layers")
  model.width = keys.take("hidden_size", int)
  model.num_heads = keys.take("num_attention_heads", int)
  model.num_kv_heads = keys.take(
    "num_key_value_heads", int, kv_heads or model.num_heads, null=model.num_heads
  )
  if model.num_heads < 1:
    raise UserError(
      f"{keys.path}: num_attention_heads={model.num_heads} is not positive."
    )
  if not latent:
    model.head_dim = keys.take("head_dim", int, model.width // model.num_heads)
  model.vocab_size = keys.take("vocab_size", int)
  model.norm_eps = keys.take("rms_norm_eps", float, eps)
  model.tie_embeddings = keys.take("tie_word_embeddings", bool, False)
  model.max_position = keys.take("max_position_embeddings", int, positions)
  model.activation = _ACTIVATIONS[keys.only("hidden_act", *_ACTIVATIONS)]
  model.dtype = model.param_dtype = _dtype(keys)
  rope.read(keys, config, theta=theta, fraction=fraction, scales_logits=latent)
  moe.router, moe.every, moe.offset = "top_k", 1, 0
  moe.capacity_factor = moe.eval_capacity_factor = None
  config.data.sequence_length = min(model.max_position, SEQUENCE)
  config.data.tokenizer = "hf"
  config.train.batch_size = 8
  return config


def write_decoder(config: Config, *, class_name: str) -> dict[str, Any]:
  """Returns the keys that `read_decoder` reads, for a canonical config."""
  model = config.model
  return {
    "architectures": [class_name],
    # If absent, they default to those of the published model, which may not fit the
    # vocabulary.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attention_dropout": 0.0,
    "dtype": model.param_dtype,
    "torch_dtype": model.param_dtype,
    "head_dim": model.head_dim,
    "hidden_act": _WRITTEN.get(model.activation, "silu"),
    "hidden_size": model.width,
    "initializer_range": 0.02,
    "max_position_embeddings": model.max_position or config.data.sequence_length,
    "num_attention_heads": model.num_heads,
    "num_hidden_layers": model.num_layers,
    "num_key_value_heads": model.num_kv_heads,
    "output_router_logits": False,
    "rms_norm_eps": model.norm_eps,
    "tie_word_embeddings": model.tie_embeddings,
    "use_cache": True,
    "vocab_size": model.vocab_size,
    **rope.write(config),
  }


def take_layers(keys: Keys, name: str, *default: int, **null: int) -> int:
  """Reads a number of layers; checked here, since lists of that length are made early.

  Args:
    keys: of the config.json.
    name: of the key.
    *default: as in `Keys.take`.
    **null: as in `Keys.take`.

  Raises:
    UserError: it is missing, not an integer, below 1 or huge.
  """
  layers = keys.take(name, int, *default, **null)
  if not 0 < layers <= _MOST_LAYERS:
    raise UserError(
      f"{keys.path}: {name}={layers} must be at least 1 and at most {_MOST_LAYERS:,}."
    )
  return layers


def take_experts(keys: Keys, *names: str) -> int:
  """Reads the number of experts, which has several names; all given ones must agree."""
  found = {name: keys.take(name, int) for name in names if keys.has(name)}
  if not found:
    return keys.take(names[0], int)
  if len(set(found.values())) > 1:
    shown = " and ".join(f"{name}={value}" for name, value in found.items())
    raise UserError(f"{keys.path}: {shown} contradict each other. Remove one of them.")
  return next(iter(found.values()))


def read_attention_bias(keys: Keys, config: Config, *, default: bool = False) -> None:
  """Reads attention_bias: biases on queries, keys, values and the output."""
  biased = keys.take("attention_bias", bool, default)
  config.model.attention_bias = config.model.attention_out_bias = biased


def read_sparse_step(keys: Keys, config: Config) -> None:
  """Reads decoder_sparse_step and mlp_only_layers of Qwen: which layers are MoE."""
  moe = config.moe
  moe.every = keys.take("decoder_sparse_step", int, 1)
  moe.offset = moe.every - 1
  dense = keys.take("mlp_only_layers", list, [])
  moe.dense_layers = ",".join(str(layer) for layer in dense)


def write_sparse_step(config: Config) -> dict[str, Any]:
  """Inverts `read_sparse_step`, with as few mlp_only_layers as possible."""
  kinds = layer_pattern(config.model.num_layers, config.moe).is_moe
  step = math.gcd(*(i + 1 for i, is_moe in enumerate(kinds) if is_moe))
  dense = [i for i, is_moe in enumerate(kinds) if not is_moe and (i + 1) % step == 0]
  return {"decoder_sparse_step": step, "mlp_only_layers": dense}


def read_windows(keys: Keys, config: Config, default: Sequence[str]) -> None:
  """Reads layer_types: which layers see only sliding_window tokens.

  Args:
    keys: of the config.json.
    config: with sliding_window.
    default: layer_types if the key is absent.
  """
  kinds = keys.take("layer_types", list, list(default))
  words = {"sliding_attention": "sliding", "full_attention": "full"}
  unknown = [kind for kind in kinds if type(kind) is not str or kind not in words]
  if unknown or len(kinds) != config.model.num_layers:
    raise UserError(
      f"{keys.path}: layer_types={kinds} must be a list of {config.model.num_layers} "
      f"words, one for each layer: {' or '.join(words)}."
    )
  if "sliding_attention" in kinds and not config.model.sliding_window:
    raise UserError(
      f"{keys.path}: layer_types has sliding_attention, but no sliding_window is "
      "in effect. Give its size, or make all layers full_attention."
    )
  if "sliding_attention" not in kinds:
    config.model.sliding_window = 0
  elif "full_attention" in kinds:
    config.model.window_pattern = ",".join(words[kind] for kind in kinds)


def take_window(keys: Keys, default: int) -> int:
  """Reads sliding_window; null means 0, no window.

  Raises:
    UserError: the window has no tokens.
  """
  size = keys.take("sliding_window", int, default, null=0)
  if size < 1 and keys.values.get("sliding_window") is not None:
    raise UserError(
      f"{keys.path}: sliding_window={size} is not positive. Give a number of tokens, or "
      "null for no window."
    )
  return size


def write_windows(config: Config) -> list[str]:
  """Returns layer_types."""
  windows = layer_windows(config.model)
  return ["sliding_attention" if window else "full_attention" for window in windows]


def leading_dense(config: Config) -> int:
  """Returns how many layers are dense before the first MoE layer."""
  return layer_pattern(config.model.num_layers, config.moe).is_moe.index(True)


def read_groups(
  keys: Keys, config: Config, *, best: int, groups: int = 1, selected: int = 1
) -> None:
  """Reads n_group and topk_group: a token's experts are in its best groups.

  Args:
    keys: of the config.json.
    config: with a router that has groups; without a limit its options stay unset.
    best: number of a group's experts whose scores are summed to the group's score.
    groups: default of n_group.
    selected: default of topk_group.
  """
  groups = keys.take("n_group", int, groups)
  selected = keys.take("topk_group", int, selected)
  if groups >= 1 and not 0 < selected <= groups:
    raise UserError(
      f"{keys.path}: topk_group={selected} is not in 1..{groups}, the number of groups."
    )
  if groups > 1:
    options = {
      "num_expert_groups": groups,
      "num_selected_groups": selected,
      "group_best": best,
    }
    config.moe.use_router(config.moe.router, **options)


def write_groups(config: Config) -> dict[str, Any]:
  """Inverts `read_groups`."""
  options = config.moe.router_options
  return {
    "n_group": options.get("num_expert_groups", 1),
    "topk_group": options.get("num_selected_groups", 1),
  }


def further_layers(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
  """Returns the prefixes of layers after the last, which predict further tokens.

  Their eh_proj (DeepSeek-V3, arXiv:2412.19437, equation 21) distinguishes them from
  layers that a wrong num_hidden_layers cuts off. Without a key there is at most one.
  """
  last = config.get("num_hidden_layers")
  more = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 1)) or 0
  if type(last) is not int or type(more) is not int:
    return {}
  reason = "layers for multi-token prediction, which decoding does not need"
  prefixes = [f"model.layers.{last + i}." for i in range(min(more, _MOST_FURTHER))]
  return {p: reason for p in prefixes if f"{p}eh_proj.weight" in names}


def renormalize(keys: Keys, config: Config, default: bool) -> None:
  """Reads norm_topk_prob: whether a token's K gates sum to 1."""
  scaled = keys.take("norm_topk_prob", bool, default, null=False)
  # With K = 1 a renormalised gate would always be 1.
  config.moe.renormalize = "before_drop" if scaled else "none"


def _dtype(keys: Keys) -> str:
  name = keys.values.get("dtype") or keys.values.get("torch_dtype") or "float32"
  return "bfloat16" if name == "bfloat16" else "float32"
