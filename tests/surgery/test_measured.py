"""Sums over a text, against loops in numpy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.experts.weights import ExpertWeights
from moejax.layers.routes import Routes
from moejax.models.loss import token_losses
from moejax.surgery.clone import copies_of
from moejax.surgery.measured import Measured, batch_sums, squared_gradients
from moejax.surgery.permute import spread
from moejax.surgery.scores import best
from tests.evaluate import tiny

B, S, D, E, K, F = 2, 5, 3, 4, 2, 6


def test_sums_are_those_of_loops_over_tokens():
  """Load, gates, norms and mean outputs of ReLU experts; padding and drops count not."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, S, D)).astype(np.float32)
  w_in, w_out = (rng.normal(size=s).astype(np.float32) for s in ((E, D, F), (E, F, D)))
  logits = rng.normal(size=(B, S, E)).astype(np.float32)
  expert = np.argsort(-logits, axis=-1)[..., :K].astype(np.int32)
  gate = rng.uniform(0.1, 1.0, size=(B, S, K)).astype(np.float32)
  gate[0, 1, 1] = 0.0  # Dropped.
  valid = np.ones((B, S), bool)
  valid[1, 3:] = False
  routes = Routes(
    logits=jnp.asarray(logits),
    probs=jnp.asarray(logits),
    served=jnp.ones((B, S, E), bool),
    expert=jnp.asarray(expert),
    gate=jnp.asarray(gate),
    kept=jnp.ones((B, S, K), bool),
  )
  weights = ExpertWeights(w_in=jnp.asarray(w_in), w_out=jnp.asarray(w_out))
  found = batch_sums(
    jnp.asarray(x), weights, routes, jnp.asarray(valid), activation="relu"
  )

  wanted = {name: np.zeros(E) for name in ("load", "gate", "norm", "gated_norm")}
  outputs, gram, tokens = np.zeros((E, D)), np.zeros((E, E)), 0
  for b in range(B):
    for s in range(S):
      if not valid[b, s]:
        continue
      tokens += 1
      gram += np.outer(logits[b, s], logits[b, s])
      out = [np.maximum(x[b, s] @ w_in[e], 0) @ w_out[e] for e in range(E)]
      outputs += out
      for k in range(K):
        g, e = gate[b, s, k], expert[b, s, k]
        if g:
          wanted["load"][e] += 1
          wanted["gate"][e] += g
          wanted["norm"][e] += np.linalg.norm(out[e])
          wanted["gated_norm"][e] += g / gate[b, s].sum() * np.linalg.norm(out[e])
  wanted |= {"outputs": outputs, "logits": gram, "tokens": np.array(tokens)}
  assert found.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_without_a_text_nothing_can_be_measured():
  with pytest.raises(UserError, match="over a text, and none was given"):
    _ = Measured().sums


def test_best_takes_equally_many_of_each_group():
  scores = np.array([5.0, 4, 3, 2, 1, 6])
  assert best(scores, 2) == (0, 5)
  assert best(scores, 4, num_groups=2) == (0, 1, 3, 5)
  assert best(np.zeros(4), 2) == (0, 1)


def test_copies_go_by_utility_with_the_largest_remainders_first():
  """Every expert has one; four further ones are 2.4, 1.0 and 0.6, so 2, 1 and 1."""
  assert copies_of(np.array([12.0, 5, 3]), 7) == [3, 2, 2]
  assert copies_of(np.ones(3), 6) == [2, 2, 2]
  assert copies_of(np.array([1.0, 0, 0]), 6) == [4, 1, 1]
  assert sum(copies_of(np.random.default_rng(0).random(7), 21)) == 21


def test_load_is_spread_over_devices():
  """9 + 1 and 6 + 5, not 9 + 6 and 5 + 1; each within its group if there are two."""
  load = np.array([9.0, 6, 5, 1])
  order = spread(load, 2)
  parts = [load[order[:2]].sum(), load[order[2:]].sum()]
  assert sorted(parts) == [10, 11]
  grouped = spread(load, 2, num_groups=2)
  assert sorted(grouped[:2]) == [0, 1]
  assert math.prod(len(set(o)) for o in (order, grouped)) == 16


@pytest.mark.slow
def test_gradients_are_summed_by_expert_and_layer():
  """Against jax.grad of the same loss, taken apart by hand, in a scanned model."""
  model, params = tiny.model_and_params(model__num_layers=2)
  data = tiny.TinyDataset([(b"expert surgery needs a measure", 0)])
  batch: Any = {n: jnp.asarray(x) for n, x in data.arrays.items() if n != "domain"}

  def loss(params):
    losses, _ = token_losses(model, params, batch, capacity_factor=None)
    return jnp.sum(losses) / jnp.sum((batch["segment_ids"] > 0).astype(jnp.float32))

  gradient = jax.jit(jax.grad(loss))(params)["unit"]["0"]["moe"]["experts"]
  found = jax.jit(lambda p: squared_gradients(model, p, batch))(params)
  assert set(found) == {0, 1}
  for layer in (0, 1):
    for expert in range(4):
      own = [np.square(np.asarray(g)[layer, expert]).sum() for g in gradient.values()]
      np.testing.assert_allclose(found[layer][expert], sum(own), rtol=1e-4)
