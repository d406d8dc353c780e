"""Step times."""

from collections.abc import Sequence
from pathlib import Path

from moejax.sweep import local
from moejax.sweep.spec import Point


def measure(
  workdir: Path, points: Sequence[Point], num_steps: int, slot: local.Slot
) -> int:
  return 0
