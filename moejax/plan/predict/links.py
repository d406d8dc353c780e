"""The links that a mesh axis spans, and the time to send over them.

Axes are placed on a torus as `jax.experimental.mesh_utils` places them: starting with the
last mesh axis, each takes as many whole sides of the torus as possible whose product is
its size; an axis without such sides shares one. Slices are joined along
`mesh.slice_axis`; GPU nodes are filled by the last axes of the mesh.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from moejax.config.mesh import AXES
from moejax.cost.chips import CHIPS, Chip
from moejax.plan.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """The part of a machine that each group of a mesh axis spans."""

  devices: int
  sides: tuple[int, ...]
  """Torus sides that it covers, inside an island."""
  inside: int
  """Devices of a group in the same island (slice or node)."""


def spans(
  topology: Topology, mesh: Mapping[str, int], slice_axis: str
) -> dict[str, Span]:
  """Returns the span of every axis, by name."""
  sizes = dict(mesh)
  if CHIPS[topology.kind].family == "gpu":
    return _of_nodes(topology, sizes)
  across = {axis: topology.slices if axis == slice_axis else 1 for axis in AXES}
  inner = {axis: sizes[axis] // across[axis] for axis in AXES}
  free = list(topology.shape)
  found = {}
  for axis in reversed(AXES):
    sides = _take(free, inner[axis])
    found[axis] = Span(devices=sizes[axis], sides=sides, inside=inner[axis])
  return found


def _take(free: list[int], size: int) -> tuple[int, ...]:
  """Removes sides whose product is `size` from `free`, and returns them."""
  for count in range(len(free), 0, -1):
    for sides in itertools.combinations(free, count):
      if math.prod(sides) == size and size > 1:
        for side in sides:
          free.remove(side)
        return sides
  return (size,) if size > 1 else ()


def _of_nodes(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Span]:
  left = topology.shape[-1]
  found = {}
  for axis in reversed(AXES):
    inside = math.gcd(left, sizes[axis])
    left //= inside
    found[axis] = Span(devices=sizes[axis], sides=(inside,), inside=inside)
  return found


def joined(parts: Sequence[Span]) -> Span:
  """Returns the combined span of groups over several axes."""
  return Span(
    devices=math.prod(span.devices for span in parts),
    sides=tuple(side for span in parts for side in span.sides),
    inside=math.prod(span.inside for span in parts),
  )


def seconds(sent: float, span: Span, chip: Chip, *, exchange: bool) -> tuple[str, float]:
  """Returns the network that limits a collective, and a lower bound of its time.

  Between islands, the devices of an island share a ring's traffic, but not an exchange's.

  Args:
    sent: bytes that a device sends.
    span: of the device's group.
    chip: figures of a device.
    exchange: whether it is an all-to-all, whose bytes pass through other devices.
  """
  if not chip.link_bandwidth:
    return "", 0.0
  if span.inside < span.devices:
    share = 1 - span.inside / span.devices if exchange else 1 / max(1, span.inside)
    return "dcn", sent * share / chip.slow_bandwidth
  if chip.family == "gpu":
    return "nvlink", sent / chip.link_bandwidth
  return "ici", torus_seconds(sent, span.sides, chip, exchange=exchange)


def torus_seconds(
  sent: float, sides: Sequence[int], chip: Chip, *, exchange: bool
) -> float:
  """Returns the time to send over the links of a torus.

  Rings send in both directions along every side; an all-to-all's bytes travel a quarter
  of each ring on average.
  """
  used = [side for side in sides if side > 1] or [1]
  hops = sum(used) / 4 if exchange else 1.0
  return sent * max(1.0, hops) / (2 * len(used) * chip.link_bandwidth)
