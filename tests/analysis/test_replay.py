"""Replay: decisions from logits alone, equal to the model's where they can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis import decide, replay
from moejax.config import MeshConfig
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.layers.routes import Routes
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [(b"aaab" * 24, 0), (b"bcbc" * 24, 1), (b"axyz" * 10, 0)]
_RUN = {"model__num_layers": 2, "moe__capacity_factor": 1.0}
_SETTINGS = [
  {"capacity_factor": 0.5},
  {"capacity_factor": 0.5, "overflow": "next_best", "group_size": 64},
  {"capacity_factor": 0.75, "priority": "gate", "renormalize": "after_drop"},
  {"capacity_factor": 0.5, "slot_order": "token_major", "num_selected": 3},
]


def _batch():
  return jax.tree.map(jnp.asarray, tiny.TinyDataset(_TEXTS).arrays)


def _routes(model, params, batch, factor) -> Routes:
  return jax.jit(
    lambda p, b: (
      model(
        p,
        b["inputs"],
        segment_ids=b["segment_ids"],
        positions=b["positions"],
        capacity_factor=factor,
        return_routes=True,
      ).routes
    )
  )(params, batch)


def _mesh():
  return make_mesh(MeshConfig(), jax.devices()[:1])


def _recorded(model, params, batch):
  routes = _routes(model, params, batch, None)
  return replay.make_recorder(model, _mesh())(params, routes, batch)


@pytest.fixture(scope="module")
def run():
  model, params = tiny.model_and_params(**_RUN)
  return model, params, _recorded(model, params, _batch())


def test_the_table_has_a_line_for_each_setting_and_layer():
  """With the words of the flags, and shares in percent."""
  rates = {"drop_fraction": 0.125, "dropped_tokens": 0.1, "max_load_ratio": 1.5}
  layers = [rates | {"layer": 1}, rates | {"layer": 3}]
  settings = [{"capacity_factor": None}, {"capacity_factor": 2.0}]
  found = [{"setting": setting, "layers": layers} for setting in settings]
  head, *rows = replay.table(found).splitlines()
  assert head.split() == ["setting", "layer", "dropped", "lost", "busiest"]
  assert len(rows) == 4 and len({len(row) for row in (head, *rows)}) == 1
  assert rows[0].split() == ["capacity_factor=none", "1", "12.50%", "10.00%", "1.50x"]


@pytest.mark.parametrize("setting", _SETTINGS, ids=replay.show)
def test_the_first_layer_is_decided_as_the_model_does(run, setting):
  """Experts, slots and gates of every token, against the model run with the option."""
  _, params, (recorded, own) = run
  config = replay.configured(tiny.config(**_RUN), setting)
  model = groups.make_model(config, 264)
  want = _routes(model, params, _batch(), config.moe.capacity_factor)
  found = jax.jit(
    lambda r, o: decide.decide(config.moe, r, o, setting["capacity_factor"])
  )
  got = found(recorded, own)
  assert got.kept is not None and want.kept is not None
  assert got.expert is not None and want.expert is not None
  assert got.gate is not None and want.gate is not None
  assert got.kept.shape == want.kept.shape
  np.testing.assert_array_equal(got.kept[0], want.kept[0])
  kept = np.asarray(want.kept[0])
  assert not kept[np.asarray(recorded.valid)].all()  # Something is dropped.
  experts = np.asarray(got.expert[0]), np.asarray(want.expert[0])
  np.testing.assert_array_equal(experts[0][kept], experts[1][kept])
  np.testing.assert_allclose(got.gate[0], want.gate[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("router", ["sigmoid_bias", "hash", "forced_balance"])
def test_biases_tables_and_positions_are_recorded_too(router):
  """What a router reads besides its logits, at every MoE layer of both parts."""
  changes = _RUN | {"moe__router": router, "model__num_layers": 3, "moe__dense_prefix": 1}
  model, params = tiny.model_and_params(**changes)
  if router == "hash":
    table = np.random.default_rng(0).permuted(np.tile(np.arange(4.0), (264, 1)), axis=1)
    params = params | {"hash_table": jnp.asarray(table[:, :2], jnp.float32)}
  recorded, own = _recorded(model, params, _batch())
  got = jax.jit(lambda r, o: decide.decide(model.moe, r, o, None))(recorded, own)
  want = _routes(model, params, _batch(), None)
  np.testing.assert_array_equal(got.expert, want.expert)


def test_rates_of_a_dropless_setting_are_zero(run):
  """And those of a tight one are not, and are exact at the first layer only."""
  model, _, (recorded, own) = run
  asked = replay.settings({"capacity_factor": [None, 0.5]})
  replayer = replay.Replay(tiny.config(**_RUN), model, _mesh(), asked)
  replayer.see(recorded, own)
  dropless, tight = (entry["layers"] for entry in replayer.result())
  assert [layer["drop_fraction"] for layer in dropless] == [0, 0]
  assert tight[0]["drop_fraction"] > 0.3
  assert [layer["exact"] for layer in tight] == [True, False]


def test_a_confirmed_setting_agrees_at_the_first_layer(run):
  model, params, (recorded, own) = run
  replayer = replay.Replay(
    tiny.config(**_RUN), model, _mesh(), [{"capacity_factor": 0.5}]
  )
  replayer.see(recorded, own)
  found = replay.confirm(
    tiny.config(**_RUN),
    params,
    tiny.TinyDataset(_TEXTS),
    replayer.result()[0],
    split="validation",
    mesh=_mesh(),
    batch_size=8,
  )
  assert found["difference"][0] == pytest.approx(0, abs=1e-9)
  assert found["difference"][1] != 0 and found["loss"] > 0


def test_settings_are_all_combinations_in_order():
  asked = {"overflow": ["drop", "next_best"], "capacity_factor": [1.0, 2.0]}
  found = replay.settings(asked)
  assert [s["capacity_factor"] for s in found] == [1, 1, 2, 2]
  assert [s["overflow"] for s in found] == 2 * ["drop", "next_best"]


@pytest.mark.parametrize(
  ("setting", "words"),
  [
    ({"capacity_factor": None, "overflow": "next_best"}, "dropless never overflows"),
    ({"num_selected": 9}, "cannot choose an expert twice"),
  ],
)
def test_a_setting_that_makes_no_sense_is_refused(setting, words):
  with pytest.raises(UserError, match=words) as error:
    replay.configured(tiny.config(**_RUN), setting)
  assert "--replay with" in str(error.value) and "\n" not in str(error.value)


def test_batches_hold_whole_groups_of_every_setting():
  """Groups of 3 and 2 sequences: a multiple of 6."""
  asked = [{"group_size": 96}, {"group_size": 64}]
  config = tiny.config(**_RUN | {"train__batch_size": 6})
  assert replay.batch_multiple(config, _mesh(), asked) % 6 == 0


def test_a_router_without_its_own_queue_is_refused():
  model, _ = tiny.model_and_params(
    moe__router="expert_choice", moe__eval_capacity_factor=1.0
  )
  with pytest.raises(UserError, match="experts choose tokens"):
    replay.check(model)


def test_gates_that_logits_do_not_decide_are_refused():
  """Rows of pruned experts take a part of the gates, and have no logits here."""
  model, _ = tiny.model_and_params(
    moe__router="top_k", moe__renormalize="none", moe__pruned_rows=2
  )
  with pytest.raises(UserError, match="2 router rows without an expert"):
    replay.check(model)
