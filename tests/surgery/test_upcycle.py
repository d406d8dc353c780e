"""A dense model becomes a Mixture of Experts: its first logits, and what is drawn."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.surgery.operation import CLOSE, DROP, EQUAL, Kind
from moejax.surgery.upcycle import Upcycle
from tests.surgery.common import (
  VOCAB,
  config,
  draw,
  layer_of,
  make_change,
  operate,
  run_dense,
  run_layer,
  unscaled,
  with_layer,
)


def dense(**changes):
  """One dense layer of 12 neurons, as the twin of a switch layer."""
  return config(**{"dense_twin": True, "num_selected": 1, "router": "switch"} | changes)


def asked(old, **changes):
  new = copy.deepcopy(old)
  for name, value in changes.items():
    setattr(new.moe, name, value)
  return new


RENORMALISED = {"router": "top_k", "num_selected": 2, "renormalize": "before_drop"}

EXACT = {
  "renormalised": (Upcycle(), RENORMALISED),
  # Two groups of three thirds; every token chooses all thirds of one copy.
  "virtual_groups": (
    Upcycle(),
    RENORMALISED | {"num_experts": 2, "num_selected": 1, "segments": 3},
  ),
  "virtual_groups_raw": (
    Upcycle(router="zero"),
    {"router": "top_k", "num_experts": 2, "num_selected": 1, "segments": 3},
  ),
  "switch_zero": (Upcycle(router="zero"), {"router": "switch", "num_selected": 1}),
  "shared": (
    Upcycle(dense_share=0.25),
    RENORMALISED | {"shared_gate": True, "gate_scale": 2.5},
  ),
  "shared_alone": (Upcycle(dense_share=1.0), RENORMALISED),
}


@pytest.mark.parametrize(
  "name",
  [
    name
    if name in ("renormalised", "shared")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in EXACT
  ],
)
def test_the_layer_computes_what_the_dense_one_did(name):
  """Outputs and gradients of the input agree to 1e-5, and the loss is expected equal.

  The gradients of copies sum to the dense gradient: of w_out and of the rest, each by
  what it was scaled with. So do the moments that are broadcast.
  """
  operation, fields = EXACT[name]
  old = dense(model__activation="swiglu")
  params = draw(old)
  done = operate(operation, old, params, asked=asked(old, **fields))
  assert done.expected == EQUAL
  y, grads, dx = run_dense(old, params)
  new_y, new_grads, new_dx = run_layer(done.change.new, done.params)
  scale = np.abs(y).max()
  np.testing.assert_allclose(new_y, y, atol=1e-5 * scale, rtol=0)
  np.testing.assert_allclose(new_dx, dx, atol=1e-5 * np.abs(dx).max(), rtol=0)
  moments = layer_of(
    done.moments(with_layer(params, grads, "feed_forward"), Kind.GRADIENT)
  )
  coarse, m = done.change.new.moe.num_experts, done.change.new.moe.segments
  for leaf in grads:
    found, wanted = (
      tree["experts"][leaf].reshape(coarse, m, *tree["experts"][leaf].shape[1:]).sum(0)
      for tree in (new_grads, moments)
    )
    size = max(np.abs(grads[leaf]).max(), 1e-6)
    if done.choices[0].scale:
      np.testing.assert_allclose(found, wanted, atol=2e-5 * size, rtol=0, err_msg=leaf)
    if "shared" in moments:
      np.testing.assert_allclose(
        new_grads["shared"][leaf], moments["shared"][leaf], atol=2e-5 * size, rtol=0
      )


@pytest.mark.slow
def test_a_whole_model_keeps_its_logits_where_every_second_layer_becomes_moe():
  """Layers keep their number, though other ones are stacked together afterwards."""
  old = dense(model__num_layers=4, model__activation="swiglu")
  params = draw(old)
  new = asked(old, **RENORMALISED, every=2, offset=1)
  done = operate(Upcycle(), old, params, asked=new)
  assert done.change.made == (1, 3)
  tokens = jnp.asarray(np.random.default_rng(1).integers(VOCAB, size=(2, 8)), jnp.int32)
  logits = [
    jax.jit(lambda p, model=model: model(p, tokens).logits)(jax.tree.map(jnp.asarray, p))
    for model, p in (
      (done.change.old_model, params),
      (done.change.new_model, done.params),
    )
  ]
  np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


@pytest.mark.parametrize(
  ("operation", "fields", "expected"),
  [
    (Upcycle(), {"router": "switch", "num_selected": 1}, CLOSE),
    (Upcycle(scale_out=False), {"router": "switch", "num_selected": 1}, DROP),
    (Upcycle(init="drop"), RENORMALISED, DROP),
    (Upcycle(init="noise"), RENORMALISED, CLOSE),
  ],
)
def test_what_is_expected_where_the_function_changes(operation, fields, expected):
  """K = 1 with a random router and raw gates is near the dense model only if scaled."""
  old = dense()
  done = operate(operation, old, draw(old), asked=asked(old, **fields))
  assert done.expected == expected


@pytest.mark.parametrize(("neurons", "whole"), [("shared", 6), ("independent", None)])
def test_drop_upcycling_draws_half_of_the_neurons_anew(neurons, whole):
  """With one set half of an expert's neurons are whole; with three sets about an eighth.

  Each expert has a set of its own, and in each matrix exactly half is drawn anew.
  """
  old = dense(model__activation="swiglu")
  params = draw(old)
  change = make_change(
    Upcycle(init="drop", neurons=neurons), old, asked(old, **RENORMALISED)
  )
  experts = layer_of(unscaled(change, params))["experts"]
  source = layer_of(params, "feed_forward")
  kept = [
    (experts[n] == source[n]).all(axis=2 if n == "w_out" else 1)
    for n in ("w_in", "w_gate", "w_out")
  ]
  assert all((k.sum(axis=1) == 6).all() for k in kept)
  all_three = np.logical_and.reduce(kept).sum(axis=1)
  if whole is not None:
    assert (all_three == whole).all()
  else:
    assert all_three.sum() < 4 * 6 / 2
  assert len({tuple(row) for row in kept[0]}) > 1


def test_new_neurons_have_the_statistics_of_those_they_replace():
  """Mean and standard deviation are those of the replaced part, not of the matrix."""
  old = dense(model__hidden=400, hidden=400)
  params = draw(old)
  source = layer_of(params, "feed_forward")
  source["w_in"][...] = 3.0 + 0.1 * source["w_in"]
  change = make_change(Upcycle(init="drop"), old, asked(old, **RENORMALISED))
  made = layer_of(unscaled(change, params))["experts"]["w_in"][0]
  new = made[:, (made != source["w_in"]).any(axis=0)]
  assert abs(new.mean() - 3.0) < 0.01
  assert abs(new.std() - 0.05) < 0.005


def test_entries_and_noise_are_drawn_per_expert():
  """Half of the entries are N(0, std) of OLMoE's script; noise is added everywhere."""
  old = dense(model__hidden=200, hidden=200)
  params = draw(old)
  source = layer_of(params, "feed_forward")["w_in"]
  new = asked(old, **RENORMALISED)
  entries = make_change(Upcycle(init="entries"), old, new)
  made = layer_of(unscaled(entries, params))["experts"]["w_in"]
  anew = made != source
  assert abs(anew.mean() - 0.5) < 0.03
  assert abs(made[anew].std() - 0.02) < 0.001
  noisy = make_change(Upcycle(init="noise", noise=0.1), old, new)
  noise = layer_of(unscaled(noisy, params))["experts"]["w_in"] - source
  assert abs(noise.std() - 0.1) < 0.005
  assert not np.allclose(noise[0], noise[1])


def test_layers_that_become_moe_must_have_one_width():
  """With every=1, twins of 12 neurons and dense layers of 20 would have one F."""
  old = dense(model__num_layers=2, every=2, model__hidden=20)
  with pytest.raises(UserError, match=r"hidden widths 12 \(gelu\) and 20 \(gelu\)"):
    Upcycle().new_config(old, asked(old, every=1))


def test_a_model_with_experts_is_refused():
  with pytest.raises(UserError, match="clone or add"):
    Upcycle().check(config())
