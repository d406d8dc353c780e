"""Freed pages stay with the process, so that a step's memory is touched once."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from moejax.launch import host_memory
kept = host_memory.keep_freed_pages() if sys.argv[1] == "keep" else False
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (x[:, None] * x).at[0].add(1.0))
x = jnp.ones(4096)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(40):
  before = faults()
  step(x).block_until_ready()
  counts.append(faults() - before)
print(kept, sorted(counts[20:])[10])
"""


def faults(mode: str) -> tuple[bool, int]:
  """Page faults of a later step, whose result has 64 MiB: 16,384 pages.

  The median of twenty: now and then the block of the step before is not free yet.
  """
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
  )
  kept, count = done.stdout.split()
  return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only; elsewhere a no-op")
def test_a_step_touches_its_memory_once():
  """Without it a step faults in its whole result; with it, soon, nearly nothing."""
  kept, with_it = faults("keep")
  _, without = faults("leave")
  assert kept
  assert without > 16_000
  assert with_it < 1_000
