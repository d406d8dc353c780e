"""Every token-choice router and overflow policy against the oracle, gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.expert_groups import GroupLimited
from moejax.routing.hashing import hash_table
from moejax.routing.registry import ROUTERS
from moejax.routing.token_choice import Top2
from tests import reference
from tests.routing.common import all_options, made, route, skewed_logits, token_order

E = 5
T = 13


def options(**changes) -> SlotPolicy:
  return SlotPolicy(num_experts=E, **changes)


def own(**changes) -> dict:
  """Options of which some are the router's own."""
  return {"num_experts": E} | changes


CASES = {
  "switch": ("switch", options(capacity=3)),
  "switch_dropless": ("switch", options()),
  "switch_gate": ("switch", options(capacity=3, priority="gate")),
  "switch_random": ("switch", options(capacity=3, priority="random")),
  "top2": ("top2", options(num_selected=2, capacity=4, renormalize="before_drop")),
  "top2_after": ("top2", options(num_selected=2, capacity=4, renormalize="after_drop")),
  "top2_gate": ("top2", options(num_selected=2, capacity=4, priority="gate")),
  "top2_random": (
    "top2",
    own(num_selected=2, capacity=4, renormalize="before_drop", second_policy="random"),
  ),
  "top2_sample": ("top2", own(num_selected=2, capacity=4, second_policy="sample")),
  "top_k": ("top_k", options(num_selected=3, capacity=5)),
  "top_k_before": ("top_k", options(num_selected=3, renormalize="before_drop")),
  "top_k_after": ("top_k", options(num_selected=3, capacity=5, renormalize="after_drop")),
  "top_k_random": ("top_k", options(num_selected=3, capacity=5, priority="random")),
  "top_k_all": ("top_k", options(num_selected=5, capacity=7)),
  "top_k_token_major": (
    "top_k",
    options(num_selected=2, capacity=4, slot_order="token_major"),
  ),
  "top_k_by_gate": (
    "top_k",
    options(
      num_selected=3,
      capacity=5,
      slot_order="by_gate",
      slot_numbering="arrival",
      renormalize="before_drop",
    ),
  ),
  "top_k_batch_priority": (
    "top_k",
    options(
      num_selected=2, capacity=3, slot_order="batch_priority", renormalize="before_drop"
    ),
  ),
  "switch_next_best": ("switch", options(capacity=2, overflow="next_best")),
  "top_k_next_best": (
    "top_k",
    options(num_selected=3, capacity=6, overflow="next_best", renormalize="after_drop"),
  ),
  "top_k_next_best_gate": (
    "top_k",
    options(
      num_selected=2,
      capacity=4,
      overflow="next_best",
      renormalize="before_drop",
      priority="gate",
    ),
  ),
  "sigmoid_bias": (
    "sigmoid_bias",
    options(num_selected=2, capacity=4, renormalize="before_drop", gate_scale=2.5),
  ),
  "quantile_bias": (
    "quantile_bias",
    options(num_selected=3, capacity=5, renormalize="before_drop", overflow="next_best"),
  ),
  "sigmoid_bias_groups": (
    "sigmoid_bias",
    own(
      num_experts=8,
      num_selected=3,
      capacity=6,
      renormalize="before_drop",
      overflow="next_best",
      num_expert_groups=4,
      num_selected_groups=2,
      group_best=2,
    ),
  ),
  "group_limited": (
    "group_limited",
    own(
      num_experts=6,
      num_selected=2,
      capacity=4,
      gate_scale=16.0,
      num_expert_groups=3,
      num_selected_groups=2,
    ),
  ),
  "noisy": (
    "noisy_top_k",
    options(num_selected=2, capacity=4, renormalize="before_drop"),
  ),
  "noisy_fixed": ("noisy_top_k", own(num_selected=2, capacity=4, noise="fixed")),
  "hash": ("hash", options(num_selected=2, capacity=4)),
  "base": ("base", options(num_selected=1, capacity=2, overflow="next_best")),
  "base_top2": ("base", options(num_selected=2, capacity=5)),
  "random": ("random", options(num_selected=2, capacity=4)),
  "forced_balance": ("forced_balance", options(num_selected=2, capacity=4)),
  "dense": ("dense", options(num_selected=1)),
}
SLOW = {
  "switch_gate",
  "top2_gate",
  "top_k_random",
  "top_k_all",
  "top_k_batch_priority",
  "top_k_next_best_gate",
  "noisy_fixed",
  "base_top2",
  "random",
  "forced_balance",
  "dense",
}
"""Variations of others, for the nightly run: each case is a compilation."""

