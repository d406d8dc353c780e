"""Compares a function's results on a device with those on the CPU of the same process.

The CPU's result is the reference, in float32 and by the simplest form. The tests, which
run on CPUs, compare that form with the numpy oracle, so a result that agrees with it here
also agrees with the oracle. (The oracle is part of the tests, which are not installed.)

An error is the largest difference between entries of two arrays, relative to the largest
entry of the reference. Tolerances:

  float32   1e-4. Products are computed at the highest precision. Rounding to 2^-24 in
            sums of up to 512 terms, in two or three products in a row, gives 1e-5 at
            worst; a product in TF32 or in one pass of bfloat16 is 1e-3 off and is found.
  bfloat16  3e-2. Inputs are rounded before either side sees them. The hidden values, the
            activation, the output and their cotangents are each rounded to a relative
            2^-9; a chain of four gives 8e-3, and 2e-3 to 1.1e-2 was measured on a CPU. A
            wrong row, a lost gate or a missing sum gives 1e-1 or more.

Integers and booleans (routing decisions) must be equal.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config.mesh import AXES
from moejax.device_check.runner import Mismatch, Outcome

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
DTYPES = tuple(TOLERANCE)


def mesh_of(device: Any) -> Mesh:
  """Returns a mesh of one device, which decides where and by which kernels to compute."""
  return Mesh(np.array(device).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)


def cpu() -> Any:
  return jax.devices("cpu")[0]


def device() -> Any:
  """Returns the device that is checked: jax's first."""
  return jax.devices()[0]


@contextlib.contextmanager
def exact_products(dtype: str):
  """Returns a context in which float32 products are exact, which is no chip's default."""
  if dtype == "float32":
    with jax.default_matmul_precision("highest"):
      yield
  else:
    yield


def compute(where: Any, function: Callable[..., Any], *args: Any) -> Any:
  """Compiles function(*args) for one device; returns its result as numpy arrays."""
  mesh = mesh_of(where)
  with jax.set_mesh(mesh):
    placed = jax.device_put(args, NamedSharding(mesh, PartitionSpec()))
    return jax.device_get(jax.jit(function)(*placed))


def value_and_gradients(
  function: Callable[..., Any], cotangent: jax.Array, *args: Any
) -> tuple[Any, Any]:
  """Returns y = function(*args), and the gradients of sum(cotangent * y) for all args."""
  y, pull = jax.vjp(function, *args)
  return y, pull(cotangent.astype(y.dtype))


def rounded(tree: Any, dtype: str) -> Any:
  """Returns the tree with every float in this dtype."""
  return jax.tree.map(
    lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree
  )


def agree(got: Any, want: Any, dtype: str) -> Outcome:
  """Compares trees of arrays leaf by leaf.

  Raises:
    Mismatch: names the first leaf that is not finite or not equal, or else the worst one.
  """
  tolerance, worst, where = TOLERANCE[dtype], 0.0, ""
  found, wanted = (jax.tree_util.tree_leaves_with_path(t) for t in (got, want))
  assert len(found) == len(wanted), (len(found), len(wanted))
  for (path, a), (_, b) in zip(found, wanted, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if np.asarray(b).dtype.kind in "biu":
      if wrong := int(np.sum(a != b)):
        raise Mismatch(f"{wrong} of {np.size(b)} differ in {name}", error=1.0)
      continue
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.all(np.isfinite(a)):
      raise Mismatch(f"{name} is not finite", error=float("inf"))
    if a.size == 0:
      continue
    error = float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6))
    if error >= worst:
      worst, where = error, name
  detail = f"error {worst:.1e} (at most {tolerance:.0e})"
  if worst > tolerance:
    hint = ""
    if dtype == "float32" and worst < 20 * tolerance:
      hint = "; typical of products in TF32 or bfloat16"
    raise Mismatch(f"{detail} in {where}{hint}", error=worst, tolerance=tolerance)
  return Outcome(detail, {"error": worst, "tolerance": tolerance})
