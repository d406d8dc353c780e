"""Decoding: buckets, chunks and layers laid out one by one change no result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.evaluate import buckets, decoding
from moejax.experts.blocks import cover, sizes_for
from tests.evaluate import tiny

GREEDY = decoding.Sampling.of(0.0)
ALLOWED = np.ones(264, bool)
PROMPTS = [[256, 1, 2, 3], [256], [256, *range(40, 57)]]


def make(**changes) -> decoding.Engine:
  return decoding.Engine(*tiny.model_and_params(**changes))


def run(engine: decoding.Engine, prompts, new=6, **kwargs) -> list[list[int]]:
  settings: dict[str, Any] = {"how": GREEDY, "stop": [], "allowed": ALLOWED} | kwargs
  return engine.run(prompts, [new] * len(prompts), **settings).tokens


VARIANTS = {
  "three_layers": {"model__num_layers": 3},
  "prefix_and_window": {
    "model__num_layers": 5,
    "moe__every": 2,
    "moe__dense_prefix": 1,
    "model__sliding_window": 5,
    "model__num_kv_heads": 2,
  },
  "random": {"moe__router": "random"},
  "forced_balance": {"moe__router": "forced_balance"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_other_lengths_change_nothing(name):
  """Each row's tokens are those it has alone, also under routers that ask for places."""
  engine = make(**VARIANTS[name])
  together = run(engine, PROMPTS)
  assert together == [run(engine, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["three_layers", "prefix_and_window"])
def test_unrolled_is_the_same_model(name):
  """A block per layer, prefix, repeats and suffix in order, gives the same logits."""
  model, params = tiny.model_and_params(**VARIANTS[name])
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 264, (2, 9)), jnp.int32)
  wanted = jax.jit(lambda p: model(p, ids, capacity_factor=None).logits)(params)
  flat = model.unrolled
  last = jax.jit(lambda p: flat(p, ids, capacity_factor=None, last_only=True).logits)
  got = last(model.unroll(params))
  np.testing.assert_allclose(got[:, 0], wanted[:, -1], atol=1e-5, rtol=1e-5)


def test_chunks_read_what_one_call_reads(monkeypatch):
  """A prompt of 18 ids in chunks of 4 gives the tokens of a single prefill."""
  engine = make()
  whole = run(engine, PROMPTS)
  monkeypatch.setattr(buckets, "CHUNK", 4)
  assert run(engine, PROMPTS) == whole
  assert buckets.prompt_size(18) == (20, 4)


def test_lengths_of_one_bucket_compile_once():
  """Prompts of 2 to 16 ids and 3 to 16 new tokens share both programs."""
  engine = make()
  run(engine, [[256, 1]], new=3)
  programs = decoding.programs("cpu")
  before = [program._cache_size() for program in programs]
  run(engine, [[256] * 16], new=16)
  run(engine, [[256] * 9], new=5)
  assert [program._cache_size() for program in programs] == before


def test_a_router_with_a_capacity_sees_each_length_by_itself():
  """No padding reaches its groups, so a row's tokens are those it has alone."""
  engine = make(
    moe__router="expert_choice",
    moe__capacity_factor=1.0,
    moe__eval_capacity_factor=1.0,
    moe__allow_future_leak=True,
  )
  together = run(engine, PROMPTS, new=3)
  assert together == [run(engine, [prompt], new=3)[0] for prompt in PROMPTS]


def test_a_row_ends_by_its_text():
  """It is asked every 2 steps, of each row by its number."""
  asked = []

  def is_done(row: int, ids: list[int]) -> bool:
    asked.append((row, len(ids)))
    return row == 0

  first, second = run(make(), PROMPTS[:2], is_done=is_done, every=2)
  assert (len(first), len(second)) == (3, 6)
  assert asked == [(0, 3), (1, 3), (1, 5)]


def test_a_few_rows_are_not_padded_to_sixteen():
  """A step of 4 assignments to 32 experts: each of them is a block of one row."""
  sizes = sizes_for(4, 32)
  assert sizes == (4, 1)
  assert list(cover(sizes)[1]) == [0, 1]


def test_the_cache_of_latent_attention_is_its_vectors():
  """(rank + rotated width) numbers per token and layer, whatever the heads: 3 rows, 24
  tokens, 2 layers, 12 + 6 floats of 4 bytes. With room for 8 more, of 32 tokens."""
  model, _ = tiny.model_and_params(
    model__attention="latent",
    model__kv_rank=12,
    model__rope_head_dim=6,
    model__nope_head_dim=10,
    model__value_head_dim=14,
    model__num_layers=2,
  )
  flat = model.unrolled
  for length, make in (
    (24, lambda: flat.init_cache(3, 24)),
    (32, lambda: flat.init_cache(3, 24).longer(8)),
  ):
    leaves = jax.tree.leaves(jax.eval_shape(make).layers)
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 3 * length * 2 * 72
