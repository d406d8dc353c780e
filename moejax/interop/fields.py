"""What the config.json of most decoders has in common, in both directions.

`read_decoder` and `write_decoder` are the shared part of an architecture's `read` and
`write`; the architecture adds its own keys. Defaults are those of its class in
Transformers, which an absent or null key means there.
"""

from typing import Any

from moejax.config import Config
from moejax.errors import UserError
from moejax.interop.keys import Keys

SEQUENCE = 1024
"""Most tokens of a sequence that an imported model is evaluated on, unless asked."""

_ACTIVATIONS = {"silu": "swiglu"}
"""hidden_act of a gated layer, and our activation."""


def read_decoder(keys: Keys, *, theta: float = 10_000.0, eps: float = 1e-6) -> Config:
  """Returns a dropless MoE decoder with the sizes of a config.json.

  Args:
    keys: of the config.json.
    theta: the class's default of rope_theta.
    eps: the class's default of rms_norm_eps.

  Raises:
    UserError: a key is missing or not understood.
  """
  config = Config()
  model, moe = config.model, config.moe
  model.num_layers = keys.take("num_hidden_layers", int)
  model.width = keys.take("hidden_size", int)
  model.num_heads = keys.take("num_attention_heads", int)
  model.num_kv_heads = keys.take("num_key_value_heads", int, model.num_heads)
  if model.num_heads < 1:
    raise UserError(
      f"{keys.path}: num_attention_heads={model.num_heads} is not positive."
    )
  model.head_dim = keys.take("head_dim", int, model.width // model.num_heads)
  model.vocab_size = keys.take("vocab_size", int)
  model.norm_eps = keys.take("rms_norm_eps", float, eps)
  model.tie_embeddings = keys.take("tie_word_embeddings", bool, False)
  model.max_position = keys.take("max_position_embeddings", int)
  model.activation = _ACTIVATIONS[keys.only("hidden_act", *_ACTIVATIONS)]
  model.dtype = model.param_dtype = _dtype(keys)
  _read_rope(keys, config, theta)
  moe.router, moe.every, moe.offset = "top_k", 1, 0
  moe.capacity_factor = moe.eval_capacity_factor = None
  config.data.sequence_length = min(model.max_position, SEQUENCE)
  config.data.tokenizer = "hf"
  config.train.batch_size = 8
  return config


def write_decoder(config: Config, *, class_name: str) -> dict[str, Any]:
  """Returns the keys that `read_decoder` reads, for a canonical config."""
  model = config.model
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  return {
    "architectures": [class_name],
    "attention_dropout": 0.0,
    "dtype": model.param_dtype,
    "torch_dtype": model.param_dtype,
    "head_dim": model.head_dim,
    "hidden_act": activations.get(model.activation, "silu"),
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
    **_write_rope(config),
  }


def take_experts(keys: Keys, *names: str) -> int:
  """Takes the number of experts, which has several names; all given ones must agree."""
  found = {name: keys.take(name, int) for name in names if keys.has(name)}
  if not found:
    return keys.take(names[0], int)
  if len(set(found.values())) > 1:
    shown = " and ".join(f"{name}={value}" for name, value in found.items())
    raise UserError(f"{keys.path}: {shown} contradict each other. Remove one of them.")
  return next(iter(found.values()))


def renormalize(keys: Keys, config: Config, default: bool) -> None:
  """Takes norm_topk_prob: whether a token's K gates sum to 1."""
  scaled = keys.take("norm_topk_prob", bool, default)
  # With K = 1 a renormalised gate would always be 1.
  config.moe.renormalize = "before_drop" if scaled else "none"


def _dtype(keys: Keys) -> str:
  name = keys.values.get("dtype") or keys.values.get("torch_dtype") or "float32"
  return "bfloat16" if name == "bfloat16" else "float32"


def _read_rope(keys: Keys, config: Config, theta: float) -> None:
  rope = keys.take("rope_parameters", dict, {})
  scaling = keys.take("rope_scaling", dict, {})
  if not rope:
    rope = scaling
  own_theta = keys.take("rope_theta", float, theta)
  config.model.rope_theta = float(rope.get("rope_theta", own_theta))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind != "default":
    raise UserError(
      f"{keys.path}: rope_scaling of type {kind!r} changes the computation and is not "
      "supported."
    )
  rest = set(rope) - {"rope_theta", "rope_type", "type"}
  if rest:
    raise UserError(f"{keys.path}: rope_parameters has {sorted(rest)}, not understood.")


def _write_rope(config: Config) -> dict[str, Any]:
  theta = config.model.rope_theta
  # Both spellings: Transformers 5 reads the first, earlier versions the second.
  return {
    "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    "rope_theta": theta,
  }
