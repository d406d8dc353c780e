"""Checks kernels, attention and dispatchers on a device against the CPU, with gradients.

Letters: N rows, T tokens, D width, F hidden width, E experts, K choices, B batch, S
sequence, H query heads, J key/value heads, A head width.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.device_check.compare import (
  DTYPES,
  agree,
  compute,
  cpu,
  device,
  exact_products,
  rounded,
  value_and_gradients,
)
from moejax.device_check.runner import Check, Outcome
from moejax.dispatch.registry import DISPATCHERS
from moejax.dispatch.rows import LOOP
from moejax.experts import grouped_matmul as kernels
from moejax.experts.stack_gradient import stack_gradient
from moejax.experts.weights import ExpertWeights, activate
from moejax.layers.attend import Context, attend, attention_mask, plain_attention
from moejax.layers.tpu_attention import tpu_attention
from moejax.platform import target_is_nvidia
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import capacity_of
from moejax.routing.registry import ROUTERS

SIZES = (130, 0, 1, 200, 57, 0, 100, 8)
"""Number of rows of each expert: none, one, less than a tile, across tiles."""
ROWS = 512
"""The last 16 belong to no expert, and hold values that must not be read."""
D, F = 128, 256


@dataclasses.dataclass(frozen=True)
class Options:
  """The selection of checks."""

  small: bool = False
  """Whether to run only basic checks, with tiny layers."""
  only: tuple[str, ...] = ()
  """Names of groups; empty means all."""


def platform() -> str:
  """Returns the platform that is checked: cpu, gpu or tpu."""
  name = jax.default_backend()
  return name if name in ("cpu", "tpu") else "gpu"


def normal(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def experts(num_experts: int, *, width: int = D, hidden: int = F) -> ExpertWeights:
  return ExpertWeights(
    w_in=width**-0.5 * normal(1, num_experts, width, hidden),
    w_out=hidden**-0.5 * normal(2, num_experts, hidden, width),
    w_gate=width**-0.5 * normal(3, num_experts, width, hidden),
  )


def against(
  reference: Callable[..., Any], function: Callable[..., Any], dtype: str, *args: Any
) -> Outcome:
  """Compares function(*args), in this dtype on the device, with reference(*args).

  The reference is computed in float32 on the CPU.
  """
  args = rounded(args, dtype)
  with exact_products(dtype):
    got = compute(device(), function, *args)
  with exact_products("float32"):
    want = compute(cpu(), reference, *rounded(args, "float32"))
  return agree(got, want, dtype)


# Ragged products.


def _runs() -> Iterator[tuple[int, int, int]]:
  """Yields (expert, first row, end) of each run of rows."""
  end = 0
  for expert, size in enumerate(SIZES):
    yield expert, end, end + size
    end += size


def _owned(x: jax.Array) -> jax.Array:
  """Returns the rows that belong to an expert."""
  return x[: sum(SIZES)]


def _plain_product(rows: jax.Array, stack: jax.Array) -> jax.Array:
  parts = [rows[start:end] @ stack[e] for e, start, end in _runs()]
  behind = rows.shape[0] - sum(SIZES)
  return jnp.concatenate([*parts, jnp.zeros((behind, stack.shape[2]), rows.dtype)])


def _product(rows: jax.Array, stack: jax.Array, implementation: str) -> jax.Array:
  sizes = jnp.asarray(SIZES, jnp.int32)
  return kernels.grouped_matmul(rows, stack, sizes, implementation=implementation)


def check_product(implementation: str, dtype: str) -> Outcome:
  """Checks a ragged product and its gradients for the stack and the experts' rows."""

  def both(function: Callable[..., Any], rows: Any, stack: Any, dy: Any) -> Any:
    y, (d_rows, d_stack) = value_and_gradients(function, dy, rows, stack)
    return {"y": y, "d_rows": _owned(d_rows), "d_stack": d_stack}

  rows = normal(0, ROWS, D).at[sum(SIZES) :].set(100.0)
  stack, dy = D**-0.5 * normal(1, len(SIZES), D, F), normal(2, ROWS, F)
  product = functools.partial(_product, implementation=implementation)
  return against(
    functools.partial(both, _plain_product),
    functools.partial(both, product),
    dtype,
    *(rows, stack, dy),
  )


def _plain_experts(rows: Any, weights: ExpertWeights, gate: Any) -> Any:
  assert weights.w_gate is not None
  hidden = _plain_product(rows, weights.w_in)
  hidden = activate(hidden, _plain_product(rows, weights.w_gate), "swiglu")
  return gate[:, None] * _plain_product(hidden, weights.w_out)


