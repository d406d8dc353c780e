"""The speed of MoE layers of published shapes, as a fraction of the device's rate.

The device's rate is measured with one large matrix product. Each layer is compared with a
dense one of equal active FLOPs, and with torch's grouped product of the same rows, if
torch is installed and supports this kind of device. Sizes are those of the papers, with
as many tokens as fit in memory; on a CPU widths are an eighth or less.

Letters: T tokens, D width, F hidden width, E experts, K choices per token, N = T*K rows.
"""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.device_check import layer_variants
from moejax.device_check.checks import Options, platform
from moejax.device_check.compare import device
from moejax.device_check.runner import Check, Outcome
from moejax.device_check.shapes import FACTOR, Shape
from moejax.dispatch.rows import Rows
from moejax.experts import permute
from moejax.experts.grouped_matmul import apply_ragged_experts
from moejax.experts.weights import ExpertWeights
from moejax.run import timing

SHAPES = (
  # OLMoE-1B-7B, arXiv:2409.02060, table 1; Mixtral 8x7B, arXiv:2401.04088, table 1.
  Shape("OLMoE", T=16384, D=2048, F=1024, E=64, K=8),
  Shape("Mixtral", T=16384, D=4096, F=14336, E=8, K=2),
)
PRODUCT = "matrix product"
SECONDS = 5.0
"""Seconds of timing per shape and direction, without warm-up and compilation."""
MEMORY_SHARE = 0.4
"""Fraction of a device's memory that a layer may take, by our rough estimate."""


def dtype() -> str:
  return "float32" if platform() == "cpu" else "bfloat16"


def bytes_of(shape: Shape) -> int:
  """Returns the bytes of the backward pass: weights, gradients, rows, hidden values."""
  weights = 3 * shape.E * shape.D * shape.F
  rows = shape.T * shape.K
  dense = 3 * shape.K * shape.D * shape.F
  return 2 * (2 * (weights + dense) + rows * (6 * shape.F + 4 * shape.D))


