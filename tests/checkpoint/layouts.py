"""One small state on every mesh: for tests that save on one and restore on another."""

import dataclasses
import functools
import gc
import pathlib
import threading
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint import fingerprint
from moejax.checkpoint.manager import DIRECTORY, Checkpointer
from moejax.config import Config, MeshConfig
from moejax.models.decoder import Decoder
from moejax.sharding.mesh import make_mesh
from moejax.train import setup as setup_lib
from moejax.train import state as state_lib
from moejax.train.optimizer import Optimizer, make_optimizer
from tests.train.conftest import VOCAB, tiny_config

MESHES = {
  "1": MeshConfig(data=1),
  "data 8": MeshConfig(data=8),
  "expert 8": MeshConfig(data=1, expert=8),
  "expert 4 x data 2": MeshConfig(data=2, expert=4),
  "expert 2 x fsdp 2 x tensor 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
  "fsdp 8": MeshConfig(data=1, fsdp=8),
}
STEP = 7


def layout_config(mesh: str = "1") -> Config:
  """The tiny model with as many experts as there are devices."""
  config = tiny_config()
  config.moe.num_experts = 8
  return dataclasses.replace(config, mesh=MESHES[mesh])


@functools.cache
def parts() -> tuple[Decoder, Optimizer]:
  config = layout_config()
  model = Decoder(config.model, config.moe, vocab_size=VOCAB)
  axes, trained = model.logical_axes(), model.trained()
  return model, make_optimizer(config.optimizer, num_steps=20, axes=axes, trained=trained)


@functools.cache
def mesh_of(name: str) -> jax.sharding.Mesh:
  """Over all devices of all processes, or over the first one."""
  devices = jax.devices()[: 1 if name == "1" else None]
  return make_mesh(MESHES[name], devices)


@functools.cache
def target(name: str) -> state_lib.State:
  """What a run on this mesh restores into."""
  return state_lib.state_shapes(*parts(), mesh_of(name))


def key_data(shape: jax.ShapeDtypeStruct) -> bool:
  return jnp.issubdtype(shape.dtype, jax.dtypes.prng_key)


@functools.cache
def numbers() -> state_lib.State:
  """The state's bits, on the host: other numbers in every place of every array."""
  random = np.random.default_rng(0)

  def draw(shape: Any) -> np.ndarray:
    if key_data(shape):
      return np.array([3, 5], np.uint32)
    return (100 * random.normal(size=shape.shape)).astype(shape.dtype)

  return jax.tree.map(draw, target("1")) | {"step": np.array(STEP, np.int32)}


def place(name: str) -> state_lib.State:
  """The state on a mesh; nothing is compiled."""

  def one(bits: np.ndarray, shape: Any) -> jax.Array:
    if key_data(shape):
      key = jax.device_put(bits, shape.sharding)
      return jax.random.wrap_key_data(key)
    return jax.make_array_from_callback(bits.shape, shape.sharding, lambda i: bits[i])

  return jax.tree.map(one, numbers(), target(name))


def open_checkpoints(workdir: pathlib.Path, name: str = "1", warn=None) -> Checkpointer:
  return Checkpointer(
    workdir / DIRECTORY,
    keep_last=9,
    keep_best=0,
    config=layout_config(name),
    metadata={},
    logical_axes=parts()[0].logical_axes(),
    **({} if warn is None else {"warn": warn}),
  )


def save(workdir: pathlib.Path, name: str, step: int = STEP) -> None:
  checkpoints = open_checkpoints(workdir, name)
  assert checkpoints.save(step, place(name), position={"step": step, "seed": 0})
  assert checkpoints.close()


def restore(workdir: pathlib.Path, name: str, warn=None) -> state_lib.State:
  """What `resume` does once it has found the shapes of the state."""
  checkpoints = open_checkpoints(workdir, name, warn)
  try:
    return checkpoints.restore(target(name))[0]
  finally:
    checkpoints.close()


def resume(workdir: pathlib.Path, name: str, warn=None) -> state_lib.State:
  """What training does when it starts in a directory that has checkpoints."""
  checkpoints = open_checkpoints(workdir, name, warn)
  model, optimizer = parts()
  try:
    return setup_lib.make_state(
      layout_config(name), model, optimizer, mesh_of(name), checkpoints, ""
    )
  finally:
    checkpoints.close()


def assert_whole(state: state_lib.State, name: str) -> None:
  """Every copy of every part is bit for bit the one drawn, where it was asked for."""
  want, aim = (fingerprint.named_leaves(t) for t in (numbers(), target(name)))
  found = fingerprint.named_leaves(state)
  assert found.keys() == want.keys()
  for leaf, array in found.items():
    assert array.dtype == aim[leaf].dtype
    assert array.sharding.is_equivalent_to(aim[leaf].sharding, array.ndim), leaf
    for shard in fingerprint.raw(array).addressable_shards:
      here = np.ascontiguousarray(want[leaf][shard.index])
      assert np.asarray(shard.data).tobytes() == here.tobytes(), (leaf, shard.device)


class PeakMemory:
  """Most bytes that jax arrays added on each device while entered.

  Looks all the time from a thread. Arrays that share a buffer count once.
  """

  def __enter__(self) -> "PeakMemory":
    gc.collect()
    self._before = self._sizes()
    self.peak: Counter[int] = Counter()
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._done.set()
    self._thread.join()
    self._look()

  def _watch(self) -> None:
    while not self._done.wait(0.0005):
      self._look()

  def _look(self) -> None:
    for device, size in self._sizes().items():
      self.peak[device] = max(self.peak[device], size - self._before[device])

  def _sizes(self) -> Counter[int]:
    buffers = {}
    for array in jax.live_arrays():
      try:
        for shard in array.addressable_shards:
          buffers[shard.data.unsafe_buffer_pointer()] = shard
      except (RuntimeError, ValueError):  # deleted meanwhile
        continue
    sizes: Counter[int] = Counter()
    for shard in buffers.values():
      sizes[shard.device.id] += shard.data.nbytes
    return sizes
