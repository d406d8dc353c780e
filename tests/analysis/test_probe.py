"""Similarity, outliers and saturation: against numpy, and where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis import probe, saturation
from moejax.analysis.measures import outliers, similarity
from moejax.analysis.measures import saturation as measure
from moejax.config import MeshConfig
from moejax.experts.weights import ExpertWeights
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [(b"aaab" * 24, 0), (b"bcbc" * 24, 1), (b"axyz" * 10, 0)]


def _arguments(**changes):
  model, params = tiny.model_and_params(model__num_layers=2, **changes)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  where = {"split": "validation", "mesh": mesh, "batch_size": 8}
  return model, params, tiny.TinyDataset(_TEXTS), where


def test_cka_is_one_for_a_rotation_and_near_zero_for_noise():
  """Scale and rotation do not count; unrelated outputs scatter around zero."""
  rng = np.random.default_rng(0)
  first, other = rng.normal(size=(2, 64, 5))
  turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
  outputs = jnp.asarray(np.stack([first, 3 * first @ turn, other]), jnp.float32)
  found = similarity.cka(np.asarray(probe.hsic(outputs, jnp.ones(64, bool)), np.float64))
  assert found[0, 1] == pytest.approx(1, abs=1e-4)
  assert abs(found[0, 2]) < 0.1


def test_hsic_is_the_mean_over_distinct_tokens():
  """The U-statistic by its definition: four different tokens; the last is padding."""
  rng = np.random.default_rng(1)
  outputs = rng.normal(size=(2, 6, 3))
  valid = np.array([True] * 5 + [False])
  k, l = (rows[valid] @ rows[valid].T for rows in outputs)
  index = [
    (i, j, q, r)
    for i in range(5)
    for j in range(5)
    for q in range(5)
    for r in range(5)
    if len({i, j, q, r}) == 4
  ]
  want = np.mean([k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in index])
  found = probe.hsic(jnp.asarray(outputs, jnp.float32), jnp.asarray(valid))
  assert found[0, 1] == pytest.approx(want, rel=1e-4)


def test_shuffled_outputs_are_unrelated_and_padding_stays():
  """The null of CKA: around zero for copies too, and only valid tokens change places."""
  rng = np.random.default_rng(2)
  one = rng.normal(size=(64, 5))
  outputs = jnp.asarray(np.stack([one, one, one]), jnp.float32)
  valid = jnp.arange(64) % 4 > 0
  moved = probe.shuffled(outputs, valid)
  np.testing.assert_array_equal(moved[:, ~valid], outputs[:, ~valid])
  same = np.sort(np.asarray(outputs[0, valid, 0]))
  np.testing.assert_array_equal(np.sort(np.asarray(moved[0, valid, 0])), same)
  real, null = probe.hsic(outputs, valid), probe.hsic(outputs, valid, moved)
  found = similarity.chance(np.asarray(real, np.float64), np.asarray(null, np.float64))
  assert abs(found["mean"]) < 0.1
  assert similarity.cka(np.asarray(real, np.float64))[0, 1] == pytest.approx(1, abs=1e-4)


def test_cosine_is_over_all_matrices():
  """Opposite experts -1; one that shares a matrix of two 1/2."""
  one = np.array([[[1.0]], [[-1.0]], [[1.0]]], np.float32)
  two = np.array([[[1.0]], [[-1.0]], [[-1.0]]], np.float32)
  found = probe.cosine(ExpertWeights(w_in=jnp.asarray(one), w_out=jnp.asarray(two)))
  np.testing.assert_allclose(found[0], [1, -1, 0], atol=1e-6)


def test_copies_compute_the_same_and_a_loud_expert_is_super():
  """Expert 1 is a copy of 0, and expert 3 of layer 1 is a hundred times louder."""
  model, params, dataset, where = _arguments()
  params = jax.tree.map(lambda leaf: leaf, params)
  experts = params["unit"]["0"]["moe"]["experts"]
  for name in ("w_in", "w_out"):
    experts[name] = experts[name].at[:, 1].set(experts[name][:, 0])
  experts["w_out"] = experts["w_out"].at[1, 3].multiply(100)
  found = probe.probe(model, params, dataset, **where)
  first = found["layers"][0]
  assert first["cka"][0][1] == pytest.approx(1, abs=1e-4)
  assert first["weight_cosine"][0][1] == pytest.approx(1)
  assert abs(first["weight_cosine"][0][2]) < 0.3
  rates = list(first["best_hit_rate"].values())
  assert list(first["best_hit_rate"]) == ["2", "4"]
  assert 0 < rates[0] < rates[1] < 1  # Of all four only first uses miss.
  top = found["super_experts"][0]
  assert (top["layer"], top["expert"]) == (1, 3) and top["ratio"] > 20


def test_no_expert_is_super_if_none_computes():
  assert outliers.super_experts(np.zeros((1, 4)), (0,)) == []


def test_saturation_by_hand():
  """Six of eight choices agree; even loads of K=2 from four agree by chance in half."""
  even = np.full(4, 2)
  found = measure.saturation(6, even, even, 4, 3)
  assert found["saturation"] == 0.75 and found["first_choice"] == 0.75
  assert found["chance"] == pytest.approx(0.5)


def test_a_checkpoint_agrees_with_itself_and_not_with_another():
  """Layer 0 has new router weights and so other choices; the same ones agree fully."""
  model, params, dataset, where = _arguments()
  other = jax.tree.map(lambda leaf: leaf, params)
  router = other["unit"]["0"]["moe"]["router"]
  router["weight"] = -router["weight"]
  step = saturation.make_step(model, where["mesh"])
  same = saturation.compare(step, model, params, params, dataset, **where)
  assert [layer["saturation"] for layer in same] == [1, 1]
  changed = saturation.compare(step, model, params, other, dataset, **where)
  assert changed[0]["saturation"] < 0.4
