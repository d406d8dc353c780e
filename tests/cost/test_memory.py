"""The least memory of a run: below what the compiler takes, and refused in numbers."""

import types

import jax
import numpy as np
import pytest

from moejax.config import Config
from moejax.config import text as config_text
from moejax.cost import memory
from moejax.cost.parameters import resolve_vocab_size
from moejax.errors import UserError
from moejax.plan.compile import compile_step
from moejax.run import workdir as workdir_lib
from moejax.sharding.mesh import make_mesh
from moejax.train import loop

MESH = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def small(**fields) -> Config:
  config = Config()
  sizes = {
    "model__num_layers": 2,
    "model__width": 32,
    "model__num_heads": 2,
    "model__hidden": 64,
    "moe__num_experts": 4,
    "moe__hidden": 64,
    "data__sequence_length": 32,
    "train__batch_size": 8,
  }
  for name, value in (sizes | fields).items():
    config_text.set_field(config, name.replace("__", "."), value)
  return config


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"mesh__fsdp": 2, "mesh__expert": 2, "mesh__tensor": 2, "mesh__data": 1},
    {"model__dtype": "bfloat16"},
    {"optimizer__name": "lion", "model__remat": "full"},
    {"optimizer__name": "adafactor"},
    {"optimizer__name": "muon"},
  ],
)
def test_the_compiler_takes_no_less(fields):
  """Of the real train step: state as it is cut, and all that the program needs."""
  config = small(**fields)
  devices = jax.devices()[: 8 if "mesh__fsdp" in fields else 1]
  # jax's own attention promotes in its gradient.
  with jax.numpy_dtype_promotion("standard"):
    step = compile_step(config, devices)
  need = memory.least_bytes(config, dict(step.mesh.shape), resolve_vocab_size(config))

  def held(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(
      int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves
    )

  assert 0.7 * held(step.state["params"]) < need["parameters"]
  assert need["parameters"] <= held(step.state["params"])
  assert need["moments"] <= held(step.state["opt_state"])
  taken = step.compiled.memory_analysis()
  total = taken.argument_size_in_bytes + taken.temp_size_in_bytes
  assert sum(need.values()) <= total


def test_the_numbers_of_a_known_model():
  """A million float32 parameters: 4 MB, 4 of gradients, 8 of Adam's moments."""
  config = small()
  need = memory.least_bytes(config, MESH, 264)
  # embedding 264*32; per layer attention 4*32*32 and norms 2*32, norm at the end;
  # dense 2*32*64; experts 4 times that, router 32*4.
  count = 264 * 32 + 2 * (4 * 32 * 32 + 64) + 32 + 5 * 2 * 32 * 64 + 32 * 4
  assert need["parameters"] == need["gradients"] == 4 * count
  assert need["moments"] == 8 * count
  # Muon has one moment of the matrices: attention, dense layer and experts.
  config.optimizer.name = "muon"
  need = memory.least_bytes(config, MESH, 264)
  matrices = 2 * 4 * 32 * 32 + 5 * 2 * 32 * 64
  assert need["moments"] == 8 * count - 4 * matrices
  # 8 sequences of 32: the input of one block of two layers, and the logits.
  assert need["activations"] == 8 * 32 * (32 + 264) * 4


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  """One line with the need, what is there, and the way out; no directory is made."""
  monkeypatch.setattr(memory, "host_memory", lambda: 10**5)
  with pytest.raises(UserError) as caught:
    loop.train(small(), tmp_path / "run", devices=jax.devices()[:1])
  message = str(caught.value)
  assert "\n" not in message
  for part in ("needs at least", "parameters", "moments", "--ignore_memory", "0.0 GB"):
    assert part in message
  assert not (tmp_path / "run").exists()


def test_it_can_be_tried_all_the_same(tmp_path, monkeypatch):
  """--ignore_memory goes on to the run's directory."""
  monkeypatch.setattr(memory, "host_memory", lambda: 10**5)

  def stop(*_, **__):
    raise UserError("came as far as this")

  monkeypatch.setattr(workdir_lib, "prepare", stop)
  with pytest.raises(UserError, match="came as far"):
    loop.train(small(), tmp_path / "run", devices=jax.devices()[:1], ignore_memory=True)


def test_the_devices_of_a_cpu_share_its_memory(monkeypatch):
  """Two replicas need twice as much as one; two accelerators have a memory each."""
  need = sum(memory.least_bytes(small(), MESH | {"data": 2}, 264).values())
  mesh = make_mesh(small().mesh, jax.devices()[:2])
  monkeypatch.setattr(memory, "host_memory", lambda: 2 * need)
  memory.check(small(), mesh, mesh.local_devices)
  monkeypatch.setattr(memory, "host_memory", lambda: 2 * need - 1)
  with pytest.raises(UserError, match="in all"):
    memory.check(small(), mesh, mesh.local_devices)
  stats = {"bytes_limit": need}
  chip = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
  memory.check(small(), mesh, [chip, chip])
  stats["bytes_limit"] = need - 1
  with pytest.raises(UserError, match="--config.mesh.fsdp"):
    memory.check(small(), mesh, [chip, chip])
  chip.memory_stats = lambda: None
  memory.check(small(), mesh, [chip])


def test_the_smaller_of_machine_and_control_group_counts(tmp_path, monkeypatch):
  """Both versions' files; no limit and no files are no limit."""
  monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
  monkeypatch.setattr(memory, "_CGROUP", tmp_path)
  assert memory.host_memory() is None
  (tmp_path / "meminfo").write_text("MemAvailable:  100 kB\nSwapFree:  20 kB\n")
  assert memory.host_memory() == 120 * 1024
  (tmp_path / "memory.max").write_text("max\n")
  assert memory.host_memory() == 120 * 1024
  (tmp_path / "memory.max").write_text("5000\n")
  assert memory.host_memory() == 5000
  (tmp_path / "memory").mkdir()
  (tmp_path / "memory" / "memory.limit_in_bytes").write_text("4000\n")
  assert memory.host_memory() == 4000
