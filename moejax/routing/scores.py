"""Scores: from router logits to probabilities, and from scores to choices.

Everything is float32. A choice is an index and has no gradient; a gate is the
probability at a chosen index and has one.

Letters: T tokens of one group, D width, E experts, K choices per token.
Sources: Switch, arXiv:2101.03961, section 2.4 (input jitter).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

_MAX_PASSES = 8
"""Above this many choices a partial sort is cheaper than one pass per choice."""

ABSENT = -1e9
"""Logit of an expert that is out for this step (expert dropout): finite, so that
nothing becomes NaN."""

TINY = 1e-18
"""The square of anything smaller is no normal float32."""

_OUT_OF_GROUP = -100.0
"""Score of an absent expert within its group's score; real scores are below ten."""

_SMALL_E = 16
"""Up to this many experts XLA:CPU's argmax beats two plain reductions."""


def jitter(
  x: Float[Array, "... T D"], key: Key[Array, ""], amount: float
) -> Float[Array, "... T D"]:
  """Multiplies the router's input by uniform noise in [1 - amount, 1 + amount].

  Only the router sees the result: the experts get the clean tokens (Switch,
  section 2.4). In training only.
  """
  noise = jax.random.uniform(key, x.shape, jnp.float32, 1.0 - amount, 1.0 + amount)
  return x * noise.astype(x.dtype)


def softmax(logits: Float[Array, "... E"]) -> Float[Array, "... E"]:
  """Returns probabilities over experts, in float32 for any input dtype."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def ratio(part: Float[Array, "*a"], whole: Float[Array, "*b"]) -> Float[Array, "..."]:
  """Returns part / whole, 0 where the whole is 0.

  Below `TINY` it has no gradient: float32 holds no reciprocal of the whole's square, and
  infinity times zero would make every parameter NaN.
  """
  is_tiny = whole < TINY
  still = jax.lax.stop_gradient((part, whole))
  whole = jnp.where(is_tiny, still[1], whole)
  part = jnp.where(jnp.broadcast_to(is_tiny, part.shape), still[0], part)
  return part / jnp.where(whole > 0, whole, 1.0)


def choose(scores: Float[Array, "T E"], num_selected: int) -> Int[Array, "T K"]:
  """Returns the K best experts of each token, best first; ties go to the lowest index.

  Indices are below E for any scores, so that a non-finite step cannot write out of
  bounds. -inf marks an expert that is taken only when no other is left.
  """
  scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
  num_experts = scores.shape[-1]
  if num_selected > _MAX_PASSES:
    return jax.lax.top_k(scores, num_selected)[1].astype(jnp.int32)
  # K passes over [T,E]: half the time of jax.lax.top_k on CPU at E <= 64.
  # -inf means "taken" below, so an excluded expert gets the lowest finite number.
  scores = jnp.maximum(scores, jnp.finfo(jnp.float32).min)
  index = jnp.arange(num_experts, dtype=jnp.int32)[None, :]
  chosen = []
  for _ in range(num_selected):
    if num_experts <= _SMALL_E:
      best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    else:
      top = jnp.max(scores, axis=-1, keepdims=True)
      best = jnp.min(jnp.where(scores == top, index, num_experts - 1), axis=-1)
    chosen.append(best)
    scores = jnp.where(index == best[:, None], -jnp.inf, scores)
  return jnp.stack(chosen, axis=-1)


def present(
  logits: Float[Array, "T E"], scores: Float[Array, "T E"]
) -> Float[Array, "T E"]:
  """Returns selection scores: -inf for experts that are out for this step."""
  return jnp.where(logits > ABSENT, jax.lax.stop_gradient(scores), -jnp.inf)


@jax.custom_vjp
def pick(values: Float[Array, "T E"], expert: Int[Array, "T K"]) -> Float[Array, "T K"]:
  """Returns values[t, expert[t, k]], with a backward pass that is not a scatter."""
  return jnp.take_along_axis(values, expert, axis=-1, mode="promise_in_bounds")


def _pick_forward(values, expert):
  # The empty array passes E and the dtype to the backward pass without keeping values.
  return pick(values, expert), (expert, jnp.zeros((0, values.shape[-1]), values.dtype))


def _pick_backward(residuals, g):
  expert, like = residuals
  index = jnp.arange(like.shape[-1], dtype=expert.dtype)[None, :]
  grad = jnp.zeros((g.shape[0], like.shape[-1]), like.dtype)
  for k in range(expert.shape[-1]):
    grad = grad + jnp.where(index == expert[:, k : k + 1], g[:, k : k + 1], 0.0)
  return grad, None


pick.defvjp(_pick_forward, _pick_backward)


def limit_to_groups(
  scores: Float[Array, "T E"],
  num_groups: int,
  num_selected_groups: int,
  group_best: int = 1,
) -> Float[Array, "T E"]:
  """Sets the scores of experts outside each token's best groups to -inf.

  Experts form `num_groups` groups of consecutive indices, as many as there are devices
  to send to. A group's score is the sum of its `group_best` largest scores: 1 is
  DeepSeek-V2 (arXiv:2405.04434, section 2.1.2), 2 is DeepSeek-V3
  (arXiv:2412.19437, section 2.1.2), K / num_selected_groups is Megatron.
  """
  if num_selected_groups >= num_groups:
    return scores
  num_tokens, num_experts = scores.shape
  size = num_experts // num_groups
  # An absent expert (-inf) costs its group more than any score can offset, but stays
  # finite: among groups that lack one, those with better experts come first.
  finite = jnp.maximum(jax.lax.stop_gradient(scores), _OUT_OF_GROUP)
  grouped = finite.reshape(num_tokens, num_groups, size)
  if group_best == 1:
    group_score = jnp.max(grouped, axis=-1)
  else:
    group_score = jnp.sum(jax.lax.top_k(grouped, group_best)[0], axis=-1)
  groups = choose(group_score, num_selected_groups)
  index = jnp.arange(num_groups, dtype=jnp.int32)[None, None, :]
  allowed = jnp.any(groups[:, :, None] == index, axis=1)
  return jnp.where(jnp.repeat(allowed, size, axis=-1), scores, -jnp.inf)


def entropy(probs: Float[Array, "... E"]) -> Float[Array, "..."]:
  """Returns the entropy in nats; 0 log 0 = 0, with a finite gradient."""
  safe = jnp.where(probs > 0, probs, 1.0)
  return -jnp.sum(probs * jnp.log(safe), axis=-1)
