"""What `import moejax` offers."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.checkpoint import manager as checkpoint
from moejax.errors import ConfigError, UserError
from moejax.routing.registry import ROUTERS
from moejax.train import loop
from tests.train.conftest import cache_dir, compilation_cache, tiny_config

__all__ = ["cache_dir", "compilation_cache"]
"""Fixtures, shared with the tests of training."""


def test_the_package_alone_imports_neither_jax_nor_flax():
  code = (
    "import sys, moejax\n"
    "assert set(moejax.__all__) == set(dir(moejax)), dir(moejax)\n"
    "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_is_there_and_no_other():
  assert all(getattr(moejax, name) is not None for name in moejax.__all__)
  with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
    _ = moejax.Trainer  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("factor", [pytest.param(None, marks=pytest.mark.slow), 1.0])
def test_a_run_gives_the_logits_of_its_own_model(
  factor, cache_dir, compilation_cache, tmp_path
):
  """At any of its steps, with its tokenizer, at its own capacity in evaluation."""
  config = tiny_config(num_steps=2, checkpoint_every=1)
  config.data.cache_dir, config.moe.eval_capacity_factor = cache_dir, factor
  config.train.sample = config.train.report = False
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  run = moejax.load_run(tmp_path)
  assert (run.step, run.config.moe.num_experts) == (2, 4)
  assert run.tokenizer is not None
  ids = run.tokenizer.encode("def main():\n  return the words" * 4)[:64]
  tokens = np.asarray(ids, np.int32).reshape(2, -1)
  logits = run.logits(tokens)
  np.testing.assert_array_equal(logits, run.logits(tokens.tolist()))
  assert logits.shape == (*tokens.shape, run.model.vocab_size)
  assert logits.dtype == jnp.float32
  params, _, _ = checkpoint.restore_params(tmp_path, 2)
  forward = jax.jit(run.model, static_argnames="capacity_factor")
  direct = forward(params, jnp.asarray(tokens), capacity_factor=factor).logits
  np.testing.assert_allclose(logits, direct, rtol=1e-5, atol=1e-5)
  other = forward(params, jnp.asarray(tokens), capacity_factor=0.25).logits
  assert np.abs(np.asarray(logits) - np.asarray(other)).max() > 1e-3
  first = moejax.load_run(tmp_path, step=1)
  assert first.step == 1
  assert np.abs(np.asarray(first.logits(tokens)) - np.asarray(logits)).max() > 1e-4
  half = moejax.load_run(tmp_path, dtype="bfloat16")
  assert half.model.config.dtype == "bfloat16"
  assert half.params["embedding"]["table"].dtype == jnp.float32
  distance = np.abs(np.asarray(half.logits(tokens)) - np.asarray(logits)).max()
  assert 1e-4 < distance < 0.1
  mistakes: tuple[tuple[Any, str], ...] = (
    ([[5, 6], [7]], "rows of different lengths"),
    ([5, 6], r"shape \[2\]: give integers"),
    (np.ones((1, 3)), "tokens of type float64"),
    ([[2**40]], "vocabulary has ids from 0"),
  )
  for wrong, part in mistakes:
    with pytest.raises(UserError, match=part):
      run._checked(wrong)  # Past the check of types that tests have.
  with pytest.raises(UserError, match="vocabulary has ids from 0"):
    run.logits(tokens + 10_000)
  longer = np.zeros((1, 2 * config.data.sequence_length), np.int32)
  with pytest.raises(UserError, match="Rows of .* tokens: the context of this run holds"):
    run.logits(longer)
  run.config.model.max_position = longer.size
  assert run.logits(longer).shape[1] == longer.size
  with pytest.raises(UserError, match="the directory is empty text"):
    moejax.load_run("")
  with pytest.raises(UserError, match="step=7"):
    moejax.load_run(tmp_path, step=7)
  with pytest.raises(UserError, match="dtype=half: give float32 or bfloat16"):
    moejax.load_run(tmp_path, dtype="half")


B, S, D, E, F = 2, 8, 6, 4, 10


def by_hand(weights, x):
  """Top-2 of a softmax, raw gates, gelu experts; every expert computes every token."""
  probs = jax.nn.softmax(x @ weights["router"]["weight"], axis=-1)
  _, best = jax.lax.top_k(probs, 2)
  chosen = jnp.sum(jax.nn.one_hot(best, E), axis=-2)
  hidden = jax.nn.gelu(jnp.einsum("bsd,edf->bsef", x, weights["experts"]["w_in"]))
  out = jnp.einsum("bsef,efd->bsed", hidden, weights["experts"]["w_out"])
  return jnp.einsum("bse,bsed->bsd", probs * chosen, out)


def test_a_layer_alone_is_the_formula_in_value_and_gradient():
  """Without config, mesh or experiment; under jit; a sequence alone is a batch of one."""
  layer = moejax.MoE(width=D, num_experts=E, num_selected=2, hidden=F, rngs=nnx.Rngs(0))
  graph, state = nnx.split(layer)
  weights = nnx.to_pure_dict(state)["layer"]
  x = jax.random.normal(jax.random.key(1), (B, S, D))

  def ours(state, x):
    y, aux = nnx.merge(graph, state)(x)
    return jnp.sum(jnp.sin(y)), (y, aux)

  def theirs(weights, x):
    return jnp.sum(jnp.sin(by_hand(weights, x)))

  grads, (y, aux) = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))(state, x)
  np.testing.assert_allclose(y, jax.jit(by_hand)(weights, x), rtol=1e-4, atol=1e-5)
  want = jax.jit(jax.grad(theirs, argnums=(0, 1)))(weights, x)
  got = (nnx.to_pure_dict(grads[0])["layer"], grads[1])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  one, _ = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x[0])
  np.testing.assert_allclose(one, y[0], rtol=1e-4, atol=1e-5)
  total = 0.01 * aux.losses["balance_loss"] + 0.001 * aux.losses["z_loss"]
  np.testing.assert_allclose(aux.loss, total, rtol=1e-6)
  assert float(aux.stats.chosen.sum()) == 2 * B * S


@pytest.mark.parametrize("router", [n for n, r in ROUTERS.items() if not r.has_table])
def test_every_router_works_in_a_layer_alone(router):
  """Under nnx.jit and nnx.grad; what is not trained has no gradient there."""
  slots: dict[str, Any] = {"group_size": S}
  chosen = ROUTERS[router]
  layer = moejax.MoE(
    width=D,
    num_experts=E,
    num_selected=chosen.fixed_selected or 2,
    hidden=F,
    router=router,
    rngs=nnx.Rngs(0),
    capacity_factor=1.0 if chosen.needs_capacity else None,
    **(slots if chosen.needs_capacity else {}),
  )
  x = jax.random.normal(jax.random.key(1), (B, S, D))

  @nnx.jit
  def step(layer, x):
    def loss_of(layer):
      y, aux = layer(x, train=True, key=jax.random.key(2))
      return jnp.mean(jnp.square(y)) + aux.loss, aux.stats

    wrt = nnx.DiffState(0, moejax.is_trained)
    grads, stats = nnx.grad(loss_of, argnums=wrt, has_aux=True)(layer)
    layer.update_router(stats)
    return grads

  grads = nnx.to_pure_dict(step(layer, x))["layer"]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  own = layer.layer.router.parameter_names
  assert ("bias" in grads["router"]) is False
  if "bias" in own:
    moved = nnx.to_pure_dict(nnx.state(layer))["layer"]["router"]["bias"]
    assert np.any(np.asarray(moved) != 0)


def test_a_key_is_asked_for_where_training_would_be_evaluation(monkeypatch):
  """By the routers that say so, and by all that compute something else with a key."""
  x = jax.random.normal(jax.random.key(1), (2, S, D))
  for name, router in ROUTERS.items():
    if router.has_table or router.needs_capacity:
      continue
    make: Any = dict(width=D, num_experts=E, hidden=F, router=name, rngs=nnx.Rngs(0))
    layer = moejax.MoE(num_selected=router.fixed_selected or 2, **make)
    if router.needs_key:
      with pytest.raises(ValueError, match=f"needs key=.* for router {name}:"):
        layer(x, train=True)
      continue
    with_key, _ = layer(x, train=True, key=jax.random.key(2))
    np.testing.assert_array_equal(with_key, layer(x, train=True)[0])
  make = dict(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))
  for option in ({"jitter": 0.1}, {"expert_dropout": 0.2}, {"priority": "random"}):
    with pytest.raises(ValueError, match=f"for {next(iter(option))}"):
      moejax.MoE(capacity_factor=1.0, **option, **make)(x, train=True)


def test_evaluation_has_a_capacity_of_its_own():
  """That of training, if none is given; a call's own comes first. x may be numpy's."""
  x = np.broadcast_to(np.random.default_rng(1).normal(size=D), (1, S, D))
  x = x.astype(np.float32)
  make: Any = dict(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))

  def served(layer, **call):
    split = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(split[0], state)(x, **call)[1].stats.load)
    return float(run(split[1], x).sum())

  slots = S // E
  assert served(moejax.MoE(capacity_factor=1.0, **make)) == slots
  layer = moejax.MoE(capacity_factor=1.0, eval_capacity_factor=2.0, **make)
  assert served(layer) == 2 * slots and served(layer, train=True) == slots
  assert served(layer, capacity_factor=None) == S


@pytest.mark.parametrize(
  ("x", "call", "part"),
  [
    (np.zeros((2, 3, D + 1), np.float32), {}, rf"expected \[B, S, {D}\]"),
    (np.zeros(D, np.float32), {}, rf"expected \[B, S, {D}\]"),
    (np.zeros((0, 3, D), np.float32), {}, "not empty"),
    (np.zeros((2, 3, D), np.int32), {}, "floating-point"),
    (np.zeros((2, 3, D), np.float32), {"valid": np.ones((2, 4), bool)}, r"bool\[2, 3\]"),
    (np.zeros((2, 3, D), np.float32), {"valid": np.ones((2, 3))}, r"bool\[2, 3\]"),
  ],
)
def test_what_a_layer_cannot_read_is_one_line(x, call, part):
  """Asked of the check itself, before which the tests' own check of types would speak."""
  layer = moejax.MoE(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=part):
    layer._check(jnp.asarray(x), call.get("valid"))


