"""The registry: every router by its name on the command line."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxtyping import Array, Float

from moejax.errors import ConfigError
from moejax.routing import (
  assignment,
  bias,
  expert_choice,
  hashing,
  noisy,
  soft,
  token_choice,
)
from moejax.routing.base import RouterFn, RouterOptions, RouterStats

Extra = Literal["assigned", "bias", "noise_logits", "slot_logits"]

BiasFn = Callable[
  [Float[Array, "*l E"], RouterStats, RouterOptions], Float[Array, "*l E"]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
  """A router, and what whoever calls it must know about it.

  The layer makes `RouterInputs` of one group (logits, valid, and a key in training
  only), adds the fields named in `needs`, maps `fn` over groups, and adds
  `Routing.losses` to the balance and z-losses. For each of `needs` it must pass:

    assigned      [G,T,K] = table[token_ids], table = `hashing.hash_table(V, E, K)`, a
                  constant that is not trained.
    bias          [E], the same for every group: a state that starts at zero, gets no
                  gradient and no weight decay, and is replaced once per optimizer
                  step by `update_bias(bias, stats, options)` from the batch's stats.
    noise_logits  [G,T,E] = x @ W_noise, W_noise [D,E] a parameter that starts at zero.
    slot_logits   [G,T,E,C] = normalize(x) @ (scale * normalize(phi)), phi [D,E,C] a
                  parameter; C is fixed by the config, so groups must have one size.
  """

  fn: RouterFn
  summary: str
  """One line, for --list=routers."""
  causal: bool = True
  """Whether a token's experts are independent of later tokens. What gets a slot may
  still depend on them: see `is_causal`."""
  num_selected: int | None = None
  """K where the router fixes it, whatever the flag says."""
  needs: tuple[Extra, ...] = ()
  losses: tuple[str, ...] = ()
  """Names in `Routing.losses`."""
  needs_capacity: bool = False
  """Whether dropless is impossible."""
  token_choice: bool = True
  """Whether assignments are token-major, so that priority and overflow apply."""
  groups: bool = False
  """Whether num_expert_groups is read."""
  update_bias: BiasFn | None = None
  """How a step moves the bias, where one is needed; see `moejax.routing.bias`."""
  all_experts: bool = False
  """Whether a token's K choices are all experts, whatever the flag says."""
  by_logits: bool = True
  """Whether the logits alone decide who goes where, so that expert dropout, which
  lowers some of them, keeps tokens away from an expert."""
  reads: tuple[str, ...] = ()
  """Fields of `MoEConfig` that this router reads and not every router does, beside
  those of its `losses` and, under token choice, `TOKEN_CHOICE_READS`."""
  learned: bool = True
  """Whether anything is learned; if not, no loss may reach tokens through the logits."""


TOKEN_CHOICE_READS = (
  "renormalize",
  "renormalize_norm",
  "priority",
  "slot_order",
  "slot_numbering",
  "overflow",
  "gate_scale",
)
"""Fields of `MoEConfig` that the routers whose tokens choose read, through `assign`."""

LOGIT_READS = ("balance_weight", "z_weight", "entropy_weight", "jitter")
"""Fields of `MoEConfig` that act on what a router has learned alone."""

_GROUPS = ("num_expert_groups", "num_selected_groups", "group_best")

ROUTERS: dict[str, RouterSpec] = {
  "switch": RouterSpec(
    fn=token_choice.switch,
    num_selected=1,
    summary="top-1, gate = probability (Switch)",
  ),
  "top2": RouterSpec(
    fn=token_choice.top2,
    num_selected=2,
    reads=("second_policy",),
    summary="best expert and a second one: always, at random or sampled (GShard)",
  ),
  "top_k": RouterSpec(
    fn=token_choice.top_k,
    summary="K most probable experts, gates raw or renormalised (Mixtral, OLMoE)",
  ),
  "noisy_top_k": RouterSpec(
    fn=noisy.noisy_top_k,
    needs=("noise_logits",),
    losses=("importance_loss", "load_loss"),
    reads=("noise", "noise_std"),
    summary="K best of noisy logits, noise scale learned (Shazeer) or fixed (V-MoE)",
  ),
  "expert_choice": RouterSpec(
    fn=expert_choice.expert_choice,
    causal=False,
    needs_capacity=True,
    token_choice=False,
    by_logits=False,
    reads=("gate_scale",),
    summary="every expert picks its C most probable tokens; leaks the future",
  ),
  "sigmoid_bias": RouterSpec(
    fn=token_choice.sigmoid_bias,
    needs=("bias",),
    update_bias=bias.sign_step,
    groups=True,
    reads=(*_GROUPS, "bias_update_rate"),
    summary="sigmoid scores balanced by a bias that only choosing sees (DeepSeek-V3)",
  ),
  "quantile_bias": RouterSpec(
    fn=token_choice.quantile_bias,
    needs=("bias",),
    update_bias=bias.quantile_step,
    groups=True,
    reads=(*_GROUPS, "quantile_rate"),
    summary="sigmoid_bias whose bias steps towards a quantile's estimate, which balances",
  ),
  "quantile_balancing": RouterSpec(
    fn=token_choice.quantile_balancing,
    needs=("bias",),
    update_bias=bias.quantile_balance,
    summary="sigmoid_bias whose bias is the quantile that balances the last batch (Su)",
  ),
  "group_limited": RouterSpec(
    fn=token_choice.group_limited,
    losses=("device_loss", "communication_loss"),
    groups=True,
    reads=_GROUPS,
    summary="top-k within a token's best groups of experts (DeepSeek-V2)",
  ),
  "hash": RouterSpec(
    fn=hashing.hash_router,
    needs=("assigned",),
    reads=("hash_table",),
    by_logits=False,
    learned=False,
    summary="experts fixed per vocabulary id, nothing learned (Hash layers)",
  ),
  "base": RouterSpec(
    fn=assignment.base,
    causal=False,
    by_logits=False,
    reads=("sinkhorn_iterations", "sinkhorn_tolerance"),
    summary="balanced assignment by Sinkhorn in training, greedy at test (BASE)",
  ),
  "soft": RouterSpec(
    fn=soft.soft,
    causal=False,
    by_logits=False,
    needs=("slot_logits",),
    needs_capacity=True,
    token_choice=False,
    summary="slots are weighted means of all tokens (Soft MoE); einsum dispatcher only",
  ),
  "random": RouterSpec(
    fn=token_choice.random,
    by_logits=False,
    summary="K experts at random, for benchmarks",
  ),
  "forced_balance": RouterSpec(
    fn=token_choice.forced_balance,
    by_logits=False,
    summary="experts in turn, perfectly balanced, for benchmarks",
  ),
  "dense": RouterSpec(
    fn=token_choice.dense,
    all_experts=True,
    by_logits=False,
    summary="every token to every expert: what sparse routing approximates",
  ),
}


