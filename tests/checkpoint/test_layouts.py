"""Checkpoints across layouts: saved on any mesh, restored on any other, bit for bit."""

import itertools
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moejax.checkpoint.manager import DIRECTORY, Checkpointer
from moejax.checkpoint.read import read_meta
from moejax.config import Config
from moejax.errors import UserError
from moejax.run import writers
from moejax.train import finish, loop
from tests.checkpoint import layouts
from tests.checkpoint.layouts import MESHES, STEP

W_IN = "unit.1.moe.experts.w_in"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Mesh -> directory with the state's checkpoint, saved on that mesh once."""
  made = {}

  def of(mesh: str):
    if mesh not in made:
      made[mesh] = tmp_path_factory.mktemp("saved")
      layouts.save(made[mesh], mesh)
    return made[mesh]

  return of


PAIRS = list(itertools.product(MESHES, MESHES))
FAST = {
  ("1", "expert 2 x fsdp 2 x tensor 2"),
  ("expert 2 x fsdp 2 x tensor 2", "expert 4 x data 2"),
  ("expert 4 x data 2", "fsdp 8"),
  ("fsdp 8", "1"),
}


@pytest.mark.parametrize(
  ("source", "goal"),
  [p if p in FAST else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS],
)
def test_any_mesh_restores_what_any_other_saved(saved, source, goal):
  """Parameters, moments, key, step and position: the bits, in the goal's shardings."""
  state = layouts.restore(saved(source), goal, warn=pytest.fail)
  layouts.assert_whole(state, goal)
  meta = read_meta(saved(source) / DIRECTORY / str(STEP))
  assert meta["position"] == {"step": STEP, "seed": 0}


def change(workdir, leaf: str, how) -> None:
  """Rewrites one stored array in place, by the library that stored it."""
  spec = {
    "driver": "zarr",
    "kvstore": {
      "driver": "ocdbt",
      "base": f"file://{workdir / DIRECTORY / str(STEP) / 'state'}/",
      "path": f"{leaf}/",
    },
  }
  array = tensorstore.open(spec, open=True).result()
  values = np.array(array.read().result())
  how(values)
  array.write(values).result()


def swap(w):
  w[0, [2, 5]] = w[0, [5, 2]]


def duplicate(w):
  w[0, 3] = w[0, 6]


def lose(w):
  w[0, 7] = 0


DAMAGE = {
  swap: [
    "expert 2 of layer 0 holds what was expert 5 of layer 0",
    "expert 5 of layer 0 holds what was expert 2 of layer 0",
  ],
  duplicate: ["expert 3 of layer 0 holds what was expert 6 of layer 0"],
  lose: ["expert 7 of layer 0 is missing (all zero)"],
}


@pytest.mark.parametrize(
  ("how", "leaf", "source", "goal"),
  [
    (swap, f"params.{W_IN}", "expert 8", "fsdp 8"),
    (duplicate, f"params.{W_IN}", "expert 2 x fsdp 2 x tensor 2", "data 8"),
    (lose, f"opt_state.0.mu.{W_IN}", "expert 4 x data 2", "1"),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (swap, f"opt_state.0.nu.{W_IN}", "data 8", "expert 2 x fsdp 2 x tensor 2"),
        (duplicate, f"opt_state.0.mu.{W_IN}", "1", "expert 8"),
        (lose, f"params.{W_IN}", "fsdp 8", "expert 4 x data 2"),
      )
    ),
  ],
)
def test_a_wrong_expert_is_named_on_any_other_mesh(
  saved, tmp_path, how, leaf, source, goal
):
  """Valid files, wrong experts: resuming refuses, by parameter and by expert.

  With a good step before it, that one is used, and the same is said.
  """
  workdir = tmp_path / "run"
  shutil.copytree(saved(source), workdir)
  change(workdir, leaf, how)
  with pytest.raises(UserError, match="no intact checkpoint") as refused:
    layouts.resume(workdir, goal)
  assert f"{leaf} changed" in str(refused.value)
  for words in DAMAGE[how]:
    assert words in str(refused.value)
  assert str(refused.value).count("expert ") == sum(
    w.count("expert ") for w in DAMAGE[how]
  )

  good = workdir / DIRECTORY / str(STEP - 1)
  shutil.copytree(saved(source) / DIRECTORY / str(STEP), good)
  said = []
  state = layouts.restore(workdir, goal, said.append)
  layouts.assert_whole(state, goal)
  assert len(said) == 1 and f"{leaf} changed: {DAMAGE[how][0]}" in said[0]


