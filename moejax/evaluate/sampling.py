"""Sampling: chooses the next token, given its logits.

Letters: V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moejax.types import pytree


@pytree
class Sampling:
  """How to sample a token from logits; arrays, so that new values do not recompile."""

  temperature: Float[Array, ""]
  """Divides the logits; 0 means greedy: the most probable token."""
  top_k: Int[Array, ""]
  """Keeps only the k most probable tokens; V or more keeps all."""
  top_p: Float[Array, ""]
  """Keeps the fewest tokens whose total probability reaches p (arXiv:1904.09751)."""

  @classmethod
  def of(cls, temperature: float, top_k: int = 0, top_p: float = 1.0) -> "Sampling":
    """Returns the settings; 0 as top_k means all tokens."""
    return cls(
      temperature=jnp.asarray(temperature, jnp.float32),
      top_k=jnp.asarray(top_k or 2**31 - 1, jnp.int32),
      top_p=jnp.asarray(top_p, jnp.float32),
    )


def sample_token(
  logits: Float[Array, "V"], allowed: Bool[Array, "V"], key: Key[Array, ""], how: Sampling
) -> Int[Array, ""]:
  """Samples one token: applies temperature, then top-k, then top-p to the rest.

  Equal logits rank by lowest id, so greedy decoding is the same everywhere.
  """
  logits = jnp.where(allowed, logits, -jnp.inf)

  def greedy() -> Int[Array, ""]:
    # Two plain reductions: argmax compares pairs, ten times slower on CPU.
    ids = jnp.arange(logits.shape[0], dtype=jnp.int32)
    return jnp.min(jnp.where(logits == jnp.max(logits), ids, logits.shape[0] - 1))

  def all_ids() -> Int[Array, ""]:
    return jax.random.categorical(key, logits / how.temperature).astype(jnp.int32)

  def most_probable() -> Int[Array, ""]:
    order = jnp.argsort(-logits, stable=True).astype(jnp.int32)
    ranked = logits[order] / how.temperature
    rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
    ranked = jnp.where(rank < how.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability
    # The most probable token is kept for any p.
    ranked = jnp.where((before < how.top_p) | (rank == 0), ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked).astype(jnp.int32)]

  # Sorting the vocabulary would take longer than a small model's step.
  is_cut = (how.top_k < logits.shape[0]) | (how.top_p < 1)
  branch = jnp.where(how.temperature <= 0, 0, jnp.where(is_cut, 2, 1))
  return jax.lax.switch(branch, (greedy, all_ids, most_probable))
