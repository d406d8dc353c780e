"""The report on a compiled step, on fake devices of this machine."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.cost.chips import CHIPS
from moejax.plan import pod, topology, units, wire_bound
from moejax.plan.compile import compile_step

COMMAND = [sys.executable, "-m", "tools.compile_for"]


def tiny(**moe) -> Config:
  config = Config(
    model=ModelConfig(num_layers=2, width=32, num_heads=2, hidden=64, vocab_size=64),
    moe=MoEConfig(num_experts=4, hidden=64, every=1, offset=0, **moe),
    mesh=MeshConfig(data=1, fsdp=2, expert=4),
  )
  config.data.sequence_length, config.train.batch_size = 32, 8
  return config


@pytest.fixture(scope="module")
def compiled():
  config = tiny(capacity_factor=1.0)
  return config, compile_step(config, jax.devices())


def test_report(compiled):
  """Memory, FLOPs and bytes against what they must be by hand."""
  config, step = compiled
  machine = topology.parse("cpu:8")
  found = pod.report(config, machine, step, CHIPS["cpu"])
  memory = found["memory_per_chip_bytes"]
  assert found["chips"] == 8 and found["fits"] and found["topology"] == "cpu:8"
  kinds = ("parameters", "optimizer", "other_arguments")
  assert sum(memory[k] for k in kinds) == memory["arguments"]
  kinds = ("saved_activations", "gradients", "buffers")
  assert sum(memory[k] for k in kinds) == memory["temporaries"]
  # Two moments beside each parameter, and the step's count.
  assert 0 <= memory["optimizer"] - 2 * memory["parameters"] < 100
  # No recomputation, no slot to spare: the model's FLOPs and attention's other half.
  assert 1.0 <= found["executed_flops_per_chip"] / found["model_flops_per_chip"] < 1.1
  exchanges = [row for row in found["collectives"] if row["kind"] == "all-to-all"]
  sent = sum(row["bytes_per_chip"] for row in exchanges)
  assert sent == wire_bound.exchange_bound(config, found["mesh"])
  # Slots of 32 tokens, four times a layer, three quarters of which leave the device.
  assert sent == 2 * 4 * 32 * 32 * 4 * 3 // 4


def test_model_flops_are_shared_by_the_devices(compiled):
  config, _ = compiled
  assert pod.model_flops(config, 8) * 8 == pod.model_flops(config, 1)


@pytest.mark.parametrize(
  ("moe", "fraction"),
  [
    ({"capacity_factor": 1.0}, 1.0),
    ({"capacity_factor": None, "exchange": "ring"}, 0.25),
    ({"capacity_factor": None, "exchange": "ragged"}, 0.25),
    ({"capacity_factor": None, "exchange_buffer": 1.25}, 0.8),
    # One expert a device: of each token's two rows, one at most.
    (
      {
        "capacity_factor": None,
        "num_selected": 2,
        "router": "top_k",
        "exchange": "ragged",
      },
      0.5,
    ),
    ({"capacity_factor": None, "num_selected": 4, "router": "top_k"}, 0.25),
  ],
)
def test_rows_that_exist(compiled, moe, fraction):
  """Of a bounded buffer all but the room to spare, of a whole one an equal share."""
  _, step = compiled
  assert pod.ragged_fraction(tiny(**moe), step.mesh) == fraction


class _Chip:
  """A device of a torus."""

  def __init__(self, coords, slice_index=0):
    self.coords, self.slice_index = coords, slice_index


def test_time_on_a_torus():
  """Rings send both ways on every side; an all-to-all goes a quarter of them round."""
  chips = [_Chip((x, y, 0), z) for z in range(2) for x in range(4) for y in range(4)]

  devices = np.array(chips, dtype=object).reshape(2, 4, 4, 1)
  chip = CHIPS["v5p"]
  network = pod.Network(devices, topology.parse("v5p:4x4x1", 2), chip)
  sent, link = 1e9, chip.link_bandwidth

  def time_of(kind: str, axis: str):
    return network.time_of({"kind": kind, "axis": axis, "bytes_per_chip": sent})

  assert time_of("all-gather", "fsdp") == ("ici", sent / (2 * link))
  assert time_of("all-gather", "fsdp,expert") == ("ici", sent / (4 * link))
  assert time_of("all-to-all", "expert") == ("ici", sent / (2 * link))
  assert time_of("all-to-all", "fsdp,expert") == ("ici", 2 * sent / (4 * link))
  assert time_of("all-reduce", "data") == ("dcn", sent / chip.slow_bandwidth)


@pytest.mark.parametrize(
  ("value", "unit", "largest", "words"),
  [
    (37.4e9, "B", "G", "37.40 GB"),
    (1.2345e12, "B", "G", "1,234.50 GB"),
    (262_144, "B", "G", "262.14 kB"),
    (512, "B", "G", "512.00 B"),
    (804e12, "", "T", "804.00 T"),
    (3.1e6, "", "T", "3.10 M"),
    (2.8, "s", "", "2.80 s"),
    (0.0034, "s", "", "3.40 ms"),
    (2e-9, "s", "", "0.00 µs"),
    (0, "B", "G", "0 B"),
  ],
)
def test_a_small_model_is_not_all_zeros(value, unit, largest, words):
  """Each number has the prefix that it needs; large ones keep the usual one."""
  assert units.quantity(value, unit, largest=largest) == words


@pytest.mark.parametrize(
  ("value", "digits", "words"),
  [(1658.2, 0, "1,658"), (0.04, 1, "0.04"), (3.1e-7, 2, "3.1e-07"), (0, 1, "0.0")],
)
def test_a_column_of_a_small_model_is_not_all_zeros(value, digits, words):
  assert units.fixed(value, digits) == words


def call(*args: str) -> subprocess.CompletedProcess:
  return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=300)


def test_bad_input():
  """An unknown machine and a mesh that is none of it: exit code 2, one line."""
  done = call("--topology=v9:4x4")
  assert done.returncode == 2 and "--topology=v9:4x4" in done.stderr
  done = call("--topology=cpu:8", "--config.mesh.expert=3")
  assert done.returncode == 2 and "--config.mesh.expert=3" in done.stderr
  assert "Traceback" not in done.stderr
  done = call("--hlo=/nowhere/x")
  assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
  assert "--hlo=/nowhere/x: the directory /nowhere does not exist." in done.stderr


@pytest.mark.slow
def test_command_line():
  """The fields that scripts rely on, and the tables that people read."""
  small = [
    "--config.model.width=32",
    "--config.moe.hidden=64",
    "--config.moe.group_size=0",
  ]
  small += ["--config.data.sequence_length=32", "--config.mesh.expert=4"]
  done = call("--topology=cpu:8", *small, "--json")
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  names = ("topology", "chips", "memory_per_chip_bytes", "hbm_bytes", "fits")
  names += ("executed_flops_per_chip", "model_flops_per_chip", "compile_seconds")
  assert all(name in found for name in names)
  for row in found["collectives"]:
    assert {"kind", "axis", "count", "bytes_per_chip"} <= set(row)
  done = call("--topology=cpu:8", *small)
  assert (
    done.returncode == 0 and "executed" in done.stdout and "all-to-all" in done.stdout
  )
  assert " 0.00" not in done.stdout
