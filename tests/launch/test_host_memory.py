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
for _ in range(30): step(x).block_until_ready()
before = faults()
for _ in range(8): step(x).block_until_ready()
print(kept, faults() - before)
"""


def faults(mode: str) -> tuple[bool, int]:
  """Page faults of eight later steps, each with a result of 64 MiB: 16,384 pages."""
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
  )
  kept, count = done.stdout.split()
  return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only; elsewhere a no-op")
def test_a_step_touches_its_memory_once():
  """Without it every step faults in its whole result; with it, soon, none does."""
  kept, with_it = faults("keep")
  _, without = faults("leave")
  assert kept
  assert without > 8 * 16_000
  assert with_it < 2 * 16_384
