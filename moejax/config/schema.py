"""The experiment's configuration: typed, readable, checked once.

`configs/*.py:get_config()` returns a `Config`; absl flags override any leaf
(`--config.moe.num_experts=16`). Overriding does not re-run `__post_init__`, so
nothing is derived here: `moejax.config.check.validate` is called once after
parsing, and derived numbers are computed from these fields where they are needed.

A router's own options are declared by its class (moejax/routing) and only stored here.

No `from __future__ import annotations` here: the flag parser reads the types.
`float | None` fields take `none` on the command line.
"""

from dataclasses import dataclass, field
from typing import Any

from moejax.config.alarms import AlarmConfig

SCHEMA_VERSION = 2
"""Incremented when a field is renamed or changes meaning; see config.text.MIGRATIONS.
2: options of one router moved from `moe` to that router."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
  """Where text comes from and how it becomes batches."""

  name: str = "python_stdlib"
  """python_stdlib or python_packages (embedded), text (your own, with path), or a TFDS
  name such as lm1b."""
  path: str = ""
  """name=text: a folder, a file, .jsonl, each also .gz .xz .zst. With a TFDS name: the
  directory of the prepared dataset, if not TFDS's own."""
  domains: str = ""
  """Read only documents of these domains, separated by commas: distributions of
  python_packages, folders of python_stdlib and text. Empty means all."""
  cache_dir: str = ""
  """Prepared datasets and token caches; empty means ~/.cache/moejax."""
  text_field: str = "text"
  tokenizer: str = "bytes"
  """bytes, bpe (trained on the train split, stored with the run), or hf (imported with a
  published model)."""
  vocab_size: int = 2048
  """Vocabulary size of bpe; the bytes tokenizer has a fixed size."""
  sequence_length: int = 256
  """Tokens of a training sequence; with span_corruption, of the encoder's."""
  objective: str = "causal"
  """causal, or span_corruption: the encoder sees text with spans replaced by sentinels,
  the decoder predicts the spans (T5, arXiv:1910.10683, section 3.1.4)."""
  noise_density: float = 0.15
  """span_corruption: fraction of the tokens that is replaced."""
  mean_span_length: float = 3.0
  """span_corruption: tokens of a replaced span, on average."""
  decoder_length: int = 0
  """span_corruption: tokens of the decoder's sequence; 0 means as many as the spans of a
  full encoder sequence need."""
  num_sentinels: int = 100
  """span_corruption: ids for the places of spans, after those of the tokenizer."""
  validation_fraction: float = 0.05
  test_fraction: float = 0.05
  """Fraction of documents, split by a content hash. TFDS datasets keep their splits."""
  max_documents: int = 0
  """Maximum number of documents read per split; 0 means all."""
  num_workers: int = 0
  """Grain worker processes; 0 reads in threads of this process."""
  prefetch: int = 4
  """Batches prepared in advance."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
  """The Transformer around the MoE layers."""

  kind: str = "decoder"
  """decoder, or encoder_decoder (T5, arXiv:1910.10683)."""
  num_layers: int = 4
  """Number of layers of the decoder."""
  encoder_layers: int = 0
  """encoder_decoder: layers of the encoder; 0 means num_layers."""
  encoder_embedding: bool = False
  """encoder_decoder: a separate token table for the encoder (Transformers' Switch, if
  nothing is tied)."""
  width: int = 128
  """D."""
  num_heads: int = 4
  num_kv_heads: int = 0
  """Key/value heads, for grouped-query attention; 0 means num_heads."""
  head_dim: int = 0
  """Width of a head; 0 means width / num_heads."""
  hidden: int = 512
  """Hidden width of the dense feed-forward layers."""
  activation: str = "gelu"
  """relu, gelu, swiglu, geglu (arXiv:2002.05202) or clamped_swiglu (GPT-OSS), in dense
  layers, and in experts unless moe.activation differs."""
  vocab_size: int = 0
  """V; 0 means the tokenizer's."""
  vocab_multiple: int = 1
  """Pad the embedding and the head to a multiple of this many rows, so that they can be
  sharded; padded ids are never predicted."""
  tie_embeddings: bool = True
  attention: str = "multi_head"
  """multi_head (grouped-query with num_kv_heads), or latent: keys and values are
  expanded from one low-rank vector per token (DeepSeek-V2, arXiv:2405.04434)."""
  q_rank: int = 0
  """latent: rank of the queries; 0 means full rank (DeepSeek-V2-Lite)."""
  kv_rank: int = 0
  """latent: joint rank of the keys and values, which the cache stores."""
  nope_head_dim: int = 0
  """latent: width of the part of a query or key head without position."""
  rope_head_dim: int = 0
  """latent: width of the part that rotates; all heads share that of the key."""
  value_head_dim: int = 0
  """latent: width of a value head."""
  qk_norm: bool = False
  """RMSNorm on queries and keys (arXiv:2302.05442), before rotation."""
  qk_norm_scope: str = "head"
  """head: each head on its own (Qwen3); width: all heads together (OLMoE)."""
  clip_qkv: float | None = None
  """Clip queries, keys and values to +- this value, after qk_norm (DBRX, OLMoE)."""
  attention_bias: bool = False
  """Biases on the query, key and value projections (Qwen style); with latent attention
  on the projections down to the latent vectors (DeepSeek)."""
  attention_out_bias: bool = False
  """A bias on the output projection of attention (GPT-OSS)."""
  attention_sinks: bool = False
  """One learned logit per head takes part in every softmax and has no value (GPT-OSS;
  arXiv:2309.17453)."""
  attention_scale: float = 0.0
  """Multiplies attention logits (Granite's attention_multiplier); 0 means 1/sqrt(head
  width)."""
  sliding_window: int = 0
  """Attention window in tokens, including the current one; 0 means no window."""
  window_pattern: str = ""
  """Which layers have the window: sliding or full for each layer, separated by commas,
  repeated over all layers (GPT-OSS: sliding,full); empty means sliding for all."""
  positions: str = "rotary"
  """rotary, or relative: a learned bias of attention logits for each bucket of
  distances, shared by all layers of a stack (T5)."""
  relative_buckets: int = 32
  """relative: number of buckets."""
  relative_distance: int = 128
  """relative: distances from this on share the last bucket."""
  rope_theta: float = 10_000.0
  rope_fraction: float = 1.0
  """Fraction of a head that rotates, from its beginning (GLM-4.5: 0.5)."""
  rope_interleaved: bool = False
  """Rotate neighbours (2i, 2i+1) as in RoFormer and DeepSeek, not the two halves of a
  head (i, i + A/2) as in Llama."""
  rope_scaling: str = "none"
  """Context extension: none, linear (arXiv:2306.15595), llama3 (Llama 3.1) or yarn
  (arXiv:2309.00071)."""
  rope_factor: float = 1.0
  """Ratio of the extended context to the original one."""
  rope_original: int = 0
  """llama3, yarn: context length before the extension, in tokens."""
  rope_low_factor: float = 1.0
  """llama3: frequencies of fewer turns than this in the original context are divided by
  rope_factor."""
  rope_high_factor: float = 4.0
  """llama3: frequencies of more turns than this are kept."""
  rope_beta_fast: float = 32.0
  """yarn: frequencies of more turns than this in the original context are kept."""
  rope_beta_slow: float = 1.0
  """yarn: frequencies of fewer turns than this are divided by rope_factor."""
  rope_truncate: bool = True
  """yarn: round the ends of the ramp outwards to whole indices (GPT-OSS does not)."""
  rope_mscale: float = 1.0
  """yarn: m in 0.1 * m * ln(rope_factor) + 1, which multiplies rotated queries and
  keys."""
  rope_mscale_all_dim: float = 0.0
  """yarn: m of the same formula for the whole head: its square multiplies attention
  logits, and rotated queries and keys are divided by it (DeepSeek); 0 means off."""
  rope_attention_factor: float | None = None
  """yarn: factor of rotated queries and keys, replacing the one from the two mscales."""
  norm_placement: str = "pre"
  """RMSNorm on the input of attention and feed-forward (pre), on their output before it
  is added (post: FlexOlmo, OLMo 2, arXiv:2501.00656), or on both."""
  norm_eps: float = 1e-6
  embedding_scale: float = 1.0
  """Multiplies the embeddings (Granite's embedding_multiplier)."""
  residual_scale: float = 1.0
  """Multiplies the outputs of attention and feed-forward (Granite's
  residual_multiplier)."""
  logits_divisor: float = 1.0
  """Divides the logits (Granite's logits_scaling)."""
  logits_soft_cap: float | None = None
  """Squash logits to +- this value: c * tanh(logits / c) (Gemma 2, arXiv:2408.00118)."""
  init_scale: float = 1.0
  """Multiplies the fan-in truncated-normal standard deviation of every matrix."""
  dtype: str = "float32"
  """Compute dtype: float32 or bfloat16. Router, norms and loss are always float32."""
  param_dtype: str = "float32"
  remat: str = "none"
  """none, full (recompute the block except token exchange), offload (as full, but keep
  exchanged rows in the host's memory), all (recompute exchange too), or dots (keep matrix
  products)."""
  scan_layers: bool = True
  """False unrolls: slower to compile, easier to read in a profile."""
  max_position: int = 0
  """Longest context for generation; 0 means data.sequence_length."""

  def padded(self, vocab_size: int) -> int:
    """Returns the rows of embedding and head: V, rounded up to `vocab_multiple`."""
    return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(kw_only=True, slots=True)
