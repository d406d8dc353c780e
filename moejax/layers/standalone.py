"""An MoE layer for any NNX model: without a config, a mesh or an experiment.

  layer = MoE(width=64, num_experts=8, num_selected=2, hidden=128, rngs=nnx.Rngs(0))
  y, aux = layer(x)
  loss = your_loss(y) + aux.loss

Letters: B batch, S sequence, D width, E experts, K choices per token, F hidden width.
Errors name values by the flags of the programs: `--config.moe.num_selected` is the
argument `num_selected`.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.config.check import validate
from moejax.config.router import CONFIGURED, factor_of
from moejax.errors import ConfigError, did_you_mean
from moejax.layers import moe as moe_lib
from moejax.routing.base import RouterStats
from moejax.types import pytree

_SET_HERE = (
  *("every", "offset", "dense_prefix", "dense_layers", "dense_twin", "dense_after"),
  *("encoder_every", "encoder_router"),
)
"""Fields that choose the layers with experts."""


@pytree
class Aux:
  """Losses and statistics that an MoE layer returns with its output."""

  loss: Float[Array, ""]
  """The weighted sum of the terms, to add to your loss."""
  losses: dict[str, Float[Array, ""]]
  """Each term's mean over tokens, unweighted."""
  stats: RouterStats
  """Router statistics, as sums over tokens; see `moejax.routing.base`."""


