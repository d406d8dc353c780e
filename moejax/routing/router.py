"""The contract of a router: one class that says everything there is to know about it.

A router is a frozen dataclass. Its fields are its options, each of them a flag
(`--config.moe.<router>.<option>`). It says what it needs beside the logits, which losses
it has, how a step moves what is not trained, what kind of router it is and what it costs,
and it is called on one group of tokens. One line in `moejax.routing.registry` (or
`registry.ROUTERS[name] = cls` from a config file) makes it known; nothing else names it.

Letters: G groups, T tokens of a group, D width, E experts, K choices per token, C slots
per expert and group, V vocabulary, l any leading axes of layers.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

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
"""Fields of `MoEConfig` that the routers whose tokens choose read, through `assign`."""

LEARNED_READS = ("balance_weight", "z_weight", "entropy_weight", "jitter")
"""Fields of `MoEConfig` that act on what a router has learned alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of a layer and one of its training groups."""

  width: int
  """D."""
  num_experts: int
  """E, fine-grained ones counted."""
  num_selected: int
  """K."""
  num_tokens: int
  """T."""
  capacity: int | None
  """C; None is dropless."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
  """A parameter of a router: shape, names of its dimensions, and how it begins."""

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  """Logical names, for `moejax.sharding.rules`."""
  fan_in: int | None = None
  """Drawn from a cut normal of deviation 1 / sqrt(fan_in); None begins at `value`."""
  value: float = 0.0
  trained: bool = True
  """False: no gradient and no optimizer sees it, and `Router.update` may move it."""
  by_group: bool = True
  """Whether the router is given it with each group (`RouterInputs.params`); False where
  only `Router.features` reads it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """What features are made of: all groups at once, so that products are large."""

  clean: Float[Array, "G T D"]
  """float32."""
  seen: Float[Array, "G T D"]
  """With input jitter, in training."""
  project: Callable[[Float[Array, "G T D"], Float[Array, "D E"]], Float[Array, "G T E"]]
  """tokens @ weight in float32, whatever the chip's precision and the weight's shards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(abc.ABC):
  """Who goes where. A subclass sets what differs, and is called on one group."""

  name: ClassVar[str]
  """On the command line."""
  summary: ClassVar[str]
  """One line, for --list=routers."""
  fixed_selected: ClassVar[int | None] = None
  """K where the router fixes it, and the config must agree."""
  causal: ClassVar[bool] = True
  """Whether a token's experts are independent of later tokens. What gets a slot may
  still depend on them: see `is_causal`."""
  by_logits: ClassVar[bool] = True
  """Whether the logits alone decide who goes where, so that expert dropout, which
  lowers some of them, keeps tokens away from an expert."""
  learned: ClassVar[bool] = True
  """Whether anything is learned; if not, no loss may reach tokens through the logits."""
  token_choice: ClassVar[bool] = True
  """Whether assignments are token-major, so that priority and overflow apply."""
  needs_capacity: ClassVar[bool] = False
  """Whether dropless is impossible."""
  fixed_slots: ClassVar[bool] = False
  """Whether parameters fix C and T: the same capacity and group size always, whole
  groups only, and no generation token by token."""
  mixes: ClassVar[bool] = False
  """Whether slots hold mixtures of tokens, which only the einsum dispatcher carries."""
  reads: ClassVar[tuple[str, ...]] = ()
  """Of `TOKEN_CHOICE_READS`, what it reads though its tokens do not choose."""
  has_table: ClassVar[bool] = False
  """Whether a table says each vocabulary id's experts; see `table`."""

  @abc.abstractmethod
  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    """Routes one group of T tokens.

    Args:
      inputs: what there is to look at.
      policy: how many are chosen, and who gets the slots.
    """

  # ------------------------------------------------------------- what it needs and has

  def selected(self, num_experts: int, num_selected: int) -> int:
    """K, where the config has E experts and asks for `num_selected`."""
    del num_experts
    return num_selected

  def parameters(self, sizes: Sizes) -> dict[str, Parameter]:
    """Its own parameters by name, beside the [D, E] weight of the logits."""
    del sizes
    return {}

  def features(
    self, tokens: Tokens, params: Params, policy: SlotPolicy
  ) -> dict[str, Float[Array, "G T ..."]]:
    """What it looks at beside the logits, made for all groups at once.

    Args:
      tokens: of all groups.
      params: all of its own.
      policy: as in the call.

    Returns:
      `RouterInputs.features`, with the leading axis of groups.
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
    """The experts of every vocabulary id, int [V, K], where `has_table`.

    Args:
      vocab_size: V.
      num_experts: E.
      num_selected: K.
      token_counts: () -> how often each id stands in the training text; None where
        that is not known.
    """
    raise NotImplementedError

  def table_damage(self, table: np.ndarray, num_experts: int) -> str | None:
    """What is wrong with a stored table, in a sentence; None if nothing is known.

    Args:
      table: [V, K], in floats as checkpoints hold it.
      num_experts: E.
    """
    del table, num_experts
    return None

  def loss_weights(self) -> dict[str, float]:
    """Coefficient of each term of its own, by its name in `Routing.losses`."""
    return {}

  def update(self, params: Params, stats: RouterStats) -> dict[str, Float[Array, "..."]]:
    """New values of parameters that are not trained, once per optimizer step.

    Args:
      params: its own, of one layer or with leading axes of layers.
      stats: of the whole batch: groups, devices and microbatches added up.
    """
    del params, stats
    return {}

  # ---------------------------------------------------------------------- what it costs

  def macs(self, sizes: Sizes) -> float:
    """Multiply-adds of a token beside those of its experts; choosing is not counted."""
    return sizes.width * sizes.num_experts

  def experts_per_token(self, sizes: Sizes) -> float:
    """Experts computed for a token, drops not counted."""
    return sizes.num_selected

  # ------------------------------------------------------------------------- its checks

  @classmethod
  def reads_field(cls, field: str) -> bool:
    """Whether it reads a field of `MoEConfig`; True for what all routers read."""
    if field in TOKEN_CHOICE_READS:
      return cls.token_choice or field in cls.reads
    return cls.learned or field not in LEARNED_READS

  def is_causal(self, policy: SlotPolicy) -> bool:
    """Whether no token's output depends on a later token of its group.

    Capacity makes batch priority, by_gate and random order look ahead; choice-major
    order does too for K > 1 (a later token's first choice goes before an earlier
    token's second one), as in every codebase that has it, and is let pass here.
    """
    ordered = policy.priority == "arrival" and policy.slot_order in (
      "choice_major",
      "token_major",
    )
    return self.causal and (policy.capacity is None or ordered)

  def check(self, policy: SlotPolicy) -> None:
    """Refuses combinations of router, options and policy that make no sense.

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
    if self.token_choice and k == 1 and policy.renormalize != "none":
      raise ConfigError(
        f"{flag}renormalize={policy.renormalize} with one choice per token makes every "
        "gate 1 and takes the router its gradient. Use none."
      )
    if self.needs_capacity and policy.capacity is None:
      raise ConfigError(
        f"{flag}router={self.name} needs slots, and {flag}capacity_factor=none gives no "
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
        f"{flag}overflow=next_best has nothing to do with {flag}capacity_factor=none: "
        "dropless never overflows. Give a capacity factor, or use overflow=drop."
      )
    if policy.slot_order in ("token_major", "by_gate"):
      raise ConfigError(
        f"{flag}overflow=next_best places first choices before second ones, which "
        f"{flag}slot_order={policy.slot_order} does not. Use choice_major or "
        "batch_priority."
      )
