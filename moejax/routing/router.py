"""The router interface: one class describes a router completely.

A router is a frozen dataclass. Its fields are its options, each a flag
(`--config.moe.<router>.<option>`). It declares its inputs other than the logits, its
losses, how a step updates its untrained parameters, its properties and its cost. It is
called on one group of tokens. One line in `moejax.routing.registry` (or
`registry.ROUTERS[name] = cls` in a config file) registers it; nothing else on a token's
way names it.

Letters: G groups, T tokens of a group, D width, E experts, K choices per token, C slots
per expert and group, V vocabulary, l any leading axes of layers.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float

from moejax.errors import ConfigError
from moejax.routing.base import RouterInputs, RouterStats, Routing, SlotPolicy

Params = Mapping[str, Array]
"""A router's own parameters by name."""

TOKEN_CHOICE_READS = (
  "renormalize",
  "renormalize_norm",
  "priority",
  "slot_order",
  "slot_numbering",
  "overflow",
  "gate_scale",
)
"""Fields of `MoEConfig` that token-choice routers read, through `assign`."""

LEARNED_READS = (
  "balance_weight",
  "z_weight",
  "entropy_weight",
  "jitter",
  "router_bias",
)
"""Fields of `MoEConfig` that affect only routers that learn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of a layer and of one training group."""

  width: int
  """D."""
  num_experts: int
  """E, counting fine-grained experts."""
  num_selected: int
  """K."""
  num_tokens: int
  """T."""
  capacity: int | None
  """C; None means dropless."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
  """A router parameter: its shape, axis names and initialisation."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  """Logical axis names, for `moejax.sharding.rules`."""
  fan_in: int | None = None
  """Truncated normal of std 1 / sqrt(fan_in); None initialises to `value`."""
  value: float = 0.0
  trained: bool = True
  """False: no gradient, no optimizer; `Router.update` may change it."""
  by_group: bool = True
  """Whether the router receives it with each group (`RouterInputs.params`); False if
  only `Router.features` reads it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """Inputs of `Router.features`: all groups at once, so that matmuls are large."""

  clean: Float[Array, "G T D"]
  """float32."""
  seen: Float[Array, "G T D"]
  """The tokens with input jitter, in training."""
  project: Callable[[Float[Array, "G T D"], Float[Array, "D E"]], Float[Array, "G T E"]]
  """Returns tokens @ weight in float32, for any default precision and weight sharding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(abc.ABC):
  """Assigns tokens to experts. Subclasses override what differs from the defaults."""

  name: ClassVar[str]
  """Name on the command line."""
  summary: ClassVar[str]
  """One line, for --list=routers."""
  fixed_selected: ClassVar[int | None] = None
  """K if the router fixes it; the config must agree."""
  causal: ClassVar[bool] = True
  """Whether a token's experts are independent of later tokens. Slots may still depend
  on them: see `is_causal`."""
  by_logits: ClassVar[bool] = True
  """Whether the logits alone decide the experts, so that expert dropout, which lowers
  some logits, keeps tokens away from an expert."""
  learned: ClassVar[bool] = True
  """Whether the router learns; if not, no gradient reaches tokens through the logits."""
  gates_are_probabilities: ClassVar[bool] = False
  """Whether raw gates are a softmax over all experts, so that a router row without an
  expert (`moe.pruned_rows`) takes a share of them."""
  needs_key: ClassVar[bool] = False
  """Whether it behaves differently in training, where `RouterInputs.key` is set; without
  a key it chooses as in evaluation."""
  selection_bias: ClassVar[str] = ""
  """Name of its parameter [E] that is added to the scores for selection only; empty if
  it has none. An alarm watches its range."""
  by_sigmoid: ClassVar[bool] = False
  """Whether a token's scores are sigmoids of its logits, not their softmax."""
  balancer: ClassVar[str] = ""
  """Name of its option that balances the load faster when raised; empty means the weight
  of the balance loss."""
  token_choice: ClassVar[bool] = True
  """Whether assignments are token-major, so that priority and overflow apply."""
  needs_capacity: ClassVar[bool] = False
  """Whether the router cannot run dropless."""
  fixed_slots: ClassVar[bool] = False
  """Whether parameters fix C and T: constant capacity and group size, whole groups
  only, no token-by-token generation."""
  mixes: ClassVar[bool] = False
  """Whether slots hold mixtures of tokens, which only the einsum dispatcher supports."""
  reads: ClassVar[tuple[str, ...]] = ()
  """The fields of `TOKEN_CHOICE_READS` read by a router that is not token-choice."""
  has_table: ClassVar[bool] = False
  """Whether a table gives each vocabulary id's experts; see `table`."""

  @abc.abstractmethod
  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    """Routes one group of T tokens.

    Args:
      inputs: logits, valid tokens and other inputs of the group.
      policy: how many experts are chosen, and which assignments get slots.
    """

  # ------------------------------------------------------------- inputs and parameters

  def selected(self, num_experts: int, num_selected: int) -> int:
    """Returns K for a config with E experts and `num_selected` choices."""
    del num_experts
    return num_selected

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    """Returns its own parameters by name, without the [D, E] weight of the logits."""
    del sizes
    return {}

  def features(
    self, tokens: Tokens, params: Params, policy: SlotPolicy
  ) -> dict[str, Float[Array, "G T ..."]]:
    """Returns its inputs other than the logits, computed for all groups at once.

    Args:
      tokens: the tokens of all groups.
      params: all of the router's own parameters.
      policy: as in `__call__`.

    Returns:
      `RouterInputs.features`, with a leading group axis.
    """
    del tokens, params, policy
    return {}

  def table(
    self,
    vocab_size: int,
    num_experts: int,
    num_selected: int,
    token_counts: Callable[[], np.ndarray] | None,
  ) -> np.ndarray:
    """Returns the experts of every vocabulary id, int [V, K], if `has_table`.

    Args:
      vocab_size: V.
      num_experts: E.
      num_selected: K.
      token_counts: () -> how often each id occurs in the training text; None if
        unknown.
    """
    raise NotImplementedError

  def table_damage(self, table: np.ndarray, num_experts: int) -> str | None:
    """Returns what is wrong with a stored table, in a sentence; None if unknown.

    Args:
      table: [V, K], as floats, as stored in checkpoints.
      num_experts: E.
    """
    del table, num_experts
    return None

  def loss_weights(self) -> dict[str, float]:
    """Returns the coefficient of each of its own terms in `Routing.losses`, by name."""
    return {}

  def update(self, params: Params, stats: RouterStats) -> dict[str, Float[Array, "..."]]:
    """Returns new values of its untrained parameters, once per optimizer step.

    Args:
      params: its own parameters, of one layer or with leading layer axes.
      stats: of the whole batch: summed over groups, devices and microbatches.
    """
    del params, stats
    return {}

  @property
  def expert_groups(self) -> int:
    """Returns the number of equal groups of consecutive experts that tokens choose in."""
    return 1

  def options_with_copies(self, copies: int) -> dict[str, Any]:
    """Returns the options to change so that copying the experts keeps the output.

    Args:
      copies: number of adjacent copies of every expert; a token chooses all copies of its
        experts.
    """
    del copies
    return {}

  # ------------------------------------------------------------------------------- cost

  def macs(self, sizes: Sizes) -> float:
    """Returns the router's multiply-adds per token; the selection is not counted."""
    return sizes.width * sizes.num_experts

  def experts_per_token(self, sizes: Sizes) -> float:
    """Returns the experts computed per token, ignoring drops."""
    return sizes.num_selected

  # ----------------------------------------------------------------------------- checks

  @classmethod
  def reads_field(cls, field: str) -> bool:
    """Returns whether it reads a `MoEConfig` field; True for those every router reads."""
    if field in TOKEN_CHOICE_READS:
      return cls.token_choice or field in cls.reads
    return cls.learned or field not in LEARNED_READS

  def is_causal(self, policy: SlotPolicy) -> bool:
    """Returns whether no token's output depends on a later token of its group.

    With a capacity, batch priority, by_gate and random order look ahead. So does
    choice-major order for K > 1 (a later token's first choice precedes an earlier
    token's second), as in every codebase that has it; it is accepted as causal here.
    """
    ordered = policy.priority == "arrival" and policy.slot_order in (
      "choice_major",
      "token_major",
    )
    return self.causal and (policy.capacity is None or ordered)

  def check(self, policy: SlotPolicy) -> None:
    """Rejects combinations of router, options and policy that make no sense.

    Raises:
      ConfigError: naming the flags and the remedy.
    """
    flag, experts = "--config.moe.", policy.num_experts
    k = self.fixed_selected or policy.num_selected
    if k > experts:
      raise ConfigError(
        f"{flag}num_selected={k} is more than {flag}num_experts={experts}: a token "
        "cannot choose an expert twice. Lower the first or raise the second."
      )
    constant = self.token_choice and k == 1 and policy.renormalize != "none"
    if constant and not policy.allow_constant_gates:
      raise ConfigError(
        f"{flag}renormalize={policy.renormalize} with one choice per token makes every "
        f"gate 1 and leaves the router without a gradient. Use none; {flag}"
        "allow_constant_gates=true allows it anyway."
      )
    if self.needs_capacity and policy.capacity is None:
      raise ConfigError(
        f"{flag}router={self.name} needs slots, but {flag}capacity_factor=none sets no "
        "number of them. Give a number, for training and evaluation."
      )
    if policy.overflow == "next_best":
      self._check_next_best(policy)

  def _check_next_best(self, policy: SlotPolicy) -> None:
    flag = "--config.moe."
    if not self.token_choice:
      raise ConfigError(
        f"{flag}overflow=next_best has no meaning for {flag}router={self.name}, which "
        "never overflows. Use drop."
      )
    if policy.capacity is None:
      raise ConfigError(
        f"{flag}overflow=next_best has no effect with {flag}capacity_factor=none: "
        "dropless never overflows. Give a capacity factor, or use overflow=drop."
      )
    if policy.slot_order in ("token_major", "by_gate"):
      raise ConfigError(
        f"{flag}overflow=next_best places first choices before second ones, which "
        f"{flag}slot_order={policy.slot_order} does not. Use choice_major or "
        "batch_priority."
      )
