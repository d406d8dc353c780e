"""The ragged matmul, with several implementations chosen by platform.

`grouped_matmul(rows, stack, sizes)` multiplies each run of rows by its expert's matrix.
On TPU `jax.lax.ragged_dot` is a compiler kernel, and the gradient of the stack is our
own kernel (`stack_gradient`). On GPU the tokamax kernels (extra `cuda`) are used if
installed and the GPU is local, else `ragged_dot`, and the reason is logged once.
On CPU the dispatcher does not use this: a loop over blocks that fuses both matmuls
(`expert_loop`) is faster there than separate matmuls, and the `ragged_dot` of XLA:CPU
multiplies every row by every expert.

Letters: N rows, D width, F hidden width, E experts.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax import parts
from moejax.experts.stack_gradient import stack_gradient
from moejax.experts.weights import ExpertWeights, activate
from moejax.platform import target_platform

GroupedMatmul = Callable[[Array, Array, Array], Array]

_logger = logging.getLogger(__name__)


def _ragged_dot(rows: Array, stack: Array, sizes: Array) -> Array:
  return jax.lax.ragged_dot(rows, stack, sizes)


@jax.custom_vjp
def _tpu(rows: Array, stack: Array, sizes: Array) -> Array:
  return jax.lax.ragged_dot(rows, stack, sizes)


def _tpu_forward(rows: Array, stack: Array, sizes: Array) -> tuple[Array, Any]:
  return _tpu(rows, stack, sizes), (rows, stack, sizes)


def _tpu_backward(residuals: Any, grad: Array) -> tuple[Array, Array, None]:
  rows, stack, sizes = residuals
  d_rows = jax.lax.ragged_dot(grad, stack.swapaxes(1, 2), sizes)
  return d_rows, stack_gradient(rows, grad, sizes).astype(stack.dtype), None


_tpu.defvjp(_tpu_forward, _tpu_backward)


def _tokamax(rows: Array, stack: Array, sizes: Array) -> Array:
  import tokamax  # pyright: ignore[reportMissingImports]  # An extra.

  return tokamax.ragged_dot(rows, stack, sizes)


IMPLEMENTATIONS: Mapping[str, GroupedMatmul] = {
  "ragged_dot": _ragged_dot,
  "tpu": _tpu,
  "tokamax": _tokamax,
}


@functools.cache
def choose(platform: str) -> str:
  """Returns the implementation for this platform; logs once why tokamax is not used."""
  if platform == "tpu":
    return "tpu"
  if platform == "cpu":
    return "ragged_dot"
  if jax.default_backend() != "gpu":
    _logger.warning(
      "grouped_matmul: using jax.lax.ragged_dot, because tokamax chooses its kernels by "
      "the devices of this machine, which are not the GPUs compiled for."
    )
    return "ragged_dot"
  try:
    import tokamax  # pyright: ignore[reportMissingImports]  # noqa: F401
  except Exception as error:  # Not installed, or incompatible with this jax.
    _logger.warning(
      "grouped_matmul: using jax.lax.ragged_dot on %s, because tokamax does not import "
      "(%s: %s); `pip install tokamax` gives faster kernels.",
      platform,
      type(error).__name__,
      error,
    )
    return "ragged_dot"
  return "tokamax"


def grouped_matmul(
  rows: Float[Array, "N D"],
  stack: Float[Array, "E D F"],
  sizes: Int[Array, "E"],
  *,
  implementation: str | None = None,
) -> Float[Array, "N F"]:
  """Multiplies the sizes[e] rows of each expert e by stack[e].

  Args:
    rows: in expert order; rows after the last run belong to no expert.
    implementation: a key of IMPLEMENTATIONS; None chooses by platform.

  Returns:
    The products, differentiable in rows and stack; zero after the last run, which
    some kernels leave unwritten.
  """
  name = implementation or choose(target_platform())
  out = IMPLEMENTATIONS[name](rows, stack, sizes)
  owned = jnp.arange(rows.shape[0], dtype=sizes.dtype) < jnp.sum(sizes)
  return jnp.where(owned[:, None], out, jnp.zeros((), out.dtype))


@parts.of_part(parts.EXPERTS)
def apply_ragged_experts(
  rows: Float[Array, "N D"],
  sizes: Int[Array, "E"],
  weights: ExpertWeights,
  activation: str,
  *,
  gate: Float[Array, "N"] | None = None,
  chunks: int = 1,
  implementation: str | None = None,
) -> Float[Array, "N D"]:
  """Applies every expert to its own run of rows: the ragged form of `apply_experts`.

  Args:
    rows: in expert order.
    sizes: lengths of the runs.
    weights: of the experts.
    activation: of the experts.
    gate: weight of each row's output, None for 1. Applied to the hidden activations,
      which is equivalent by linearity, so that the backward pass needs only those and
      rematerialisation need not recompute the output.
    chunks: parts of the rows computed one after the other, forwards and backwards, so
      that only one part's hidden activations are in memory at a time. The backward
      pass recomputes them, as a rematerialised block does anyway.
    implementation: see `grouped_matmul`.
  """
  if chunks > 1:
    return _in_chunks(rows, sizes, weights, activation, gate, chunks, implementation)
  product = functools.partial(grouped_matmul, sizes=sizes, implementation=implementation)
  hidden = _add(product(rows, weights.w_in), weights.b_in, sizes)
  hidden_gate = None
  if weights.w_gate is not None:
    hidden_gate = _add(product(rows, weights.w_gate), weights.b_gate, sizes)
  hidden = activate(hidden, hidden_gate, activation)
  if gate is not None:
    hidden = (hidden.astype(jnp.float32) * gate[:, None]).astype(rows.dtype)
  return _add(product(hidden, weights.w_out), weights.b_out, sizes, gate)


def _add(
  out: Float[Array, "N F"],
  bias: Float[Array, "E F"] | None,
  sizes: Int[Array, "E"],
  gate: Float[Array, "N"] | None = None,
) -> Float[Array, "N F"]:
  """Adds each row's expert bias times its gate; none after the last run."""
  if bias is None:
    return out
  ends = jnp.cumsum(sizes)
  row = jnp.arange(out.shape[0], dtype=sizes.dtype)
  expert = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
  own = bias[jnp.minimum(expert, sizes.shape[0] - 1)]
  if gate is not None:
    own = (own.astype(jnp.float32) * gate[:, None]).astype(out.dtype)
  return out + jnp.where((row < ends[-1])[:, None], own, jnp.zeros((), own.dtype))


