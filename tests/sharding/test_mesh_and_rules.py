"""Who holds what: mesh sizes, the rules' table, and their refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.config import MeshConfig, ModelConfig, MoEConfig
from moejax.config.mesh import mesh_shape
from moejax.errors import ConfigError
from moejax.models.decoder import Decoder
from moejax.sharding import mesh as meshes
from moejax.sharding import rules


@pytest.mark.parametrize(
  ("sizes", "devices", "expected"),
  [
    ({}, 8, (8, 1, 1, 1)),
    ({"expert": 4}, 8, (2, 1, 4, 1)),
    ({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}, 8, (1, 2, 2, 2)),
    ({"data": 1, "fsdp": -1}, 6, (1, 6, 1, 1)),
  ],
)
def test_one_axis_takes_what_the_others_leave(sizes, devices, expected):
  """-1 fills; the product is the device count."""
  assert mesh_shape(MeshConfig(**sizes), devices) == expected


@pytest.mark.parametrize(
  "sizes", [{"expert": 3}, {"data": 2}, {"expert": 0}, {"expert": -1}, {"tensor": -2}]
)
def test_a_mesh_that_cannot_be_is_refused_by_flag(sizes):
  """The error names a mesh flag: product unequal to 8, zero, two fillers."""
  with pytest.raises(ConfigError, match="--config.mesh"):
    mesh_shape(MeshConfig(**sizes), 8)


def test_parameters_are_cut_as_the_table_says():
  """Expert weights over expert, fsdp and tensor; the router whole on every device."""
  config = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
  mesh = meshes.make_mesh(config)
  decoder = Decoder(ModelConfig(width=16, hidden=32), MoEConfig(), vocab_size=8)
  shapes = decoder.shapes()
  tree = rules.shardings(mesh, decoder.logical_axes(), shapes)
  moe = tree["unit"]["1"]["moe"]
  assert moe["experts"]["w_in"].spec == PartitionSpec(None, "expert", "fsdp", "tensor")
  assert moe["experts"]["w_out"].spec == PartitionSpec(None, "expert", "tensor", "fsdp")
  assert moe["router"]["weight"].spec == PartitionSpec(None, "fsdp", None)
  params = jax.jit(decoder.init, out_shardings=tree)(jax.random.key(0))
  w_in = params["unit"]["1"]["moe"]["experts"]["w_in"]
  assert w_in.addressable_shards[0].data.size * 8 == w_in.size


def test_optimizer_state_is_cut_as_its_parameter():
  """A copy of a parameter under another name keeps its sharding; a count does not."""
  mesh = meshes.make_mesh(MeshConfig(fsdp=8))
  axes = {"a": ("width", None), "b": ("norm",)}
  params = {"a": jnp.zeros((16, 3)), "b": jnp.zeros((4,))}
  tree = rules.shardings(mesh, axes, params)
  state = {"mu": params, "count": jnp.zeros(()), "row": {"a": jnp.zeros((16,))}}
  cut = rules.like_parameters(mesh, state, params, tree)
  assert cut["mu"]["a"].spec == PartitionSpec("fsdp", None)
  assert cut["count"].spec == cut["row"]["a"].spec == PartitionSpec()


def test_a_colliding_unknown_or_indivisible_axis_is_an_error():
  """A hole in a sharding rule must not be silent."""
  with pytest.raises(ValueError, match="used twice"):
    rules.RULES.spec(("heads", "hidden"))
  with pytest.raises(ValueError, match="unknown logical dimension 'hiden'"):
    rules.RULES.spec(("hiden",))
  mesh = meshes.make_mesh(MeshConfig(tensor=8))
  with pytest.raises(ConfigError, match=r"--config.mesh.tensor=8 .* \(12\) of w"):
    rules.shardings(mesh, {"w": ("hidden",)}, {"w": jnp.zeros((12,))})


class _Sliced:
  """A device of one of two TPU slices."""

  platform, device_kind = "tpu", "TPU v5"

  def __init__(self, index: int):
    self.id, self.slice_index = index, index // 4


def test_an_axis_that_cannot_cross_slices_is_refused():
  """With the axis, its size and both remedies named."""
  devices = [_Sliced(i) for i in range(8)]
  with pytest.raises(ConfigError, match="mesh.data=1 must span 2 slices") as caught:
    meshes.make_mesh(MeshConfig(data=1, fsdp=-1), devices)
  assert "slice_axis" in str(caught.value)


def test_slices_are_crossed_by_the_axis_that_is_named(monkeypatch):
  """Inside a slice are the other axes, and what the axis has beyond the slices."""
  asked = {}

  def place(inner, outer, devices, **options):
    del options
    asked.update(inner=inner, outer=outer)
    return np.array(devices, dtype=object).reshape(np.multiply(inner, outer))

  monkeypatch.setattr("jax.experimental.mesh_utils.create_hybrid_device_mesh", place)
  devices = jax.devices()
  monkeypatch.setattr("moejax.sharding.mesh.num_slices", lambda devices: 2)
  meshes.make_mesh(MeshConfig(data=4, expert=2), devices)
  assert asked == {"inner": (2, 1, 2, 1), "outer": (2, 1, 1, 1)}
  meshes.make_mesh(MeshConfig(data=1, fsdp=4, expert=2, slice_axis="expert"), devices)
  assert asked == {"inner": (1, 4, 1, 1), "outer": (1, 1, 2, 1)}


def test_an_axis_that_is_no_side_of_the_torus_shares_one(monkeypatch):
  """What cannot be placed along whole sides is placed along parts of them."""
  asked = []

  def place(shape, devices, *, allow_split_physical_axes=False):
    asked.append(allow_split_physical_axes)
    if not allow_split_physical_axes:
      raise NotImplementedError("no such sides")
    return np.array(devices, dtype=object).reshape(shape)

  monkeypatch.setattr("jax.experimental.mesh_utils.create_device_mesh", place)
  mesh = meshes.make_mesh(MeshConfig(data=2, expert=-1))
  assert asked == [False, True] and mesh.shape["expert"] == 4
