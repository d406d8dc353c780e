"""The MoE layer: scores, routing, dispatch, experts, combine.

  y = sum over chosen experts e of gate_e(x) * expert_e(x)  (+ shared experts)

The module owns parameters and calls pure functions: a router from `moejax.routing`
places tokens, and `moejax.exchange` runs the experts on them, on any devices. Neither
depends on the other.

Letters: B batch, S sequence, G routing groups, T tokens of a group, D width,
E experts, K choices per token, C slots per expert and group, F expert hidden
width. With fine-grained experts (m segments) E, K and F here are m*E, m*K, F/m
(DeepSeekMoE, arXiv:2401.06066, section 3.1).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moejax import parts
from moejax.config import ModelConfig, MoEConfig
from moejax.config.ranges import GATED
from moejax.config.router import make_router, num_present, num_selected
from moejax.exchange import run as exchange
from moejax.exchange.base import Lost, Options
from moejax.experts.weights import ExpertWeights
from moejax.layers import parameter
from moejax.layers.feed_forward import FeedForward
from moejax.layers.router import RouterLayer, project
from moejax.layers.routes import Routes, routes_of
from moejax.routing import losses
from moejax.routing.base import RouterStats, Routing
from moejax.types import Constant, pytree

WHOLE_BATCH = -1
"""Group size that puts all tokens of a (micro)batch in one routing group."""


@pytree
class MoEAux:
  """Losses and statistics that an MoE layer returns with its output."""

  losses: dict[str, Float[Array, "*l"]]
  """For each term: sum over groups of (the group's loss * its valid tokens)."""
  stats: RouterStats
  """Summed over groups."""
  served: Bool[Array, "*l B S E"] | None = None
  """Which experts computed each token; only on request."""
  routes: Routes | None = None
  """The router's decisions for each token; only on request."""


@pytree
class LayerInputs:
  """Inputs specific to one MoE layer of a call."""

  batch_chosen: Float[Array, "*l E"] | None = None
  """Assignments requested in the whole batch, if the call sees only part of it and
  `balance_scope` is batch; None uses those of the call."""
  present: Bool[Array, "*l E"] | None = None
  """The experts that take part: of a step under expert dropout, or of an evaluation
  that leaves some out."""


def loss_weights(moe: MoEConfig) -> dict[str, float]:
  """Returns the coefficient of each aux term in the training loss."""
  weights = {"balance_loss": moe.balance_weight, "z_loss": moe.z_weight}
  if moe.entropy_weight:
    weights["entropy_bonus"] = moe.entropy_weight
  return weights | make_router(moe).loss_weights()


class Experts(nnx.Module):
  """E feed-forward networks, with one stacked parameter per matrix."""

  def __init__(
    self,
    config: ModelConfig,
    num_experts: int,
    hidden: int,
    rngs: nnx.Rngs,
    *,
    activation: str = "",
    bias: bool = False,
  ):
    """Creates E experts.

    Args:
      config: of the model.
      num_experts: E.
      hidden: F.
      rngs: for the initial parameters.
      activation: empty means the model's.
      bias: whether every matrix has a bias.
    """
    width, scale, dtype = config.width, config.init_scale, config.param_dtype
    shape_in, axes_in = (num_experts, width, hidden), ("expert", "width", "hidden")
    shape_out, axes_out = (num_experts, hidden, width), ("expert", "hidden", "width")
    out_scale = scale / (2 * config.num_layers) ** 0.5

    def w_in() -> nnx.Param:
      return parameter.matrix(
        rngs, shape_in, axes_in, fan_in=width, scale=scale, dtype=dtype
      )

    self.w_in = w_in()
    is_gated = (activation or config.activation) in GATED
    self.w_gate = w_in() if is_gated else None
    self.w_out = parameter.matrix(
      rngs, shape_out, axes_out, fan_in=hidden, scale=out_scale, dtype=dtype
    )

    def zeros(size: int, axis: str, wanted: bool = True) -> nnx.Param | None:
      if not (bias and wanted):
        return None
      return parameter.constant(0.0, (num_experts, size), ("expert", axis), dtype=dtype)

    self.in_bias = zeros(hidden, "hidden")
    self.gate_bias = zeros(hidden, "hidden", is_gated)
    self.out_bias = zeros(width, "width")

  def weights(self, dtype: jnp.dtype) -> ExpertWeights:
    """Returns the matrices in the compute dtype."""

    def cast(param: nnx.Param | None) -> Array | None:
      return None if param is None else param[...].astype(dtype)

    return ExpertWeights(
      w_in=self.w_in[...].astype(dtype),
      w_out=self.w_out[...].astype(dtype),
      w_gate=cast(self.w_gate),
      b_in=cast(self.in_bias),
      b_gate=cast(self.gate_bias),
      b_out=cast(self.out_bias),
    )


class MoE(nnx.Module):
  """A sparse feed-forward layer."""

  def __init__(self, model: ModelConfig, moe: MoEConfig, rngs: nnx.Rngs):
    self.num_experts = moe.fine_experts
    hidden = moe.fine_hidden
    self.router = RouterLayer(model.width, moe, rngs)
    activation = moe.activation or model.activation
    self.experts = Experts(
      *(model, self.num_experts, hidden, rngs),
      activation=activation,
      bias=moe.expert_bias,
    )
    if moe.shared_width:
      self.shared = FeedForward(model, moe.shared_width, rngs, activation)
    shape, axes = (model.width, 1), ("width", None)
    self.shared_gate = (
      parameter.matrix(rngs, shape, axes, fan_in=model.width) if moe.shared_gate else None
    )
    self._config = Constant(moe)
    self.options = Options(
      activation=activation,
      num_selected=num_selected(moe),
      dispatcher=moe.dispatcher,
      exchange=moe.exchange,
      exchange_buffer=moe.exchange_buffer,
      exchange_chunks=moe.exchange_chunks,
      recomputed=model.remat != "none",
      expert_chunks=moe.expert_chunks,
    )

  @property
  def config(self) -> MoEConfig:
    return self._config.value

  def __call__(
    self,
    x: Float[Array, "B S D"],
    valid: Bool[Array, "B S"],
    token_ids: Int[Array, "B S"],
    assigned: Int[Array, "B S K"] | None = None,
    layer: LayerInputs | None = None,
    *,
    key: Key[Array, ""] | None,
    train: bool,
    capacity_factor: float | None,
    positions: Int[Array, "B S"] | None = None,
    step: Int[Array, ""] | None = None,
    return_served: bool = False,
    return_routes: bool = False,
  ) -> tuple[Float[Array, "B S D"], MoEAux]:
    """Returns the layer's output, router losses and statistics.

    Args:
      x: normalised activations.
      valid: False for padding.
      token_ids: vocabulary ids.
      assigned: the experts of each token, if given by a table.
      layer: inputs specific to this layer.
      key: PRNG key of this step; used in training only.
      train: whether routing noise applies and routing groups matter.
      capacity_factor: None means dropless.
      positions: position of each token in its document.
      step: optimizer steps taken, in training.
      return_served: whether to return `MoEAux.served`.
      return_routes: whether to return `MoEAux.routes`.
    """
    layer = layer or LayerInputs()
    num_groups = self._num_groups(x.shape[0], x.shape[1], train, capacity_factor)
    tokens = x.reshape(num_groups, -1, x.shape[-1])
    valid = valid.reshape(num_groups, -1)
    if assigned is not None:
      assigned = assigned.reshape(num_groups, -1, assigned.shape[-1])
    if positions is not None:
      positions = positions.reshape(num_groups, -1)
    logits, routing = self.router(
      tokens,
      valid,
      token_ids.reshape(num_groups, -1),
      assigned,
      key=key if train else None,
      capacity_factor=capacity_factor,
      positions=positions,
      step=step,
      present=layer.present,
    )
    options = self.options
    if not train:
      # Evaluation must not lose tokens in the exchange, and may be dropless when training
      # is not.
      options = dataclasses.replace(
        options, exchange="auto", exchange_buffer=None, recomputed=False
      )
    weights = self.experts.weights(x.dtype)
    y, lost = exchange.run(tokens, routing.placement, weights, options)
    y = y.reshape(x.shape)
    if self.config.shared_width:
      y = y + self._shared(x)
    aux = self._losses(logits, routing, valid, layer.batch_chosen, train)
    served = None
    if return_served:
      served = jax.vmap(lambda group: group.served())(routing.placement)
      served = served.reshape(*x.shape[:2], self.num_experts)
    routes = routes_of(logits, routing, *x.shape[:2]) if return_routes else None
    stats = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), routing.stats)
    stats = _without(stats, lost)
    return y, MoEAux(losses=aux, stats=stats, served=served, routes=routes)

  @parts.of_part(parts.FEED_FORWARD)
  def _shared(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Returns the shared experts' output, scaled by a learned gate if any (Qwen2-MoE)."""
    y = self.shared(x)
    if self.shared_gate is None:
      return y
    # In float32, like every gate.
    part = jax.nn.sigmoid(project(x.astype(jnp.float32), self.shared_gate[...]))
    return y * part.astype(y.dtype)

  def _num_groups(
    self, batch: int, sequence: int, train: bool, capacity_factor: float | None
  ) -> int:
    """Returns G. In dropless evaluation tokens are independent and need no groups; one
    group per sequence makes the losses the same on any mesh."""
    size = self.config.group_size or sequence
    if not train and capacity_factor is None:
      return batch
    if size == WHOLE_BATCH:
      return 1
    if batch * sequence % size:
      raise ValueError(
        f"--config.moe.group_size={size} does not divide the {batch}x{sequence} tokens "
        "of a batch. Choose a divisor, or 0 for one group per sequence."
      )
    return batch * sequence // size

  @parts.of_part(parts.ROUTER)
  def _losses(
    self,
    logits: Float[Array, "G T E"],
    routing: Routing,
    valid: Bool[Array, "G T"],
    batch_chosen: Float[Array, "E"] | None,
    train: bool,
  ) -> dict[str, Float[Array, ""]]:
    """Returns each term, summed over groups with their valid tokens as weights."""
    count = routing.stats.num_valid
    terms = {"z_loss": jax.vmap(losses.z_loss)(logits, valid), **(routing.losses or {})}
    if self.config.entropy_weight:
      terms["entropy_bonus"] = jax.vmap(losses.entropy_bonus)(routing.probs, valid)
    sums = {name: jnp.sum(value * count) for name, value in terms.items()}
    probs, chosen = routing.probs, routing.stats.chosen
    if self.config.balance_counts == "first":
      chosen = jax.vmap(losses.first_choices)(routing, valid)
    if self.config.balance_scope == "batch":
      probs, chosen = probs.reshape(1, -1, self.num_experts), chosen.sum(0, keepdims=True)
      if batch_chosen is not None:
        chosen = batch_chosen[None]
      valid, count = valid.reshape(1, -1), count.sum(keepdims=True)
    present = num_present(self.config) if train else self.num_experts
    balance_loss = functools.partial(losses.balance_loss, num_present=present)
    balance = jnp.sum(jax.vmap(balance_loss)(probs, chosen, valid) * count)
    return {"balance_loss": balance, **sums}


def _without(stats: RouterStats, lost: Lost | None) -> RouterStats:
  """Subtracts the losses of a bounded exchange from the statistics."""
  if lost is None:
    return stats
  return dataclasses.replace(
    stats,
    load=stats.load - lost.assignments,
    lost=jnp.sum(lost.assignments),
    dropped_tokens=stats.dropped_tokens + lost.tokens,
  )
