"""One optimizer step and one evaluation step, each a single compiled function.

The training loss, over the valid tokens of the whole global batch, is

    (sum of cross-entropy + sum over aux terms of weight * aux sum) / valid tokens

Every term is a sum over tokens divided by a number known before the forward pass, so
microbatches simply add: accumulation gives the gradients of the large batch up to
float32 rounding. The reported loss is the cross-entropy alone, in nats per token; aux
terms are reported unweighted under their own names.

Letters: A microbatches, B sequences of the global batch, S tokens of a sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from moejax import parts
from moejax.alarms.rules import thresholds
from moejax.config import Config
from moejax.models import trained as trained_lib
from moejax.models.loss import Batch, Sums, forward_sums
from moejax.models.placement import param_shardings
from moejax.models.router_health import RouterHealth, router_health
from moejax.sharding import rules
from moejax.sharding.mesh import TOKEN_AXES
from moejax.train import state as state_lib
from moejax.train.optimizer import Optimizer
from moejax.train.state import BadSteps, State
from moejax.types import Params, pytree


@pytree
class StepMetrics:
  """The metrics of one step."""

  sums: Sums
  grad_norm: Float[Array, ""]
  learning_rate: Float[Array, ""]
  bad_total: Int[Array, ""]
  """Steps skipped as non-finite since the run began; `bad_in_a_row` counts the last."""
  bad_in_a_row: Int[Array, ""]
  health: RouterHealth | None = None
  """Present if alarms are on and there is an MoE layer."""


def loss_gradients(
  model: Any,
  params: Params,
  batch: Batch,
  key: Key[Array, ""],
  *,
  accumulation: int = 1,
  token_bytes: Float[Array, "V"] | None = None,
  step: Int[Array, ""] | None = None,
) -> tuple[Sums, Params]:
  """Returns sums over the global batch and the gradient of the mean training loss.

  The gradient is with respect to the trained parameters only (`moejax.models.trained`).
  Microbatches are consecutive sequences, so that a routing group of several sequences
  holds the same ones for any accumulation.
  """
  valid = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
  total = jnp.maximum(valid, 1.0)
  weights, chosen = model.aux_weights, None
  same = {"train": True, "present": model.present_experts(key), "step": step}
  if "encoder_inputs" in batch:
    read = jnp.sum(batch["encoder_segment_ids"] > 0, dtype=jnp.float32)
    same["encoder_weight"] = valid / jnp.maximum(read, 1.0)
  indices = jnp.arange(accumulation, dtype=jnp.int32)
  microbatches = batch
  if accumulation > 1:
    microbatches = jax.tree.map(lambda x: _split(x, accumulation), batch)
    if model.balances_batch:
      chosen = _chosen_in_batch(model, params, indices, microbatches, key, same)

  trained = model.trained()
  learned, kept = trained_lib.split(params, trained)

  def loss_of(learned: Params, batch: Batch, key: Key[Array, ""]):
    sums = forward_sums(
      model,
      trained_lib.join(learned, kept, trained),
      batch,
      token_bytes=token_bytes,
      key=key,
      batch_chosen=chosen,
      **same,
    )
    aux = sum(weights[name] * value for name, value in sums.aux.items())
    return (sums.loss + aux) / total, sums

  gradients_of = jax.grad(loss_of, has_aux=True)
  if accumulation == 1:
    gradients, sums = gradients_of(learned, batch, jax.random.fold_in(key, 0))
    return sums, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

  def add(carry: Any, inputs: tuple[Int[Array, ""], Batch]):
    index, microbatch = inputs
    new = gradients_of(learned, microbatch, jax.random.fold_in(key, index))
    # Where fsdp spans all devices, XLA for TPU else tries to move the exchange of these
    # sums out of the loop and fails, in while_loop_all_reduce_code_motion (libtpu
    # 0.0.42.1).
    new = jax.tree.map(jax.lax.optimization_barrier, new)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, new), None

  first = jax.tree.map(lambda x: x[0], microbatches)
  shapes = jax.eval_shape(gradients_of, learned, first, key)
  # Accumulated in float32 for any parameter dtype: small terms must not vanish.
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
  (gradients, sums), _ = jax.lax.scan(add, zeros, (indices, microbatches))
  return sums, gradients


def _chosen_in_batch(
  model: Any,
  params: Params,
  indices: Int[Array, "A"],
  microbatches: Batch,
  key: Key[Array, ""],
  same: dict[str, Any],
) -> Float[Array, "L E"]:
  """Counts the assignments requested in the whole batch, in a separate forward pass.

  A balance loss over the batch multiplies each token's probabilities by loads to which
  every microbatch contributes, the last one too. Megatron uses the loads counted so far
  instead, which needs no extra pass but is not the loss of the large batch.
  """

  def count(index: Int[Array, ""], microbatch: Batch) -> Float[Array, "L E"]:
    step_key = jax.random.fold_in(key, index)
    sums = forward_sums(model, params, microbatch, key=step_key, **same)
    assert sums.stats is not None
    return sums.stats.chosen

  def add(total: Float[Array, "L E"], inputs: tuple[Int[Array, ""], Batch]):
    return total + count(*inputs), None

  first = jax.tree.map(lambda x: x[0], (indices, microbatches))
  shape = jax.eval_shape(count, *first)
  total, _ = jax.lax.scan(
    add, jnp.zeros(shape.shape, shape.dtype), (indices, microbatches)
  )
  return total


def _split(x: Int[Array, "B S"], parts: int) -> Int[Array, "A b S"]:
  """Splits B into A consecutive microbatches, each sharded over all devices.

  Only tokens move between devices here, a few bytes each, never activations.
  """
  x = x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(None, TOKEN_AXES))


def train_step(
  model: Any,
  optimizer: Optimizer,
  state: State,
  batch: Batch,
  *,
  accumulation: int = 1,
  token_bytes: Float[Array, "V"] | None = None,
  watches: bool = False,
) -> tuple[State, StepMetrics]:
  """Takes one step, uncompiled; see `make_train_step`.

  A non-finite loss or gradient leaves parameters and optimizer state unchanged and is
  counted. This is a select, so that the compiled step has no branch. `watches` adds
  `StepMetrics.health`, and changes no other value.
  """
  step, params = state["step"], state["params"]
  key = jax.random.fold_in(state["key"], step)
  sums, gradients = loss_gradients(
    model,
    params,
    batch,
    key,
    accumulation=accumulation,
    token_bytes=token_bytes,
    step=step,
  )
  with parts.scope(parts.OPTIMIZER):
    return update(model, optimizer, state, sums, gradients, watches)


def update(
  model: Any,
  optimizer: Optimizer,
  state: State,
  sums: Sums,
  gradients: Params,
  watches: bool,
) -> tuple[State, StepMetrics]:
  """Applies the gradients of a step; see `train_step`."""
  step, params = state["step"], state["params"]
  norm = optax.tree.norm(gradients)
  learning_rate = optimizer.schedule(step)
  updated = optimizer.apply(
    gradients,
    state["opt_state"],
    params,
    learning_rate=learning_rate,
    gradient_norm=norm,
  )
  if sums.stats is not None:
    # Uses the loads of the whole batch, outside the gradient (DeepSeek-V3).
    moved = model.update_routers(updated[0], sums.stats)
    updated = (moved, updated[1])
    # A router's own sums are only needed for this update and may be costly to fetch.
    stats = dataclasses.replace(sums.stats, extra={})
    if not watches:
      stats = dataclasses.replace(stats, top_gate=None, top_logit=None)
    sums = dataclasses.replace(sums, stats=stats)
  finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
  new_params, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), updated, (params, state["opt_state"])
  )
  bad = (~finite).astype(jnp.int32)
  bad_steps: BadSteps = {
    "total": state["bad_steps"]["total"] + bad,
    "in_a_row": (state["bad_steps"]["in_a_row"] + 1) * bad,
  }
  new_state: State = {
    "step": step + 1,
    "params": new_params,
    "opt_state": opt_state,
    "key": state["key"],
    "bad_steps": bad_steps,
  }
  metrics = StepMetrics(
    sums=sums,
    grad_norm=norm,
    learning_rate=learning_rate,
    bad_total=bad_steps["total"],
    bad_in_a_row=bad_steps["in_a_row"],
    health=router_health(model, params, gradients, norm) if watches else None,
  )
  return new_state, metrics


def make_train_step(
  model: Any,
  optimizer: Optimizer,
  config: Config,
  mesh: Mesh,
  *,
  token_bytes: Float[np.ndarray, "V"] | None = None,
) -> Callable[[State, Batch], tuple[State, StepMetrics]]:
  """Compiles the step for a mesh; its input state is donated.

  Returns:
    (state, batch) -> (state, metrics), the latter replicated.
  """
  shardings = state_lib.shardings_of(state_lib.state_shapes(model, optimizer, mesh))
  watches = bool(model.moe_layers and thresholds(config))

  def step(state: State, batch: Batch) -> tuple[State, StepMetrics]:
    return train_step(
      model,
      optimizer,
      state,
      batch,
      accumulation=config.train.accumulation,
      token_bytes=None if token_bytes is None else jnp.asarray(token_bytes),
      watches=watches,
    )

  return jax.jit(
    step,
    in_shardings=(shardings, rules.batch_sharding(mesh)),
    out_shardings=(shardings, rules.replicated(mesh)),
    donate_argnums=0,
  )


def make_eval_step(
  model: Any,
  mesh: Mesh,
  capacity_factor: float | None,
  *,
  token_bytes: Float[np.ndarray, "V"] | None = None,
) -> Callable[[Params, Batch], Sums]:
  """Compiles the evaluation of one batch: deterministic, no randomness, no jitter.

  Args:
    model: a decoder.
    mesh: where it runs.
    capacity_factor: of this evaluation; None means dropless.
    token_bytes: see `forward_sums`.

  Returns:
    (params, batch) -> sums, replicated.
  """

  def step(params: Params, batch: Batch) -> Sums:
    return forward_sums(
      model,
      params,
      batch,
      token_bytes=None if token_bytes is None else jnp.asarray(token_bytes),
      train=False,
      capacity_factor=capacity_factor,
    )

  return jax.jit(
    step,
    in_shardings=(param_shardings(model, mesh), rules.batch_sharding(mesh)),
    out_shardings=rules.replicated(mesh),
  )
