"""Checkpoints: what is read is what was written, and nothing is lost on the way."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checkpoint import fingerprint
from moejax.checkpoint.manager import DIRECTORY, Checkpointer, init_from, restore_params
from moejax.config import Config
from moejax.errors import ConfigError, UserError

AXES = {
  "embed": {"table": ("vocab", "embed")},
  "moe": {"w_in": ("layers", "expert", "embed", "mlp")},
  "suffix": {},
}
OPTIMIZERS = {
  "adamw": lambda: optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(
      0.1, mask={"embed": {"table": False}, "moe": True, "suffix": True}
    ),
  ),
  "adafactor": lambda: optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=4), optax.clip_by_block_rms(1.0)
  ),
  "lion": optax.scale_by_lion,
  "masked": lambda: optax.masked(
    optax.scale_by_adam(), {"embed": {"table": True}, "moe": False, "suffix": True}
  ),
}


def make_state(optimizer="adamw", *, seed=0, mesh=None, experts=4):
  """A train state with what is hard to store: typed keys, named tuples, masks.

  Shapes are traced and values drawn by numpy: nothing is compiled.
  """
  params = {
    "embed": {"table": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)},
    "moe": {"w_in": jax.ShapeDtypeStruct((2, experts, 8, 16), jnp.float32)},
    "suffix": {},
  }
  with jax.numpy_dtype_promotion("standard"):
    opt_state = jax.eval_shape(OPTIMIZERS[optimizer]().init, params)
  scalar = jax.ShapeDtypeStruct((), jnp.int32)
  tree = {
    "step": scalar,
    "params": params,
    "opt_state": opt_state,
    "bad_steps": {"total": scalar, "in_a_row": scalar},
  }
  random = np.random.default_rng(seed)

  def draw(s):
    return jnp.asarray((100 * random.normal(size=s.shape)).astype(s.dtype))

  state = {**jax.tree.map(draw, tree), "key": jax.random.key(seed + 1)}
  return state if mesh is None else jax.device_put(state, shardings(state, mesh))


def make_mesh(shape):
  return jax.make_mesh(shape, ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)


def shardings(state, mesh):
  def of(leaf):
    spec = {4: P(None, "expert", "fsdp"), 2: P("fsdp", "expert")}.get(leaf.ndim, P())
    return NamedSharding(mesh, spec)

  return jax.tree.map(of, state)


def shapes(state, mesh=None):
  target = jax.eval_shape(lambda: state)
  if mesh is None:
    return target
  return jax.tree.map(
    lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h),
    target,
    shardings(state, mesh),
  )


def assert_identical(a, b):
  """Same tree, same types, same bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    x, y = (np.asarray(fingerprint.raw(v)) for v in (x, y))
    assert x.tobytes() == y.tobytes()


def open_checkpoints(workdir: Path, *, keep_last=5, keep_best=0, warn=None, **kwargs):
  return Checkpointer(
    workdir / DIRECTORY,
    keep_last=keep_last,
    keep_best=keep_best,
    config=kwargs.pop("config", Config()),
    metadata={"dataset_fingerprint": "abc"},
    logical_axes=AXES,
    warn=warn or pytest.fail,
  )


def save_steps(workdir, steps, **kwargs):
  """Saves one state per step; returns them by step."""
  checkpoints = open_checkpoints(workdir, **kwargs)
  states = {}
  for step in steps:
    states[step] = make_state(seed=step)
    assert checkpoints.save(step, states[step], position={"step": step})
  assert checkpoints.close()
  return states


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_round_trip_is_bit_exact(tmp_path, optimizer):
  """Keys, bfloat16, optax's named tuples, masks and empty states all survive."""
  state = make_state(optimizer)
  checkpoints = open_checkpoints(tmp_path)
  assert checkpoints.save(3, state, position={"sequence": 12}, metric=1.5)
  assert checkpoints.wait()
  restored, meta = checkpoints.restore(shapes(state))
  checkpoints.close()
  assert_identical(restored, state)
  assert meta["step"] == 3 and meta["metric"] == 1.5
  assert meta["position"] == {"sequence": 12}
  assert meta["dataset_fingerprint"] == "abc"
  assert meta["config"]["moe"]["num_experts"] == Config().moe.num_experts
  assert {"python", "jax", "flax", "optax", "orbax-checkpoint"} <= set(meta["versions"])


def test_restores_onto_another_mesh(tmp_path):
  """Saved from 4x2 devices, restored onto 2x4 in the target's own shardings."""
  state = make_state(mesh=make_mesh((4, 2)))
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(1, state, position={})
  target = shapes(state, make_mesh((2, 4)))
  restored, _ = checkpoints.restore(target)
  checkpoints.close()
  assert_identical(restored, state)
  for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target)):
    assert got.sharding == want.sharding


