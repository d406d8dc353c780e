"""Fewer experts: which ones go, what their average is, and when nothing changes."""

import jax
import numpy as np
import pytest

from moejax.config.check import validate
from moejax.errors import UserError
from moejax.surgery.clone import Clone
from moejax.surgery.join import Join
from moejax.surgery.merge import Merge
from moejax.surgery.operation import CLOSE, DROP, EQUAL, Choice, Kind, mapped_table
from moejax.surgery.prune import Prune, concentration
from moejax.surgery.share import Share
from moejax.surgery.split import Split
from tests.surgery.common import (
  D,
  chosen,
  config,
  draw,
  layer_of,
  make_change,
  operate,
  run_layer,
  unscaled,
  with_layer,
)

SUMS = {
  0: {
    "tokens": np.array(100.0),
    "load": np.array([70.0, 60.0, 40.0, 30.0]),
    "gate": np.array([40.0, 30.0, 20.0, 10.0]),
    "norm": np.array([70.0, 180.0, 200.0, 60.0]),
    "gated_norm": np.array([35.0, 60.0, 80.0, 60.0]),
    "outputs": np.array([[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]]),
    "logits": np.array([[4.0, 0, 1, 0], [0, 4, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]),
  }
}


@pytest.mark.parametrize(
  ("by", "kept"),
  [
    ("load", (0, 1)),
    # 35/70, 60/60, 80/40, 60/30: the mean of gate times norm.
    ("reap", (2, 3)),
    ("norm", (1, 2)),
    # 1, 3, 5, 2.
    ("mean_norm", (1, 2)),
  ],
)
def test_the_least_important_experts_go(by, kept):
  """By each measure the two lowest of four are left out; ties go by index."""
  old = config()
  change = make_change(Prune(experts=2, by=by), old)
  choice = chosen(change, draw(old), SUMS)[0]
  assert tuple(choice.sources) == kept
  assert not choice.exact


def test_the_most_even_weights_go_without_any_text():
  """AIMER drops the highest mean|w| / rms(w): an expert of equal weights has ratio 1."""
  old = config()
  params = draw(old)
  for leaf in layer_of(params)["experts"].values():
    leaf[2] = np.sign(leaf[2])
  change = make_change(Prune(experts=3, by="weights"), old)
  assert chosen(change, params)[0].sources == [0, 1, 3]
  arrays = layer_of(params)["experts"]
  both = np.concatenate([arrays[n][1].reshape(-1) for n in ("w_in", "w_out")])
  layer = _layer(change, params)
  wanted = np.abs(both).mean() / np.sqrt(np.square(both).mean())
  np.testing.assert_allclose(concentration(layer)[[1, 2]], [wanted, 1.0], rtol=1e-6)


def test_random_experts_go_by_the_seed_alone():
  """The control: without text, the same for one seed, and every expert can go."""
  old = config()
  params, prune = draw(old), Prune(experts=2, by="random")
  assert not prune.reads_text
  changes = [make_change(prune, old, seed=seed) for seed in (*range(8), 0)]
  kept = [tuple(chosen(change, params)[0].sources) for change in changes]
  assert kept[0] == kept[-1]
  assert {e for pair in kept for e in pair} == {0, 1, 2, 3} and len(set(kept)) > 3
  assert all(a < b for a, b in kept)


def _layer(change, params):
  from moejax.surgery.change import InMemory

  return change.layer(0, InMemory({"params": params}))


def test_groups_of_a_router_lose_equally_many():
  """Of two groups of two, each keeps its best, though both best are in the first."""
  groups = {"num_expert_groups": 2, "num_selected_groups": 2}
  old = config(router="sigmoid_bias", options={"sigmoid_bias": groups})
  change = make_change(Prune(experts=2, by="load"), old)
  assert chosen(change, draw(old), SUMS)[0].sources == [0, 2]
  with pytest.raises(UserError, match="multiple of 2"):
    Prune(experts=3).check(old)


def unvisited(**fields):
  """A layer whose expert 2 is never chosen, but has some probability."""
  old = config(router_bias=True, **fields)
  params = draw(old)
  layer_of(params)["router"]["logit_bias"][2] = -7.0
  sums = {0: SUMS[0] | {"load": np.array([40.0, 30.0, 0.0, 20.0])}}
  return old, params, sums


@pytest.mark.parametrize(
  "renormalize", ["before_drop", pytest.param("none", marks=pytest.mark.slow)]
)
def test_an_expert_that_nobody_visits_can_go(renormalize):
  """With renormalised gates nothing changes; raw softmax loses its logit.

  Then the probabilities of the others grow, by less than its own share.
  """
  old, params, sums = unvisited(renormalize=renormalize)
  done = operate(Prune(experts=3, by="load"), old, params, sums=sums)
  assert done.choices[0].sources == [0, 1, 3]
  y = run_layer(old, params)[0]
  new_y = run_layer(done.change.new, done.params)[0]
  difference = np.abs(new_y - y).max() / np.abs(y).max()
  if renormalize == "none":
    assert done.expected == CLOSE
    assert 1e-5 < difference < 0.05
  else:
    assert done.expected == EQUAL
    assert difference < 1e-5


@pytest.mark.parametrize(
  "router", ["top_k", pytest.param("group_limited", marks=pytest.mark.slow)]
)
def test_an_expert_that_nobody_visits_can_go_if_its_logit_stays(router):
  """Under raw softmax, with --denominator: outputs, and the gradient of the input."""
  old, params, sums = unvisited(router=router)
  prune = Prune(experts=3, by="load", denominator=True)
  done = operate(prune, old, params, sums=sums)
  assert done.expected == EQUAL
  assert layer_of(done.params)["router"]["pruned"].shape == (D, 1)
  y, grads, dx = run_layer(old, params)
  new_y, new_grads, new_dx = run_layer(done.change.new, done.params)
  np.testing.assert_allclose(new_y, y, atol=1e-5 * np.abs(y).max())
  np.testing.assert_allclose(new_dx, dx, atol=1e-5 * np.abs(dx).max())
  # The row without an expert still learns, as it did.
  old_row, row = grads["router"]["weight"][:, 2:3], new_grads["router"]["pruned"]
  np.testing.assert_allclose(row, old_row, atol=1e-4 * np.abs(old_row).max())


def test_rows_without_experts_are_refused_where_they_do_nothing():
  for fields in ({"router": "sigmoid_bias"}, {"renormalize": "before_drop"}):
    with pytest.raises(UserError, match="--denominator"):
      Prune(experts=3, denominator=True).check(config(**fields))
    with pytest.raises(UserError, match="moe.pruned_rows"):
      validate(config(pruned_rows=1, **fields))


@pytest.mark.slow
def test_an_expert_that_nobody_visits_can_go_under_sigmoid_scores():
  """Each score stands alone, so gates of the others stay. (Selection has a bias.)"""
  old, params, sums = unvisited(router="sigmoid_bias")
  done = operate(Prune(experts=3, by="load"), old, params, sums=sums)
  assert done.expected == EQUAL
  y, new_y = run_layer(old, params)[0], run_layer(done.change.new, done.params)[0]
  np.testing.assert_allclose(new_y, y, atol=1e-5 * np.abs(y).max())


def tree_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_clone_then_merge_gives_the_original_parameters(activation):
  """Bit by bit, and moments up to rounding: copies have a part of them each."""
  old = config(
    model__activation=activation, expert_bias=True, num_shared=1, router="sigmoid_bias"
  )
  params = draw(old)
  first = make_change(Clone(factor=3), old)
  cloned = unscaled(first, params)
  merge = Merge(experts=4, group_by="order", weigh="even")
  second = make_change(merge, first.new)
  tree_equal(unscaled(second, cloned), params)
  choices = chosen(second, cloned)
  assert choices[0].exact
  squares = jax.tree.map(np.square, params)
  for kind, tree in ((Kind.GRADIENT, params), (Kind.SQUARE, squares)):
    there = _moments(first, chosen(first, params), tree, kind)
    back = _moments(second, choices, there, kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), back, tree)


