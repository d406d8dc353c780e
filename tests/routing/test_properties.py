"""Properties of every token-choice router, over random shapes, ties and capacities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.registry import ROUTERS
from moejax.routing.scores import choose, pick
from tests import reference
from tests.routing.common import route, skewed_logits
from tests.routing.test_token_choice import check_order

SHAPES = ((1, 1, 1), (7, 3, 3), (8, 4, 2))
"""(T, E, K): few, so that compiled routers are shared."""


@st.composite
def cases(draw):
  """Logits of small integers, so that ties are common; some padding; a capacity."""
  num_tokens, num_experts, k = draw(st.sampled_from(SHAPES))
  values = draw(
    st.lists(
      st.integers(-2, 2),
      min_size=num_tokens * num_experts,
      max_size=num_tokens * num_experts,
    )
  )
  valid = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
  capacity = draw(st.sampled_from([None, 2]))
  if capacity is not None:
    capacity = min(capacity, num_tokens)
  opts = SlotPolicy(
    num_experts=num_experts,
    num_selected=k,
    capacity=capacity,
    priority=draw(st.sampled_from(["arrival", "gate"])),
  )
  logits = np.float32(values).reshape(num_tokens, num_experts)
  if opts.priority == "gate":
    # Gates that are equal on paper differ by rounding: who is first is then no
    # property. Ties within a token stay decided by index; see the oracle's tests.
    logits += np.random.default_rng(0).uniform(0, 0.2, logits.shape).astype(np.float32)
  return logits, np.array(valid), opts


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_slots(case):
  """One token a slot; no expert above C; gates zero exactly where dropped."""
  logits, valid, opts = case
  got = route("top_k", logits, opts, valid)
  kept, gate = np.asarray(got.assignments.kept), np.asarray(got.assignments.gate)
  taken = list(
    zip(
      np.asarray(got.assignments.expert)[kept],
      np.asarray(got.assignments.slot)[kept],
      strict=True,
    )
  )
  assert len(set(taken)) == len(taken)
  assert np.max(got.assignments.load) <= got.assignments.num_slots
  np.testing.assert_array_equal(gate == 0, ~kept)
  assert not kept.reshape(len(valid), -1)[~valid].any()
  assert np.all(np.asarray(got.assignments.slot)[~kept] == got.assignments.num_slots)
  check_order(got.assignments)
  want = reference.route("top_k", logits, valid, opts)
  np.testing.assert_array_equal(kept.reshape(want.kept.shape), want.kept)
  np.testing.assert_array_equal(got.assignments.slot.reshape(want.slot.shape), want.slot)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_first_choices_never_lose_a_slot_to_second_ones(case):
  """Under arrival: where a first choice was dropped, its expert kept no second one."""
  logits, valid, opts = case
  opts = dataclasses.replace(opts, priority="arrival")
  got = route("top_k", logits, opts, valid)
  kept = np.asarray(got.assignments.kept).reshape(len(valid), -1)
  expert = np.asarray(got.assignments.expert).reshape(kept.shape)
  for t in np.flatnonzero(valid):
    if not kept[t, 0]:
      assert not kept[:, 1:][expert[:, 1:] == expert[t, 0]].any()


@settings(max_examples=40, deadline=None)
@given(case=cases(), seed=st.integers(0, 9))
def test_permuting_tokens_permutes_the_routing_when_nothing_is_dropped(case, seed):
  """Dropless, a token's experts and gates do not depend on its neighbours."""
  logits, valid, opts = case
  opts = dataclasses.replace(opts, capacity=None)
  order = np.random.default_rng(seed).permutation(len(valid))
  one = route("top_k", logits, opts, valid)
  two = route("top_k", logits[order], opts, valid[order])
  for field in ("expert", "gate", "kept"):
    a = np.asarray(getattr(one.assignments, field)).reshape(len(valid), -1)
    b = np.asarray(getattr(two.assignments, field)).reshape(len(valid), -1)
    np.testing.assert_array_equal(a[order], b)


@pytest.mark.parametrize("num_experts", [3, 8, 40])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_choice_is_best_first_with_ties_to_the_lowest_index(num_experts, k):
  """Also with refused experts (-inf), which come last, each of them once."""
  k = min(k, num_experts)
  rng = np.random.default_rng(k)
  scores = rng.integers(0, 3, size=(20, num_experts)).astype(np.float32)
  scores[rng.random(scores.shape) < 0.3] = -np.inf
  scores[0] = -np.inf
  got = np.asarray(jax.jit(choose, static_argnums=1)(scores, k))
  want = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
  np.testing.assert_array_equal(got, want)


