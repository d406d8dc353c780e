"""Memory of a CPU run: the process keeps the pages that it has used.

XLA:CPU allocates temporaries and results anew in every step. By default glibc returns
such large blocks to the system when they are freed, and the next step pays a page fault
for each 4 KiB of them. docs/speed.md has the cost.
"""

import ctypes
import os
import sys
from collections.abc import Sequence

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8

_KEEP = (
  # One heap for all threads: heaps of other threads are too small for large blocks,
  # which are then mapped and unmapped whatever the other settings say.
  (_ARENA_MAX, 1),
  (_MMAP_MAX, 0),
  (_TRIM_THRESHOLD, 2**31 - 1),
  (_TOP_PAD, 64 << 20),
)
_DEFAULT = (
  (_ARENA_MAX, 8 * (os.cpu_count() or 1)),
  (_MMAP_MAX, 65536),
  (_TRIM_THRESHOLD, 128 << 10),
  (_TOP_PAD, 128 << 10),
)


def keep_freed_pages() -> bool:
  """Makes glibc keep freed memory for reuse, if this process computes on its CPU.

  Call it before jax starts its threads, and inside `distributed.joined`. The process
  never shrinks again, as with an accelerator's allocator.

  Returns:
    Whether it did; False with an accelerator, or without Linux and glibc.
  """
  if not _set(_KEEP):
    return False
  import jax

  if jax.default_backend() == "cpu":
    return True
  # With an accelerator, the heap serves data loading, in many threads at once.
  _set(_DEFAULT)
  return False


def _set(settings: Sequence[tuple[int, int]]) -> bool:
  if not sys.platform.startswith("linux"):
    return False
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is None:  # musl
    return False
  return all(mallopt(name, value) for name, value in settings)
