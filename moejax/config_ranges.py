"""What each field of the config may be, taken by itself: names, and numbers in range.

One line per field. What fields must be *together* stands in `config_check`.
Routers and dispatchers are not here: their registries say what there is.
"""

import dataclasses
import math

CHOICES: dict[str, tuple[str, ...]] = {
  "data.tokenizer": ("bytes", "bpe"),
  "model.activation": ("relu", "gelu", "swiglu"),
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "all", "dots"),
  "moe.capacity_convention": ("per_assignment", "per_token"),
  "moe.renormalize": ("none", "before_drop", "after_drop"),
  "moe.priority": ("arrival", "gate", "random"),
  "moe.overflow": ("drop", "next_best"),
  "moe.second_policy": ("all", "random", "random_raw", "sample"),
  "moe.slot_order": ("choice_major", "token_major", "by_gate", "batch_priority"),
  "moe.slot_numbering": ("queue", "arrival"),
  "moe.noise": ("learned", "fixed"),
  "moe.hash_table": ("random", "balanced"),
  "moe.balance_scope": ("group", "batch"),
  "moe.exchange": ("auto", "all_to_all", "ragged", "ring", "gspmd"),
  "moe.balance_counts": ("all", "first"),
  "optimizer.name": ("adamw", "adafactor", "lion"),
  "mesh.slice_axis": ("data", "fsdp", "expert", "tensor"),
  "optimizer.schedule": ("cosine", "linear", "inverse_sqrt", "constant_decay"),
}


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval, open at the ends that say so; `why` completes the error."""

  low: float = -math.inf
  high: float = math.inf
  why: str = ""
  low_open: bool = False
  high_open: bool = False

  def __contains__(self, value: float) -> bool:
    above = self.low < value if self.low_open else self.low <= value
    below = value < self.high if self.high_open else value <= self.high
    return math.isfinite(value) and above and below

  def __str__(self) -> str:
    """Such as "at least 1" or "above 0 and at most 1"."""
    low = "above" if self.low_open else "at least"
    high = "below" if self.high_open else "at most"
    words = [f"{low} {self.low:g}"] if math.isfinite(self.low) else []
    words += [f"{high} {self.high:g}"] if math.isfinite(self.high) else []
    return " and ".join(words) or "finite"


def _at_least(low: float, why: str = "") -> Range:
  return Range(low, why=why)


def _positive(why: str = "") -> Range:
  return Range(0, why=why, low_open=True)


_FRACTION = Range(0, 1)
_BELOW_ONE = Range(0, 1, high_open=True)
_AXIS = Range(-1, why="-1 takes what the other axes leave")

RANGES: dict[str, Range] = {
  "data.vocab_size": _at_least(257, "all bytes and the separator need an id"),
  "data.sequence_length": _at_least(1),
  "data.validation_fraction": _BELOW_ONE,
  "data.test_fraction": _BELOW_ONE,
  "data.max_documents": _at_least(0, "0 is all"),
  "data.num_workers": _at_least(0, "0 reads in threads of this process"),
  "data.prefetch": _at_least(0),
  "model.num_layers": _at_least(1),
  "model.width": _at_least(1),
  "model.num_heads": _at_least(1),
  "model.num_kv_heads": _at_least(0, "0 is num_heads"),
  "model.head_dim": _at_least(0, "0 is width / num_heads"),
  "model.hidden": _at_least(1),
  "model.vocab_size": _at_least(0, "0 is the tokenizer's"),
  "model.sliding_window": _at_least(0, "0 is no window"),
  "model.rope_theta": _positive(),
  "model.norm_eps": _positive(),
  "model.init_scale": _positive(),
  "model.max_position": _at_least(0, "0 is data.sequence_length"),
  "moe.num_experts": _at_least(1, "for a dense model use --config.moe.dense_twin=true"),
  "moe.num_selected": _at_least(1),
  "moe.hidden": _at_least(1),
  "moe.segments": _at_least(1, "1 leaves the experts whole"),
  "moe.num_shared": _at_least(0),
  "moe.shared_hidden": _at_least(0, "0 is num_shared * hidden / segments"),
  "moe.every": _at_least(1, "1 makes every layer an MoE layer"),
  "moe.offset": _at_least(0),
  "moe.dense_prefix": _at_least(0),
  "moe.capacity_factor": _positive("none is dropless"),
  "moe.eval_capacity_factor": _positive("none is dropless"),
  "moe.min_capacity": _at_least(1),
  "moe.exchange_buffer": _positive("none fits any load"),
  "moe.exchange_chunks": _at_least(1, "1 sends all at once"),
  "moe.expert_chunks": _at_least(1, "1 computes all at once"),
  "moe.group_size": _at_least(-1, "0 is one group per sequence, -1 the whole batch"),
  "moe.renormalize_norm": Range(1, 16, "1 is the sum, 2 the Euclidean norm"),
  "moe.gate_scale": _positive(),
  "moe.num_expert_groups": _at_least(1, "1 is no limit"),
  "moe.num_selected_groups": _at_least(1),
  "moe.group_best": _at_least(1),
  "moe.bias_update_rate": _at_least(0, "0 leaves the bias at zero"),
  "moe.quantile_rate": _at_least(0, "0 leaves the bias at zero"),
  "moe.noise_std": _at_least(0),
  "moe.sinkhorn_iterations": _at_least(1),
  "moe.sinkhorn_tolerance": _positive(),
  "moe.expert_dropout": _BELOW_ONE,
  "moe.jitter": _BELOW_ONE,
  "moe.balance_weight": _at_least(0, "0 is off"),
  "moe.z_weight": _at_least(0, "0 is off"),
  "moe.importance_weight": _at_least(0, "0 is off"),
  "moe.load_weight": _at_least(0, "0 is off"),
  "moe.device_weight": _at_least(0, "0 is off"),
  "moe.communication_weight": _at_least(0, "0 is off"),
  "moe.entropy_weight": Range(why="above 0 rewards spread, 0 is off"),
  "moe.router_init_scale": _positive(),
  "optimizer.learning_rate": _positive(),
  "optimizer.warmup_steps": _at_least(0),
  "optimizer.final_fraction": _FRACTION,
  "optimizer.decay_fraction": Range(0, 1, low_open=True),
  "optimizer.beta1": _BELOW_ONE,
  "optimizer.beta2": _BELOW_ONE,
  "optimizer.epsilon": _positive(),
  "optimizer.weight_decay": _at_least(0, "0 is off"),
  "optimizer.clip_norm": _at_least(0, "0 is off"),
  "train.num_steps": _at_least(1),
  "train.batch_size": _at_least(1),
  "train.accumulation": _at_least(1, "1 is none"),
  "train.seed": Range(0, 2**31 - 1),
  "train.log_every": _at_least(1),
  "train.eval_every": _at_least(0, "0 is only at the end"),
  "train.eval_batches": _at_least(0, "0 is the whole validation split"),
  "train.final_eval_tokens": _at_least(-1, "0 is all, -1 a quarter of those trained on"),
  "train.checkpoint_every": _at_least(0, "0 is only at the end"),
  "train.keep_last": _at_least(1, "a run resumes from its newest checkpoint"),
  "train.keep_best": _at_least(0),
  "train.max_bad_steps": _at_least(1),
  "mesh.data": _AXIS,
  "mesh.fsdp": _AXIS,
  "mesh.expert": _AXIS,
  "mesh.tensor": _AXIS,
}
