"""What the oracle table of token choice cannot hold: expert choice, Soft MoE, hash
tables, Sinkhorn, next_best's promises, and which options are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.errors import ConfigError
from moejax.routing import losses
from moejax.routing.assignment import sinkhorn
from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.hashing import hash_table
from moejax.routing.placement import Mixture
from moejax.routing.registry import ROUTERS
from moejax.routing.soft import Soft
from tests import reference_routing as reference
from tests.routing.common import made, route, skewed_logits
from tests.routing.test_token_choice import EIGHT_TOKENS, check_order


@pytest.mark.parametrize("num_valid", [12, 3, 0])
def test_expert_choice_equals_the_oracle(num_valid: int):
  """Each expert holds its best tokens in order; padding fills no slot."""
  logits = skewed_logits(2, 12, 4)
  valid = np.random.default_rng(0).permutation(12) < num_valid
  opts = SlotPolicy(num_experts=4, capacity=5)
  got = route("expert_choice", logits, opts, valid)
  want = reference.expert_choice(logits, valid, 5)
  for e, picks in enumerate(want):
    mine = slice(e * 5, e * 5 + len(picks))
    assert got.assignments.load[e] == len(picks)
    np.testing.assert_array_equal(got.assignments.token[mine], [t for t, _ in picks])
    np.testing.assert_allclose(
      got.assignments.gate[mine], [g for _, g in picks], rtol=1e-5
    )
    np.testing.assert_array_equal(got.assignments.slot[mine], range(len(picks)))
  assert int(np.sum(got.assignments.kept)) == 4 * min(num_valid, 5)
  served = {t for picks in want for t, _ in picks}
  assert float(got.stats.dropped_tokens) == num_valid - len(served)
  check_order(got.assignments)


def test_expert_choice_gradient_reaches_the_logits_of_the_chosen():
  """The gate's gradient is the softmax's, as by hand."""
  logits = skewed_logits(2, 6, 3)
  opts = SlotPolicy(num_experts=3, capacity=2)

  def total(logits):
    inputs = RouterInputs(logits=logits, valid=jnp.ones(6, bool))
    gate = ROUTERS["expert_choice"]()(inputs, opts).assignments.gate
    return jnp.sum(gate * jnp.arange(6.0))

  grad = jax.jit(jax.grad(total))(jnp.asarray(logits))
  want = np.zeros((6, 3))
  for e, picks in enumerate(reference.expert_choice(logits, np.ones(6, bool), 2)):
    for c, (t, _) in enumerate(picks):
      p = reference.softmax(logits[t].astype(np.float64))
      want[t] += reference.softmax_backward(p, np.eye(3)[e] * (2 * e + c))
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)


def test_soft_weights_by_hand():
  """Dispatch sums to 1 over tokens, combine over slots; padding is in neither."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(5, 3, 2)).astype(np.float32)
  valid = np.array([True, True, False, True, True])
  opts = SlotPolicy(num_experts=3, capacity=2)
  inputs = RouterInputs(
    logits=jnp.zeros((5, 3)),
    valid=jnp.asarray(valid),
    features={"slot_logits": jnp.asarray(logits)},
  )
  got = Soft()(inputs, opts)
  exp = np.exp(logits.astype(np.float64)) * valid[:, None, None]
  np.testing.assert_allclose(
    got.placement.dispatch_weights(), exp / exp.sum(0), rtol=1e-5
  )
  total = np.where(valid, exp.sum((1, 2)), 1)[:, None, None]
  np.testing.assert_allclose(got.placement.combine_weights(), exp / total, rtol=1e-5)
  assert float(got.stats.num_valid) == 4


@pytest.mark.parametrize("balanced", [False, True])
def test_hash_tables_are_balanced_and_rows_differ(balanced: bool):
  """Ids (or their corpus counts) are spread evenly, and a row has no expert twice."""
  counts = np.random.default_rng(1).zipf(1.5, size=200).astype(float)
  counts = np.minimum(counts, 40) if balanced else None
  table = hash_table(200, 8, 3, seed=1, counts=counts)
  assert all(len(set(row)) == 3 for row in table)
  weight = np.ones(200) if counts is None else counts
  load = np.bincount(table[:, 0], weights=weight, minlength=8)
  assert load.max() - load.min() <= (0 if counts is None else 2)
  np.testing.assert_array_equal(table, hash_table(200, 8, 3, seed=1, counts=counts))