def test_aliases_keep_values_gradients_and_moments():
  """Clone, then merge each pair of copies as aliases: the layer and its state stay.

  An alias is reached by its own tokens alone, so its gradient is that of the copy.
  """
  old = config()
  first = make_change(Clone(), old)
  cloned = unscaled(first, draw(old))
  alias = Merge(experts=4, group_by="order", weigh="even", rows="alias")
  done = operate(alias, first.new, cloned)
  tree_equal(done.params, cloned)
  y, grads, dx = run_layer(first.new, cloned)
  new_y, new_grads, new_dx = run_layer(done.change.new, done.params)
  tree_equal((new_y, new_dx), (y, dx))
  squares = jax.tree.map(np.square, grads)
  for kind, tree, new in (
    (Kind.GRADIENT, grads, new_grads),
    (Kind.SQUARE, squares, jax.tree.map(np.square, new_grads)),
  ):
    tree_equal(layer_of(done.moments(with_layer(cloned, tree), kind)), new)


def test_moments_of_an_alias_are_in_the_order_of_its_new_neurons():
  """Its neurons are permuted to match the first member's, and their moments with them."""
  old = config()
  params = draw(old)
  permuted_copy(params, 1, 0, np.random.default_rng(1))
  alias = Merge(experts=2, group_by="order", weigh="even", rows="alias")
  change = make_change(alias, old)
  choices = chosen(change, params)
  assert choices[0].orders is not None
  order = choices[0].orders[1]
  found = layer_of(_moments(change, choices, params, Kind.GRADIENT))["experts"]
  w_in = layer_of(params)["experts"]["w_in"]
  tree_equal(found["w_in"][0], w_in[0])
  tree_equal(found["w_in"][1], w_in[1][:, order])
  tree_equal(found["w_in"][1], w_in[0])