def test_padding_may_be_marked_by_a_list_and_keys_be_old_ones():
  """Other types are one line; past the check of types that tests have."""
  layer: Any = moejax.MoE(
    width=D, num_experts=E, hidden=F, capacity_factor=1.0, jitter=0.1, rngs=nnx.Rngs(0)
  )
  x, valid = np.ones((1, 3, D), np.float32), [[True, True, False]]
  call: Any = moejax.MoE.__call__
  assert call.__wrapped__(layer, x, valid)[1].stats.num_valid == 2
  layer._check_options(True, jax.random.PRNGKey(0), np.float32(2))
  for key in (0, "a", np.zeros(2)):
    with pytest.raises(ValueError, match="give a PRNG key"):
      layer._check_options(True, key, None)
  with pytest.raises(ValueError, match="capacity_factor='2': give a number"):
    layer._check_options(False, None, "2")
  with pytest.raises(TypeError, match="got Aux: give aux.stats"):
    layer.update_router.__wrapped__(layer, layer(x)[1])


def test_arguments_that_do_not_exist_name_the_nearest():
  make: Any = dict(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match="num_slected. Did you mean num_selected"):
    moejax.MoE(num_slected=2, **make)
  with pytest.raises(TypeError, match="go into router_options"):
    moejax.MoE(router="sigmoid_bias", bias_update_rate=0.1, **make)
  with pytest.raises(TypeError, match="dense_twin is for whole models"):
    moejax.MoE(dense_twin=True, **make)
  with pytest.raises(ConfigError, match="moe.group_size=4.0: expected a whole number"):
    moejax.MoE(group_size=4.0, **make)