SHAPE = (1, 8, 512, 512)
LEAVES = ("params", "opt_state")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Two arrays of 8 MiB: long enough on their way for a thread to see them."""
  workdir = tmp_path_factory.mktemp("large")
  values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
  state = {leaf: {"w_in": jnp.asarray(values)} for leaf in LEAVES}
  checkpoints = open_large(workdir)
  assert checkpoints.save(1, state, position={})
  assert checkpoints.close()
  return workdir


def open_large(workdir):
  return Checkpointer(
    workdir / DIRECTORY,
    keep_last=1,
    keep_best=0,
    config=Config(),
    metadata={},
    logical_axes={"w_in": ("layer", "expert", "width", "hidden")},
  )


def peak_of(workdir, sharding, then=None) -> float:
  """Peak over final bytes, of the device for which it is worst."""
  shape = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding)
  checkpoints = open_large(workdir)
  with layouts.PeakMemory() as memory:
    state, _ = checkpoints.restore({leaf: {"w_in": shape} for leaf in LEAVES})
    if then is not None:
      state = jax.block_until_ready(jax.device_put(state, then))
  checkpoints.close()
  final = Counter()
  for leaf in jax.tree.leaves(state):
    for shard in leaf.addressable_shards:
      final[shard.device.id] += shard.data.nbytes
  return max(memory.peak[device] / final[device] for device in final)


@pytest.mark.parametrize("mesh", ["expert 2 x fsdp 2 x tensor 2", "fsdp 8", "data 8"])
def test_no_device_ever_holds_more_than_its_own_part(large, mesh):
  """At most 1.2 times the final bytes on every device, of a state one device saved."""
  spec = PartitionSpec(None, "expert", "fsdp", "tensor")
  assert peak_of(large, NamedSharding(layouts.mesh_of(mesh), spec)) <= 1.2


def test_the_measurement_sees_a_detour_over_one_device(large):
  """Restored whole, then cut: the first device held eight times its part."""
  sharding = NamedSharding(layouts.mesh_of("fsdp 8"), PartitionSpec(None, "fsdp"))
  one = SingleDeviceSharding(jax.devices()[0])
  assert peak_of(large, one, then=sharding) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
  ("source", "goal"),
  [
    ("expert 2 x fsdp 2 x tensor 2", "data 8"),
    ("expert 4 x data 2", "expert 2 x fsdp 2 x tensor 2"),
  ],
)
def test_training_goes_on_as_on_the_mesh_it_left(
  cache_dir, tmp_path, monkeypatch, source, goal
):
  """Six steps on one mesh, or three there and three on another: the same losses."""

  def end(run, reporter):
    return {"status": "done", "exit_code": 0}

  def train(workdir, mesh):
    config = layouts.layout_config(mesh)
    config.data.cache_dir, config.moe.group_size = cache_dir, 0
    config.train.num_steps, config.train.checkpoint_every = 6, 3
    loop.train(config, workdir)
    lines = writers.read(workdir / writers.METRICS_FILE)
    return [line["loss"] for line in lines], [line["dropped_fraction"] for line in lines]

  monkeypatch.setattr(finish, "finish", end)
  stayed = train(tmp_path / "run", source)
  shutil.rmtree(tmp_path / "run" / DIRECTORY / "6")
  moved = train(tmp_path / "run", goal)
  assert len(moved[0]) == 6 and moved[0][:3] == stayed[0][:3]
  np.testing.assert_allclose(moved[0], stayed[0], rtol=1e-5)
  assert moved[1] == stayed[1]
  assert moved[0][5] < moved[0][0]
