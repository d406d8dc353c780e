"""The pictures of who holds what: drawn from a run, and they agree with the rules."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.config import MeshConfig
from moejax.sharding import rules
from tools import draw_sharding
from tools.sharding_record import Box, Held, box_of, record

MESHES = [
  MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
  pytest.param(MeshConfig(data=2, expert=4), marks=pytest.mark.slow),
  pytest.param(MeshConfig(data=2, fsdp=4), marks=pytest.mark.slow),
]


def by_rule(mesh, spec: PartitionSpec, held: Held) -> dict[int, Box]:
  """The part of each device, had the array this sharding."""
  index = NamedSharding(mesh, spec).devices_indices_map(held.shape)
  return {
    device.id: tuple(
      (s.start or 0, size if s.stop is None else s.stop)
      for s, size in zip(slices, held.shape, strict=True)
    )
    for device, slices in index.items()
  }


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_what_was_seen_is_what_the_rules_say(mesh, tmp_path):
  """Every array at every step; and the pictures are drawn, small enough to be kept.

  The exchange changes which of its dimensions the expert axis cuts: G*C before, E after.
  """
  recording = record(mesh, jax.devices())
  held = {h.title: h for h in recording.held}
  weight = ("expert", "width", "hidden")
  tokens = rules.batch_sharding(recording.mesh).spec
  expected = {
    "tokens": tokens,
    "router weight, at rest": rules.RULES.spec(("width", "router_expert")),
    "expert weight, at rest": rules.RULES.spec(weight),
    "expert weight, in use": PartitionSpec("expert", None, "tensor"),
    "slots, before the exchange": PartitionSpec(None, tokens[0]),
    "slots, after the exchange": PartitionSpec("expert", ("data", "fsdp")),
    # With experts that are the identity, a part of F has the addend of that part of D.
    "experts' output": PartitionSpec("expert", ("data", "fsdp"), "tensor"),
    "results, back": PartitionSpec(None, tokens[0], "tensor"),
    "output": tokens,
  }
  exchanged = mesh.expert > 1
  assert len(held) == (len(expected) if exchanged else len(expected) - 4)
  for title, array in held.items():
    assert array.parts == by_rule(recording.mesh, expected[title], array), title

  draw_sharding.draw_layer(recording, tmp_path / "layer.png")
  assert 5_000 < (tmp_path / "layer.png").stat().st_size < 300_000
  if exchanged:
    draw_sharding.draw_exchange(recording, tmp_path / "exchange.png")
    assert 5_000 < (tmp_path / "exchange.png").stat().st_size < 300_000


def test_a_part_is_all_of_a_box_and_nothing_else():
  """Numbers that are no box are an error, not a picture."""
  numbers = 1 + np.arange(24, dtype=np.float32).reshape(4, 6)
  assert box_of(numbers[1:3, 2:], (4, 6)) == ((1, 3), (2, 6))
  with pytest.raises(AssertionError):
    box_of(numbers.reshape(-1)[:7], (4, 6))


def test_a_part_that_several_devices_have_is_drawn_once():
  """With all their numbers; of slots, whatever part of the width they have."""
  parts: dict[int, Box] = {
    0: ((0, 2), (0, 4), (0, 1)),
    1: ((0, 2), (0, 4), (1, 2)),
    2: ((2, 4), (0, 4), (0, 1)),
    3: ((2, 4), (0, 4), (1, 2)),
  }
  slots = Held("slots", "ESD", (4, 4, 2), parts)
  assert slots.partial
  assert draw_sharding.drawn(slots) == {
    ((0, 2), (0, 4)): [0, 1],
    ((2, 4), (0, 4)): [2, 3],
  }
  assert len(draw_sharding.drawn(Held("tokens", "GTD", (4, 4, 2), parts))) == 4
