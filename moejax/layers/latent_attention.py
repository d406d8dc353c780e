"""Multi-head latent attention: keys and values of all heads from one vector per token.

A token's latent vector c = norm(x W_down) of rank R gives every head its key and value,
c W_up. Position is separate: P further entries of each query are rotated, and multiply
one rotated key that all heads share. There are two equivalent forms:

  naive     expand every token's keys and values, then ordinary attention;
  absorbed  move W_up to the other side of both products, (q W_up^T) c and (weights c)
            W_up: attention with one key/value head, whose keys are the cached vectors
            themselves. Wider products, but nothing is expanded.

In both forms the cache holds R + P numbers per token and layer.

Letters: B batch, S new tokens, M tokens that can be attended to, D width, H heads, R rank
of keys and values, N width of a head without position, P width with, Z value head width;
A = N + P, X = R + P.
Source: DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C (equations 37 to 47).
As in its released code, both latent vectors are normalised, with an epsilon of 1e-6.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.config import ModelConfig
from moejax.config.attention import head_widths
from moejax.layers import parameter
from moejax.layers.attend import Context, attend
from moejax.layers.attention import out_bias, project_out, sinks
from moejax.layers.cache import LatentCache, LayerCache
from moejax.layers.norm import RMSNorm
from moejax.layers.rotary import logit_scale, make_rotary
from moejax.sharding.vocabulary import score

_EPSILON = 1e-6


class LatentAttention(nnx.Module):
  """Attention with low-rank keys and values, and low-rank queries if `q_rank` is set."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    width, heads = config.width, config.num_heads
    sizes = head_widths(config)
    dtype = config.param_dtype

    def down(rank: int) -> nnx.Param:
      return parameter.matrix(
        rngs,
        (width, rank),
        ("width", "latent"),
        fan_in=width,
        scale=config.init_scale,
        dtype=dtype,
      )

    def up(rank: int, size: int, axis: str = "rank") -> nnx.Param:
      return parameter.matrix(
        rngs,
        (rank, heads, size),
        (axis, "heads", "head_dim"),
        fan_in=rank,
        scale=config.init_scale,
        dtype=dtype,
      )

    def bias(rank: int) -> nnx.Param | None:
      if not config.attention_bias:
        return None
      return parameter.constant(0.0, (rank,), ("latent",), dtype=dtype)

    if config.q_rank:
      self.query_down = down(config.q_rank)
      self.query_down_bias = bias(config.q_rank)
      self.query_norm = RMSNorm(config.q_rank, epsilon=_EPSILON)
      self.query_up = up(config.q_rank, sizes.query)
    else:
      self.query = up(width, sizes.query, "width")
    self.kv_down = down(config.kv_rank + config.rope_head_dim)
    self.kv_down_bias = bias(config.kv_rank + config.rope_head_dim)
    self.kv_norm = RMSNorm(config.kv_rank, epsilon=_EPSILON)
    self.kv_up = up(config.kv_rank, config.nope_head_dim + sizes.value)
    self.out = parameter.matrix(
      rngs,
      (heads, sizes.value, width),
      ("heads", "head_dim", "width"),
      fan_in=heads * sizes.value,
      scale=config.init_scale / (2 * config.num_layers) ** 0.5,
      dtype=dtype,
    )
    self.out_bias, self.sinks = out_bias(config), sinks(config)
    self.rotary, self.scale = make_rotary(config), logit_scale(config)
    if self.scale is None:
      self.scale = sizes.query**-0.5
    self.window = config.sliding_window
    self.q_rank, self.rank, self.nope = (
      config.q_rank,
      config.kv_rank,
      config.nope_head_dim,
    )

  def __call__(
    self, x: Float[Array, "B S D"], context: Context, cache: LayerCache | None
  ) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    query = self._query(x, context)
    latent = self._latent(x, context)
    if isinstance(cache, LatentCache) and context.index is not None:
      start = (0, context.index, 0)
      latent = jax.lax.dynamic_update_slice(cache.latent, latent, start)
      cache = LatentCache(latent=latent)
    mix = self.naive
    if cache is not None and self.is_absorbed(query.shape[1], latent.shape[1]):
      mix = self.absorbed
    mixed = mix(query, latent, context)
    cached = cache is not None
    return project_out(mixed, self.out, self.out_bias, cached=cached), cache

  def is_absorbed(self, num_queries: int, num_keys: int) -> bool:
    """Returns whether the absorbed form takes fewer products than the naive one.

    Per head, the naive form expands M keys and values. The absorbed form maps S queries
    and results, and multiplies 2R numbers per pair instead of N + Z.
    """
    expanded = self.kv_up.shape[-1]
    wider = num_queries * num_keys * (2 * self.rank - expanded)
    return wider < (num_keys - num_queries) * self.rank * expanded

  def naive(
    self,
    query: Float[Array, "B S H A"],
    latent: Float[Array, "B M X"],
    context: Context,
  ) -> Float[Array, "B S H Z"]:
    """Expands the keys and values of every head; see the module."""
    vector, shared = jnp.split(latent, [self.rank], axis=-1)
    up = self.kv_up[...].astype(query.dtype)
    expanded = jnp.einsum("bmr,rha->bmha", vector, up)
    key, value = jnp.split(expanded, [self.nope], axis=-1)
    heads = (*key.shape[:-1], shared.shape[-1])
    key = jnp.concatenate([key, jnp.broadcast_to(shared[:, :, None], heads)], axis=-1)
    return self._attend(query, key, value, context)

  def absorbed(
    self,
    query: Float[Array, "B S H A"],
    latent: Float[Array, "B M X"],
    context: Context,
  ) -> Float[Array, "B S H Z"]:
    """Attends to the latent vectors themselves; see the module."""
    up_key, up_value = jnp.split(
      self.kv_up[...].astype(query.dtype), [self.nope], axis=-1
    )
    still, turned = jnp.split(query, [self.nope], axis=-1)
    still = jnp.einsum("bsha,rha->bshr", still, up_key)
    query = jnp.concatenate([still, turned], axis=-1)
    key = latent[:, :, None]
    mixed = self._attend(query, key, key[..., : self.rank], context)
    return jnp.einsum("bshr,rhz->bshz", mixed, up_value)

  def _attend(
    self, query: Array, key: Array, value: Array, context: Context
  ) -> Float[Array, "B S H Z"]:
    return attend(
      *(query, key, value, context),
      window=self.window,
      scale=self.scale,
      sinks=None if self.sinks is None else self.sinks[...],
    )

  def _query(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S H A"]:
    if self.q_rank:
      x = self.query_norm(_project(x, self.query_down, self.query_down_bias))
    up = self.query_up if self.q_rank else self.query
    query = jnp.einsum("bsr,rha->bsha", x, up[...].astype(x.dtype))
    still, turned = jnp.split(query, [self.nope], axis=-1)
    turned = self.rotary(turned, context.positions)
    return jnp.concatenate([still, turned], axis=-1)

  def _latent(self, x: Float[Array, "B S D"], context: Context) -> Float[Array, "B S X"]:
    """Returns the vector of each token that the cache stores."""
    down = _project(x, self.kv_down, self.kv_down_bias)
    vector, shared = jnp.split(down, [self.rank], axis=-1)
    shared = self.rotary(shared[:, :, None], context.positions)[:, :, 0]
    return jnp.concatenate([self.kv_norm(vector), shared], axis=-1)


def _project(
  x: Float[Array, "B S D"], weight: nnx.Param, bias: nnx.Param | None
) -> Float[Array, "B S R"]:
  # Each device of `tensor` computes the whole vector. Left to itself, the compiler cuts
  # this product over `tensor` and sends pieces of the weight around.
  y = score(x, weight[...].astype(x.dtype), cut_over=None).astype(x.dtype)
  return y if bias is None else y + bias[...].astype(x.dtype)[None, None]
