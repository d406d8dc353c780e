"""Every layer keeps its number, however layers are stacked before and after."""

import copy

import jax
import numpy as np
import pytest

from moejax.surgery.add import Add
from moejax.surgery.clone import Clone
from moejax.surgery.merge import Merge
from moejax.surgery.prune import Prune
from moejax.surgery.share import Share
from moejax.surgery.split import Split
from moejax.surgery.upcycle import Upcycle
from moejax.surgery.where import layers_of
from tests.surgery.common import chosen, config, draw, make_change, unscaled

PATTERNS = {
  "every_second": {"every": 2, "offset": 1, "model__num_layers": 4},
  "offset": {"every": 3, "offset": 0, "model__num_layers": 7},
  "dense_prefix": {"dense_prefix": 1, "model__num_layers": 4},
  "dense_layers": {"dense_layers": "1,3", "model__num_layers": 6},
  "unscanned": {"every": 2, "model__num_layers": 4, "model__scan_layers": False},
  "encoder": {
    "every": 2,
    "offset": 1,
    "model__num_layers": 4,
    "model__encoder_layers": 3,
    "model__kind": "encoder_decoder",
    "data__objective": "span_corruption",
    "encoder_every": 3,
  },
}


def blocks(model, params):
  """The arrays of each layer of a model, in the order of their numbers."""
  found = []
  for where in layers_of(model):
    node = params
    for name in where.block.split("."):
      node = node[name]
    repeat = where.repeat
    found.append(jax.tree.map(lambda x, r=repeat: x if r is None else x[r], node))
  return found


@pytest.mark.parametrize("name", PATTERNS)
def test_each_moe_layer_is_cloned_and_each_other_layer_is_copied(name):
  old = config(**PATTERNS[name])
  params = draw(old)
  change = make_change(Clone(), old)
  before = blocks(change.old_model, params)
  after = blocks(change.new_model, unscaled(change, params))
  assert len(before) == len(after) > len(change.made) > 0
  for number, (was, now) in enumerate(zip(before, after, strict=True)):
    if number in change.made:
      for leaf, x in was["moe"]["experts"].items():
        np.testing.assert_array_equal(now["moe"]["experts"][leaf], np.repeat(x, 2, 0))
      was, now = ({k: v for k, v in b.items() if k != "moe"} for b in (was, now))
    jax.tree.map(np.testing.assert_array_equal, now, was)


@pytest.mark.parametrize("name", ["every_second", "dense_prefix", "dense_layers"])
def test_layers_change_their_place_in_the_checkpoint_when_some_become_moe(name):
  """All layers were one scanned unit; afterwards they are others, in the same order."""
  fields = {k: v for k, v in PATTERNS[name].items() if not k.startswith("model__")}
  layers = PATTERNS[name]["model__num_layers"]
  old = config(dense_twin=True, num_selected=1, router="switch", model__num_layers=layers)
  asked = copy.deepcopy(old)
  for field, value in fields.items():
    setattr(asked.moe, field, value)
  params = draw(old)
  change = make_change(Upcycle(), old, asked)
  before = blocks(change.old_model, params)
  after = blocks(change.new_model, unscaled(change, params))
  for number, (was, now) in enumerate(zip(before, after, strict=True)):
    x = was["feed_forward"]["w_in"]
    if number in change.made:
      np.testing.assert_array_equal(
        now["moe"]["experts"]["w_in"], np.broadcast_to(x, (4, *x.shape))
      )
    else:
      np.testing.assert_array_equal(now["feed_forward"]["w_in"], x)
    jax.tree.map(np.testing.assert_array_equal, now["attention"], was["attention"])


def test_layers_choose_for_themselves_unless_a_table_serves_them_all():
  """Each layer drops its own least loaded expert; under hash all drop the same one."""
  fields = {"model__num_layers": 2, "num_selected": 1}
  sums = {
    0: {"load": np.array([9.0, 1, 9, 8])},
    1: {"load": np.array([9.0, 9, 0, 8])},
  }
  for router, kept in (("top_k", ([0, 2, 3], [0, 1, 3])), ("hash", ([0, 1, 3],) * 2)):
    old = config(router=router, **fields)
    change = make_change(Prune(experts=3, by="load"), old)
    choices = chosen(change, draw(old), sums)
    assert tuple(choices[n].sources for n in (0, 1)) == kept


@pytest.mark.parametrize(
  "operation",
  [
    Clone(),
    Split(pieces=2),
    Merge(experts=2, group_by="weights", weigh="even"),
    Add(number=1),
    Share(gate=0.5),
  ],
)
def test_parameters_in_bfloat16_stay_so(operation):
  """Arithmetic is in float32, and what is stored has the type of the model."""
  old = config(model__param_dtype="bfloat16", num_shared=1)
  params = draw(old)
  sums = {0: {"load": np.arange(4.0), "gate": np.ones(4), "tokens": np.array(9.0)}}
  change = make_change(operation, old)
  new = unscaled(change, params, sums)
  types = jax.tree.map(lambda x, shape: x.dtype == shape.dtype, new, change.shapes)
  assert all(jax.tree.leaves(types))
  experts = new["unit"]["0"]["moe"]["experts"]
  assert experts["w_in"].dtype.name == "bfloat16"
  assert np.isfinite(experts["w_in"].astype(np.float32)).all()
