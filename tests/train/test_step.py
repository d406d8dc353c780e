"""The train step: what it adds up, what it refuses, where it runs."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MeshConfig
from moejax.models.loss import cross_entropy, forward_sums
from moejax.models.output import DecoderOutput
from moejax.train import state as state_lib
from moejax.train import step as step_lib
from tests.train.conftest import make_batch, make_setup, tiny_config


def _close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def test_cross_entropy_by_hand():
  """Logits log(1), log(3): probabilities 1/4 and 3/4."""
  logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]))
  losses = cross_entropy(logits, jnp.array([[0, 1]], jnp.int32))
  np.testing.assert_allclose(losses[0], [np.log(4), np.log(4 / 3)], rtol=1e-6)


def test_accumulation_equals_the_large_batch(setup, gradients):
  """Gradients and every sum agree to float32 rounding, padding of any length.

  Microbatches hold different numbers of valid tokens, so a mean of means would
  be off by per cents.
  """
  params, batch = setup.state()["params"], setup.place(make_batch(3))

  @jax.jit
  def in_four(p, b):
    key = jax.random.key(7)
    return step_lib.loss_gradients(setup.model, p, b, key, accumulation=4)

  sums, large = gradients(params, batch)
  micro_sums, micro = in_four(params, batch)
  _close(micro, large, atol=1e-6, rtol=1e-5)
  _close(micro_sums, sums, rtol=1e-6, atol=1e-6)


def test_microbatches_are_exchanged_within_the_loop(setup):
  """XLA for TPU fails where it tries to add them up first; no test compiles for one."""
  params, batch = setup.state()["params"], setup.place(make_batch(3))

  def in_two(p):
    key = jax.random.key(7)
    return step_lib.loss_gradients(setup.model, p, batch, key, accumulation=2)

  program = str(jax.make_jaxpr(in_two)(params))
  assert program.count("optimization_barrier") >= len(jax.tree.leaves(params))


def test_accumulation_equals_the_large_batch_when_it_is_balanced_as_a_whole(setup):
  """balance_scope=batch: each microbatch's loss needs the loads of all the others.

  The term is weighted up until it dominates the router's gradient, and is really
  another one than that of the groups.
  """
  batch, key = setup.place(make_batch(3)), jax.random.key(7)

  def of(scope: str, accumulation: int):
    config = copy.deepcopy(setup.config)
    config.moe.balance_scope, config.moe.balance_weight = scope, 10.0
    model = make_setup(config).model
    return jax.jit(
      lambda p: step_lib.loss_gradients(model, p, batch, key, accumulation=accumulation)
    )(setup.state()["params"])

  sums, large = of("batch", 1)
  micro_sums, micro = of("batch", 4)
  _close(micro, large, atol=2e-6, rtol=1e-5)
  _close(micro_sums, sums, rtol=1e-6, atol=1e-6)
  assert abs(of("group", 1)[0].aux["balance_loss"] / sums.aux["balance_loss"] - 1) > (
    1e-3
  )


def test_padding_and_its_targets_do_not_matter(setup, gradients):
  """Other tokens behind the end of a row change no sum and no gradient."""
  params, batch = setup.state()["params"], make_batch(4)
  other = copy.deepcopy(batch)
  padding = batch["segment_ids"] == 0
  for name in ("inputs", "targets"):
    other[name][padding] = (other[name][padding] + 1) % 256
  expected = gradients(params, setup.place(batch))
  _close(gradients(params, setup.place(other)), expected, rtol=1e-6, atol=1e-7)


def test_the_reported_loss_has_no_aux_terms(setup):
  """At the start all experts and tokens are nearly alike: the loss is near log V."""
  _, [metrics] = setup.run(setup.state(), make_batch(0))
  loss = metrics.sums.loss / metrics.sums.tokens
  assert loss == pytest.approx(np.log(264), rel=0.1)
  # One sparse layer: the balance loss is 1 at balance, and a little above.
  assert 0.99 < metrics.sums.aux["balance_loss"] / metrics.sums.tokens < 2.0
  assert metrics.sums.tokens == make_batch(0)["segment_ids"].sum()


def test_bytes_are_counted_over_valid_targets(setup):
  """A stand-in for the model: what is counted does not depend on it."""
  batch = setup.place(make_batch(5))

  class Uniform:
    def __call__(self, params, tokens, **_):
      logits = jnp.zeros((*tokens.shape, 264))
      return DecoderOutput(logits=logits, aux={}, stats=None, cache=None)

  lengths = jnp.arange(264, dtype=jnp.float32)
  sums = forward_sums(Uniform(), {}, batch, token_bytes=lengths)
  valid = np.asarray(batch["segment_ids"]) > 0
  assert float(sums.bytes) == np.asarray(batch["targets"])[valid].sum()
  np.testing.assert_allclose(sums.loss, valid.sum() * np.log(264), rtol=1e-5)


def test_a_non_finite_step_is_skipped_and_counted_and_a_good_one_ends_the_row(setup):
  """Row 5 of the embedding is NaN: only batches that look token 5 up are bad."""
  bad, good = make_batch(1), make_batch(2)
  bad["inputs"][0, 0] = 5
  good["inputs"][good["inputs"] == 5] = 6
  state = setup.state()
  table = state["params"]["embedding"]["table"]
  state["params"]["embedding"]["table"] = table.at[5, 0].set(jnp.nan)
  before = jax.device_get({k: state[k] for k in ("params", "opt_state")})

  state, seen = setup.run(state, bad, bad)
  assert [int(m.bad_in_a_row) for m in seen] == [1, 2]
  assert int(state["step"]) == 2
  after = jax.device_get({k: state[k] for k in ("params", "opt_state")})
  jax.tree.map(np.testing.assert_array_equal, after, before)

  state, [last] = setup.run(state, good)
  assert (int(last.bad_in_a_row), int(last.bad_total)) == (0, 2)
  head = np.asarray(state["params"]["embedding"]["head"])
  assert not np.array_equal(head, before["params"]["embedding"]["head"])


def test_a_step_depends_on_state_and_batch_alone(setup):
  """The same seed and batches give the same bits; another seed does not."""
  first, _ = setup.run(setup.state(0), make_batch(0), make_batch(1))
  again, _ = setup.run(setup.state(0), make_batch(0), make_batch(1))
  other, _ = setup.run(setup.state(1), make_batch(0), make_batch(1))
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(first["params"]),
    jax.device_get(again["params"]),
  )
  a, b = first["params"]["embedding"]["table"], other["params"]["embedding"]["table"]
  assert not np.array_equal(a, b)


@pytest.mark.parametrize(
  "mesh",
  [
    MeshConfig(data=8),
    pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, fsdp=2, expert=4), marks=pytest.mark.slow),
  ],
  ids=lambda m: f"data{m.data}_fsdp{m.fsdp}_expert{m.expert}_tensor{m.tensor}",
)
def test_many_devices_compute_what_one_does(setup, mesh):
  """Same losses and parameters after three steps, to float32 rounding."""
  config = tiny_config()
  config.mesh = mesh
  many = make_setup(config, 8)
  shapes = state_lib.state_shapes(many.model, many.optimizer, many.mesh)
  start = jax.device_put(setup.state(), state_lib.shardings_of(shapes))
  batches = [make_batch(s) for s in range(3)]
  one_state, one = setup.run(setup.state(), *batches)
  many_state, seen = many.run(start, *batches)
  for a, b in zip(one, seen, strict=True):
    np.testing.assert_allclose(b.sums.loss, a.sums.loss, rtol=2e-5)
    np.testing.assert_allclose(b.grad_norm, a.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(b.sums.stats.load, a.sums.stats.load)
  # Adam divides by sqrt(v): where a gradient is nearly 0 its rounding is a step.
  _close(
    jax.device_get(many_state["params"]), jax.device_get(one_state["params"]), atol=2e-3
  )


def test_optimizer_state_is_cut_like_the_parameters():
  """Else the moments, twice the parameters, would be held whole by every device."""
  config = tiny_config()
  config.mesh = MeshConfig(data=1, fsdp=8)
  many = make_setup(config, 8)
  shapes = state_lib.state_shapes(many.model, many.optimizer, many.mesh)
  cut = state_lib.shardings_of(shapes["params"])
  assert state_lib.shardings_of(shapes["opt_state"][0].mu) == cut
  assert any(not s.is_fully_replicated for s in jax.tree.leaves(cut))
