"""The allowed values of each config field on its own: names and ranges of numbers.

Constraints *between* fields are in `config.check`. Routers are not listed here: they are
in their registry, and a router's options are declared by its class.
"""

from moejax.config import alarms
from moejax.options import Range, count, weight

GATED = ("swiglu", "geglu", "clamped_swiglu")
"""Activations of two products of x, one of which gates the other."""

ACTIVATIONS = ("relu", "gelu", *GATED)

CHOICES: dict[str, tuple[str, ...]] = {
  "data.tokenizer": ("bytes", "bpe", "hf"),
  "data.objective": ("causal", "span_corruption"),
  "model.kind": ("decoder", "encoder_decoder"),
  "model.positions": ("rotary", "relative"),
  "model.attention": ("multi_head", "latent"),
  "model.qk_norm_scope": ("head", "width"),
  "model.rope_scaling": ("none", "linear", "llama3", "yarn"),
  "model.activation": ACTIVATIONS,
  "model.norm_placement": ("pre", "post", "both"),
  "moe.activation": ("", *ACTIVATIONS),
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "offload", "all", "dots"),
  "moe.capacity_convention": ("per_assignment", "per_token", "slots"),
  "moe.renormalize": ("none", "before_drop", "after_drop"),
  "moe.priority": ("arrival", "gate", "random"),
  "moe.overflow": ("drop", "next_best"),
  "moe.slot_order": ("choice_major", "token_major", "by_gate", "batch_priority"),
  "moe.slot_numbering": ("queue", "arrival"),
  "moe.balance_scope": ("group", "batch"),
  "moe.exchange": ("auto", "all_to_all", "ragged", "ring", "gspmd"),
  "moe.balance_counts": ("all", "first"),
  "moe.dispatcher": ("auto", "einsum", "gather", "grouped"),
  "optimizer.name": ("adamw", "adafactor", "lion", "muon"),
  "mesh.slice_axis": ("data", "fsdp", "expert", "tensor"),
  "optimizer.schedule": ("cosine", "linear", "inverse_sqrt", "constant_decay"),
}


_COUNTED = "steps and sizes are counted in 32 bits"
_INT32 = 2**31 - 1


def _count(low: int = 0, why: str = "") -> Range:
  """Returns the range of steps, tokens or bytes, which are counted in 32 bits."""
  return Range(low, _INT32, why, why_high=_COUNTED)


def _positive(high: float, why_high: str, why: str = "") -> Range:
  return Range(0, high, why, low_open=True, why_high=why_high)


_FRACTION = Range(0, 1)
_BELOW_ONE = Range(0, 1, high_open=True)
_AXIS = Range(
  -1,
  2**20,
  "-1 takes what the other axes leave",
  why_high="no machine has that many devices",
)
_WIDE = "no device can hold one row of such a matrix"
_MANY_EXPERTS = "every token is scored against all of them"
_SLOTS = "num_experts / num_selected already gives every token a slot in every expert"
_TURNS = "no frequency makes that many turns within a context"
_SHARP = "every softmax would pick one token"
_PARTS = "a part must hold at least one row"
_MANY_LAYERS = "no model has more layers"

