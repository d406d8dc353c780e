"""The experts' stacked matrices, and their plain batched application.

Letters: E experts, D width, F expert hidden width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax import parts
from moejax.types import pytree


@pytree
class ExpertWeights:
  """Expert weights, one stacked array per matrix, and biases, if there are any."""

  w_in: Float[Array, "E D F"]
  w_out: Float[Array, "E F D"]
  w_gate: Float[Array, "E D F"] | None = None
  """Present for gated activations, such as SwiGLU: silu(x w_gate) * (x w_in)."""
  b_in: Float[Array, "E F"] | None = None
  b_gate: Float[Array, "E F"] | None = None
  b_out: Float[Array, "E D"] | None = None


_CLAMP, _SLOPE = 7.0, 1.702
"""Constants of clamped_swiglu, from the released code of GPT-OSS."""


def activate(
  hidden: Float[Array, "... F"], gate: Float[Array, "... F"] | None, activation: str
) -> Float[Array, "... F"]:
  """Applies the hidden non-linearity; gelu and geglu in the tanh form.

  clamped_swiglu (GPT-OSS, released code): with g = min(gate, 7) and h = hidden clipped to
  +-7, it is g * sigmoid(1.702 g) * (h + 1).
  """
  match activation:
    case "relu":
      return jax.nn.relu(hidden)
    case "gelu":
      return jax.nn.gelu(hidden, approximate=True)
    case "swiglu":
      assert gate is not None, "swiglu needs w_gate"
      return jax.nn.silu(gate) * hidden
    case "geglu":
      assert gate is not None, "geglu needs w_gate"
      return jax.nn.gelu(gate, approximate=True) * hidden
    case "clamped_swiglu":
      assert gate is not None, "clamped_swiglu needs w_gate"
      gate, hidden = jnp.minimum(gate, _CLAMP), jnp.clip(hidden, -_CLAMP, _CLAMP)
      return gate * jax.nn.sigmoid(_SLOPE * gate) * (hidden + 1)
    case _:
      raise ValueError(f"unknown activation {activation!r}")


@parts.of_part(parts.EXPERTS)
def apply_experts(
  rows: Float[Array, "E *n D"],
  weights: ExpertWeights,
  activation: str,
  *,
  gate: Float[Array, "E *n"] | None = None,
) -> Float[Array, "E *n D"]:
  """Applies every expert to its own rows, in plain batched form.

  Empty slots need no mask: no token collects their contents.

  Args:
    rows: of each expert.
    weights: of the experts.
    activation: of the experts.
    gate: weight of each row's output, None for 1. It multiplies the hidden activations,
      which is equivalent by linearity, so that the backward pass needs no output.
  """
  hidden = jnp.einsum("e...d,edf->e...f", rows, weights.w_in)
  hidden = _add(hidden, weights.b_in)
  hidden_gate = None
  if weights.w_gate is not None:
    hidden_gate = jnp.einsum("e...d,edf->e...f", rows, weights.w_gate)
    hidden_gate = _add(hidden_gate, weights.b_gate)
  hidden = activate(hidden, hidden_gate, activation)
  if gate is not None:
    hidden = _times(hidden, gate)
  out = jnp.einsum("e...f,efd->e...d", hidden, weights.w_out)
  return _add(out, weights.b_out, gate)


def apply_in_chunks(
  rows: Float[Array, "E n D"],
  weights: ExpertWeights,
  activation: str,
  *,
  gate: Float[Array, "E n"] | None,
  chunks: int,
) -> Float[Array, "E n D"]:
  """Applies every expert to equal parts of its rows, one part after the other.

  Only one part's hidden activations are in memory at a time; the backward pass computes
  them again.
  """
  if chunks == 1:
    return apply_experts(rows, weights, activation, gate=gate)
  num_experts, num_rows, width = rows.shape
  length = -(-num_rows // chunks)
  padding = ((0, 0), (0, chunks * length - num_rows))

  def split(array: Array) -> Array:
    padded = jnp.pad(array, padding + ((0, 0),) * (array.ndim - 2))
    split = padded.reshape(num_experts, chunks, length, *array.shape[2:])
    return split.swapaxes(0, 1)

  def part(_: None, inputs: tuple[Array, Array | None]) -> tuple[None, Array]:
    return None, apply_experts(inputs[0], weights, activation, gate=inputs[1])

  pieces = split(rows), None if gate is None else split(gate)
  _, out = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), None, pieces)
  return out.swapaxes(0, 1).reshape(num_experts, -1, width)[:, :num_rows]


def _add(
  rows: Float[Array, "E *n F"],
  bias: Float[Array, "E F"] | None,
  gate: Float[Array, "E *n"] | None = None,
) -> Float[Array, "E *n F"]:
  """Adds the expert's bias times the row's gate to each row."""
  if bias is None:
    return rows
  between = (1,) * (rows.ndim - 2)
  bias = bias.reshape(bias.shape[0], *between, bias.shape[1])
  return rows + (bias if gate is None else _times(bias, gate))


def _times(rows: Float[Array, "E *m F"], gate: Float[Array, "E *n"]) -> Array:
  """Returns rows times gates, multiplied in float32, in the rows' dtype."""
  return (rows.astype(jnp.float32) * gate[..., None]).astype(rows.dtype)
