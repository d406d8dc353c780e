"""Frozen parameters: never moved, and unknown to the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import fingerprint
from moejax.checkpoint.manager import Checkpointer
from moejax.cost.memory import least_bytes
from moejax.cost.parameters import count_parameters
from moejax.errors import ConfigError
from moejax.models import trained as trained_lib
from moejax.models.decoder import Decoder
from moejax.models.frozen_count import count_frozen
from moejax.models.placement import check_rows
from moejax.sharding.mesh import make_mesh
from moejax.train import state as state_lib
from moejax.train import step as step_lib
from moejax.train.optimizer import make_optimizer
from tests.train.conftest import VOCAB, make_batch, make_setup, tiny_config

FROZEN = "embedding.*,*.attention.*,*.experts.*[0:2],*.router.weight[1],*.router.bias[0]"


def config_of(frozen: str = FROZEN, *, optimizer: str = "adamw", scan: bool = True):
  """Four layers in two repeats of a dense and an MoE layer; every step clips, and decay
  moves whatever it reaches."""
  config = tiny_config(frozen=frozen)
  config.model.num_layers, config.model.width, config.model.hidden = 4, 16, 16
  config.model.scan_layers = scan
  config.moe.hidden, config.moe.num_selected = 16, 2
  config.moe.use_router("sigmoid_bias")
  config.moe.capacity_factor = None
  config.moe.dispatcher = "auto"
  config.optimizer.name, config.optimizer.weight_decay = optimizer, 1.0
  config.optimizer.clip_norm, config.optimizer.warmup_steps = 0.1, 0
  return config


def model_of(config) -> Decoder:
  return Decoder(config.model, config.moe, vocab_size=VOCAB, frozen=config.train.frozen)


def rows_of(name: str) -> tuple[int, list[int]] | None:
  """The axis and rows of a parameter that FROZEN names; None for none, [] for all."""
  if name.startswith("embedding.") or ".attention." in name:
    return 0, []
  if ".experts." in name:
    return 1, [0, 1]
  if name.endswith(".router.weight"):
    return 2, [1]
  return (1, [0]) if name.endswith(".router.bias") else None


def taken(leaf, axis: int, rows: list[int], *, frozen: bool) -> np.ndarray:
  kept = [i for i in range(leaf.shape[axis]) if (i in rows) == frozen]
  return np.take(np.asarray(leaf), kept, axis)


@pytest.fixture(scope="module")
def stepped(compilation_cache):
  """(config, devices) -> setup, parameters before and state after three steps."""
  found = {}

  def run(config, num_devices: int = 1):
    key = repr((config, num_devices))
    if key not in found:
      setup = make_setup(config, num_devices)
      state = setup.state()
      before = jax.device_get(state["params"])
      state, metrics = setup.run(state, *(make_batch(i) for i in range(3)))
      found[key] = setup, before, jax.device_get(state), metrics
    return found[key]

  return run


VARIANTS = [
  ("adamw", True),
  ("muon", True),
  pytest.param("adamw", False, marks=pytest.mark.slow),
  pytest.param("muon", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("optimizer, scan", VARIANTS)
def test_frozen_bits_stay_and_all_others_move(stepped, optimizer, scan):
  """After three steps with decay, momentum and clipping, frozen arrays and rows are the
  same bits, also those that a rule would move; every other row has moved."""
  _, before, state, metrics = stepped(config_of(optimizer=optimizer, scan=scan))
  assert metrics[0].grad_norm > 0.1  # it was clipped
  old, new = (fingerprint.named_leaves(t) for t in (before, state["params"]))
  for name, leaf in old.items():
    found = rows_of(name)
    if found is None:
      assert np.any(leaf != new[name]), name
      continue
    axis, rows = found
    if not rows:
      np.testing.assert_array_equal(leaf, new[name], err_msg=name)
      continue
    kept = [taken(x, axis, rows, frozen=True) for x in (leaf, new[name])]
    np.testing.assert_array_equal(*kept, err_msg=name)
    was, now = (taken(x, axis, rows, frozen=False) for x in (leaf, new[name]))
    for row in range(was.shape[axis]):
      assert np.any(np.take(was, row, axis) != np.take(now, row, axis)), (name, row)


@pytest.mark.parametrize("optimizer, scan", VARIANTS[:2])
def test_the_optimizer_remembers_trained_rows_alone(stepped, optimizer, scan):
  """Moments have the shape of the trained rows, and frozen parameters have none."""
  _, before, state, _ = stepped(config_of(optimizer=optimizer, scan=scan))
  moments = fingerprint.named_leaves(state["opt_state"])
  for name, leaf in fingerprint.named_leaves(before).items():
    own = [m.shape for n, m in moments.items() if n.endswith("." + name)]
    found = rows_of(name)
    if found == (0, []) or name.endswith(".bias"):
      assert not own, name
    else:
      shape = leaf.shape
      if found is not None:
        shape = taken(leaf, *found, frozen=False).shape
      assert own and set(own) == {shape}, name


def test_the_gradient_is_a_slice_of_the_whole_one(compilation_cache):
  """Of each trained row it is what it would be if everything were trained; frozen ones
  are not in it, and so not in its norm."""
  whole_model, model = model_of(config_of("")), model_of(config_of())
  params = whole_model.init(jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, make_batch(0, batch=2))
  whole, own = (
    fingerprint.named_leaves(
      jax.jit(lambda p, m=m: step_lib.loss_gradients(m, p, batch, jax.random.key(1)))(
        params
      )[1]
    )
    for m in (whole_model, model)
  )
  for name, gradient in whole.items():
    found = rows_of(name)
    if found is None:
      np.testing.assert_allclose(own[name], gradient, rtol=1e-5, atol=1e-7)
    elif not found[1]:
      assert name not in own
    else:
      wanted = taken(gradient, *found, frozen=False)
      np.testing.assert_allclose(own[name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
  "optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)]
)
def test_experts_on_several_devices_train_as_on_one(stepped, optimizer):
  """Two of four experts are frozen, the experts lie on two of eight devices: the same
  parameters, and moments that are cut over the expert axis."""
  config = config_of(optimizer=optimizer)
  _, _, one, _ = stepped(config)
  config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh))
  config.mesh.data, config.mesh.expert = 4, 2
  setup, before, eight, _ = stepped(config, 8)
  old, a, b = (
    fingerprint.named_leaves(t) for t in (before, one["params"], eight["params"])
  )
  for name in a:
    np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)
    if found := rows_of(name):
      axis, rows = found
      rows = rows or list(range(a[name].shape[0]))
      np.testing.assert_array_equal(
        taken(old[name], axis, rows, frozen=True), taken(b[name], axis, rows, frozen=True)
      )
  shapes = state_lib.state_shapes(setup.model, setup.optimizer, setup.mesh)
  moments = fingerprint.named_leaves(shapes["opt_state"])
  cut = [m for n, m in moments.items() if n.endswith(".experts.w_in")]
  assert cut and all(m.sharding.spec[1] == "expert" for m in cut)


def test_rows_that_no_mesh_axis_shares_out_are_refused():
  """Three trained experts on two devices: one line that names both."""
  config = config_of("*.experts.*[0]")
  config.mesh.data, config.mesh.expert = 1, 2
  mesh = make_mesh(config.mesh, jax.devices()[:2])
  with pytest.raises(ConfigError, match=r"3 of 4 experts .* --config\.mesh\.expert=2"):
    check_rows(model_of(config), mesh)


@pytest.mark.parametrize(
  "frozen, message",
  [
    ("*.expert.*", r"no parameter is named \*\.expert\.\*\. The nearest is .*experts"),
    ("unit.1.moe.router.wieght", r"The nearest is unit\.1\.moe\.router\.weight\."),
    ("*.attention.query[0]", "belongs to no expert and has no rows"),
    ("*.experts.*[2:5]", "rows 0 to 3"),
    ("*.experts.*[4]", "rows 0 to 3"),
    ("*", "nothing is left to train"),
    ("!*.router.bias", "nothing is left to train"),
  ],
)
def test_a_selector_that_does_not_fit_is_named(frozen, message):
  """Before anything is compiled, with what would fit."""
  with pytest.raises(ConfigError, match=message):
    model_of(config_of(frozen)).trained()


def test_later_selectors_take_back_and_negation_means_all_but():
  """`!` first freezes everything else; the last selector that matches decides."""
  model = model_of(config_of("!*.experts.*[2:],*.experts.w_out[3]"))
  learned, _ = trained_lib.split(
    model.shapes() and model.init(jax.random.key(0)), model.trained()
  )
  shapes = {n: x.shape for n, x in fingerprint.named_leaves(learned).items()}
  assert shapes == {
    "unit.1.moe.experts.w_in": (2, 2, 16, 16),
    "unit.1.moe.experts.w_out": (2, 1, 16, 16),
  }


def test_nothing_frozen_is_the_mask_of_before():
  """An empty selector leaves the declared mask, and no second one."""
  model = model_of(config_of(""))
  assert model.frozen is None
  assert trained_lib.names(model.trained()) == ["unit.1.moe.router.bias"]


def test_cut_and_woven_rows_are_the_array():
  """`weave` inverts `cut`, for every pattern of three rows; numpy says which go where."""
  value = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
  for bits in range(1, 7):
    trained = np.array([bits >> i & 1 for i in range(3)], bool)
    rows = trained_lib.Rows.of(1, trained)
    assert isinstance(rows, trained_lib.Rows)
    cut = rows.cut(jnp.asarray(value))
    np.testing.assert_array_equal(cut[0], value[:, trained])
    np.testing.assert_array_equal(cut[1], value[:, ~trained])
    np.testing.assert_array_equal(rows.weave(*cut), value)


def test_frozen_parameters_are_counted_by_part():
  """All but one norm: each part is what the closed formulas count, less that norm."""
  config = config_of("!unit.0.attention_norm.scale")
  total, _ = count_parameters(config, VOCAB)
  total = dict(total, norms=total["norms"] - 2 * 16, total=total["total"] - 2 * 16)
  assert count_frozen(config) == total
  assert count_frozen(config_of("*.experts.*[0]"))["experts"] == total["experts"] // 4
  assert count_frozen(config_of("")) == {}


def test_the_memory_that_is_predicted_has_moments_of_trained_experts_alone():
  """Exactly the bytes of the optimizer's arrays, counts aside."""
  config = config_of("embedding.*,*.experts.*[0:2],*.router.bias")
  model = model_of(config)
  optimizer = make_optimizer(
    config.optimizer, num_steps=9, axes=model.logical_axes(), trained=model.trained()
  )
  state = jax.eval_shape(optimizer.init, model.shapes())
  held = sum(4 * leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
  one = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
  assert least_bytes(config, one, VOCAB, count_frozen(config))["moments"] == held
  assert least_bytes(config, one, VOCAB)["moments"] > held


def test_a_restored_state_goes_on_to_the_bit(stepped, tmp_path):
  """Saved with cut moments, restored into the target of a resume, and one step more."""
  setup, _, state, _ = stepped(config_of())
  target = state_lib.state_shapes(setup.model, setup.optimizer, setup.mesh)

  def placed():
    return jax.device_put(state, state_lib.shardings_of(target))

  manager = Checkpointer(
    tmp_path,
    keep_last=1,
    keep_best=0,
    config=setup.config,
    metadata={},
    logical_axes=setup.model.logical_axes(),
    untrained=trained_lib.names(setup.model.trained()),
  )
  manager.save(3, placed(), position={"step": 3, "seed": 0})
  restored, _ = manager.restore(target)
  assert manager.close()
  ends = [setup.run(s, make_batch(3))[0] for s in (placed(), restored)]
  one, other = (fingerprint.named_leaves((s["params"], s["opt_state"])) for s in ends)
  for name, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[name], err_msg=name)


def test_optimizers_of_every_kind_take_rows():
  """Also those whose state is not of the parameters' shapes."""
  model = model_of(config_of())
  for name in ("adafactor", "lion"):
    config = config_of(optimizer=name)
    optimizer = make_optimizer(
      config.optimizer, num_steps=9, axes=model.logical_axes(), trained=model.trained()
    )

    def step(params, optimizer=optimizer):
      learned, _ = trained_lib.split(params, optimizer.trained)
      one = jnp.float32(1.0)
      return optimizer.apply(
        learned, optimizer.init(params), params, learning_rate=one, gradient_norm=one
      )[0]

    shapes = model.shapes()
    assert jax.tree.structure(jax.eval_shape(step, shapes)) == jax.tree.structure(shapes)