def _in_chunks(
  rows: Float[Array, "N D"],
  sizes: Int[Array, "E"],
  weights: ExpertWeights,
  activation: str,
  gate: Float[Array, "N"] | None,
  chunks: int,
  implementation: str | None,
) -> Float[Array, "N D"]:
  """Processes equal parts of the rows, each with its own share of every run."""
  num_rows = rows.shape[0]
  length = -(-num_rows // chunks)
  padding = chunks * length - num_rows
  gate = jnp.ones_like(rows[:, 0], jnp.float32) if gate is None else gate
  parts = jnp.pad(rows, ((0, padding), (0, 0))).reshape(chunks, length, -1)
  gates = jnp.pad(gate, (0, padding)).reshape(chunks, length)
  ends = jnp.cumsum(sizes)
  low = jnp.arange(chunks, dtype=sizes.dtype)[:, None] * length
  inside = jnp.clip(jnp.stack([ends - sizes, ends])[:, None] - low[None], 0, length)

  # Closes over the weights: if carried, each part's residuals would have a copy of them.
  def part(_: None, inputs: tuple[Array, Array, Array]) -> Any:
    rows, gate, sizes = inputs
    out = apply_ragged_experts(
      rows, sizes, weights, activation, gate=gate, implementation=implementation
    )
    return None, out

  _, out = jax.lax.scan(
    jax.checkpoint(part, prevent_cse=False),
    None,
    (parts, gates, inside[1] - inside[0]),
  )
  return out.reshape(chunks * length, -1)[:num_rows]