def _moments(change, choices, tree, kind):
  from moejax.checkpoint import fingerprint
  from moejax.surgery.change import InMemory

  make = change.maker(InMemory({"m": tree}), choices, "m.", kind)
  return jax.tree_util.tree_map_with_path(
    lambda path, shape: np.asarray(make(fingerprint.leaf_name(path), shape)),
    change.shapes,
  )


def test_split_then_join_gives_the_original_parameters():
  """Values, and gradients: a split only cuts, and a join only concatenates."""
  old = config(model__activation="swiglu", expert_bias=True)
  params = draw(old)
  first = make_change(Split(pieces=3), old)
  pieces = unscaled(first, params)
  second = make_change(Join(pieces=3), first.new)
  back = unscaled(second, pieces)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, params)
  assert second.new.moe == old.moe


def permuted_copy(params, expert, of, rng):
  """Makes one expert another with its neurons in another order."""
  experts = layer_of(params)["experts"]
  order = rng.permutation(experts["w_in"].shape[2])
  for name, x in experts.items():
    if name == "out_bias":
      x[expert] = x[of]
    elif name == "w_out":
      x[expert] = x[of][order]
    else:
      x[expert] = x[of][..., order]


@pytest.mark.parametrize(
  "rows", ["alias", pytest.param("dominant", marks=pytest.mark.slow)]
)
def test_two_equal_experts_become_one(rows):
  """Their neurons stand in another order and are aligned before averaging.

  As aliases, with both router rows kept, nothing changes. With the row of one of them,
  the other's tokens go elsewhere.
  """
  old = config(expert_bias=True, renormalize="before_drop")
  params = draw(old)
  permuted_copy(params, 3, 0, np.random.default_rng(1))
  merge = Merge(experts=3, group_by="outputs", weigh="load", rows=rows)
  sums = {0: SUMS[0] | {"outputs": np.array([[1.0, 0], [0, 1], [1, -1], [1, 0]])}}
  done = operate(merge, old, params, sums=sums)
  assert done.choices[0].exact
  y, new_y = run_layer(old, params)[0], run_layer(done.change.new, done.params)[0]
  difference = np.abs(new_y - y).max() / np.abs(y).max()
  if rows == "alias":
    assert done.expected == EQUAL
    assert difference < 1e-5
  else:
    assert done.expected == DROP
    assert difference > 1e-2


def test_groups_and_weights_of_a_merge():
  """The two used most stay; each other joins the most similar; use weighs the mean."""
  old = config(model__activation="swiglu")
  params = draw(old)
  change = make_change(Merge(experts=2, align=False), old)
  choice = chosen(change, params, SUMS)[0]
  assert list(choice.parents) == [(0, 2), (1, 3)]
  assert choice.weights is not None
  np.testing.assert_allclose(choice.weights, [[70 / 110, 40 / 110], [60 / 90, 30 / 90]])
  before = layer_of(params)
  after = layer_of(unscaled(change, params, SUMS))
  wanted = (70 * before["experts"]["w_in"][0] + 40 * before["experts"]["w_in"][2]) / 110
  np.testing.assert_allclose(after["experts"]["w_in"][0], wanted, atol=1e-6)
  tree_equal(after["router"]["weight"], before["router"]["weight"][:, :2])


