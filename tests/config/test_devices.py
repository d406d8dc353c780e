"""Devices: as many as fit where the mesh leaves it open; otherwise flags that do run."""

import re
import types

import pytest

from configs import default
from moejax.cli import flags as cli
from moejax.config import check as config_check
from moejax.config import devices as config_devices
from moejax.config import text as config_text
from moejax.errors import ConfigError
from tests.config.test_check import TOP_K, make

DEVICES_REFUSED = [
  (dict(mesh__data=3), "--config.mesh.data=3"),
  (dict(mesh__data=16), "--config.mesh.data=16"),
  (dict(train__batch_size=12), "8 devices"),
  (dict(train__accumulation=4), "--config.train.accumulation=4"),
  (
    dict(mesh__expert=8, moe__num_experts=4, mesh__data=1),
    "--config.mesh.expert=8 does not divide --config.moe.num_experts",
  ),
  (dict(mesh__tensor=8), "--config.mesh.tensor=8 does not divide"),
  (
    dict(mesh__fsdp=4, model__width=130, model__num_heads=5),
    "--config.mesh.fsdp=4 does not divide --config.model.width",
  ),
  (dict(mesh__tensor=2, model__num_kv_heads=1), "--config.model.num_kv_heads (1)"),
  (
    dict(
      mesh__fsdp=4,
      model__attention="latent",
      model__kv_rank=18,
      model__nope_head_dim=4,
      model__rope_head_dim=4,
      model__value_head_dim=4,
    ),
    "--config.mesh.fsdp=4 does not divide --config.model.kv_rank (18)",
  ),
  (dict(moe__group_size=-1), "--config.moe.group_size=-1 makes 1 routing group(s)"),
  (dict(moe__group_size=1024), "makes 4 routing group(s) of a microbatch, which 8"),
  (
    dict(moe__capacity_factor=None, mesh__expert=8, mesh__data=1, moe__exchange_chunks=4),
    "--config.moe.exchange_chunks=4 does not divide the 2 routing group(s) of a device",
  ),
]


@pytest.mark.parametrize(("fields", "part"), DEVICES_REFUSED, ids=lambda x: str(x)[:60])
def test_devices_refused(fields, part):
  """A mesh or batch that does not fit on 8 devices is refused before any compile."""
  with pytest.raises(ConfigError, match=re.escape(part)):
    config_devices.validate_devices(make(**fields), 8)


def devices(*counts: int) -> list:
  """So many devices of each process."""
  owners = [i for i, count in enumerate(counts) for _ in range(count)]
  return [
    types.SimpleNamespace(process_index=owner, id=n) for n, owner in enumerate(owners)
  ]


@pytest.mark.parametrize(("fields", "part"), DEVICES_REFUSED, ids=lambda x: str(x)[:60])
def test_the_flags_that_an_error_recommends_do_run(fields, part):
  """Each remedy, laid over the config that was refused, is accepted on the devices."""
  config = make(**fields)
  with pytest.raises(ConfigError) as caught:
    config_devices.validate_devices(config, 8)
  _, _, remedy = str(caught.value).rpartition(" Use ")
  for alternative in remedy.split(", or "):
    found = re.findall(r"--config\.([\w.]+)=(\S+?)[.,]?(?=\s|$)", alternative)
    assert found, remedy
    changed = make(**fields)
    for name, text in found:
      config_text.set_field(changed, name, config_text.parse_value(name, text))
    config_check.validate(changed)
    assert config_devices.choose_devices(changed, devices(8))[0]


@pytest.mark.parametrize(
  ("num_devices", "used"),
  [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 4)],
)
def test_the_shipped_default_runs_on_any_machine(num_devices, used):
  """16 sequences in 4 groups: the largest divisor of 4 that is there, and it is said."""
  chosen, why = config_devices.choose_devices(default.get_config(), devices(num_devices))
  assert [d.id for d in chosen] == list(range(used))
  assert (why == "") == (used == num_devices)
  if why:
    assert why.startswith(f"Using {used} of {num_devices} devices: --config.")
    assert "\n" not in why


@pytest.mark.parametrize(
  ("counts", "used"),
  [
    ((4, 4), [0, 1, 4, 5]),
    ((2, 2, 2, 2), [0, 2, 4, 6]),
    ((3, 2), [0, 1, 3, 4]),
    ((2, 2), [0, 1, 2, 3]),
  ],
)
def test_each_process_gives_as_many_devices(counts, used):
  """None is without work, and none has more than another."""
  chosen, why = config_devices.choose_devices(default.get_config(), devices(*counts))
  assert [d.id for d in chosen] == used
  assert not why or f"({len(used) // len(counts)} of each process)" in why


def test_a_process_is_never_left_out():
  """Eight processes of one device and four groups: refused, with flags that run."""
  with pytest.raises(ConfigError, match=r"Use --config.moe.group_size=256, or"):
    config_devices.choose_devices(default.get_config(), devices(*[1] * 8))
  config = default.get_config()
  config.moe.group_size = 256
  assert len(config_devices.choose_devices(config, devices(*[1] * 8))[0]) == 8


def test_a_mesh_that_is_given_in_full_is_taken_as_given():
  """Nothing is left out in silence where every axis has its number."""
  with pytest.raises(ConfigError, match=r"Use --config.mesh.data=-1"):
    config_devices.choose_devices(make(mesh__data=4), devices(8))


@pytest.mark.parametrize(
  ("fields", "num_devices"),
  [
    ({}, 1),
    ({}, 16),
    (dict(moe__group_size=-1, moe__exchange="gspmd"), 8),
    (dict(mesh__expert=4), 8),
    (dict(mesh__tensor=4, mesh__fsdp=2), 8),
    (dict(mesh__data=1, mesh__expert=-1), 8),
    (dict(mesh__data=1, mesh__expert=8, moe__num_experts=4, moe__segments=2, **TOP_K), 8),
    (dict(mesh__data=1, mesh__expert=8, moe__num_experts=3, moe__dense_twin=True), 8),
  ],
)
def test_devices_accepted(fields, num_devices):
  config_devices.validate_devices(make(**fields), num_devices)


def test_the_nearest_size_of_an_axis_is_recommended():
  """7 of 8 experts: one more, as in the preset, and not the largest one below."""
  config = cli.load_config("configs/mixtral_8x7b.py")
  config.mesh.expert = 7
  with pytest.raises(ConfigError, match=r"Use --config\.mesh\.expert=8\b"):
    config_devices.validate_devices(config, 128)