def check_ragged_experts(chunks: int, dtype: str) -> Outcome:
  """Checks gated experts on ragged rows, in `chunks` parts, as this device chooses."""

  def ragged(rows: Any, weights: ExpertWeights, gate: Any) -> Any:
    sizes = jnp.asarray(SIZES, jnp.int32)
    return kernels.apply_ragged_experts(
      rows, sizes, weights, "swiglu", gate=gate.astype(jnp.float32), chunks=chunks
    )

  def both(function: Callable[..., Any], *args: Any) -> Any:
    y, (d_rows, d_weights, d_gate) = value_and_gradients(function, args[-1], *args[:-1])
    return y, _owned(d_rows), d_weights, _owned(d_gate)

  rows, gate = normal(0, ROWS, D), jnp.abs(normal(4, ROWS))
  args = (rows, experts(len(SIZES)), gate, normal(5, ROWS, D))
  return against(
    functools.partial(both, _plain_experts), functools.partial(both, ragged), dtype, *args
  )


def check_stack_gradient(dtype: str) -> Outcome:
  """Checks rows^T grad of each run of rows; interpreted if there is no TPU."""

  def kernel(rows: Any, grad: Any) -> Any:
    sizes = jnp.asarray(SIZES, jnp.int32)
    return stack_gradient(rows, grad, sizes, interpret=platform() != "tpu")

  def plain(rows: Any, grad: Any) -> Any:
    return jnp.stack([rows[a:b].T @ grad[a:b] for _, a, b in _runs()])

  return against(plain, kernel, dtype, normal(0, ROWS, D), normal(1, ROWS, F))


def _why_not(implementation: str) -> str:
  """Returns why a ragged product cannot run on this device; empty if it can."""
  here = platform()
  if implementation == "tpu" and here != "tpu":
    return f"for TPUs; this is a {here}"
  if implementation == "tokamax" and here != "gpu":
    return f"used on GPUs; this is a {here}"
  if implementation == "tokamax" and importlib.util.find_spec("tokamax") is None:
    return "tokamax is not installed (extra `cuda`)"
  if implementation == LOOP and here != "cpu":
    return f"used on CPUs; this is a {here}"
  return ""


def kernel_checks() -> Iterator[Check]:
  """Yields checks of every ragged product, the experts made of them, and TPU kernels."""
  for dtype in DTYPES:
    for name in kernels.IMPLEMENTATIONS:
      run = functools.partial(check_product, name, dtype)
      yield Check("kernels", f"grouped_matmul {name} {dtype}", run, _why_not(name))
    for chunks in (1, 3):
      run = functools.partial(check_ragged_experts, chunks, dtype)
      label = f"ragged experts, {chunks} part(s), {dtype}"
      yield Check("kernels", label, run, basic=chunks == 1 and dtype == "bfloat16")
    run = functools.partial(check_stack_gradient, dtype)
    reason = _why_not("tpu") if platform() == "gpu" else ""
    label = f"stack_gradient {dtype}"
    yield Check("kernels", label, run, reason, basic=dtype == "float32")


# Attention.


def check_attention(implementation: str, window: int, dtype: str) -> Outcome:
  """Checks attention on two documents and padding, with grouped heads and gradients."""
  ids = np.ones((2, 256), np.int32)
  ids[0, 100:], ids[1, 200:] = 2, 0
  segments = jnp.asarray(ids)

  def plain(kind: Any, query: Any, key: Any, value: Any) -> Any:
    mask = attention_mask(segments, segments, window=window)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
      return jax.nn.dot_product_attention(
        query, key, value, mask=mask, implementation=kind
      )

  def splash(query: Any, key: Any, value: Any) -> Any:
    return tpu_attention(
      *(query, key, value, segments), window=window, interpret=platform() != "tpu"
    )

  chosen = splash if implementation == "splash" else None
  chosen = chosen or functools.partial(plain, implementation)

  def both(function: Callable[..., Any], *args: Any) -> Any:
    return value_and_gradients(function, args[-1], *args[:-1])

  args = [normal(i, 2, 256, heads, 128) for i, heads in enumerate((4, 2, 2, 4))]
  return against(
    functools.partial(both, functools.partial(plain, "xla")),
    functools.partial(both, chosen),
    dtype,
    *args,
  )


def check_attend(with_sinks: bool, dtype: str) -> Outcome:
  """Checks what `layers/attend` chooses here for keys of width 192 and values of 128.

  The reference holds all logits in memory.
  """
  ids = np.ones((2, 256), np.int32)
  ids[0, 100:], ids[1, 200:] = 2, 0
  segments = jnp.asarray(ids)
  positions = jnp.zeros_like(segments)
  mask = attention_mask(segments, segments)
  context = Context(positions=positions, mask=mask, segment_ids=segments)

  def chosen(query: Any, key: Any, value: Any, sinks: Any) -> Any:
    used = sinks if with_sinks else None
    return attend(query, key, value, context, scale=0.1, sinks=used)

  def reference(query: Any, key: Any, value: Any, sinks: Any) -> Any:
    used = sinks if with_sinks else None
    return plain_attention(query, key, value, mask, scale=0.1, sinks=used)

  def both(function: Callable[..., Any], *args: Any) -> Any:
    return value_and_gradients(function, args[-1], *args[:-1])

  shapes = ((2, 256, 4, 192), (2, 256, 2, 192), (2, 256, 2, 128), (4,), (2, 256, 4, 128))
  args = [normal(i, *shape) for i, shape in enumerate(shapes)]
  return against(
    functools.partial(both, reference), functools.partial(both, chosen), dtype, *args
  )


