"""Operations that change nothing: outputs, gradients and moments of one MoE layer.

Each case is a layer as published models have it. The expected gradient of a new
parameter is the operation applied to the old gradient: a parameter that is copied has its
part of it, and one that is scaled by c has it divided by c.
"""

import jax
import numpy as np
import pytest

from moejax.routing import registry
from moejax.surgery.clone import Clone
from moejax.surgery.operation import EQUAL, Kind
from moejax.surgery.permute import Permute
from moejax.surgery.split import Split
from tests.surgery.common import (
  config,
  draw,
  layer_of,
  operate,
  run_layer,
  with_layer,
)

GROUPS = {"num_expert_groups": 2, "num_selected_groups": 1, "group_best": 2}

CASES = {
  "gelu_raw_softmax": {},
  "swiglu_renormalised": {"activation": "swiglu", "renormalize": "before_drop"},
  "sigmoid_shared": {"router": "sigmoid_bias", "num_shared": 1, "gate_scale": 2.5},
  "biases_norm_2": {
    "activation": "clamped_swiglu",
    "expert_bias": True,
    "router_bias": True,
    "renormalize": "before_drop",
    "renormalize_norm": 2.0,
  },
  "segments_groups": {
    "router": "sigmoid_bias",
    "segments": 2,
    "renormalize": "after_drop",
    "options": {"sigmoid_bias": GROUPS},
    "num_selected": 1,
  },
  "hash": {"router": "hash"},
}

OPERATIONS = {
  "split": Split(pieces=2),
  "split_3": Split(pieces=3),
  "clone_all": Clone(selected="all"),
  "permute": Permute(),
}

SAME = [
  ("split", "swiglu_renormalised"),
  ("split", "hash"),
  ("clone_all", "sigmoid_shared"),
  ("permute", "segments_groups"),
  *(
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in (
      ("split", "gelu_raw_softmax"),
      ("split", "sigmoid_shared"),
      ("split", "biases_norm_2"),
      ("split", "segments_groups"),
      ("split_3", "segments_groups"),
      ("clone_all", "gelu_raw_softmax"),
      ("clone_all", "segments_groups"),
      ("clone_all", "hash"),
      ("permute", "biases_norm_2"),
      ("permute", "hash"),
    )
  ),
]


def close(one, other, what=""):
  largest = max(float(np.max(np.abs(other), initial=0.0)), 1e-6)
  np.testing.assert_allclose(one, other, atol=2e-5 * largest, rtol=0, err_msg=what)


@pytest.mark.parametrize(("operation", "name"), SAME)
def test_output_gradients_and_moments_stay(name, operation):
  """The layer computes the same; gradients and Adam's moments go with their parameters.

  Router rows of copies are compared by their sum, since a copy's own gradient depends on
  its part of the expert.
  """
  old = config(**CASES[name])
  params = draw(old)
  done = operate(OPERATIONS[operation], old, params)
  assert done.expected == EQUAL
  y, grads, dx = run_layer(old, params, params.get("hash_table"))
  new_y, new_grads, new_dx = run_layer(
    done.change.new, done.params, done.params.get("hash_table")
  )
  close(new_y, y, "output")
  close(new_dx, dx, "gradient of the input")
  first = layer_of(done.moments(with_layer(params, grads), Kind.GRADIENT))
  squares = with_layer(params, jax.tree.map(np.square, grads))
  second = layer_of(done.moments(squares, Kind.SQUARE))
  for part, found in new_grads.items():
    if part == "router" and operation != "permute":
      sources = done.choices[0].sources
      jax.tree.map(lambda n, o: close(over_copies(n, sources), o), found, grads[part])
      continue
    jax.tree.map(close, found, first[part])
    jax.tree.map(lambda n, m: close(np.abs(n), np.sqrt(m)), found, second[part])


SLOTS = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}
ROUTERS = {
  "switch": {"num_selected": 1},
  "top2": {},
  "noisy_top_k": {},
  "expert_choice": SLOTS,
  "quantile_bias": {},
  "quantile_balancing": {},
  "group_limited": {
    "options": {"group_limited": {"num_expert_groups": 2, "num_selected_groups": 2}}
  },
  "base": SLOTS | {"num_selected": 1},
  "soft": SLOTS | {"group_size": 16, "data__sequence_length": 16},
  "dense": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_every_learned_router_can_have_its_experts_in_another_order(router):
  """In evaluation, where no noise is drawn; all its own arrays move with the experts."""
  old = config(router=router, **ROUTERS[router])
  params = draw(old)
  done = operate(Permute(by="order", order="1,0,3,2"), old, params)
  assert done.expected == EQUAL
  y, new_y = run_layer(old, params)[0], run_layer(done.change.new, done.params)[0]
  close(new_y, y)


def test_the_learned_routers_are_all_tried():
  learned = {name for name, router in registry.ROUTERS.items() if router.learned}
  # Random and forced choices are by the experts' indices.
  by_index = {"random", "forced_balance"}
  tried = set(ROUTERS) | {fields.get("router", "top_k") for fields in CASES.values()}
  assert learned - by_index <= tried


def over_copies(x, sources):
  """Sums the last axis, of router rows, over the copies of each expert."""
  out = np.zeros((*x.shape[:-1], max(sources) + 1), x.dtype)
  np.add.at(np.moveaxis(out, -1, 0), sources, np.moveaxis(x, -1, 0))
  return out
