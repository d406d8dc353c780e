"""The router of docs/adding_a_router.md, run as the page has it."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.routers import run as study
from moejax import config, config_ranges
from moejax.routing import base, registry, token_choice
from moejax.routing.base import RouterInputs

PAGE = Path(__file__).parents[2] / "docs/adding_a_router.md"
T, E, K = 64, 8, 2


def blocks() -> list[str]:
  return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def page(monkeypatch):
  """The page's code, executed where it says it goes; everything as before afterwards."""
  function, fields, limits, entry, variant = blocks()
  for name in ("RANGES",):
    monkeypatch.setattr(config_ranges, name, dict(getattr(config_ranges, name)))
  monkeypatch.setattr(registry, "ROUTERS", dict(registry.ROUTERS))
  monkeypatch.setattr(study, "VARIANTS", dict(study.VARIANTS))
  space = {**vars(token_choice), "jnp": jnp}
  exec(function, space)
  values: dict = {}
  exec(fields, values)
  made = [("gate_power", float, values["gate_power"])]
  options = dataclasses.make_dataclass(
    "Options", made, bases=(base.RouterOptions,), frozen=True, kw_only=True
  )
  exec(limits, vars(config_ranges) | {"RANGES": config_ranges.RANGES})
  exec(entry, {**vars(registry), "powered": space["powered"]})
  exec(variant, {"VARIANTS": study.VARIANTS, "TWO": study.TWO})
  return options


def routed(options, **inputs):
  logits = np.random.default_rng(0).normal(size=(T, E)).astype(np.float32)
  return registry.ROUTERS["powered"].fn(
    RouterInputs(logits=jnp.asarray(logits), valid=jnp.ones(T, bool), **inputs), options
  )


def test_the_pages_router_does_what_the_page_says(page):
  """Annealed gates, given-up choices that take no slot and count in the sum of
  before_drop, moved tokens with powered gates, and no absent expert."""
  options = page(num_experts=E, num_selected=K)
  probs = routed(options).probs
  first = np.asarray(jnp.max(probs, axis=-1))
  gate = lambda r: np.asarray(r.gate).reshape(T, K)  # noqa: E731
  np.testing.assert_allclose(gate(routed(options))[:, 0], first**0.5, rtol=1e-5)
  begun = routed(options, step=jnp.int32(0), key=jax.random.key(0))
  np.testing.assert_allclose(gate(begun)[:, 0], first, rtol=1e-5)
  half = routed(options, step=jnp.int32(500), key=jax.random.key(0))
  np.testing.assert_allclose(gate(half)[:, 0], first**0.75, rtol=1e-5)

  second = -np.sort(-np.asarray(probs), axis=1)[:, 1]
  given_up = second <= 1 / E
  assert 0 < given_up.sum() < T
  assert int(begun.load.sum()) == 2 * T - given_up.sum()
  before = routed(dataclasses.replace(options, renormalize="before_drop"))
  after = routed(dataclasses.replace(options, renormalize="after_drop"))
  assert (gate(before)[given_up].sum(1) < 0.9).all()
  np.testing.assert_allclose(gate(after)[given_up], [[1.0, 0.0]] * given_up.sum())

  moved = routed(dataclasses.replace(options, capacity=14, overflow="next_best"))
  expert, kept = (np.asarray(a).reshape(T, K) for a in (moved.expert, moved.kept))
  served = np.take_along_axis(np.asarray(probs), expert, axis=1) ** 0.5
  np.testing.assert_allclose(gate(moved)[kept], served[kept], rtol=1e-5)

  here = jnp.arange(E) < E - 2
  hidden = jnp.tile(jnp.where(here, 0.0, -1e9)[None], (T, 1))
  out = registry.ROUTERS["powered"].fn(
    RouterInputs(logits=hidden, valid=jnp.ones(T, bool), present=here), options
  )
  assert int(out.load[-2:].sum()) == 0


def test_the_pages_option_is_checked_and_belongs_to_its_router(page):
  """A range that refuses, and a reader that no other router is."""
  assert 0.7 in config_ranges.RANGES["moe.gate_power"]
  assert 1.5 not in config_ranges.RANGES["moe.gate_power"]
  assert registry.ROUTERS["powered"].reads == ("gate_power",)
  assert study.VARIANTS["powered"][-1] == "moe.router=powered"
  assert not hasattr(config.MoEConfig(), "gate_power")