def test_sinkhorn_balances_rows_and_columns():
  """Valid rows sum to 1/T and columns to 1/E; padding has no mass."""
  logits = jnp.asarray(skewed_logits(0, 12, 4))
  valid = np.arange(12) % 4 != 1
  plan = sinkhorn(logits, jnp.asarray(valid), tolerance=1e-7, max_iterations=200)
  np.testing.assert_allclose(np.sum(plan, 0), 1 / 4, rtol=1e-4)
  np.testing.assert_allclose(np.sum(plan, 1), valid / valid.sum(), rtol=1e-3)


def test_base_with_next_best_is_exactly_balanced_in_training():
  """Capacity factor 1 and next_best give every expert T/E tokens and drop none."""
  opts = SlotPolicy(num_experts=4, capacity=3, overflow="next_best")
  got = route("base", skewed_logits(1, 12, 4), opts, key=jax.random.key(0))
  assert got.assignments.load.tolist() == [3, 3, 3, 3]


@st.composite
def overflow_cases(draw):
  """Ties, padding, and little room."""
  values = draw(st.lists(st.integers(-2, 2), min_size=32, max_size=32))
  valid = draw(st.lists(st.booleans(), min_size=8, max_size=8))
  k, capacity = draw(st.sampled_from([(1, 2), (2, 4), (2, 3), (3, 2)]))
  return np.float32(values).reshape(8, 4), np.array(valid), k, capacity


@settings(max_examples=60, deadline=None)
@given(case=overflow_cases())
def test_next_best_drops_nothing_while_any_choosable_expert_has_room(case):
  """What is dropped had no free expert; who kept a slot under drop keeps it; no expert
  serves a token twice; the gate is the probability of the expert that serves."""
  logits, valid, k, capacity = case
  opts = SlotPolicy(num_experts=4, num_selected=k, capacity=capacity)
  plain = route("top_k", logits, opts, valid)
  opts = dataclasses.replace(opts, overflow="next_best")
  got = route("top_k", logits, opts, valid)
  expert, kept = (
    np.asarray(a).reshape(8, k) for a in (got.assignments.expert, got.assignments.kept)
  )
  was = np.asarray(plain.assignments.kept).reshape(8, k)
  assert np.all(kept[was])
  np.testing.assert_array_equal(
    expert[was], np.asarray(plain.assignments.expert).reshape(8, k)[was]
  )
  np.testing.assert_array_equal(
    np.asarray(got.assignments.slot)[was.reshape(-1)],
    np.asarray(plain.assignments.slot)[was.reshape(-1)],
  )
  gate = np.asarray(got.assignments.gate).reshape(8, k)
  for t, c in np.ndindex(8, k):
    serving = set(expert[t][kept[t]])
    assert len(serving) == kept[t].sum()
    if kept[t, c]:
      assert gate[t, c] == got.probs[t, expert[t, c]]
    elif valid[t]:
      assert all(got.assignments.load[e] == capacity or e in serving for e in range(4))
  np.testing.assert_array_equal(got.stats.chosen, plain.stats.chosen)
  want = reference.route("top_k", logits, valid, opts)
  np.testing.assert_array_equal(kept, want.kept)
  np.testing.assert_array_equal(expert[kept], want.expert[kept])
  np.testing.assert_array_equal(np.asarray(got.assignments.slot).reshape(8, k), want.slot)


def test_the_hand_worked_tables_of_next_best_and_expert_choice():
  """docs/routing.md: tokens 2 and 4 find room; each expert's two best tokens."""
  logits = np.log(EIGHT_TOKENS)
  opts = SlotPolicy(num_experts=4, capacity=2, overflow="next_best")
  got = route("switch", logits, opts)
  assert got.assignments.expert.tolist() == [0, 0, 2, 1, 3, 2, 1, 3]
  np.testing.assert_allclose(np.asarray(got.assignments.gate)[[2, 4]], 0.1, rtol=1e-6)
  got = route("expert_choice", logits, SlotPolicy(num_experts=4, capacity=2))
  assert got.assignments.token.tolist()[:4] == [
    2,
    0,
    3,
    6,
  ] and got.assignments.token.tolist()[4::2] == [5, 7]