class MoE(nnx.Module):
  """A sparse feed-forward layer: y = sum over chosen experts of gate * expert(x)."""

  def __init__(
    self,
    *,
    width: int,
    num_experts: int,
    hidden: int,
    num_selected: int = 1,
    router: str = "top_k",
    router_options: Mapping[str, Any] | None = None,
    activation: str = "gelu",
    capacity_factor: float | None = None,
    rngs: nnx.Rngs,
    **moe: Any,
  ):
    """Creates a layer.

    Args:
      width: D.
      num_experts: E.
      hidden: F of one expert.
      num_selected: K.
      router: a name from `--list=routers`.
      router_options: the router's own options.
      activation: relu, gelu, swiglu, geglu or clamped_swiglu.
      capacity_factor: slots per expert relative to an even load; None means dropless.
      rngs: for the initial parameters.
      **moe: other fields of `moejax.config.MoEConfig`, such as num_shared=1,
        group_size=512, renormalize="before_drop" or dispatcher="gather".
        eval_capacity_factor applies to calls without `train`; it defaults to
        capacity_factor.

    Raises:
      ConfigError: an invalid value, named by its experiment flag.
      TypeError: an argument that does not exist; names the nearest.
    """
    _check_names(moe)
    if not isinstance(rngs, nnx.Rngs):
      raise TypeError(f"MoE(): rngs={rngs!r}: give nnx.Rngs(SEED).")
    if not isinstance(router_options or {}, Mapping):
      raise TypeError(f"MoE(): router_options={router_options!r}: give a dict or None.")
    moe.setdefault("eval_capacity_factor", capacity_factor)
    config = Config(
      model=ModelConfig(num_layers=1, width=width, head_dim=2, activation=activation),
      moe=MoEConfig(
        num_experts=num_experts,
        num_selected=num_selected,
        hidden=hidden,
        capacity_factor=capacity_factor,
        every=1,
        offset=0,
        **moe,
      ),
    )
    config.moe.use_router(router, **(router_options or {}))
    if isinstance(config.moe.group_size, int) and config.moe.group_size > 0:
      # The group size must divide this; the tokens of a call are checked in the call.
      config.data.sequence_length = config.moe.group_size
    validate(config)
    self.layer = moe_lib.MoE(config.model, config.moe, rngs)
    if self.layer.router.router.has_table:
      raise ConfigError(
        f"--config.moe.router={router} reads a table by token id, which only a whole "
        "model has (moejax.Decoder). Use another router."
      )

  def _check(self, x: Array, valid: Array | np.ndarray | None) -> None:
    """Rejects invalid inputs, before a library does."""
    width = self.layer.router.weight.shape[0]
    said = f"x is {x.dtype}{list(x.shape)}"
    if x.ndim < 2 or x.shape[-1] != width or not x.size:
      raise ValueError(f"{said}: expected [B, S, {width}] or [S, {width}], not empty.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{said}: expected a floating-point dtype, such as float32.")
    if valid is not None and (valid.shape != x.shape[:-1] or valid.dtype != jnp.bool_):
      raise ValueError(
        f"valid is {valid.dtype}{list(valid.shape)}: expected bool{list(x.shape[:-1])}, "
        "one for each token of x."
      )

  def _check_options(self, train: bool, key: Any, capacity_factor: Any) -> None:
    """Rejects a factor that is no number and a key that is none, or missing."""
    configured = capacity_factor is CONFIGURED
    if not configured and not isinstance(capacity_factor, numbers.Real | None):
      raise ValueError(f"capacity_factor={capacity_factor!r}: give a number or None.")
    if key is not None:
      dtype = getattr(key, "dtype", np.dtype(object))
      # Old keys, of jax.random.PRNGKey, are integers.
      if not jnp.issubdtype(dtype, jax.dtypes.prng_key) and dtype != jnp.uint32:
        raise ValueError(f"key is {key!r}: give a PRNG key, such as jax.random.key(0).")
    if key is not None or not train:
      return
    moe, router = self.layer.config, self.layer.router.router
    users = {
      f"router {moe.router}": router.needs_key,
      "jitter": moe.jitter,
      "expert_dropout": moe.expert_dropout,
      "priority random": moe.priority == "random",
    }
    if found := [name for name, is_user in users.items() if is_user]:
      raise ValueError(
        f"train=True needs key=..., a PRNG key of this step, for {', '.join(found)}: "
        "without one the layer would choose as in evaluation."
      )

  def __call__(
    self,
    x: Float[Array | np.ndarray, "... S D"],
    valid: Bool[Array | np.ndarray, "... S"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    capacity_factor: float | None = CONFIGURED,
    step: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "... S D"], Aux]:
    """Returns the layer's output, losses and router statistics.

    Args:
      x: floating-point activations, [S, D] or [B, S, D]; by default a sequence is a
        routing group.
      valid: False for padding, which no expert sees; None means no padding.
      train: whether the router may use randomness, and tokens may be lost in the
        exchange between devices.
      key: PRNG key of this step. With `train`, required if anything is random or
        different in training: some routers, jitter, expert dropout, random priority.
      capacity_factor: overrides the layer's; None means dropless.
      step: optimizer steps taken, for routers that anneal.

    Raises:
      ValueError: x or valid has the wrong shape or dtype, the key is missing or no key,
        or the capacity factor no number.
    """
    x = jnp.asarray(x)
    valid = None if valid is None else jnp.asarray(valid)
    self._check(x, valid)
    self._check_options(train, key, capacity_factor)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    if valid is None:
      valid = jnp.ones(shape[:-1], bool)
    valid = valid.reshape(x.shape[:-1])
    y, aux = self.layer(
      x,
      valid,
      jnp.zeros(valid.shape, jnp.int32),
      key=key,
      train=train,
      capacity_factor=factor_of(self.layer.config, capacity_factor, train=train),
      step=step,
    )
    tokens = jnp.maximum(jnp.sum(aux.stats.num_valid), 1.0)
    losses = {name: value / tokens for name, value in aux.losses.items()}
    weights = moe_lib.loss_weights(self.layer.config)
    loss = sum((weights[n] * losses[n] for n in losses), start=jnp.zeros(()))
    return y.reshape(shape), Aux(loss=loss, losses=losses, stats=aux.stats)

  def update_router(self, stats: RouterStats) -> None:
    """Updates untrained parameters (balancing biases), once per optimizer step.

    Args:
      stats: statistics of the whole batch, from `Aux`.

    Raises:
      TypeError: they are something else.
    """
    if not isinstance(stats, RouterStats):
      raise TypeError(f"update_router(): got {type(stats).__name__}: give aux.stats.")
    module = self.layer.router
    params = {name: getattr(module, name)[...] for name in module.parameter_names}
    for name, value in module.router.update(params, stats).items():
      getattr(module, name)[...] = jax.lax.stop_gradient(value)


def is_trained(path: Any, value: Any) -> bool:
  """Returns whether a parameter is trained; an NNX filter.

  `nnx.Optimizer(layer, tx, wrt=is_trained)` and `nnx.DiffState(0, is_trained)` exclude
  balancing biases, which weight decay would corrupt.
  """
  del path
  is_param = isinstance(value, nnx.Param)
  return is_param and value.get_metadata().get("trained", True)


def _check_names(moe: dict[str, Any]) -> None:
  """Rejects arguments that are not fields of `MoEConfig`, or not of a single layer."""
  # The layer's own `router` and `router_options` set these two.
  known = {f.name for f in dataclasses.fields(MoEConfig)}
  known -= {*_SET_HERE, "options", "router"}
  for name in moe:
    if name in _SET_HERE:
      raise TypeError(f"MoE(): {name} is for whole models; a layer alone has none.")
    if name not in known:
      known |= {"width", "router", "router_options", "activation", "rngs"}
      raise TypeError(
        f"MoE(): there is no argument {name}. {did_you_mean(name, sorted(known))} A "
        "router's own options go into router_options; the dtype is that of x."
      )