def fit(shape: Shape, memory: int) -> Shape:
  """Returns the shape with fewer tokens, and then narrower, until the layer fits."""
  while bytes_of(shape) > MEMORY_SHARE * memory:
    if shape.T > 2048:
      shape = dataclasses.replace(shape, T=shape.T // 2)
    else:
      shape = dataclasses.replace(shape, D=shape.D // 2, F=shape.F // 2)
  return shape


def scaled(shape: Shape, options: Options) -> Shape:
  """Returns the shape for this device."""
  if options.small:
    return dataclasses.replace(shape, T=64, D=64, F=max(32, shape.F // 128))
  if platform() == "cpu":
    return dataclasses.replace(shape, T=512, D=shape.D // 8, F=shape.F // 8)
  memory = (device().memory_stats() or {}).get("bytes_limit", 16 * 2**30)
  return fit(shape, memory)


@functools.cache
def product(small: bool) -> tuple[int, Callable[[], Any]]:
  """Returns the side of square matrices, and their product, ready to be timed."""
  size = 128 if small else 1024 if platform() == "cpu" else 8192
  a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype()) for i in range(2))
  compiled = jax.jit(jnp.matmul).lower(a, b).compile()
  return size, lambda: compiled(a, b).block_until_ready()


def check_rate(options: Options) -> Outcome:
  """Measures the FLOP/s of the product alone."""
  size, run = product(options.small)
  times = timing.interleave({PRODUCT: run}, seconds=0.1 if options.small else 2.0)
  rate = 2 * size**3 / statistics.median(times[PRODUCT])
  detail = f"{rate / 1e12:.3g} TFLOP/s, {size}^3 {dtype()}"
  return Outcome(detail, {"flops": rate})


def flops_of(shape: Shape, direction: str) -> float:
  """Returns FLOPs of three products per row and the router, tripled with gradients."""
  forward = 6 * shape.T * shape.K * shape.D * shape.F + 2 * shape.T * shape.D * shape.E
  return forward * (1 if direction == "forward" else 3)


def report(
  shape: Shape, flops: float, times: dict[str, list[float]], product_flops: float
) -> Outcome:
  """Returns medians and fractions of the product's rate, for all functions timed."""
  rate = product_flops / statistics.median(times[PRODUCT])
  numbers: dict[str, float] = dataclasses.asdict(shape) | {"rate": rate}
  numbers.pop("name")
  parts = []
  for name, runs in times.items():
    if name == PRODUCT:
      continue
    seconds = statistics.median(runs)
    share = flops / seconds / rate
    numbers |= {f"{name} ms": 1e3 * seconds, f"{name} share": share}
    parts.append(f"{name} {share:.0%} ({1e3 * seconds:.3g} ms)")
  sizes = " ".join(f"{k}={getattr(shape, k)}" for k in "TDFEK")
  return Outcome(f"{', '.join(parts)}; {sizes}", numbers)


def time_beside_product(
  shape: Shape, flops: float, functions: dict[str, Callable[[], Any]], options: Options
) -> Outcome:
  """Times functions interleaved with the product, so that a slow spell affects both."""
  size, run = product(options.small)
  seconds = 0.1 if options.small else SECONDS
  times = timing.interleave({**functions, PRODUCT: run}, seconds=seconds, min_rounds=3)
  return report(shape, flops, times, 2 * size**3)


def check_layer(shape: Shape, direction: str, options: Options) -> Outcome:
  """Times a whole MoE layer, dropless and with a capacity, against a dense layer."""
  shape = scaled(shape, options)
  settings = layer_variants.Settings.make(dtype(), "swiglu")
  layers = {
    "dropless": layer_variants.make_moe(shape, settings, "auto", None, skew=False),
    "capacity": layer_variants.make_moe(shape, settings, "auto", FACTOR, skew=False),
    "dense": layer_variants.make_dense(shape, settings),
  }
  compiled = {
    name: layer_variants.compile_direction(*layer, shape, settings, direction).run
    for name, layer in layers.items()
  }
  return time_beside_product(shape, flops_of(shape, direction), compiled, options)


# Torch.


def torch_device() -> tuple[str, str]:
  """Returns where torch would compute, or else why it cannot."""
  if importlib.util.find_spec("torch") is None:
    return "", "torch is not installed"
  if platform() == "cpu":
    return "cpu", ""
  if platform() == "tpu":
    return "", "torch has no TPU"
  import torch  # pyright: ignore[reportMissingImports]  # Never a dependency.

  return ("cuda", "") if torch.cuda.is_available() else ("", "torch sees no GPU")


def torch_experts(
  shape: Shape, sizes: np.ndarray, where: str
) -> tuple[str, Callable[[], Any]]:
  """Returns SwiGLU experts on sorted rows: torch's grouped product, or one by one."""
  import torch  # pyright: ignore[reportMissingImports]

  def normal(*size: int) -> Any:
    kind = torch.bfloat16 if dtype() == "bfloat16" else torch.float32
    return torch.randn(size, dtype=kind, device=where) * size[-1] ** -0.5

  x = normal(int(sizes.sum()), shape.D)
  # Stored [E, out, in], as torch's linear layers are, and seen transposed.
  w_in, w_gate = (normal(shape.E, shape.F, shape.D).transpose(1, 2) for _ in range(2))
  w_out = normal(shape.E, shape.D, shape.F).transpose(1, 2)
  ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device=where)
  cuts = [0, *np.cumsum(sizes).tolist()]

  def loop(a: Any, b: Any) -> Any:
    return torch.cat([a[cuts[e] : cuts[e + 1]] @ b[e] for e in range(shape.E)])

  def forward(product: Callable[[Any, Any], Any]) -> Any:
    with torch.no_grad():
      hidden = torch.nn.functional.silu(product(x, w_gate)) * product(x, w_in)
      out = product(hidden, w_out)
      if where == "cuda":
        torch.cuda.synchronize()
      return out

  grouped = getattr(torch.nn.functional, "grouped_mm", None)
  grouped = grouped or getattr(torch, "_grouped_mm", None)
  if grouped is not None:
    product = functools.partial(grouped, offs=ends)
    try:
      forward(product)
    except (RuntimeError, TypeError):
      grouped = None  # Not available for this dtype or device.
    else:
      return "torch grouped_mm", lambda: forward(product)
  return "torch loop", lambda: forward(loop)


def check_torch(shape: Shape, options: Options) -> Outcome:
  """Times the experts alone on sorted rows, forward, interleaved with torch's."""
  shape = scaled(shape, options)
  chosen = np.random.default_rng(0).integers(0, shape.E, shape.T * shape.K)
  sizes = np.bincount(chosen, minlength=shape.E).astype(np.int32)
  name, run_torch = torch_experts(shape, sizes, torch_device()[0])
  settings = layer_variants.Settings.make(dtype(), "swiglu")
  params, _ = layer_variants.make_moe(shape, settings, "auto", None, skew=False)
  rows = jax.random.normal(jax.random.key(0), (chosen.size, shape.D), dtype())
  compiled = jax.jit(_experts_on_rows).lower(rows, params["experts"], sizes).compile()

  def ours() -> Any:
    return jax.block_until_ready(compiled(rows, params["experts"], sizes))

  functions = {"moejax": ours, name: run_torch}
  flops = 6 * shape.T * shape.K * shape.D * shape.F
  return time_beside_product(shape, flops, functions, options)


def _experts_on_rows(rows: jax.Array, weights: ExpertWeights, sizes: jax.Array) -> Any:
  """Returns what the dispatcher `grouped` computes from rows already in order."""
  if platform() != "cpu":
    return apply_ragged_experts(rows, sizes, weights, "swiglu")
  index = jnp.arange(rows.shape[0], dtype=jnp.int32)
  every = jnp.ones(index.shape, bool)
  moves = permute.Moves(
    token=index,
    place=index,
    kept=every,
    assignment=index,
    used=every,
    num_tokens=rows.shape[0],
    num_selected=1,
  )
  gate = jnp.ones(index.shape, jnp.float32)
  return Rows(moves=moves, gate=gate, load=sizes).run(rows, weights, activation="swiglu")


def speed_checks(options: Options) -> Iterator[Check]:
  """Yields checks: the rate, then each shape, forward, with gradients, and in torch."""
  yield Check("speed", PRODUCT, functools.partial(check_rate, options))
  for shape in SHAPES:
    for direction in ("forward", "both"):
      run = functools.partial(check_layer, shape, direction, options)
      label = f"{shape.name} layer, {direction}"
      yield Check("speed", label, run, basic=direction == "forward")
    run = functools.partial(check_torch, shape, options)
    yield Check("speed", f"{shape.name} experts beside torch", run, torch_device()[1])
