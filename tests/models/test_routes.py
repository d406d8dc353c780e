"""Routes: what a call returns of its routers' decisions, on request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MeshConfig, ModelConfig, MoEConfig
from moejax.layers.block import CallOptions
from moejax.models.decoder import Decoder
from moejax.sharding.mesh import make_mesh

VOCABULARY = 32


def _model(**moe) -> Decoder:
  model = ModelConfig(num_layers=4, width=8, num_heads=2, hidden=8, scan_layers=True)
  options = {"num_experts": 4, "num_selected": 2, "hidden": 8, "router": "top_k"}
  return Decoder(model, MoEConfig(**options | moe), vocab_size=VOCABULARY)


def _params(model: Decoder):
  """Random parameters, drawn by numpy: compiling `init` is the dear part."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    return jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype)

  return jax.tree.map(draw, model.shapes())


def _batch() -> tuple[jax.Array, jax.Array]:
  tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, VOCABULARY)
  segment_ids = jnp.ones_like(tokens).at[-1, 8:].set(0)
  return tokens, segment_ids


@pytest.fixture(scope="module")
def routed():
  model = _model(group_size=32, eval_capacity_factor=0.75)
  params = _params(model)
  tokens, segment_ids = _batch()
  call = jax.jit(
    lambda p: model(
      p, tokens, segment_ids=segment_ids, return_routes=True, return_served=True
    )
  )
  return model, params, call(params)


def test_routes_agree_with_statistics_and_served(routed):
  """Under scan, in four groups of two sequences, with drops and padding."""
  _, _, out = routed
  routes, stats = out.routes, out.stats
  assert routes.logits.shape == (2, 8, 16, 4) and routes.expert.shape == (2, 8, 16, 2)
  np.testing.assert_array_equal(routes.served, out.served)
  np.testing.assert_array_equal(routes.served.sum((1, 2)), stats.load)
  assert not routes.kept[:, -1, 8:].any()
  assert routes.kept.sum() < 2 * 2 * (8 * 16 - 8)
  # A choice is kept where its expert computes the token, and only there has it a gate.
  chosen = np.take_along_axis(np.asarray(routes.served), np.asarray(routes.expert), -1)
  np.testing.assert_array_equal(chosen, routes.kept)
  np.testing.assert_array_equal(routes.gate > 0, routes.kept)
  valid = np.asarray(_batch()[1] > 0)
  probs = np.asarray(routes.probs)[:, valid]
  np.testing.assert_allclose(probs.sum(axis=1), stats.importance, rtol=1e-5)


def test_a_mesh_returns_the_same_routes(routed):
  model, params, out = routed
  tokens, segment_ids = _batch()
  with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])):
    call = jax.jit(
      lambda p: model(p, tokens, segment_ids=segment_ids, return_routes=True).routes
    )
    routes = call(params)
  np.testing.assert_array_equal(routes.expert, out.routes.expert)
  np.testing.assert_array_equal(routes.kept, out.routes.kept)
  np.testing.assert_allclose(routes.logits, out.routes.logits, atol=1e-5)


def test_nothing_is_returned_unasked(routed):
  """And the program is the one without the option."""
  model, params, _ = routed
  tokens, _ = _batch()
  shapes = jax.eval_shape(model, params, tokens)
  assert shapes.routes is None and shapes.served is None


def test_an_absent_expert_serves_no_token_in_evaluation(routed):
  """What expert dropout does in training, an evaluation can ask for."""
  model, params, _ = routed
  tokens, segment_ids = _batch()
  present = jnp.ones((2, 4), bool).at[0, 1].set(False)
  out = jax.jit(
    lambda p: model(
      p, tokens, segment_ids=segment_ids, present=present, return_routes=True
    )
  )(params)
  assert not out.routes.served[0, ..., 1].any() and out.routes.served[1, ..., 1].any()


@pytest.mark.parametrize("router", ["expert_choice", "hash", "sigmoid_bias"])
def test_routers_say_what_they_choose(router):
  """Tokens that do not choose have no choices, and are served all the same."""
  model = _model(router=router, num_selected=1, eval_capacity_factor=1.0)
  shapes = jax.eval_shape(
    lambda p, t: model(p, t, return_routes=True), model.shapes(), _batch()[0]
  )
  assert (shapes.routes.expert is None) == (router == "expert_choice")
  assert shapes.routes.served.shape == (2, 8, 16, 4)


def test_blocks_one_by_one_are_the_model():
  """`begin`, each block's two halves, `finish`: for whoever stops in between."""
  model = _model(capacity_factor=None, dense_prefix=2, offset=0, every=1)
  params = _params(model)
  tokens, _ = _batch()

  @jax.jit
  def by_hand(params):
    options = CallOptions(train=False, capacity_factor=None)
    x, inputs, _ = model.begin(params, tokens, options)
    for path in model.stack.paths:
      block, own = model.stack.block(params, inputs, path)
      x, _ = block.attend(x, own)
      x, _ = block.feed(x, own)
    return model.finish(params, x)

  want = jax.jit(lambda p: model(p, tokens).logits)(params)
  assert [path.part for path in model.stack.paths] == 2 * ["prefix"] + 2 * ["unit"]
  np.testing.assert_allclose(by_hand(params), want, rtol=1e-5, atol=1e-5)
