"""An MoE layer for any NNX model: without a config, a mesh or an experiment.

  layer = MoE(width=64, num_experts=8, num_selected=2, hidden=128, rngs=nnx.Rngs(0))
  y, aux = layer(x)
  loss = your_loss(y) + aux.loss

Letters: B batch, S sequence, D width, E experts, K choices per token, F hidden width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.config import Config, ModelConfig, MoEConfig
from moejax.config.check import validate
from moejax.errors import ConfigError
from moejax.layers import moe as moe_lib
from moejax.routing.base import RouterStats
from moejax.types import pytree

_TRAINED: Any = object()


@pytree
class Aux:
  """What an MoE layer returns besides its output."""

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
    router_options: dict[str, Any] | None = None,
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

    Raises:
      ConfigError: an invalid value, named by its experiment flag.
    """
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
    if config.moe.group_size > 0:
      # The group size must divide this; the tokens of a call are checked in the call.
      config.data.sequence_length = config.moe.group_size
    validate(config)
    self.layer = moe_lib.MoE(config.model, config.moe, rngs)
    if self.layer.router.router.has_table:
      raise ConfigError(
        f"--config.moe.router={router} reads a table by token id, which a whole model "
        "has (moejax.Decoder) and a layer has not. Use another router."
      )

  def __call__(
    self,
    x: Float[Array, "... S D"],
    valid: Bool[Array, "... S"] | None = None,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
    capacity_factor: float | None = _TRAINED,
    step: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, "... S D"], Aux]:
    """Returns the layer's output, losses and router statistics.

    Args:
      x: activations, [S, D] or [B, S, D]; by default a sequence is a routing group.
      valid: False for padding, which no expert sees; None means no padding.
      train: whether the router may use randomness, and tokens may be lost in the
        exchange between devices.
      key: PRNG key of this step, for routers that are random in training.
      capacity_factor: overrides the layer's; None means dropless.
      step: optimizer steps taken, for routers that anneal.
    """
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    if valid is None:
      valid = jnp.ones(shape[:-1], bool)
    valid = valid.reshape(x.shape[:-1])
    if capacity_factor is _TRAINED:
      capacity_factor = self.layer.config.capacity_factor
    y, aux = self.layer(
      x,
      valid,
      jnp.zeros(valid.shape, jnp.int32),
      key=key,
      train=train,
      capacity_factor=capacity_factor,
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
    """
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
