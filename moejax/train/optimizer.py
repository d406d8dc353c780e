"""Optimizers by name, learning-rate schedules, the weight-decay mask.

An optimizer takes all parameters and updates only the trained ones
(`moejax.models.trained`): the others have no moments, do not decay, and are returned
unchanged.

An optimizer here is an optax chain without the learning rate: `apply` multiplies by the
rate that the train step passes in, `schedule(step)`. The logged rate is therefore the one
used, also after a skipped step, where optax's counters stop but the schedule does not.

Sources: AdamW, arXiv:1711.05101 (decay is decoupled: it is multiplied by the
learning rate and never enters the moments); Adafactor, arXiv:1804.04235; Lion,
arXiv:2302.06675; Muon, see `moejax.train.muon`; constant-then-decay,
arXiv:2405.18392; inverse square root, arXiv:1706.03762.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from moejax.config import OptimizerConfig
from moejax.errors import ConfigError
from moejax.models import trained as trained_lib
from moejax.sharding.rules import STACKED, LogicalAxes, is_axes
from moejax.train.muon import muon
from moejax.types import Params

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

_OF_HEADS = ("heads", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """An update rule without learning rate, and its schedule."""

  transform: optax.GradientTransformation
  schedule: Schedule
  clip_norm: float
  """Global gradient norm above which gradients are scaled down; 0 means off."""
  trained: trained_lib.Mask
  """Mask of the parameters that are trained."""

  def init(self, params: Params) -> Any:
    """Returns the initial optimizer state: a tree of arrays that Orbax can restore."""
    learned, _ = trained_lib.split(params, self.trained)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
      return self.transform.init(_float32(learned))

  def apply(
    self,
    gradients: Params,
    opt_state: Any,
    params: Params,
    *,
    learning_rate: Float[Array, ""],
    gradient_norm: Float[Array, ""],
  ) -> tuple[Params, Any]:
    """Applies one update. The norm is an argument because the step needs it anyway.

    Args:
      gradients: of the trained parameters.
      opt_state: from `init` or the previous update.
      params: all parameters.

    Returns:
      All parameters, untrained ones unchanged, and the new optimizer state.
    """
    learned, kept = trained_lib.split(params, self.trained)
    with jax.numpy_dtype_promotion("standard"):
      if self.clip_norm > 0:
        # max(norm, clip) avoids division by zero and gives scale 1 below the clip norm.
        scale = self.clip_norm / jnp.maximum(gradient_norm, self.clip_norm)
        gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
      updates, opt_state = self.transform.update(gradients, opt_state, _float32(learned))
      updates = jax.tree.map(lambda u: -learning_rate * u, updates)
      learned: Params = optax.apply_updates(learned, updates)  # pyright: ignore[reportAssignmentType]
    return trained_lib.join(learned, kept, self.trained), opt_state


def _float32(params: Params) -> Params:
  """Casts to float32, so that moments are float32 whatever the parameters' dtype."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def _adamw(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
  return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _adafactor(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
  # beta1, beta2 and epsilon are not used: the factored second moment has its own
  # decay 1 - t^-0.8, and by design there is no first moment. The step is relative
  # to the parameter's scale, so 1e-2 is a usual rate.
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )


def _lion(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
  return optax.scale_by_lion(config.beta1, config.beta2)


OPTIMIZERS: dict[
  str, Callable[[OptimizerConfig, Params], optax.GradientTransformation]
] = {
  "adamw": _adamw,
  "adafactor": _adafactor,
  "lion": _lion,
  "muon": muon,
}


def make_optimizer(
  config: OptimizerConfig, *, num_steps: int, axes: Params, trained: trained_lib.Mask
) -> Optimizer:
  """Builds the optimizer of a config.

  Args:
    config: name, schedule, moments, decay, clipping.
    num_steps: length of the run, which cosine, linear and constant_decay need.
    axes: the model's `logical_axes()`, from which the decay mask is derived.
    trained: the model's `trained()`.

  Raises:
    ConfigError: an unknown optimizer or schedule.
  """
  if config.name not in OPTIMIZERS:
    raise ConfigError(
      f"--config.optimizer.name={config.name} is unknown: one of {', '.join(OPTIMIZERS)}."
    )
  learned = trained_lib.of_trained(axes, trained)
  transform = OPTIMIZERS[config.name](config, learned)
  if config.weight_decay:
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(learned))
    transform = optax.chain(transform, decay)
  return Optimizer(
    transform=transform,
    schedule=make_schedule(config, num_steps),
    clip_norm=float(config.clip_norm),
    trained=trained,
  )