def test_the_hand_worked_tables_of_the_other_routers():
  """docs/routing.md, each on the eight tokens with logits log p."""
  logits = np.log(EIGHT_TOKENS)
  two = SlotPolicy(num_experts=4, capacity=2)
  assigned = jnp.asarray([0, 2, 2, 1, 0, 2, 3, 1], jnp.int32)[:, None]
  got = route("hash", logits, two, assigned=assigned)
  assert np.flatnonzero(~np.asarray(got.assignments.kept)).tolist() == [5]
  assert set(np.asarray(got.assignments.gate).tolist()) == {0.0, 1.0}

  balanced = dataclasses.replace(two, overflow="next_best")
  got = route("base", logits, balanced, key=jax.random.key(0))
  assert got.assignments.expert.tolist() == [0, 0, 3, 1, 2, 2, 1, 3] and np.all(
    got.assignments.kept
  )
  np.testing.assert_allclose(
    np.asarray(got.assignments.gate)[[0, 2]], [0.375, 0.1 / 1.1], rtol=1e-5
  )
  plan = sinkhorn(jnp.asarray(logits, jnp.float32), jnp.ones(8, bool))
  rows = 8 * np.asarray(plan)[[2, 4]]
  expected = [[0.55, 0.10, 0.14, 0.20], [0.29, 0.27, 0.26, 0.18]]
  np.testing.assert_allclose(rows, expected, atol=0.006)

  one = SlotPolicy(num_experts=4, capacity=1)
  slot_logits = jnp.asarray(logits)[:, :, None]
  got = route("soft", logits, one, features={"slot_logits": slot_logits})
  assert isinstance(got.placement, Mixture)
  sent = np.asarray(got.placement.dispatch)[[2, 7], 0, 0]
  np.testing.assert_allclose(sent, [0.7 / 2.7, 0.1 / 2.7], rtol=1e-5)
  back = np.asarray(got.placement.combine)[2, :, 0]
  np.testing.assert_allclose(back, [0.7, 0.1, 0.1, 0.1], rtol=1e-5)

  got = route("forced_balance", logits, SlotPolicy(num_experts=4))
  assert got.assignments.expert.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
  gates = [0.6, 0.3, 0.1, 0.1, 0.4, 0.2, 0.2, 0.6]
  np.testing.assert_allclose(got.assignments.gate, gates, rtol=1e-5)
  got = route("dense", logits, SlotPolicy(num_experts=4))
  np.testing.assert_allclose(
    np.asarray(got.assignments.gate)[:4], EIGHT_TOKENS[0], rtol=1e-5
  )


def test_next_best_gives_no_token_the_same_expert_twice():
  """Both choices of the last token overflow: they go to experts 2 and 3, by rank.

  Three tokens want experts 0 and 1, which have two slots each; 2 and 3 are empty.
  """
  probs = np.tile(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32), (3, 1))
  opts = SlotPolicy(num_experts=4, num_selected=2, capacity=2, overflow="next_best")
  got = route("top_k", np.log(probs), opts)
  assert got.assignments.expert.tolist() == [0, 1, 0, 1, 2, 3]
  np.testing.assert_allclose(
    np.asarray(got.assignments.gate)[4:], [0.15, 0.05], rtol=1e-5
  )


def test_importance_and_load_losses_by_hand():
  """CV^2 is 0 at balance, and for sums (3, 1) it is (1/2)^2, unbiased 1/2."""
  valid = jnp.ones(4, bool)
  even = jnp.full((4, 2), 0.5)
  assert float(losses.importance_loss(even, valid)) == 0
  uneven = jnp.tile(jnp.float32([[0.75, 0.25]]), (4, 1))
  np.testing.assert_allclose(losses.importance_loss(uneven, valid), 0.25, rtol=1e-6)
  np.testing.assert_allclose(losses.load_loss(uneven, valid, ddof=1), 0.5, rtol=1e-6)


