"""Optimizers by name, learning-rate schedules, the weight-decay mask.

An optimizer is given all parameters and sees the trained ones alone
(`moejax.models.trained`): the others have no moments, do not decay, and come out as they
went in.

An optimizer here is an optax chain that stops short of the learning rate: the
train step multiplies by `schedule(step)` itself. The number that is logged is
therefore the number that was used, also after a skipped step, where optax's own
counters stand still and the schedule goes on.

Sources: AdamW, arXiv:1711.05101 (decay is decoupled: it is multiplied by the
learning rate and never enters the moments); Adafactor, arXiv:1804.04235; Lion,
arXiv:2302.06675; constant-then-decay, arXiv:2405.18392; inverse square root,
arXiv:1706.03762.
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
from moejax.types import Params

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]

LAYER_AXIS = "layer"
"""The logical axis that only stacks layers: it does not make a vector a matrix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """An update rule without its learning rate, and the schedule beside it."""

  transform: optax.GradientTransformation
  schedule: Schedule
  clip_norm: float
  """Global gradient norm above which gradients are scaled down; 0 is off."""
  trained: trained_lib.Mask
  """Of all parameters, those that are its business."""

  def init(self, params: Params) -> Any:
    """The optimizer's state: a tree of arrays that Orbax can restore."""
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
    """One update. The norm is passed in because the step needs it anyway.

    Args:
      gradients: of the trained parameters.
      opt_state: from `init`, or from the update before.
      params: all of them.

    Returns:
      All parameters, those that are not trained as they were, and the new state.
    """
    learned, kept = trained_lib.split(params, self.trained)
    with jax.numpy_dtype_promotion("standard"):
      if self.clip_norm > 0:
        # max(norm, clip) in the denominator: no division by zero, scale 1 below.
        scale = self.clip_norm / jnp.maximum(gradient_norm, self.clip_norm)
        gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
      updates, opt_state = self.transform.update(gradients, opt_state, _float32(learned))
      updates = jax.tree.map(lambda u: -learning_rate * u, updates)
      learned: Params = optax.apply_updates(learned, updates)  # pyright: ignore[reportAssignmentType]
    return trained_lib.join(learned, kept), opt_state


def _float32(params: Params) -> Params:
  """The moments are float32 whatever the type the parameters are stored in."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
  # beta1, beta2 and epsilon are not used: the paper's factored second moment has
  # its own decay 1 - t^-0.8 and there is no first moment, which is its point.
  # The step is relative to the parameter's scale, so 1e-2 is a usual rate.
  return optax.chain(
    optax.scale_by_factored_rms(),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  )


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
  return optax.scale_by_lion(config.beta1, config.beta2)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
  "adamw": _adamw,
  "adafactor": _adafactor,
  "lion": _lion,
}


def make_optimizer(
  config: OptimizerConfig, *, num_steps: int, axes: Params, trained: trained_lib.Mask
) -> Optimizer:
  """Builds the optimizer a config names.

  Args:
    config: name, schedule, moments, decay, clipping.
    num_steps: length of the run, which cosine, linear and constant_decay need.
    axes: the model's `logical_axes()`, from which the decay mask is read.
    trained: the model's `trained()`.

  Raises:
    ConfigError: an unknown optimizer or schedule.
  """
  if config.name not in OPTIMIZERS:
    raise ConfigError(
      f"--config.optimizer.name={config.name} is unknown: one of {', '.join(OPTIMIZERS)}."
    )
  transform = OPTIMIZERS[config.name](config)
  if config.weight_decay:
    learned, _ = trained_lib.split(axes, trained)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decay_mask(learned))
    transform = optax.chain(transform, decay)
  return Optimizer(
    transform=transform,
    schedule=make_schedule(config, num_steps),
    clip_norm=float(config.clip_norm),
    trained=trained,
  )


def decay_mask(axes: Any) -> Any:
  """True for the parameters that weight decay applies to: the matrices.

  A matrix has two or more axes besides the one that stacks layers. A table that
  is looked up by token (its first axis is the vocabulary) is an embedding, tied
  or not; an output projection [D, V] is a matrix. A bias of heads x head_dim has
  two axes too and is known by its name.

  Args:
    axes: tree like the parameters, of tuples of logical axis names.
  """

  def decays(path: tuple[Any, ...], names: tuple[str | None, ...]) -> bool:
    own = [n for n in names if n != LAYER_AXIS]
    is_bias = "bias" in jax.tree_util.keystr(path[-1:])
    return len(own) >= 2 and own[0] != "vocab" and not is_bias

  return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=is_axes)


def is_axes(value: Any) -> bool:
  """Whether a node of a logical-axes tree is a leaf: a tuple of names."""
  return isinstance(value, tuple) and all(n is None or isinstance(n, str) for n in value)


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
  """The learning rate of the update that follows `step` earlier ones.

  With s = step + 1, so that no step is spent at rate zero and the last step is
  exactly at `final_fraction` of the peak: linear warmup s / warmup_steps, the
  peak at s = warmup_steps, then by name

    cosine          half a cosine down to final_fraction at s = num_steps
    linear          a line to the same end
    constant_decay  the peak, then a line over the last decay_fraction of the run
    inverse_sqrt    sqrt(warmup_steps / s); knows no end, so it is the one that a
                    later, larger num_steps continues without a jump

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
  """0 at start, 1 at end and after; a run shorter than its warmup never gets here."""
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