def selected(name: str, num_experts: int, num_selected: int) -> int:
  """K of a router: what the config asks for, or all experts.

  Args:
    name: of the router.
    num_experts: E.
    num_selected: K as the config has it.
  """
  return num_experts if ROUTERS[name].all_experts else num_selected


def is_read(name: str, field: str) -> bool:
  """Whether a router reads a field of `MoEConfig` that only some routers read."""
  spec = ROUTERS[name]
  if field in LOGIT_READS:
    return spec.learned
  weights = [loss.replace("_loss", "_weight") for loss in spec.losses]
  common = TOKEN_CHOICE_READS if spec.token_choice else ()
  return field in (*spec.reads, *weights, *common)


def readers(field: str) -> list[str]:
  """The routers that read a field of `MoEConfig`; empty where all routers do."""
  return [name for name in ROUTERS if is_read(name, field)]


def is_causal(name: str, options: RouterOptions) -> bool:
  """Whether no token's output depends on a later token of its group.

  Capacity makes batch priority, by_gate and random order look ahead; choice-major
  order does too for K > 1 (a later token's first choice goes before an earlier
  token's second one), as in every codebase that has it, and is let pass here.
  """
  ordered = options.priority == "arrival" and options.slot_order in (
    "choice_major",
    "token_major",
  )
  return ROUTERS[name].causal and (options.capacity is None or ordered)


def check(name: str, options: RouterOptions) -> None:
  """Refuses combinations of router and options that make no sense.

  Raises:
    ConfigError: naming the flags and the remedy.
  """
  spec = ROUTERS[name]
  experts = options.num_experts
  k = experts if spec.all_experts else spec.num_selected or options.num_selected
  flag = "--config.moe."
  if k > experts:
    raise ConfigError(
      f"{flag}num_selected={k} is more than {flag}num_experts={experts}: a token cannot "
      "choose an expert twice. Lower the first or raise the second."
    )
  if spec.token_choice and k == 1 and options.renormalize != "none":
    raise ConfigError(
      f"{flag}renormalize={options.renormalize} with one choice per token makes every "
      "gate 1 and takes the router its gradient. Use none."
    )
  if spec.needs_capacity and options.capacity is None:
    raise ConfigError(
      f"{flag}router={name} needs slots, and {flag}capacity_factor=none gives no number "
      "of them. Give a number, for training and evaluation."
    )
  if options.overflow == "next_best":
    _check_next_best(name, options)
  if options.num_expert_groups > 1:
    _check_groups(name, options, k)


def _check_next_best(name: str, options: RouterOptions) -> None:
  flag = "--config.moe."
  if not ROUTERS[name].token_choice:
    raise ConfigError(
      f"{flag}overflow=next_best has no meaning for {flag}router={name}, which never "
      "overflows. Use drop."
    )
  if options.capacity is None:
    raise ConfigError(
      f"{flag}overflow=next_best has nothing to do with {flag}capacity_factor=none: "
      "dropless never overflows. Give a capacity factor, or use overflow=drop."
    )
  if options.slot_order in ("token_major", "by_gate"):
    raise ConfigError(
      f"{flag}overflow=next_best places first choices before second ones, which "
      f"{flag}slot_order={options.slot_order} does not. Use choice_major or "
      "batch_priority."
    )


def _check_groups(name: str, options: RouterOptions, k: int) -> None:
  flag = "--config.moe."
  groups, selected = options.num_expert_groups, options.num_selected_groups
  experts = options.num_experts
  if not ROUTERS[name].groups:
    raise ConfigError(
      f"{flag}num_expert_groups={groups} is not read by {flag}router={name}. Use "
      "group_limited, sigmoid_bias or quantile_bias, or 1."
    )
  if experts % groups:
    raise ConfigError(
      f"{flag}num_expert_groups={groups} does not divide the {experts} experts. Choose "
      "a divisor."
    )
  if not 0 < selected <= groups:
    raise ConfigError(
      f"{flag}num_selected_groups={selected} is not in 1..{groups}, the number of groups."
    )
  if k > selected * experts // groups:
    raise ConfigError(
      f"{flag}num_selected={k} is more than the {selected * experts // groups} experts "
      f"of {selected} groups of {experts // groups}. Raise num_selected_groups."
    )
  if options.group_best > experts // groups:
    raise ConfigError(
      f"{flag}group_best={options.group_best} is more than the {experts // groups} "
      "experts of a group."
    )
