"""Token embedding, final norm and output head."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.layers import parameter
from moejax.layers.norm import RMSNorm
from moejax.sharding.vocabulary import lookup, score


class TokenTable(nnx.Module):
  """A vector for each token."""

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    self.vocab_size = vocab_size
    vocab_size = config.padded(vocab_size)
    self.is_padded = vocab_size > self.vocab_size
    self.table = parameter.matrix(
      rngs,
      (vocab_size, config.width),
      ("vocab", "width"),
      fan_in=config.width,
      dtype=config.param_dtype,
    )
    self.scale = config.embedding_scale

  def embed(self, tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
    x = lookup(self.table[...], tokens, dtype)
    return x if self.scale == 1 else x * jnp.asarray(self.scale, x.dtype)


class Embedding(TokenTable):
  """Token table; also the output head when tied."""

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    super().__init__(config, vocab_size, rngs)
    self.norm = RMSNorm(config.width, epsilon=config.norm_eps)
    if not config.tie_embeddings:
      self.head = parameter.matrix(
        rngs,
        (config.width, config.padded(vocab_size)),
        ("width", "vocab"),
        fan_in=config.width,
        scale=config.init_scale,
        dtype=config.param_dtype,
      )
    self.tied = config.tie_embeddings
    self.divisor, self.soft_cap = config.logits_divisor, config.logits_soft_cap

  def logits(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Returns float32 logits; those of padded ids are -inf."""
    x = self.norm(x)
    head = self.table[...].T if self.tied else self.head[...]
    logits = score(x, head.astype(x.dtype))
    if self.divisor != 1:
      logits = logits / self.divisor
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    if self.is_padded:
      real = jnp.arange(logits.shape[-1], dtype=jnp.int32) < self.vocab_size
      logits = jnp.where(real[None, None], logits, -jnp.inf)
    return logits