class MoEConfig:
  """The MoE layers: how many, which router, what happens to overflow."""

  num_experts: int = 8
  """E, before segmentation."""
  num_selected: int = 1
  """K, before segmentation."""
  hidden: int = 512
  """F of one expert, before segmentation."""
  activation: str = ""
  """Activation of the experts, including shared ones; empty means model.activation."""
  expert_bias: bool = False
  """Biases on all matrices of the routed experts (GPT-OSS)."""
  router_bias: bool = False
  """A learned bias on the router's logits (GPT-OSS)."""
  pruned_rows: int = 0
  """Router rows whose experts were pruned: never chosen, but still in the softmax, so
  that raw gates of the other experts do not change."""
  segments: int = 1
  """m: each expert is split into m of width F/m, and m*K are chosen (DeepSeekMoE)."""
  num_shared: int = 0
  """Number of shared experts, of width F/m each, that every token visits."""
  shared_hidden: int = 0
  """Hidden width of all shared experts together; 0 means num_shared * F/m."""
  shared_gate: bool = False
  """Weigh the shared experts by sigmoid(x w), w learned (Qwen2-MoE)."""
  router: str = "switch"
  """A name from --list=routers, which also shows its options; see `use_router`."""
  dispatcher: str = "auto"
  """Layout of experts' rows: einsum, gather, grouped (--list=dispatchers), or auto."""
  every: int = 2
  """Every n-th layer is an MoE layer; 1 means all."""
  offset: int = 1
  """Index modulo `every` of the MoE layer in each `every` layers, counted from 0 after
  the dense prefix."""
  dense_prefix: int = 0
  """Number of leading layers that are dense regardless of `every`."""
  dense_layers: str = ""
  """Indices of further layers that are dense, separated by commas (mlp_only_layers of
  Qwen)."""
  encoder_every: int = 0
  """encoder_decoder: `every` of the encoder; 0 means the decoder's."""
  encoder_router: str = ""
  """encoder_decoder: router of the encoder, with its default options; empty means the
  decoder's router. It may look at later tokens (expert_choice, soft)."""
  dense_after: bool = False
  """Follow each MoE layer by a dense feed-forward of model.hidden, with its own norm and
  residual (ST-MoE, arXiv:2202.08906, appendix C)."""
  dense_twin: bool = False
  """Replace each MoE layer by a dense one of equal active FLOPs: hidden K*F + shared."""
  capacity_factor: float | None = 1.25
  """Slots per expert = ceil(factor*K*T/E); none means dropless."""
  eval_capacity_factor: float | None = None
  capacity_convention: str = "per_assignment"
  """per_assignment multiplies by K; per_token (Flaxformer, AXLearn, Praxis) does not;
  under slots both factors are C itself, for any T (Transformers' Switch)."""
  min_capacity: int = 1
  exchange: str = "auto"
  """How tokens reach experts on other devices: all_to_all (slots), ragged (sorted
  rows), ring, gspmd (the compiler decides), or auto."""
  exchange_buffer: float | None = None
  """ragged: rows a device can receive, as a multiple of an even load; none fits any
  load. Rows that do not fit are dropped and counted."""
  exchange_chunks: int = 1
  """all_to_all: chunks sent one by one, to overlap with compute. ragged: parts of a
  device's routing groups, sent and computed one after the other, so that the buffer needs
  room for one part; the backward pass sends each part again."""
  expert_chunks: int = 1
  """Sorted rows on GPU and TPU, and slots under all_to_all: chunks of rows computed in
  sequence, so that only one chunk's hidden activations are in memory at a time."""
  group_size: int = 0
  """T, tokens per routing group: the scope of capacity and balance; 0 means one sequence,
  -1 the whole batch."""
  renormalize: str = "none"
  """Scale a token's K gates to norm 1: none, before_drop or after_drop."""
  allow_constant_gates: bool = False
  """Allow renormalising with one choice per token: every gate is 1, and the task's loss
  gives the router no gradient (published models with num_experts_per_tok=1)."""
  renormalize_norm: float = 1.0
  """p of that norm: 1 makes the gates sum to 1, 2 their squares (MegaBlocks)."""
  gate_scale: float = 1.0
  """Multiplies every gate at the end (DeepSeek's routed_scaling_factor)."""
  priority: str = "arrival"
  """Order in which tokens get slots: arrival, gate or random."""
  slot_order: str = "choice_major"
  """Order in which choices get slots: choice_major (all first choices before any
  second), token_major, by_gate, or batch_priority (choice_major with priority=gate)."""
  slot_numbering: str = "queue"
  """Slots are numbered as assigned (queue), or in token order (arrival)."""
  overflow: str = "drop"
  """drop, or next_best: the token's next-best expert that has room."""
  jitter: float = 0.0
  """Switch input jitter: the router sees x * uniform(1-j, 1+j) in training."""
  expert_dropout: float = 0.0
  """In training, this fraction of each layer's experts gets no tokens. They are redrawn
  in each step and the same for all its microbatches."""
  allow_future_leak: bool = False
  """Allow generation even if the router sees later tokens (expert_choice, base)."""
  balance_weight: float = 0.01
  balance_scope: str = "group"
  """group: per routing group; batch: over the whole global batch, which needs a second
  forward pass with accumulation, since loads must be known in advance."""
  balance_counts: str = "all"
  """all: every choice counts as load in the balance loss; first: first choices only
  (GShard, V-MoE, Praxis, DeepSpeed)."""
  z_weight: float = 0.001
  entropy_weight: float = 0.0
  """Above 0 rewards, below 0 penalises, high entropy of a token's probabilities."""
  router_init_scale: float = 0.1
  """Scale of the router's initial weights; Switch, section 2.4, uses 0.1 of the usual."""
  options: dict[str, dict[str, Any]] = field(default_factory=dict)
  """Router options that are not at their defaults: router, option, value. The flag is
  `--config.moe.ROUTER.OPTION=VALUE`."""

  def use_router(self, name: str, **options: Any) -> None:
    """Sets the router and its options, in a config file."""
    self.router, self.options = name, {name: options} if options else {}

  @property
  def router_options(self) -> dict[str, Any]:
    """Options of the chosen router that were set."""
    return self.options.get(self.router, {})

  @property
  def fine_experts(self) -> int:
    """E of the router: every expert split into its segments."""
    return self.num_experts * self.segments

  @property
  def fine_selected(self) -> int:
    """K of the router, in segments."""
    return self.num_selected * self.segments

  @property
  def fine_hidden(self) -> int:
    """F of one segment."""
    return self.hidden // self.segments

  @property
  def shared_width(self) -> int:
    """Hidden width of all shared experts together; 0 is no shared expert."""
    return self.shared_hidden or self.num_shared * self.fine_hidden


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
  name: str = "adamw"
  """adamw, adafactor, lion, or muon (hidden matrices; AdamW for the rest)."""
  learning_rate: float = 1e-3
  """Learning rate at the peak of the schedule."""
  schedule: str = "cosine"
  """After warmup: cosine, linear, inverse_sqrt, or constant_decay (constant, then
  linear over the last decay_fraction)."""
  warmup_steps: int = 100
  final_fraction: float = 0.1
  """Learning rate at the end, as a fraction of the peak."""
  decay_fraction: float = 0.2
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  momentum: float = 0.95
  """Muon: Nesterov momentum of the hidden matrices."""
  newton_schulz_steps: int = 5
  """Muon: iterations that make an update orthogonal."""
  update_rms: float = 0.2
  """Muon: root mean square of an update at learning rate 1; 0.2 is about AdamW's, so that
  both share one learning rate."""
  weight_decay: float = 0.1
  """Decoupled; applied to matrices only, not to norms, biases or embeddings."""
  clip_norm: float = 1.0
  """Maximum global gradient norm; 0 means no clipping."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
  num_steps: int = 1000
  batch_size: int = 16
  """Sequences per optimizer step, over all devices and accumulation."""
  accumulation: int = 1
  """Microbatches per optimizer step."""
  seed: int = 0
  init_from: str = ""
  """Directory of a run whose parameters a new run starts from, like the flag --init_from,
  which takes precedence. For sweeps, where {seed} stands for a point's seed."""
  frozen: str = ""
  """Parameters that training does not change: selectors over their dotted names,
  separated by commas (`embedding.*,*.moe.experts.*[0:4]`, `!*.moe.experts.*`); see
  `moejax.config.selectors`."""
  log_every: int = 10
  eval_every: int = 250
  eval_batches: int = 16
  """Validation batches per evaluation during training; 0 means all."""
  final_eval_tokens: int = -1
  """Number of leading validation tokens evaluated after the last step; 0 means all, -1 a
  quarter of the tokens trained on (at most 4M, at least those of eval_batches)."""
  sample: bool = True
  """After the last step, generate from the beginning of a held-out document."""
  report: bool = True
  """After the last step, draw report.png."""
  trace_steps: int = 3
  """Number of steps traced near the end, for the bar of step time in report.png; 0 traces
  none."""
  checkpoint_every: int = 250
  keep_last: int = 2
  keep_best: int = 1
  max_bad_steps: int = 10
  """Stop after this many non-finite steps in a row."""
  tensorboard: bool = True


@dataclass(kw_only=True, slots=True)
class MeshConfig:
  """Devices per axis; one size may be -1 and takes the rest."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1
  slice_axis: str = "data"
  """The axis that spans TPU slices, over their slow network, if there are several."""


@dataclass(kw_only=True, slots=True)
class Config:
  schema_version: int = SCHEMA_VERSION
  data: DataConfig = field(default_factory=DataConfig)
  model: ModelConfig = field(default_factory=ModelConfig)
  moe: MoEConfig = field(default_factory=MoEConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  alarms: AlarmConfig = field(default_factory=AlarmConfig)