def decay_mask(axes: Any) -> Any:
  """Returns True for the parameters that weight decay applies to: the matrices.

  A matrix has two or more axes besides those that stack layers and experts. A table
  indexed by token (its first axis is the vocabulary) is an embedding, tied or not; an
  output projection [D, V] is a matrix. A parameter with axes of heads only is a bias: of
  a projection [H, head_dim], or of relative positions [buckets, H].

  Args:
    axes: tree of tuples of logical axis names, structured like the parameters.
  """

  def decays(names: LogicalAxes) -> bool:
    own = [name for name in names if name not in STACKED]
    is_bias = any(own) and all(name is None or name in _OF_HEADS for name in own)
    return len(own) >= 2 and own[0] != "vocab" and not is_bias

  return jax.tree.map(decays, axes, is_leaf=is_axes)


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
  """Returns the schedule: the learning rate of an update after `step` earlier ones.

  With s = step + 1, so that no step has rate zero and the last step is exactly at
  `final_fraction` of the peak (except inverse_sqrt): linear warmup s / warmup_steps,
  the peak at s = warmup_steps, then by name

    cosine          half a cosine down to final_fraction at s = num_steps
    linear          a line to the same end
    constant_decay  the peak, then a line over the last decay_fraction of the run
    inverse_sqrt    sqrt(warmup_steps / s); independent of num_steps, so a larger
                    num_steps later continues it without a jump

  Raises:
    ConfigError: an unknown name.
  """
  if config.schedule not in SCHEDULES:
    raise ConfigError(
      f"--config.optimizer.schedule={config.schedule} is unknown: "
      f"one of {', '.join(SCHEDULES)}."
    )
  shape = SCHEDULES[config.schedule]
  warmup = config.warmup_steps

  def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
    s = jnp.asarray(step, jnp.float32) + 1.0
    fraction = shape(s, config, num_steps)
    if warmup > 0:
      fraction = jnp.where(s < warmup, s / warmup, fraction)
    return jnp.asarray(config.learning_rate * fraction, jnp.float32)

  return schedule


_Shape = Callable[[Float[Array, ""], OptimizerConfig, int], Float[Array, ""]]


def _progress(
  s: Float[Array, ""], start: int | float, end: int | float
) -> Float[Array, ""]:
  """Returns progress from 0 at `start` to 1 at and after `end`."""
  return jnp.clip((s - start) / max(end - start, 1.0), 0.0, 1.0)


def _line(t: Float[Array, ""], final: float) -> Float[Array, ""]:
  return 1.0 - (1.0 - final) * t


def _cosine(s, config: OptimizerConfig, num_steps: int):
  t = _progress(s, config.warmup_steps, num_steps)
  return _line(0.5 - 0.5 * jnp.cos(jnp.pi * t), config.final_fraction)


def _linear(s, config: OptimizerConfig, num_steps: int):
  return _line(_progress(s, config.warmup_steps, num_steps), config.final_fraction)


def _constant_decay(s, config: OptimizerConfig, num_steps: int):
  start = (1.0 - config.decay_fraction) * num_steps
  return _line(
    _progress(s, max(start, config.warmup_steps), num_steps), config.final_fraction
  )


def _inverse_sqrt(s, config: OptimizerConfig, num_steps: int):
  warmup = float(max(config.warmup_steps, 1))
  return jnp.sqrt(warmup / jnp.maximum(s, warmup))


SCHEDULES: dict[str, _Shape] = {
  "cosine": _cosine,
  "linear": _linear,
  "constant_decay": _constant_decay,
  "inverse_sqrt": _inverse_sqrt,
}