NEVER_OVERFLOWS = {"base_top2", "random", "forced_balance"}
"""Cases that may have no drop: balanced by design or by chance."""


NOISE = np.linspace(-1, 1, T * E).reshape(T, E).astype(np.float32)
"""noise_logits of the learned noise."""


def extras(name: str, opts) -> dict:
  """What the oracle takes beside logits."""
  if name in ("sigmoid_bias", "quantile_bias"):
    return {"bias": np.linspace(-0.3, 0.3, opts.num_experts).astype(np.float32)}
  if name == "hash":
    table = hash_table(11, opts.num_experts, opts.num_selected)
    return {"assigned": table[np.arange(T) ** 2 % 11]}
  return {}


def draws(name: str, opts, key: jax.Array) -> dict:
  """The random numbers that the router makes of its key, for the oracle."""
  slot_key = key
  given = {}
  if name == "top2":
    slot_key, draw_key = jax.random.split(key)
    if opts.second_policy == "random":
      given["uniform"] = np.asarray(jax.random.uniform(draw_key, (T,)))
    if opts.second_policy == "sample":
      given["gumbel"] = np.asarray(jax.random.gumbel(draw_key, (T, E)))
  if name == "noisy_top_k":
    slot_key, noise_key = jax.random.split(key)
    scale = np.full((T, E), 1 / E) if opts.noise == "fixed" else np.log1p(np.exp(NOISE))
    given["noise"] = scale * np.asarray(jax.random.normal(noise_key, (T, E)))
  if name == "random":
    given["scores"] = np.asarray(jax.random.uniform(jax.random.split(key)[0], (T, E)))
  if opts.priority == "random":
    given["token_order"] = token_order(slot_key, T)
  return given


