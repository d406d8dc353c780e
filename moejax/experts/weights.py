"""The experts' stacked matrices, and their plain batched application.

Letters: E experts, D width, F expert hidden width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.types import pytree


@pytree
class ExpertWeights:
  """Expert weights, one stacked array per matrix. No biases, as in Switch and Mixtral."""

  w_in: Float[Array, "E D F"]
  w_out: Float[Array, "E F D"]
  w_gate: Float[Array, "E D F"] | None = None
  """Present for SwiGLU: hidden = silu(x w_gate) * (x w_in)."""


def activate(
  hidden: Float[Array, "... F"], gate: Float[Array, "... F"] | None, activation: str
) -> Float[Array, "... F"]:
  """Applies the hidden non-linearity: relu, gelu (tanh form) or swiglu."""
  match activation:
    case "relu":
      return jax.nn.relu(hidden)
    case "gelu":
      return jax.nn.gelu(hidden, approximate=True)
    case "swiglu":
      assert gate is not None, "swiglu needs w_gate"
      return jax.nn.silu(gate) * hidden
    case _:
      raise ValueError(f"unknown activation {activation!r}")


def apply_experts(
  rows: Float[Array, "E *n D"], weights: ExpertWeights, activation: str
) -> Float[Array, "E *n D"]:
  """Applies every expert to its own rows, in plain batched form.

  Maps zero rows to zero rows, so empty slots need no mask.

  """
  hidden = jnp.einsum("e...d,edf->e...f", rows, weights.w_in)
  gate = None
  if weights.w_gate is not None:
    gate = jnp.einsum("e...d,edf->e...f", rows, weights.w_gate)
  return jnp.einsum("e...f,efd->e...d", activate(hidden, gate, activation), weights.w_out)