def test_checksums_do_not_depend_on_sharding():
  """The sum is over positions: any mesh gives the same, so any mesh can verify."""
  state = make_state()
  axes = fingerprint.expert_axes(state, AXES)
  alone = fingerprint.checksums(fingerprint.snapshot(state, axes))
  spread = jax.device_put(state, shardings(state, make_mesh((2, 4))))
  assert fingerprint.checksums(fingerprint.snapshot(spread, axes)) == alone
  assert axes["params.moe.w_in"] == 1
  assert len(alone["params.moe.w_in"]["experts"]) == 2
  assert any(n.startswith("opt_state") and "experts" in c for n, c in alone.items())


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  """The next step reuses the state's memory while the save is still being written."""
  step = jax.jit(
    lambda s: jax.tree.map(lambda a: a + jnp.ones((), a.dtype), s), donate_argnums=0
  )
  state = {"params": {"w": jnp.zeros((512, 512))}}
  checkpoints = open_checkpoints(tmp_path)
  for number in range(3):
    checkpoints.save(number, state, position={})
    for _ in range(5):
      state = step(state)
  for number in range(3):
    restored, _ = checkpoints.restore(
      {"params": {"w": shapes(state["params"]["w"])}}, number
    )
    assert np.all(np.asarray(restored["params"]["w"]) == 5 * number)
  checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path):
  """Two newest and one best of six; a NaN and a missing metric are never best."""
  checkpoints = open_checkpoints(tmp_path, keep_last=2, keep_best=1)
  state = make_state()
  for step, metric in enumerate([3.0, 1.0, float("nan"), 2.0, None, 4.0]):
    checkpoints.save(step, state, position={}, metric=metric)
  checkpoints.close()
  assert checkpoints.steps() == [1, 4, 5]
  assert checkpoints.latest() == 5
  # The next process knows the metrics of those before.
  checkpoints = open_checkpoints(tmp_path, keep_last=2, keep_best=1)
  checkpoints.save(6, state, position={}, metric=0.5)
  checkpoints.close()
  assert checkpoints.steps() == [5, 6]


def test_saving_a_step_twice_keeps_the_first_unless_forced(tmp_path):
  """A final save at a step that was just saved is no work and no error."""
  checkpoints = open_checkpoints(tmp_path)
  first, second = make_state(seed=0), make_state(seed=1)
  assert checkpoints.save(1, first, position={})
  assert not checkpoints.save(1, second, position={})
  assert_identical(checkpoints.restore(shapes(first))[0], first)
  assert checkpoints.save(1, second, position={}, force=True)
  assert_identical(checkpoints.restore(shapes(first))[0], second)
  checkpoints.close()


def test_what_a_killed_save_left_is_ignored_and_cleared(tmp_path):
  """A partial save has a longer name: no step, and gone at the next start."""
  states = save_steps(tmp_path, [1])
  partial = tmp_path / DIRECTORY / "2.orbax-checkpoint-tmp"
  (partial / "state").mkdir(parents=True)
  (partial / "state" / "data").write_text("half")
  assert restore_params(tmp_path)[2]["step"] == 1 and partial.exists()
  checkpoints = open_checkpoints(tmp_path)
  assert not partial.exists() and checkpoints.steps() == [1]
  assert_identical(checkpoints.restore(shapes(states[1]))[0], states[1])
  checkpoints.close()


def test_another_model_is_the_users_mistake_not_damage(tmp_path):
  """A target of other shapes is named, and the checkpoint stays where it is."""
  save_steps(tmp_path, [1])
  checkpoints = open_checkpoints(tmp_path)
  with pytest.raises(ConfigError, match=r"params\.moe\.w_in is float32\[2, 4, 8, 16\]"):
    checkpoints.restore(shapes(make_state(experts=8)))
  with pytest.raises(ConfigError, match="is not in the checkpoint"):
    checkpoints.restore(shapes(make_state("lion") | {"more": jnp.zeros(2)}))
  assert checkpoints.steps() == [1]
  checkpoints.close()


def test_parameters_need_nothing_but_the_directory(tmp_path):
  """Shapes come from the checkpoint, the config with them, onto any sharding."""
  config = Config()
  config.moe.num_experts = 4
  states = save_steps(tmp_path, [1, 2], config=config)
  params, found, meta = restore_params(tmp_path)
  assert_identical(params, states[2]["params"])
  assert found == config and meta["step"] == 2
  mesh = make_mesh((2, 4))
  spread = shardings(states[1]["params"], mesh)
  params, _, _ = restore_params(tmp_path, 1, spread)
  assert_identical(params, states[1]["params"])
  assert params["moe"]["w_in"].sharding == spread["moe"]["w_in"]


def test_a_directory_without_a_checkpoint_says_what_is_there(tmp_path):
  """The error lists the directory's content, and a wrong step lists the steps."""
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(UserError, match=r"has no checkpoint: it holds notes\.txt"):
    restore_params(tmp_path)
  with pytest.raises(UserError, match="is not a directory"):
    restore_params(tmp_path / "absent")
  save_steps(tmp_path, [4])
  with pytest.raises(UserError, match=r"--step=5 is not in .* has step 4"):
    restore_params(tmp_path, 5)


def test_init_from_takes_parameters_and_names_what_does_not_fit(tmp_path):
  """Another run's parameters in the new run's shardings, or the leaves that differ."""
  states = save_steps(tmp_path, [1])
  target = shapes(states[1], make_mesh((4, 2)))["params"]
  params = init_from(tmp_path, target)
  assert_identical(params, states[1]["params"])
  assert params["moe"]["w_in"].sharding == target["moe"]["w_in"].sharding
  with pytest.raises(ConfigError, match=r"--init_from=.*params\.moe\.w_in"):
    init_from(tmp_path, shapes(make_state(experts=8))["params"])


def test_an_older_schema_stays_readable(tmp_path):
  """A field the checkpoint's config does not know takes the default, as before it."""
  save_steps(tmp_path, [1])
  path = tmp_path / DIRECTORY / "1" / "meta" / "metadata"
  from moejax.checkpoint.read import pack_meta

  meta = json.loads(path.read_text())["meta"]
  del meta["config"]["moe"]["slot_numbering"]
  path.write_text(pack_meta(meta))
  assert restore_params(tmp_path)[1] == Config()
  path.write_text(pack_meta(meta | {"format": 99}))
  with pytest.raises(UserError, match="format 99"):
    restore_params(tmp_path)


def test_keeping_none_is_refused(tmp_path):
  """A run that keeps no checkpoint could not resume."""
  with pytest.raises(ConfigError, match=r"keep_last=0 must be at least 1"):
    open_checkpoints(tmp_path, keep_last=0)