@pytest.mark.parametrize(
  ("case", "train"),
  [pytest.param(c, True, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES]
  + [("switch_random", False), pytest.param("base", False, marks=pytest.mark.slow)],
)
def test_equals_the_oracle(case: str, train: bool):
  """Experts, slots, drops, gates, order, stats and the gates' gradient, with padding."""
  name, given = CASES[case]
  if isinstance(given, SlotPolicy):
    router, policy = ROUTERS[name](), given
  else:
    router, policy = made(name, **given)
  opts = all_options(router, policy)
  key = jax.random.key(3) if train else None
  logits = skewed_logits(1, T, opts.num_experts)
  valid = np.arange(T) % 5 != 3
  given = draws(name, opts, key) if key is not None else {}
  more = extras(name, opts)
  want = reference.route(name, logits, valid, opts, train=train, **given, **more)
  if opts.capacity and opts.overflow == "drop" and case not in NEVER_OVERFLOWS:
    assert want.dropped, "the case should overflow, or it proves little"

  cotangent = np.random.default_rng(0).normal(size=want.gate.shape)

  @jax.jit
  def run(logits):
    arrays = {field: jnp.asarray(value) for field, value in more.items()}
    params = {name: arrays.pop(name) for name in ("bias",) if name in arrays}
    features = {"noise_logits": jnp.asarray(NOISE)} if name == "noisy_top_k" else {}
    inputs = RouterInputs(
      logits=logits,
      valid=jnp.asarray(valid),
      key=key,
      params=params,
      features=features,
      **arrays,
    )
    routing = router(inputs, policy)
    return jnp.sum(routing.assignments.gate * jnp.float32(cotangent.reshape(-1))), routing

  grad, got = jax.grad(run, has_aux=True)(jnp.asarray(logits))
  np.testing.assert_array_equal(
    got.assignments.expert.reshape(want.expert.shape), want.expert
  )
  np.testing.assert_array_equal(got.assignments.kept.reshape(want.kept.shape), want.kept)
  np.testing.assert_array_equal(got.assignments.slot.reshape(want.slot.shape), want.slot)
  np.testing.assert_array_equal(got.assignments.load, want.load)
  np.testing.assert_allclose(
    got.assignments.gate.reshape(want.gate.shape), want.gate, rtol=1e-5
  )
  np.testing.assert_allclose(got.probs, want.probs, rtol=1e-5)
  for field, value in want.stats().items():
    np.testing.assert_allclose(getattr(got.stats, field), value, rtol=1e-5)
  np.testing.assert_allclose(grad, want.backward(cotangent), rtol=1e-4, atol=1e-6)
  check_order(got.assignments)


def check_order(placed):
  """`order` is a permutation: kept ones by (expert, slot), then the dropped ones."""
  order = np.asarray(placed.order)
  kept, expert, slot = (
    np.asarray(a)[order] for a in (placed.kept, placed.expert, placed.slot)
  )
  assert sorted(order) == list(range(len(order)))
  total = int(np.sum(placed.load))
  assert kept[:total].all() and not kept[total:].any()
  want = [(e, s) for e, n in enumerate(np.asarray(placed.load)) for s in range(n)]
  assert list(zip(expert[:total], slot[:total], strict=True)) == want


def test_renormalising_before_drops_is_a_softmax_over_the_chosen_logits():
  """Mixtral's softmax after the choice is `before_drop`, so it needs no own option."""
  logits = skewed_logits(4, T, E)
  got = route("top_k", logits, options(num_selected=2, renormalize="before_drop"))
  chosen = np.sort(logits, axis=-1)[:, ::-1][:, :2].astype(np.float64)
  want = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
  np.testing.assert_allclose(got.assignments.gate.reshape(T, 2), want, rtol=1e-5)


def test_second_expert_is_kept_with_twice_its_normalised_gate():
  """GShard's random policy keeps the second with min(1, 2 g2), over 4,000 tokens."""
  num_tokens = 4000
  logits = np.tile(np.log(np.array([[0.8, 0.2, 0.0001]])), (num_tokens, 1))
  opts = SlotPolicy(num_experts=3, num_selected=2)
  got = route(Top2(second_policy="random"), logits, opts, key=jax.random.key(0))
  kept = np.asarray(got.assignments.kept).reshape(num_tokens, 2)
  assert kept[:, 0].all()
  # Binomial(4000, 0.4): one standard deviation is 0.0077.
  assert abs(kept[:, 1].mean() - 0.4) < 0.03


def test_sampled_second_follows_the_remaining_probabilities():
  """The second expert is drawn from probabilities with the first one left out."""
  num_tokens = 4000
  logits = np.tile(np.log(np.array([[0.5, 0.3, 0.2]])), (num_tokens, 1))
  opts = SlotPolicy(num_experts=3, num_selected=2)
  got = route(Top2(second_policy="sample"), logits, opts, key=jax.random.key(1))
  second = np.asarray(got.assignments.expert).reshape(num_tokens, 2)[:, 1]
  assert set(second) == {1, 2}
  assert abs((second == 1).mean() - 0.6) < 0.03


def test_switch_gate_reaches_the_router():
  """Top-1 keeps its probability, so the loss has a gradient by the logits."""
  logits = jnp.asarray(skewed_logits(0, T, E))
  opts = options(renormalize="none")

  def total(logits):
    inputs = RouterInputs(logits=logits, valid=jnp.ones(T, bool))
    return jnp.sum(ROUTERS["switch"]()(inputs, opts).assignments.gate)

  assert float(jnp.linalg.norm(jax.jit(jax.grad(total))(logits))) > 0.1


def test_groups_do_not_see_each_other():
  """A vmap over groups equals one group at a time, also where capacity binds."""
  opts = options(num_selected=2, capacity=3)
  logits = np.stack([skewed_logits(s, T, E) for s in range(3)])
  valid = jnp.ones((3, T), bool)
  inputs = RouterInputs(logits=jnp.asarray(logits), valid=valid)
  both = jax.jit(jax.vmap(lambda i: ROUTERS["top_k"]()(i, opts)))(inputs).assignments
  for g in range(3):
    one = route("top_k", logits[g], opts).assignments
    for field in ("expert", "slot", "gate", "kept", "order", "load"):
      np.testing.assert_array_equal(getattr(both, field)[g], getattr(one, field))


def test_dense_form_shows_the_same_routing():
  """dispatch_mask and combine_weights hold exactly the kept assignments."""
  opts = options(num_selected=2, capacity=3)
  got = route("top_k", skewed_logits(2, T, E), opts)
  mask, weights = (
    np.asarray(got.assignments.dispatch_mask()),
    np.asarray(got.assignments.combine_weights()),
  )
  assert mask.sum() == np.sum(got.assignments.kept) and mask.sum(axis=0).max() == 1
  np.testing.assert_array_equal(weights != 0, mask)
  assert dataclasses.replace(got).assignments.num_slots == 3


EIGHT_TOKENS = np.array(
  [
    [0.6, 0.2, 0.1, 0.1],
    [0.5, 0.3, 0.1, 0.1],
    [0.7, 0.1, 0.1, 0.1],
    [0.1, 0.6, 0.2, 0.1],
    [0.4, 0.3, 0.2, 0.1],
    [0.1, 0.2, 0.6, 0.1],
    [0.2, 0.5, 0.2, 0.1],
    [0.1, 0.1, 0.2, 0.6],
  ]
)
"""The probabilities of the tables worked by hand in docs/routing.md."""


def test_the_hand_worked_table_of_switch():
  """C = ceil(1.0 * 1 * 8 / 4) = 2: tokens 2 and 4 come too late for expert 0."""
  opts = SlotPolicy(num_experts=4, capacity=2)
  got = route("switch", np.log(EIGHT_TOKENS), opts)
  assert got.assignments.expert.tolist() == [0, 0, 0, 1, 0, 2, 1, 3]
  assert got.assignments.slot.tolist() == [0, 1, 2, 0, 2, 0, 1, 0]
  np.testing.assert_allclose(
    got.assignments.gate, [0.6, 0.5, 0, 0.6, 0, 0.6, 0.5, 0.6], rtol=1e-6
  )


def test_the_hand_worked_table_of_top2():
  """C = ceil(1.0 * 2 * 8 / 4) = 4: the second choices get what the first ones left."""
  opts = SlotPolicy(num_experts=4, num_selected=2, capacity=4, renormalize="before_drop")
  got = route("top2", np.log(EIGHT_TOKENS), opts)
  second = np.asarray(got.assignments.expert).reshape(8, 2)[:, 1]
  assert second.tolist() == [1, 1, 1, 2, 1, 1, 0, 2]
  slot = np.asarray(got.assignments.slot).reshape(8, 2)
  assert slot[:, 0].tolist() == [0, 1, 2, 0, 3, 0, 1, 0]
  assert slot[:, 1].tolist() == [2, 3, 4, 1, 4, 4, 4, 2]
  gate = np.asarray(got.assignments.gate).reshape(8, 2)
  first = [0.75, 0.625, 0.875, 0.75, 4 / 7, 0.75, 5 / 7, 0.75]
  np.testing.assert_allclose(gate[:, 0], first, rtol=1e-6)
  np.testing.assert_allclose(gate[:, 1], [0.25, 0.375, 0, 0.25, 0, 0, 0, 0.25], rtol=1e-6)


def test_a_group_is_worth_its_best_expert_and_not_its_sum():
  """DeepSeek-V2: group {0, 1} has .4 + .05, group {2, 3} has .3 + .25; the first wins."""
  logits = np.log(np.array([[0.4, 0.05, 0.3, 0.25]], np.float32))
  opts = SlotPolicy(num_experts=4, num_selected=2)
  router = GroupLimited(num_expert_groups=2, num_selected_groups=1)
  assert route(router, logits, opts).assignments.expert.tolist() == [0, 1]
  both = dataclasses.replace(router, group_best=2)
  assert route(both, logits, opts).assignments.expert.tolist() == [2, 3]


def test_switch_keeps_its_probability_whatever_renormalize_says():
  """A gate scaled to 1 would carry no gradient to the router."""
  opts = SlotPolicy(num_experts=4, renormalize="before_drop")
  got = route("switch", np.log(EIGHT_TOKENS), opts)
  np.testing.assert_allclose(got.assignments.gate, EIGHT_TOKENS.max(axis=1), rtol=1e-6)
