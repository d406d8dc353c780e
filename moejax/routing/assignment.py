"""BASE: balanced assignment of tokens to experts, without an auxiliary loss.

Letters: T tokens of one group, E experts, K choices per token.
Sources: Lewis et al. 2021, arXiv:2103.16716 (balanced in training, greedy at test,
gate = sigmoid of the logit); Clark et al. 2022, arXiv:2202.01169, section 3 (Sinkhorn
in place of the auction).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.options import Range, count, option
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.router import Router
from moejax.routing.scores import choose, pick, softmax


def sinkhorn(
  logits: Float[Array, "T E"],
  valid: Bool[Array, "T"],
  *,
  tolerance: float = 1e-4,
  max_iterations: int = 30,
) -> Float[Array, "T E"]:
  """Scales rows and columns of exp(logits) until rows sum to 1/T and columns to 1/E.

  T counts valid tokens; rows of padding are zero. Stops when the mean change of the
  column factors is at most `tolerance`, or after `max_iterations`.
  """
  logits = jax.lax.stop_gradient(logits.astype(jnp.float32))
  kernel = jnp.where(valid[:, None], jnp.exp(logits), 0.0)
  count = jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0)
  num_experts, tiny = logits.shape[-1], 1e-8

  def step(state):
    _, columns, _, i = state
    rows = 1.0 / (count * (kernel @ columns + tiny))
    new = 1.0 / (num_experts * (rows @ kernel + tiny))
    return rows, new, jnp.mean(jnp.abs(columns - new)), i + 1

  def unsettled(state):
    return (state[2] > tolerance) & (state[3] < max_iterations)

  # Derived from mapped arrays, so that the carry varies over devices as the result does.
  rows, columns = jnp.ones_like(kernel[:, 0]), jnp.ones_like(kernel[0])
  start = (rows, columns, jnp.full_like(count, jnp.inf), jnp.int32(0))
  rows, columns, _, _ = jax.lax.while_loop(unsettled, step, start)
  return rows[:, None] * kernel * columns[None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(Router):
  """Sinkhorn-balanced experts in training, the best ones at test; gate = sigmoid.

  The balanced assignment depends on the whole group, so training leaks the future;
  the greedy choice in evaluation does not. With capacity factor 1 and
  `overflow="next_best"` the assignment is exactly balanced, as in the paper.
  """

  name = "base"
  summary = "balanced assignment by Sinkhorn in training, greedy at test (BASE)"
  needs_key = True
  causal = False
  by_logits = False

  sinkhorn_iterations: int = option(
    30,
    "maximum number of iterations",
    count(1, 100_000, "a step would spend all its time on them"),
  )
  sinkhorn_tolerance: float = option(
    1e-4,
    "mean change of the columns' factors at which iterations stop",
    Range(0, 1, low_open=True, why_high="nothing would be balanced"),
  )

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    logits = inputs.logits.astype(jnp.float32)
    scores = logits
    if inputs.key is not None:
      # Per row: one token's logits may be far above another's, and exp would overflow.
      best = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
      scores = sinkhorn(
        logits - best,
        inputs.valid,
        tolerance=self.sinkhorn_tolerance,
        max_iterations=self.sinkhorn_iterations,
      )
    expert = choose(scores, policy.num_selected)
    values = jax.nn.sigmoid(logits)
    return assign(
      expert,
      pick(values, expert),
      inputs.valid,
      softmax(logits),
      policy,
      inputs.key,
      scores=scores,
      values=values,
    )
