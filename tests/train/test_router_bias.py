"""Router biases: moved once a step, by what the whole batch did."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.models.decoder import Decoder
from moejax.routing.base import RouterStats
from moejax.train import step as step_lib
from tests.train.conftest import make_batch, make_setup, tiny_config


@pytest.fixture(scope="module")
def biased(compilation_cache):
  """One MoE layer of four experts, two chosen, dropless."""
  config = tiny_config()
  config.moe.use_router("sigmoid_bias", bias_update_rate=0.5)
  config.moe.capacity_factor, config.moe.num_selected = None, 2
  return make_setup(config)


def find_bias(state) -> np.ndarray:
  """The bias leaf, wherever the one MoE layer of the model stands."""
  leaves = jax.tree_util.tree_leaves_with_path(state["params"])
  [found] = [
    leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith("['bias']")
  ]
  return np.asarray(found).reshape(-1)


def test_a_step_moves_each_bias_towards_the_mean_load(biased):
  """Rate * sign(mean - load), from this step's loads; the optimizer adds nothing."""
  state = biased.state()
  expected = np.zeros(4)
  for seed in range(3):
    state, [seen] = biased.run(state, make_batch(seed))
    chosen = seen.sums.stats.chosen.reshape(-1)
    assert chosen.sum() == 2 * seen.sums.tokens
    expected = expected + 0.5 * np.sign(chosen.mean() - chosen)
    np.testing.assert_allclose(find_bias(state), expected, rtol=1e-6)
  assert np.any(expected != 0)


def test_accumulation_moves_the_bias_once(biased):
  """Four microbatches or one batch: the same loads, the same bias."""
  batch, whole = biased.place(make_batch(3)), biased.state()
  once, _ = jax.jit(
    lambda s, b: step_lib.train_step(biased.model, biased.optimizer, s, b)
  )(whole, batch)
  four, _ = jax.jit(
    lambda s, b: step_lib.train_step(biased.model, biased.optimizer, s, b, accumulation=4)
  )(whole, batch)
  np.testing.assert_array_equal(find_bias(once), find_bias(four))


def test_a_skipped_step_and_an_evaluation_move_nothing(biased):
  """A non-finite step leaves everything as it was; evaluation has no state at all."""
  state, _ = biased.run(biased.state(), make_batch(0))
  before = find_bias(state)
  poisoned = copy.deepcopy(jax.device_get(state["params"]))
  poisoned["embedding"] = jax.tree.map(lambda x: x * np.nan, poisoned["embedding"])
  state = state | {"params": jax.tree.map(jnp.asarray, poisoned)}
  state, [seen] = biased.run(state, make_batch(1))
  assert seen.bad_total == 1
  np.testing.assert_array_equal(find_bias(state), before)


def test_every_layer_gets_its_own_loads():
  """Prefix, repeats of the unit and suffix: bias l moves by the loads of layer l."""
  moe = MoEConfig(
    num_experts=4,
    num_selected=2,
    hidden=8,
    router="sigmoid_bias",
    every=2,
    offset=0,
    options={"sigmoid_bias": {"bias_update_rate": 1.0}},
  )
  model = Decoder(
    ModelConfig(num_layers=7, width=8, num_heads=2, hidden=8), moe, vocab_size=16
  )
  params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.shapes())
  num_layers = len(model.moe_layers)
  assert num_layers == 4 and model.pattern.repeats == 3
  # Layer l has loads whose signs against their mean are those of the bits of l + 1.
  bits = (np.arange(num_layers)[:, None] + 1) >> np.arange(4)[None, :] & 1
  chosen = jnp.asarray(np.where(bits, 10.0, 1.0), jnp.float32)
  once = jnp.zeros((num_layers,))
  stats = RouterStats(
    num_valid=once,
    chosen=chosen,
    load=chosen,
    importance=chosen,
    entropy=once,
    dropped_tokens=once,
  )
  moved = model.update_routers(params, stats)
  unit = moved["unit"]["0"]["moe"]["router"]["bias"]
  suffix = moved["suffix"]["0"]["moe"]["router"]["bias"]
  np.testing.assert_array_equal(
    np.concatenate([unit, suffix[None]]), np.where(bits, -1.0, 1.0)
  )
  assert not np.any(params["unit"]["0"]["moe"]["router"]["bias"])
