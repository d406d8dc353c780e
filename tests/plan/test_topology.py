"""Names of machines, and what of them a user can get wrong."""

import sys

import pytest

from moejax.cost.chips import CHIPS
from moejax.errors import ConfigError, UserError
from moejax.plan import topology
from moejax.plan.gpu_target import target_config


def test_names():
  assert topology.parse("v5p:4x4x8", 2) == topology.Topology("v5p", (4, 4, 8), 2)
  assert str(topology.parse("h100:4x8")) == "h100:4x8"


@pytest.mark.parametrize(
  ("text", "slices", "said"),
  [
    ("v5q:4x4", 1, "v5q"),
    ("v5p:4", 1, "not a shape of v5p"),
    ("v5p:4x0x4", 1, "not a shape of v5p"),
    ("v5p", 1, "not a shape of v5p"),
    ("h100:4x4x8", 1, "nodes x GPUs"),
    ("h100:4x8", 2, "--slices=2"),
    ("cpu:x", 1, "not a shape of cpu"),
  ],
)
def test_what_is_no_machine(text, slices, said):
  """One error that names the flag and its value, before jax is imported."""
  with pytest.raises(ConfigError, match=said) as caught:
    topology.parse(text, slices)
  assert "--topology" in str(caught.value) or "--slices" in str(caught.value)


@pytest.mark.parametrize(("text", "extra"), [("v5p:2x2x1", "tpu"), ("h100:1x8", "cuda")])
def test_a_compiler_that_is_not_installed(text, extra, monkeypatch):
  """What to install is said, and nothing of this process's environment is touched."""
  for name in ("libtpu", "jax_cuda12_plugin"):
    monkeypatch.setitem(sys.modules, name, None)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=rf"moejax\[{extra}\]"):
    topology.prepare(topology.parse(text))


def test_half_a_chip_is_a_device():
  """Where a chip shows as two devices, each has half of everything."""
  whole = CHIPS["tpu7x"]
  half = topology.chip_of(topology.parse("tpu7x:2x2x2"), [None] * 16)
  assert half.hbm_bytes * 2 == whole.hbm_bytes
  assert half.flops is not None and half.flops * 2 == whole.flops
  assert topology.chip_of(topology.parse("tpu7x:2x2x2"), [None] * 8) == whole


def test_descriptions_of_gpus():
  """Memory and name are the kind's own."""
  assert "device_memory_size: 84942979072" in target_config("h100")
  assert "H200" in target_config("h200")
