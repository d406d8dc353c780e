"""Published architectures in numpy, but for their attention, which is ours.

Recorded logits of tiny random models (tests/golden/lm) then say whether our attention is
theirs, whatever else of these models moejax can represent.
"""

import json
import pathlib
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ModelConfig
from moejax.config.attention import layer_windows
from moejax.layers.attend import Context, attention_mask

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "lm"


def read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads float32 safetensors: a length, a JSON header, then the numbers."""
  data = file.read_bytes()
  start = 8 + struct.unpack("<Q", data[:8])[0]
  tensors = {}
  for name, entry in json.loads(data[8:start]).items():
    if name != "__metadata__":
      begin, end = (start + offset for offset in entry["data_offsets"])
      assert entry["dtype"] == "F32"
      array = np.frombuffer(data[begin:end], np.float32)
      tensors[name] = array.reshape(entry["shape"])
  return tensors


def attention_config(c: dict[str, Any]) -> ModelConfig:
  """Translates the attention fields of a config.json."""
  kind, rope = c["model_type"], c["rope_parameters"]
  config = ModelConfig(
    num_layers=c["num_hidden_layers"],
    width=c["hidden_size"],
    num_heads=c["num_attention_heads"],
    norm_eps=c["rms_norm_eps"],
    attention_bias=c["attention_bias"],
    rope_theta=rope["rope_theta"],
    rope_fraction=rope.get("partial_rotary_factor", 1.0),
    attention_scale=c.get("attention_multiplier", 0.0),
  )
  if rope["rope_type"] == "yarn":
    config.rope_scaling = "yarn"
    config.rope_factor = rope["factor"]
    config.rope_original = rope["original_max_position_embeddings"]
    config.rope_beta_fast, config.rope_beta_slow = rope["beta_fast"], rope["beta_slow"]
    config.rope_truncate = rope.get("truncate", True)
    config.rope_mscale = rope.get("mscale", 1.0)
    config.rope_mscale_all_dim = rope.get("mscale_all_dim", 0.0)
  if kind.startswith("deepseek"):
    config.attention, config.rope_interleaved = "latent", True
    config.q_rank, config.kv_rank = c["q_lora_rank"] or 0, c["kv_lora_rank"]
    config.nope_head_dim = c["qk_nope_head_dim"]
    config.rope_head_dim = c["qk_rope_head_dim"]
    config.value_head_dim = c["v_head_dim"]
    return config
  config.num_kv_heads, config.head_dim = c["num_key_value_heads"], c.get("head_dim", 0)
  config.qk_norm = kind in ("olmoe", "flex_olmo") or c.get("use_qk_norm", False)
  config.qk_norm_scope = "width" if "olmo" in kind else "head"
  config.clip_qkv = c.get("clip_qkv")
  if kind == "gpt_oss":
    config.sliding_window = c["sliding_window"]
    config.window_pattern = ",".join(t.split("_")[0] for t in c["layer_types"])
    config.attention_sinks = config.attention_out_bias = True
  return config


def attention_params(w: dict[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
  """Translates the tensors of one `self_attn`."""
  heads = config.num_heads

  def split(name: str, count: int) -> np.ndarray:
    matrix = w[f"{name}.weight"].T
    return matrix.reshape(matrix.shape[0], count, -1)

  out = w["o_proj.weight"].T
  params: dict[str, Any] = {"out": out.reshape(heads, -1, out.shape[-1])}
  if config.attention == "latent":
    params |= {
      "kv_down": w["kv_a_proj_with_mqa.weight"].T,
      "kv_norm": {"scale": w["kv_a_layernorm.weight"]},
      "kv_up": split("kv_b_proj", heads),
    }
    if not config.q_rank:
      return params | {"query": split("q_proj", heads)}
    return params | {
      "query_down": w["q_a_proj.weight"].T,
      "query_norm": {"scale": w["q_a_layernorm.weight"]},
      "query_up": split("q_b_proj", heads),
    }
  counts = {"query": heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
  for name, count in counts.items():
    params[name] = split(f"{name[0]}_proj", count)
    if config.attention_bias:
      params[f"{name}_bias"] = w[f"{name[0]}_proj.bias"].reshape(count, -1)
  if config.qk_norm:
    params["query_norm"] = {"scale": w["q_norm.weight"]}
    params["key_norm"] = {"scale": w["k_norm.weight"]}
  if config.attention_sinks:
    params["sinks"] = w["sinks"]
  if config.attention_out_bias:
    params["out_bias"] = w["o_proj.bias"]
  return params


def logits(c: dict[str, Any], w: dict[str, np.ndarray], ids: np.ndarray, shell: Any):
  """Runs the whole model.

  Args:
    c: config.json.
    w: all tensors.
    ids: [B, S].
    shell: of our attention layer, made from `attention_config(c)`.
  """
  config, eps = attention_config(c), c["rms_norm_eps"]
  segments = jnp.ones(ids.shape, jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  run = jax.jit(lambda p, x, context: shell.merge(p)(x, context, None)[0])
  x = w["model.embed_tokens.weight"][ids] * c.get("embedding_multiplier", 1.0)
  for index, window in enumerate(layer_windows(config)):
    layer = _under(w, f"model.layers.{index}.")
    mask = attention_mask(segments, segments, window=window)
    context = Context(positions=positions, mask=mask, segment_ids=segments)
    params = attention_params(_under(layer, "self_attn."), config)

    def mix(x: np.ndarray, params: Any = params, context: Any = context) -> np.ndarray:
      return np.asarray(run(params, jnp.asarray(x, jnp.float32), context), np.float64)

    def feed(x: np.ndarray, layer: Any = layer) -> np.ndarray:
      return feed_forward(c, layer, x)

    norms = {n: layer.get(f"{n}.weight") for n in ("input_layernorm", *_POST)}
    if norms["input_layernorm"] is None:  # FlexOlmo normalises what a branch returns.
      x = x + _norm(mix(x), norms["post_attention_layernorm"], eps)
      x = x + _norm(feed(x), norms["post_feedforward_layernorm"], eps)
      continue
    scale = c.get("residual_multiplier", 1.0)
    x = x + scale * mix(_norm(x, norms["input_layernorm"], eps))
    x = x + scale * feed(_norm(x, norms["post_attention_layernorm"], eps))
  head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
  return _norm(x, w["model.norm.weight"], eps) @ head.T / c.get("logits_scaling", 1.0)


_POST = ("post_attention_layernorm", "post_feedforward_layernorm")


def feed_forward(c: dict[str, Any], layer: dict[str, np.ndarray], x: np.ndarray):
  """Returns the dense or MoE branch of a layer, token by token."""
  w = _under(layer, "mlp.") or _under(layer, "block_sparse_moe.")
  if "gate_proj.weight" in w:
    return _gated(w, "", x)
  flat = x.reshape(-1, x.shape[-1])
  chosen, gates = _route(c, w, flat)
  out = np.zeros_like(flat)
  for token, (experts, weights) in enumerate(zip(chosen, gates, strict=True)):
    for expert, gate in zip(experts, weights, strict=True):
      out[token] += gate * _expert(c, w, expert, flat[token])
  if "shared_experts.gate_proj.weight" in w:
    out += _gated(w, "shared_experts.", flat)
  return out.reshape(x.shape)


def _route(c: dict[str, Any], w: dict[str, np.ndarray], x: np.ndarray):
  """Returns the chosen experts and their gates, [T, K] each."""
  names = ("gate.weight", "router.weight", "router.layer.weight")
  scores = x @ next(w[n] for n in names if n in w).T + w.get("router.bias", 0.0)
  count, kind = c["num_experts_per_tok"], c["model_type"]
  if kind in ("gpt_oss", "granitemoe"):
    chosen = np.argsort(-scores, axis=-1)[:, :count]
    return chosen, _softmax(np.take_along_axis(scores, chosen, -1))
  if kind not in ("deepseek_v3", "glm4_moe"):
    scores = _softmax(scores)
    chosen = np.argsort(-scores, axis=-1)[:, :count]
    scale = c.get("routed_scaling_factor", 1.0)
    return chosen, scale * np.take_along_axis(scores, chosen, -1)
  scores = 1 / (1 + np.exp(-scores))
  biased = scores + w["gate.e_score_correction_bias"]
  groups = biased.reshape(len(x), c["n_group"], -1)
  best = np.sort(groups, axis=-1)[..., -2:].sum(-1)
  kept = np.argsort(-best, axis=-1)[:, : c["topk_group"]]
  allowed = (kept[:, :, None] == np.arange(c["n_group"])).any(1)
  biased = np.where(allowed[..., None], groups, -np.inf).reshape(biased.shape)
  chosen = np.argsort(-biased, axis=-1)[:, :count]
  gates = np.take_along_axis(scores, chosen, -1)
  return chosen, c["routed_scaling_factor"] * gates / gates.sum(-1, keepdims=True)


def _expert(c: dict[str, Any], w: dict[str, np.ndarray], expert: int, x: np.ndarray):
  if c["model_type"] == "gpt_oss":
    both = x @ w["experts.gate_up_proj"][expert] + w["experts.gate_up_proj_bias"][expert]
    gate, up = np.minimum(both[::2], 7.0), np.clip(both[1::2], -7.0, 7.0)
    hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return hidden @ w["experts.down_proj"][expert] + w["experts.down_proj_bias"][expert]
  if c["model_type"] == "granitemoe":
    gate, up = np.split(w["input_linear.weight"][expert] @ x, 2)
    return w["output_linear.weight"][expert] @ (_silu(gate) * up)
  return _gated(w, f"experts.{expert}.", x)


def _gated(w: dict[str, np.ndarray], prefix: str, x: np.ndarray) -> np.ndarray:
  gate, up, down = (w[f"{prefix}{n}_proj.weight"].T for n in ("gate", "up", "down"))
  return (_silu(x @ gate) * (x @ up)) @ down


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def _softmax(x: np.ndarray) -> np.ndarray:
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _norm(x: np.ndarray, scale: np.ndarray | None, eps: float) -> np.ndarray:
  return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + eps) * scale


def _under(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  return {
    name.removeprefix(prefix): value
    for name, value in tensors.items()
    if name.startswith(prefix)
  }