def attention_checks() -> Iterator[Check]:
  """Yields checks of what `layers/attend` may choose: XLA, cuDNN or the TPU kernel."""
  for dtype in DTYPES:
    for with_sinks in (False, True):
      label = f"latent widths{', sinks' if with_sinks else ''} {dtype}"
      run = functools.partial(check_attend, with_sinks, dtype)
      basic = with_sinks and dtype == "float32"
      yield Check("attention", label, run, basic=basic)
  for name in ("xla", "cudnn", "splash"):
    for dtype in DTYPES:
      for window in (0, 40):
        reason = ""
        if name == "cudnn" and not target_is_nvidia():
          reason = "for NVIDIA GPUs"
        elif name == "cudnn" and dtype == "float32":
          reason = "half precision only"
        elif name == "splash" and platform() == "gpu":
          reason = "for TPUs"
        label = f"{name}{f', window {window}' if window else ''} {dtype}"
        run = functools.partial(check_attention, name, window, dtype)
        basic = bool(window) and dtype == "float32"
        yield Check("attention", label, run, reason, basic)


# Dispatchers.


@functools.cache
def _routed(factor: float | None) -> Routing:
  """Returns the routing of two groups of 64 tokens, K = 2, E = 8; decided on the CPU."""
  policy = SlotPolicy(
    num_experts=8, num_selected=2, capacity=capacity_of(64, 8, 2, factor)
  )

  def route(logits: Any, valid: Any) -> Any:
    inputs = RouterInputs(logits=logits, valid=valid)
    return jax.vmap(lambda i: ROUTERS["top_k"]()(i, policy))(inputs)

  valid = jnp.ones((2, 64), bool).at[:, -5:].set(False)
  # Some experts are favoured, so that a capacity overflows.
  logits = normal(9, 2, 64, 8) + jnp.linspace(1.0, 0.0, 8)[None, None, :]
  return compute(cpu(), route, logits, valid)


def _layer_and_gradients(
  dispatcher: str, how: dict[str, Any], routing: Routing, x: Any, weights: Any, dy: Any
) -> Any:
  def layer(x: Any, gate: Any, weights: Any) -> Any:
    placement = dataclasses.replace(routing.assignments, gate=gate)
    layout = DISPATCHERS[dispatcher].of(placement)
    return layout.run(x, weights, activation="swiglu", **how)

  y, (dx, d_gate, d_weights) = value_and_gradients(
    layer, dy, x, routing.assignments.gate, weights
  )
  # A dropped assignment's gate is a constant 0 already.
  return y, dx, jnp.where(routing.assignments.kept, d_gate, 0.0), d_weights


def _layer_inputs(dtype: str) -> Any:
  return rounded((normal(6, 2, 64, D), experts(8), normal(7, 2, 64, D)), dtype)


@functools.cache
def _dense_masks(factor: float | None, dtype: str) -> Any:
  """Returns the result by dense masks, in float32 on the CPU, from rounded inputs."""
  args = rounded(_layer_inputs(dtype), "float32")
  with exact_products("float32"):
    run = functools.partial(_layer_and_gradients, "einsum", {})
    return compute(cpu(), run, _routed(factor), *args)


def check_dispatcher(
  dispatcher: str, how: dict[str, str], factor: float | None, dtype: str
) -> Outcome:
  """Checks output and gradients for tokens, gates and weights against dense masks."""
  run = functools.partial(_layer_and_gradients, dispatcher, how)
  with exact_products(dtype):
    got = compute(device(), run, _routed(factor), *_layer_inputs(dtype))
  return agree(got, _dense_masks(factor, dtype), dtype)


def dispatcher_checks() -> Iterator[Check]:
  """Yields checks of each dispatcher, and of `grouped` with each product it may use."""
  variants: list[tuple[str, dict[str, str], str]] = [
    *((name, {}, "") for name in ("einsum", "gather")),
    *(
      ("grouped", {"implementation": name}, _why_not(name))
      for name in (LOOP, *kernels.IMPLEMENTATIONS)
    ),
  ]
  for dtype in DTYPES:
    for factor in (None, 1.0):
      for name, how, reason in variants:
        by = f" ({how['implementation']})" if how else ""
        label = f"{name}{by}, {'dropless' if factor is None else 'capacity'}, {dtype}"
        run = functools.partial(check_dispatcher, name, how, factor, dtype)
        basic = (factor is None) == (dtype == "float32")
        basic = basic and (factor is None or name == "gather")
        yield Check("dispatchers", label, run, reason, basic)