def test_the_most_used_expert_becomes_shared():
  """Its neurons join the shared expert, with its mean gate: 40 of 100 tokens' gates."""
  old = config(model__activation="swiglu", num_shared=1, segments=2, num_selected=1)
  params = draw(old)
  sums = {
    0: {"tokens": np.array(100.0), "load": np.arange(8.0), "gate": np.full(8, 40.0)}
  }
  change = make_change(Share(), old)
  assert (change.new.moe.fine_experts, change.new.moe.fine_selected) == (7, 1)
  assert change.new.moe.shared_width == 12
  before = layer_of(params)
  after = layer_of(unscaled(change, params, sums))
  for name in ("w_in", "w_gate"):
    tree_equal(after["shared"][name][:, 6:], before["experts"][name][7])
  tree_equal(after["shared"]["w_in"][:, :6], before["shared"]["w_in"])
  np.testing.assert_allclose(
    after["shared"]["w_out"][6:], 0.4 * before["experts"]["w_out"][7], rtol=1e-6
  )
  tree_equal(after["experts"]["w_in"], before["experts"]["w_in"][:7])


def test_a_table_gives_ids_of_lost_experts_others():
  """Kept experts keep their ids, under new numbers; nobody gets one twice."""
  table = np.array([[0, 1], [2, 3], [3, 0], [2, 1]])
  choice = Choice(parents=[(3,), (1,), (0,)])
  out = mapped_table(table, choice, 2)
  assert out[0].tolist() == [2, 1]
  assert out[2].tolist() == [0, 2]
  assert out[1][0] == 0 and out[3][0] == 1
  assert all(len(set(row)) == 2 for row in out)


@pytest.mark.parametrize(
  ("operation", "fields", "words"),
  [
    (Prune(experts=1), {}, "a token chooses 2 experts, and 1 would be left"),
    (Prune(experts=4), {}, "not fewer than the 4"),
    (Prune(), {}, "--experts=N is missing"),
    (Prune(experts=3), {"router": "dense"}, None),
    (Prune(experts=3, by="loss"), {"router": "hash"}, "--by=load"),
    (Merge(experts=3, group_by="order"), {}, "Give a divisor"),
    (Share(number=3), {"num_selected": 1}, "--selected=same"),
    (Share(), {"expert_bias": True}, "no biases"),
    (Share(), {"shared_gate": True}, "shared_gate=true: .* Use operation merge"),
    (Share(), {"router": "hash"}, "reroute"),
    (Split(pieces=5), {}, "does not divide the 12 neurons"),
    (Split(), {"router": "switch", "num_selected": 1}, "operation reroute"),
    (Join(pieces=4), {}, "must divide the 4 experts and the 2 choices"),
    (
      Prune(experts=3),
      {"router": "soft", "capacity_factor": 1.0, "eval_capacity_factor": 1.0},
      "learned slots",
    ),
  ],
)
def test_what_cannot_be_done_is_told_with_a_remedy(operation, fields, words):
  """Before anything is read."""
  if words is None:
    operation.check(config(**fields))
    return
  with pytest.raises(UserError, match=words):
    operation.check(config(**fields))


def test_widths_stay_those_of_one_layer():
  """After any operation all experts of the layer are D x F; D never changes."""
  for operation in (Clone(), Split(pieces=4), Prune(experts=2, by="weights")):
    change = make_change(operation, config())
    shapes = layer_of(unscaled(change, draw(config())))["experts"]["w_in"].shape
    assert shapes == (change.new.moe.fine_experts, D, change.new.moe.fine_hidden)


def test_gradients_of_a_merged_expert_are_the_sum_of_its_members():
  """Momentum of two experts that become one adds up, as their gradients would."""
  old = config()
  params = draw(old)
  change = make_change(Merge(experts=2, group_by="order", weigh="even", align=False), old)
  grads = with_layer(params, layer_of(params))
  found = layer_of(_moments(change, chosen(change, params), grads, Kind.GRADIENT))
  w_in = layer_of(params)["experts"]["w_in"]
  np.testing.assert_allclose(found["experts"]["w_in"][0], w_in[0] + w_in[1], rtol=1e-5)