RANGES: dict[str, Range] = {
  "data.vocab_size": count(
    257,
    2**24,
    "the output head has a row for each",
    "all bytes and the separator need an id",
  ),
  "data.sequence_length": count(1, 2**24, "attention looks at all pairs of a sequence"),
  "data.noise_density": Range(
    0, 0.95, low_open=True, why_high="too little text would be left"
  ),
  "data.mean_span_length": Range(
    1, 1e4, "a span has at least one token", why_high="no text is that long"
  ),
  "data.decoder_length": _count(0, "0 means what the spans of a full sequence need"),
  "data.num_sentinels": count(1, 2**16, "each has a row in the embedding"),
  "data.validation_fraction": _BELOW_ONE,
  "data.test_fraction": _BELOW_ONE,
  "data.max_documents": _count(0, "0 means no limit"),
  "data.num_workers": count(
    0, 1024, "each is a process", "0 reads in threads of this process"
  ),
  "data.prefetch": count(0, 4096, "that many batches would be held in memory"),
  "model.num_layers": count(1, 10_000, "each layer is compiled and kept"),
  "model.encoder_layers": count(
    0, 10_000, "each layer is compiled and kept", "0 means num_layers"
  ),
  "model.width": count(1, 2**20, _WIDE),
  "model.num_heads": count(1, 2**16, "each has a width of at least 2"),
  "model.num_kv_heads": count(0, 2**16, "at most one for each head", "0 means num_heads"),
  "model.head_dim": count(0, 2**16, _WIDE, "0 means width / num_heads"),
  "model.hidden": count(1, 2**24, _WIDE),
  "model.vocab_size": count(
    0, 2**24, "the output head has a row for each", "0 means the tokenizer's size"
  ),
  "model.q_rank": count(0, 2**20, _WIDE, "0 means full rank"),
  "model.kv_rank": count(0, 2**20, _WIDE),
  "model.nope_head_dim": count(0, 2**16, _WIDE),
  "model.rope_head_dim": count(0, 2**16, _WIDE),
  "model.value_head_dim": count(0, 2**16, _WIDE),
  "model.clip_qkv": _positive(1e6, "no entry is that large", "none disables it"),
  "model.attention_scale": Range(
    0, 1e3, "0 means 1/sqrt(head width)", why_high="every softmax would pick one token"
  ),
  "model.sliding_window": _count(0, "0 means no window"),
  "model.relative_buckets": count(4, 2**16, "distances are shorter than a sequence"),
  "model.relative_distance": _count(2, "in tokens"),
  "model.rope_theta": _positive(1e12, "positions would not turn within a sequence"),
  "model.rope_fraction": Range(0, 1, low_open=True),
  "model.rope_factor": _positive(
    1e6, "positions would not turn", "1 leaves the context as it is"
  ),
  "model.rope_original": _count(0, "in tokens"),
  "model.rope_low_factor": _positive(1e6, _TURNS),
  "model.rope_high_factor": _positive(1e6, _TURNS),
  "model.rope_beta_fast": _positive(1e6, _TURNS),
  "model.rope_beta_slow": _positive(1e6, _TURNS),
  "model.rope_mscale": Range(0, 100, "0 disables it", why_high=_SHARP),
  "model.rope_mscale_all_dim": Range(0, 100, "0 disables it", why_high=_SHARP),
  "model.rope_attention_factor": _positive(100, _SHARP, "none takes it from the mscales"),
  "model.vocab_multiple": count(1, 2**20, "most rows would be padding"),
  "model.embedding_scale": _positive(1e6, "the first activations would overflow"),
  "model.residual_scale": _positive(1e3, "activations would grow in every layer"),
  "model.logits_divisor": _positive(1e6, "all tokens would be equally likely"),
  "model.logits_soft_cap": _positive(1e6, "no logit is that large", "none disables it"),
  "model.norm_eps": _positive(1, "it only keeps a division finite"),
  "model.init_scale": _positive(1e3, "the first activations would overflow"),
  "model.max_position": count(
    0, 2**24, "attention looks at all pairs of a sequence", "0 means data.sequence_length"
  ),
  "moe.num_experts": count(
    1, 2**16, _MANY_EXPERTS, "for a dense model use --config.moe.dense_twin=true"
  ),
  "moe.num_selected": count(1, 2**16, "at most num_experts"),
  "moe.hidden": count(1, 2**24, _WIDE),
  "moe.pruned_rows": count(0, 2**16, _MANY_EXPERTS),
  "moe.segments": count(
    1, 2**16, "each is an expert to the router", "1 leaves the experts whole"
  ),
  "moe.num_shared": count(0, 2**16, "each of them computes every token"),
  "moe.shared_hidden": count(0, 2**24, _WIDE, "0 means num_shared * hidden / segments"),
  "moe.every": count(1, 10_000, _MANY_LAYERS, "1 makes every layer an MoE layer"),
  "moe.encoder_every": count(0, 10_000, _MANY_LAYERS, "0 means moe.every"),
  "moe.offset": count(0, 10_000, _MANY_LAYERS),
  "moe.dense_prefix": count(0, 10_000, _MANY_LAYERS),
  "moe.capacity_factor": _positive(2**16, _SLOTS, "none means dropless"),
  "moe.eval_capacity_factor": _positive(2**16, _SLOTS, "none means dropless"),
  "moe.min_capacity": _count(1),
  "moe.exchange_buffer": _positive(2**16, "none fits any load", "none fits any load"),
  "moe.exchange_chunks": count(1, 2**16, _PARTS, "1 sends all at once"),
  "moe.expert_chunks": count(1, 2**16, _PARTS, "1 computes all at once"),
  "moe.group_size": _count(-1, "0 means one group per sequence, -1 the whole batch"),
  "moe.renormalize_norm": Range(
    1,
    16,
    "1 means the sum, 2 the Euclidean norm",
    why_high="it would equal the largest gate",
  ),
  "moe.gate_scale": _positive(1e4, "the experts would drown out everything else"),
  "moe.expert_dropout": _BELOW_ONE,
  "moe.jitter": _BELOW_ONE,
  "moe.balance_weight": weight(),
  "moe.z_weight": weight(),
  "moe.entropy_weight": Range(
    -1e4, 1e4, "above 0 rewards spread, 0 disables it", why_high=weight().why_high
  ),
  "moe.router_init_scale": _positive(1e3, "the first gates would all be 0 or 1"),
  "optimizer.learning_rate": _positive(10, "a step moves a weight by about this much"),
  "optimizer.warmup_steps": _count(0),
  "optimizer.final_fraction": _FRACTION,
  "optimizer.decay_fraction": Range(0, 1, low_open=True),
  "optimizer.beta1": _BELOW_ONE,
  "optimizer.beta2": _BELOW_ONE,
  "optimizer.epsilon": _positive(1, "it only keeps a division finite"),
  "optimizer.momentum": _BELOW_ONE,
  "optimizer.newton_schulz_steps": count(1, 64, "five are enough"),
  "optimizer.update_rms": _positive(
    10, "a step moves a weight by about the rate times this"
  ),
  "optimizer.weight_decay": Range(
    0,
    100,
    "0 disables it",
    why_high="a step shrinks a weight by this times the learning rate",
  ),
  "optimizer.clip_norm": Range(
    0, 1e9, "0 disables it", why_high="no norm is that large, so nothing would be clipped"
  ),
  "train.num_steps": _count(1),
  "train.batch_size": count(1, 2**24, "a step processes all of them"),
  "train.accumulation": count(1, 2**24, "at most train.batch_size", "1 disables it"),
  "train.seed": Range(0, _INT32, why_high="keys are made from 32 bits"),
  "train.log_every": _count(1),
  "train.eval_every": _count(0, "0 means only at the end"),
  "train.eval_batches": _count(0, "0 means the whole validation split"),
  "train.final_eval_tokens": _count(
    -1, "0 means all, -1 a quarter of the tokens trained on"
  ),
  "train.trace_steps": count(0, 100, "a trace holds every operation", "0 means no trace"),
  "train.checkpoint_every": _count(0, "0 means only at the end"),
  "train.keep_last": _count(1, "a run resumes from its newest checkpoint"),
  "train.keep_best": _count(0),
  "train.max_bad_steps": _count(1),
  "mesh.data": _AXIS,
  "mesh.fsdp": _AXIS,
  "mesh.expert": _AXIS,
  "mesh.tensor": _AXIS,
  **alarms.RANGES,
}
