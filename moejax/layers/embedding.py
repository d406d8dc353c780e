"""Token embedding, final norm and output head."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.config import ModelConfig
from moejax.layers import parameter
from moejax.layers.norm import RMSNorm
from moejax.sharding.vocabulary import lookup, score


class Embedding(nnx.Module):
  """Token table; also the output head when tied."""

  def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
    self.table = parameter.matrix(
      rngs,
      (vocab_size, config.width),
      ("vocab", "width"),
      fan_in=config.width,
      dtype=config.param_dtype,
    )
    self.norm = RMSNorm(config.width, epsilon=config.norm_eps)
    if not config.tie_embeddings:
      self.head = parameter.matrix(
        rngs,
        (config.width, vocab_size),
        ("width", "vocab"),
        fan_in=config.width,
        scale=config.init_scale,
        dtype=config.param_dtype,
      )
    self.tied = config.tie_embeddings

  def embed(self, tokens: Int[Array, "B S"], dtype: jnp.dtype) -> Float[Array, "B S D"]:
    return lookup(self.table[...], tokens, dtype)

  def logits(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    x = self.norm(x)
    head = self.table[...].T if self.tied else self.head[...]
    return score(x, head.astype(x.dtype))