def test_load_probability_is_the_chance_of_being_chosen():
  """Over 20,000 fresh draws of ONE logit's noise, the expert is chosen as often."""
  rng = np.random.default_rng(0)
  clean, scale = np.array([0.3, 0.1, -0.2, 0.5]), 0.4
  noisy = clean + scale * rng.normal(size=4)
  got = losses.load_probability(
    jnp.asarray(clean, jnp.float32)[None],
    jnp.asarray(noisy, jnp.float32)[None],
    jnp.full((1, 4), scale),
    2,
  )[0]
  for e in range(4):
    others = np.sort(np.delete(noisy, e))[::-1]
    fresh = clean[e] + scale * rng.normal(size=20_000)
    assert abs((fresh > others[1]).mean() - float(got[e])) < 0.015


def test_device_and_communication_losses_are_one_at_balance():
  """And as many as there are groups when one group gets everything."""
  valid = jnp.ones(4, bool)
  probs = jnp.full((4, 4), 0.25)
  expert = jnp.int32([[0, 2], [1, 3], [2, 0], [3, 1]])
  chosen = jnp.full(4, 2.0)
  np.testing.assert_allclose(losses.device_loss(probs, chosen, valid, 2), 1.0, 1e-6)
  even = losses.communication_loss(probs, expert, valid, 2)
  np.testing.assert_allclose(even, 1.0, rtol=1e-6)
  probs = jnp.tile(jnp.float32([[0.5, 0.5, 0, 0]]), (4, 1))
  expert = jnp.tile(jnp.int32([[0, 1]]), (4, 1))
  chosen = jnp.float32([4, 4, 0, 0])
  np.testing.assert_allclose(losses.device_loss(probs, chosen, valid, 2), 2.0, 1e-6)
  one = losses.communication_loss(probs, expert, valid, 2)
  np.testing.assert_allclose(one, 2.0, rtol=1e-6)


def test_bias_rises_where_the_load_is_low():
  """By rate * sign(mean - load): nothing where the load is the mean."""
  got = losses.updated_bias(jnp.zeros(3), jnp.float32([5, 3, 1]), 0.01)
  np.testing.assert_allclose(got, [-0.01, 0.0, 0.01], rtol=1e-6)


OPTIONS = SlotPolicy(num_experts=8, num_selected=2, capacity=4)


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("top_k", {"num_selected": 9}, "num_selected=9"),
    ("top_k", {"num_selected": 1, "renormalize": "after_drop"}, "renormalize"),
    ("expert_choice", {"capacity": None}, "capacity_factor=none"),
    ("soft", {"capacity": None}, "capacity_factor=none"),
    ("top_k", {"overflow": "next_best", "capacity": None}, "next_best"),
    ("expert_choice", {"overflow": "next_best"}, "never overflows"),
    ("top_k", {"overflow": "next_best", "slot_order": "by_gate"}, "slot_order=by_gate"),
    ("group_limited", {"num_expert_groups": 3}, "does not divide"),
    (
      "group_limited",
      {"num_expert_groups": 8, "num_selected_groups": 1},
      "num_selected_groups",
    ),
    (
      "group_limited",
      {"num_expert_groups": 4, "num_selected_groups": 5},
      "group_limited.num_selected_groups=5 is not in 1..4",
    ),
  ],
)
def test_senseless_options_are_refused(name: str, changes: dict, message: str):
  """Before compile, with the flag named."""
  with pytest.raises(ConfigError, match=message):
    router, policy = made(name, **dataclasses.asdict(OPTIONS) | changes)
    router.check(policy)


def test_sensible_options_pass_and_causality_is_told():
  """Every router takes plain options; what looks ahead says so."""
  for name, router in ROUTERS.items():
    router().check(OPTIONS)
    assert router.name == name
  top_k, expert_choice = ROUTERS["top_k"](), ROUTERS["expert_choice"]()
  assert top_k.is_causal(OPTIONS) and not expert_choice.is_causal(OPTIONS)
  assert not top_k.is_causal(dataclasses.replace(OPTIONS, priority="gate"))
  dropless = dataclasses.replace(OPTIONS, priority="gate", capacity=None)
  assert top_k.is_causal(dropless)


def test_hash_and_soft_say_what_they_lack():
  """A missing input is the user's error, not a crash inside."""
  inputs = RouterInputs(logits=jnp.zeros((4, 8)), valid=jnp.ones(4, bool))
  for name in ("hash", "soft"):
    with pytest.raises(ConfigError, match=f"router={name}"):
      ROUTERS[name]()(inputs, OPTIONS)
