"""Reading the recorded outputs, and running our routers on their inputs."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import losses, registry
from moejax.routing.base import RouterInputs, Routing, SlotPolicy

FOLDER = Path(__file__).parent / "routing"


@functools.cache
def _index() -> dict[str, dict]:
  lines = (FOLDER / "index.jsonl").read_text().splitlines()
  return {record["name"]: record for record in map(json.loads, lines)}


@functools.cache
def _arrays(source: str):
  return np.load(FOLDER / f"{source}.npz")


FAST = {
  "flaxformer_tokens_masked.k2.bpr.pad.c1",
  "vmoe_top_items.c1",
  "vmoe_top_experts.k2.bpr.c1",
  "vmoe_router.k2.noisy.c1",
  "tutel_topk.k2.c1",
  "deepspeed_topk_probs.k2.c1",
  "praxis_top2.random.c1",
  "praxis_top2.random.renorm_after_drop.c1",
  "megablocks_router.l2.c1",
  "hf_qwen2_moe_block.c1",
  "axlearn_bias.grouped.c1",
  "megatron_sigmoid_bias_groups.c1",
  "hf_deepseek_v3_block.c1",
}
"""One case per source runs always; the others are for the nightly run."""


def names(*prefixes: str, leave_out: str = "-") -> list:
  """Recorded cases whose name begins with one of the prefixes, as test parameters."""
  chosen = [n for n in _index() if n.startswith(prefixes) and leave_out not in n]
  slow = pytest.mark.slow
  return [n if n in FAST else pytest.param(n, marks=slow, id=n) for n in chosen]


class Golden:
  """One recorded case: `g["array"]`, `g.params`, and comparisons that name it."""

  def __init__(self, name: str):
    self.name = name
    self.params = _index()[name]["params"]
    self._file = _arrays(name.split("_")[0])

  def __contains__(self, array: str) -> bool:
    return f"{self.name}/{array}" in self._file

  def __getitem__(self, array: str) -> np.ndarray:
    return self._file[f"{self.name}/{array}"]

  def groups(self, array: str, rank: int) -> jax.Array:
    """With a leading group axis, also where the source has none."""
    value = jnp.asarray(self[array])
    return value if value.ndim == rank else value[None]

  def same(self, array: str, got) -> None:
    """Masks, indices and counts: exactly."""
    np.testing.assert_array_equal(np.asarray(got).reshape(self[array].shape), self[array])

  def near(self, array: str, got, tolerance: float = 2e-6) -> None:
    """Values to 2e-6 of the largest; losses and gradients are called with 1e-5."""
    want = self[array]
    scale = max(float(np.max(np.abs(want))), 1e-3)
    got = np.asarray(got).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


KEY = jax.random.key(0)


def cotangent(shape) -> jax.Array:
  """The weights that gradients were recorded with."""
  n = int(np.prod(shape))
  return jnp.asarray(np.cos(np.arange(n)).reshape(shape), jnp.float32)


def run(name: str, logits, options: dict, valid=None, key=None, **extra):
  """[G,T,E] logits through a router, one group after the other, stacked.

  Options of another router are left out: some recordings have them at their defaults.
  """
  policy = {f.name for f in dataclasses.fields(SlotPolicy)}
  own = registry.options_by_name(name)
  router = registry.make(name, {n: v for n, v in options.items() if n in own})
  options = {n: v for n, v in options.items() if n in policy}
  if "bias" in extra:
    extra["params"] = {"bias": extra.pop("bias")}
  valid = jnp.ones(logits.shape[:2], bool) if valid is None else valid

  @jax.jit
  def groups(logits, valid, key, extra):
    parts = [
      router(
        RouterInputs(logits=logits[g], valid=valid[g], key=key, **extra),
        SlotPolicy(**options),
      )
      for g in range(logits.shape[0])
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

  return groups(logits, valid, key, extra)


@jax.jit
def combine(routing: Routing) -> jax.Array:
  return jax.vmap(lambda group: group.combine_weights())(routing.placement)


@jax.jit
def mask(routing: Routing) -> jax.Array:
  return jax.vmap(lambda group: group.dispatch_mask())(routing.assignments)


@functools.partial(jax.jit, static_argnames="first")
def balance(routing: Routing, valid=None, *, first=False, chosen=None) -> jax.Array:
  """Mean over groups of the balance loss."""
  shape = routing.probs.shape[:2]
  valid = jnp.ones(shape, bool) if valid is None else valid
  if chosen is None:
    chosen = routing.stats.chosen
  if first:
    chosen = jax.vmap(losses.first_choices)(routing, valid)
  return jnp.mean(jax.vmap(losses.balance_loss)(routing.probs, chosen, valid))


@jax.jit
def z(logits, valid=None) -> jax.Array:
  """Mean over groups of the z-loss."""
  valid = jnp.ones(logits.shape[:2], bool) if valid is None else valid
  return jnp.mean(jax.vmap(losses.z_loss)(logits, valid))


def options_of(g: Golden, **changes) -> dict:
  """E, K and C of a case, and what it sets of policy and router."""
  base = {
    "num_experts": g.params["E"],
    "num_selected": g.params.get("K", 1),
    "capacity": g.params.get("C"),
  }
  return {**base, **changes}


def give(monkeypatch, function: str, values) -> None:
  """Replaces jax.random.`function` by recorded draws, one group after the other."""
  state = {"next": 0}

  def draw(*args, **kwargs):
    state["next"] += 1
    return jnp.asarray(values[(state["next"] - 1) % len(values)])

  monkeypatch.setattr(f"jax.random.{function}", draw)


def check_gradients(g: Golden, route, first: bool, valid=None) -> None:
  """Compares the gradients of the combine weights, and of the balance loss."""
  logits = g.groups("logits", 3)

  def combined(logits):
    out = combine(route(logits))[..., : g.params["C"]]
    return jnp.sum(out * cotangent(out.shape))

  def aux(logits):
    return balance(route(logits), valid, first=first)

  g.near("grad_logits_combine", jax.jit(jax.grad(combined))(logits), 1e-5)
  if "grad_logits_aux" in g:
    g.near("grad_logits_aux", jax.jit(jax.grad(aux))(logits), 1e-5)