def test_what_makes_no_sense_is_refused_by_name():
  make: Any = dict(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match=r"moe.num_selected=9 is more than"):
    moejax.MoE(num_selected=9, **make)
  with pytest.raises(ConfigError, match="Did you mean top_k"):
    moejax.MoE(router="topk", **make)
  with pytest.raises(ConfigError, match="only a whole model has .*Use another router"):
    moejax.MoE(router="hash", **make)
  with pytest.raises(ConfigError, match="sigmoid_bias.rate: there is no such option"):
    moejax.MoE(router="sigmoid_bias", router_options={"rate": 1}, **make)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "model": 2}])
def test_on_somebodys_mesh_without_an_expert_axis_it_is_the_same_layer(axes):
  """Left to the compiler, like any layer of their model; under jit and without."""
  layer = moejax.MoE(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, S, D)), jnp.float32)
  graph, state = nnx.split(layer)
  run = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0])
  alone = run(state, x)
  types = (jax.sharding.AxisType.Auto,) * len(axes)
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(run(state, jax.device_put(x, spec)), alone, atol=1e-6)


@pytest.mark.parametrize(
  ("axes", "kind", "part"),
  [
    (("data", "expert"), "Auto", "also needs fsdp, tensor"),
    (("expert",), "Auto", "also needs data, fsdp, tensor"),
    (("data",), "Explicit", r"type Explicit \(data\)"),
    (("data", "fsdp", "expert", "tensor"), "Explicit", "AxisType.Auto,\\) \\* 4"),
  ],
)
def test_a_mesh_that_experts_cannot_use_is_one_line(axes, kind, part):
  layer = moejax.MoE(width=D, num_experts=E, hidden=F, rngs=nnx.Rngs(0))
  shape = (8,) + (1,) * (len(axes) - 1)
  types = (getattr(jax.sharding.AxisType, kind),) * len(axes)
  mesh = jax.make_mesh(shape, axes, axis_types=types)
  with jax.set_mesh(mesh), pytest.raises(ConfigError, match=part):
    jax.eval_shape(layer, jnp.zeros((8, S, D), jnp.float32))


@pytest.mark.parametrize(
  ("given", "part"),
  [
    ({"options": {"top_k": {}}}, "no argument options. .*router_options"),
    ({"dense_after": True}, "dense_after is for whole models"),
    ({"dtype": "bfloat16"}, "the dtype is that of x"),
  ],
)
def test_an_argument_that_does_nothing_is_refused(given, part):
  with pytest.raises(TypeError, match=part):
    moejax.MoE(**{"width": D, "num_experts": E, "hidden": F, "rngs": nnx.Rngs(0)} | given)