def test_a_non_finite_step_stays_in_bounds():
  """NaN logits still give experts below E, so nothing is written out of bounds."""
  for num_experts in (4, 40):
    logits = np.full((6, num_experts), np.nan, np.float32)
    got = route("top_k", logits, SlotPolicy(num_experts=num_experts, num_selected=3))
    expert = np.asarray(got.assignments.expert)
    assert expert.min() >= 0 and expert.max() < num_experts


def test_pick_equals_a_gather_in_value_and_gradient():
  """The hand-written backward of `pick` is that of take_along_axis, repeats included."""
  rng = np.random.default_rng(0)
  values = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
  expert = jnp.asarray(rng.integers(0, 5, size=(6, 3)), jnp.int32)
  weight = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

  def through(pick_fn):
    loss = lambda v: jnp.sum(weight * pick_fn(v, expert))  # noqa: E731
    return jax.value_and_grad(loss)(values)

  plain = lambda v, e: jnp.take_along_axis(v, e, axis=-1)  # noqa: E731
  for a, b in zip(through(pick), through(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in ROUTERS if n in ("switch", "top2", "top_k")])
def test_extremes(name: str):
  """One expert for everybody, capacity 1, padding alone, one token, empty experts."""
  one_sided = np.zeros((6, 4), np.float32)
  one_sided[:, 2] = 9.0
  opts = SlotPolicy(num_experts=4, num_selected=ROUTERS[name].fixed_selected or 2)
  got = route(name, one_sided, dataclasses.replace(opts, capacity=1))
  assert got.assignments.load[2] == 1 and np.max(got.assignments.load) <= 1
  assert float(got.stats.dropped_tokens) >= 4
  got = route(name, one_sided, opts)
  assert got.assignments.load[2] == 6 and float(got.stats.dropped_tokens) == 0
  padding = route(name, one_sided, opts, np.zeros(6, bool))
  assert not np.any(padding.assignments.load) and not np.any(padding.assignments.gate)
  for value in jax.tree.leaves(padding.stats):
    assert not np.any(value)
  single = route(name, one_sided[:1], dataclasses.replace(opts, capacity=1))
  assert single.assignments.load[2] == 1 and int(single.assignments.slot[0]) == 0


def test_the_packed_and_the_wide_sort_agree(monkeypatch):
  """Where expert and place do not fit one int32, two keys give the same slots."""
  opts = SlotPolicy(num_experts=4, num_selected=2, capacity=3)
  logits = skewed_logits(5, 11, 4)
  packed = route("top_k", logits, opts)
  monkeypatch.setattr("moejax.routing.queueing._PACKED_BITS", 1)
  valid = jnp.ones(11, bool)
  expert = packed.assignments.expert.reshape(11, 2)
  gate = pick(packed.probs, expert)
  wide = assign(expert, gate, valid, packed.probs, opts)
  for field in ("slot", "order", "load", "kept"):
    got, want = (getattr(r.assignments, field) for r in (wide, packed))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("slot_order", ["choice_major", "token_major", "by_gate"])
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize("capacity", [None, 3])
def test_counting_ranks_as_sorting_does(slot_order, overflow, capacity):
  """What TPUs do, where a sort is dear, gives every field of the routing the same."""
  valid = np.arange(11) != 4
  opts = SlotPolicy(
    num_experts=4,
    num_selected=2,
    capacity=capacity,
    slot_order=slot_order,
    overflow=overflow,
    slot_numbering="arrival" if slot_order == "token_major" else "queue",
  )
  logits = skewed_logits(5, 11, 4)
  sorted_ = route("top_k", logits, opts, valid)
  counted = route("top_k", logits, dataclasses.replace(opts, ranking="count"), valid)
  for field in ("expert", "slot", "kept", "gate", "order", "load"):
    got, want = (getattr(r.assignments, field) for r in (counted, sorted_))
    np.testing.assert_array_equal(got, want)


def test_nothing_of_size_tokens_times_experts_times_slots_is_made():
  """The compiled router's largest buffer is far below T*E*C."""
  num_tokens, num_experts, capacity = 512, 16, 80
  opts = SlotPolicy(num_experts=num_experts, num_selected=2, capacity=capacity)

  def run(logits, valid):
    return ROUTERS["top_k"]()(RouterInputs(logits=logits, valid=valid), opts)

  shapes = jax.make_jaxpr(run)(jnp.zeros((num_tokens, num_experts)), jnp.ones(512, bool))
  text = str(shapes)
  assert f"{num_tokens},{num_experts},{capacity}" not in text
  for variable in shapes.jaxpr.eqns:
    for out in variable.outvars:
      size = out.aval.size  # pyright: ignore[reportAttributeAccessIssue]  # By its type.
      assert size <= 4 * num_tokens * num_experts
