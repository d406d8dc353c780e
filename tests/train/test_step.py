"""The train step: what it adds up, what it refuses, where it runs."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MeshConfig
from moejax.train import step as step_lib
from tests.train.conftest import make_batch, make_setup, tiny_config


def _close(a, b, **kwargs):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def test_cross_entropy_by_hand():
  """Logits log(1), log(3): probabilities 1/4 and 3/4."""
  logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]))
  losses = step_lib.cross_entropy(logits, jnp.array([[0, 1]], jnp.int32))
  np.testing.assert_allclose(losses[0], [np.log(4), np.log(4 / 3)], rtol=1e-6)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_equals_the_large_batch(setup, accumulation):
  """Gradients and every sum agree to float32 rounding, padding of any length.

  Microbatches hold different numbers of valid tokens, so a mean of means would
  be off by per cents.
  """
  params, batch = setup.state()["params"], make_batch(3)
  key = jax.random.key(7)

  def gradients(parts: int):
    return jax.jit(
      lambda p, b: step_lib.loss_gradients(setup.model, p, b, key, accumulation=parts)
    )(params, batch)

  sums, large = gradients(1)
  micro_sums, micro = gradients(accumulation)
  _close(micro, large, atol=1e-6, rtol=1e-5)
  _close(micro_sums, sums, rtol=1e-6, atol=1e-6)


def test_padding_and_its_targets_do_not_matter(setup):
  """Other tokens behind the end of a row change no sum and no gradient."""
  params, batch = setup.state()["params"], make_batch(4)
  other = copy.deepcopy(batch)
  padding = batch["segment_ids"] == 0
  for name in ("inputs", "targets"):
    other[name][padding] = (other[name][padding] + 1) % 256
  run = jax.jit(
    lambda b: step_lib.loss_gradients(setup.model, params, b, jax.random.key(0))
  )
  _close(run(other), run(batch), rtol=1e-6, atol=1e-7)


def test_the_reported_loss_has_no_aux_terms(setup):
  """At the start all experts and tokens are nearly alike: the loss is near log V."""
  _, [metrics] = setup.run(setup.state(), make_batch(0))
  loss = metrics["loss"] / metrics["tokens"]
  assert loss == pytest.approx(np.log(264), rel=0.1)
  # One sparse layer: the balance loss is 1 at balance, and a little above.
  assert 0.99 < metrics["aux"]["balance_loss"] / metrics["tokens"] < 2.0
  assert metrics["tokens"] == make_batch(0)["segment_ids"].sum()


def test_bytes_are_counted_over_valid_targets(setup):
  token_bytes = np.arange(264, dtype=np.float32)
  batch = make_batch(5)
  sums = step_lib.forward_sums(
    setup.model, setup.state()["params"], batch, token_bytes=jnp.asarray(token_bytes)
  )
  expected = batch["targets"][batch["segment_ids"] > 0].sum()
  assert float(sums["bytes"]) == expected


class TestNonFinite:
  """A step that is not finite changes nothing but the counters."""

  def _poisoned(self, setup):
    state = setup.state()
    params = jax.tree.map(lambda p: p, state["params"])
    table = params["embedding"]["table"]
    params["embedding"]["table"] = table.at[5, 0].set(jnp.nan)
    return {**state, "params": params}

  def test_it_is_skipped_and_counted_and_good_steps_reset_the_row(self, setup):
    """Row 5 of the embedding is NaN: only batches that look at token 5 are bad."""
    bad, good = make_batch(1), make_batch(2)
    bad["inputs"][0, 0] = 5
    # The tied head reads every row, so token 5 must also be out of the targets'
    # softmax; an untied head reads only the rows that are looked up.
    config = tiny_config()
    config.model.tie_embeddings = False
    for name in ("inputs", "targets"):
      good[name][good[name] == 5] = 6
    untied = make_setup(config)
    state = self._poisoned(untied)
    before = jax.device_get(state["params"])
    moments = jax.device_get(state["opt_state"])
    state, seen = untied.run(state, bad, bad)
    assert [int(m["bad_in_a_row"]) for m in seen] == [1, 2]
    assert int(state["step"]) == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), before)
    after = jax.device_get(state["opt_state"])
    jax.tree.map(np.testing.assert_array_equal, after, moments)
    state, [last] = untied.run(state, good)
    assert (int(last["bad_in_a_row"]), int(last["bad_total"])) == (0, 2)
    changed = np.asarray(state["params"]["embedding"]["head"])
    assert not np.array_equal(changed, before["embedding"]["head"])


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
  [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)],
  ids=["data8", "data2_fsdp2_tensor2"],
)
def test_many_devices_compute_what_one_does(setup, mesh):
  """Same losses and parameters after three steps, to float32 rounding."""
  config = tiny_config()
  config.mesh = mesh
  many = make_setup(config, 8)
  batches = [make_batch(s) for s in range(3)]
  one_state, one = setup.run(setup.state(), *batches)
  many_state, seen = many.run(many.state(), *batches)
  for a, b in zip(one, seen, strict=True):
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=2e-5)
    np.testing.assert_allclose(b["grad_norm"], a["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(b["stats"].load, a["stats"].load)
  # Adam divides by sqrt(v): where a gradient is nearly 0 its rounding is a step.
  _close(
    jax.device_get(many_state["params"]), jax.device_get(one_state["params"]), atol=2e-3
  )


def test_optimizer_state_is_cut_like_the_parameters(setup):
  """Else the moments, twice the parameters, would be held whole by every device."""
  config = tiny_config()
  config.mesh = MeshConfig(data=1, fsdp=8)
  many = make_setup(config, 8)
  state = many.state()
  moments = state["opt_state"][0].mu
  jax.tree.map(lambda p, m: _same(p.sharding, m.sharding), state["params"], moments)


def _same(a, b):
  assert a == b
