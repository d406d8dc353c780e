"""Child processes on this machine, each on its own cores or accelerators.

XLA:CPU makes as many threads as its process may use cores, so concurrent runs slow each
other far less on disjoint cores. With GPUs, a child sees only its own.

The children have their own process groups: Ctrl-C at the terminal reaches only this
process, which asks them to save and stop (SIGTERM). If this process dies, Linux signals
them; see moejax/sweep/execution/child.py.
"""

import contextlib
import dataclasses
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moejax.errors import UserError
from moejax.sweep.execution import child, states

MODULE = "moejax.cli.main"

_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
_LIST_SECONDS = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A command to run once."""

  name: str
  run: Path
  """Directory of the run it belongs to."""
  command: tuple[str, ...]
  log: Path
  """Its output is appended here."""
  program: str = ""
  """Equal for commands that compile the same programs; "" if unknown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
  """The resources that one child at a time may use."""

  cores: tuple[int, ...]
  """Empty means all, because the system cannot pin (macOS)."""
  variables: dict[str, str]
  """Environment variables."""


def command(program: str, *flags: str) -> tuple[str, ...]:
  """Returns a command that runs a program of moejax in this interpreter.

  Args:
    program: its name after `moejax`, such as train.
    flags: its arguments.
  """
  return (sys.executable, "-m", MODULE, program, *flags)


def make_slots(jobs: int, devices_per_run: int | None = None) -> list[Slot]:
  """Divides this process's cores, and its GPUs if there are any, among jobs.

  Args:
    jobs: number of children at once.
    devices_per_run: GPUs, or simulated CPU devices, of each; None means one GPU, or as
      many CPU devices as the environment sets.

  Raises:
    UserError: there are not enough cores or GPUs.
  """
  pinnable = hasattr(os, "sched_getaffinity")
  cores = sorted(os.sched_getaffinity(0)) if pinnable else []
  count = len(cores) or os.cpu_count() or 1
  if jobs > count:
    raise UserError(
      f"--jobs={jobs}: this process has {count} core(s), and each run needs one of its "
      f"own. Give at most --jobs={count}."
    )
  shares = [
    tuple(cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs])
    for i in range(jobs)
  ]
  gpus = visible_gpus()
  if not gpus:
    variables = {"JAX_NUM_CPU_DEVICES": str(devices_per_run)} if devices_per_run else {}
    return [Slot(cores=share, variables=variables) for share in shares]
  each = devices_per_run or 1
  if jobs * each > len(gpus):
    raise UserError(
      f"--jobs={jobs} with {each} GPU(s) each (--devices_per_run) needs {jobs * each}, "
      f"and this process sees {len(gpus)}. Lower one of them."
    )
  return [
    Slot(
      cores=share,
      variables={"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])},
    )
    for i, share in enumerate(shares)
  ]


def visible_gpus() -> list[str]:
  """Returns the GPUs that a child would see, as CUDA_VISIBLE_DEVICES names them.

  Does not use jax, which would claim their memory for this process.
  """
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if platforms and not {"cuda", "gpu", "rocm"} & set(platforms.split(",")):
    return []
  if not any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
    return []
  named = os.environ.get("CUDA_VISIBLE_DEVICES")
  if named is not None:
    return [name for name in named.split(",") if name.strip()]
  tool = shutil.which("nvidia-smi")
  if tool is None:
    return []
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    listed = subprocess.run(
      [tool, "-L"], capture_output=True, text=True, timeout=_LIST_SECONDS, check=True
    ).stdout.splitlines()
    count = sum(line.startswith("GPU ") for line in listed)
    return [str(index) for index in range(count)]
  return []


class Pool:
  """The children that run now, at most one per slot.

  Start them from the main thread: Linux treats the end of the starting thread as the end
  of its process.
  """

  def __init__(self, slots: Sequence[Slot]):
    self._slots = list(slots)
    self._running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

  @property
  def jobs(self) -> list[Job]:
    """The commands that run now."""
    return [job for job, _ in self._running.values()]

  @property
  def num_free(self) -> int:
    return len(self._slots) - len(self._running)

  def start(self, job: Job, number: int = 1) -> int:
    """Starts a command in a free slot, and returns its process id.

    Args:
      job: the command.
      number: of the attempt, for the log.
    """
    index = next(i for i in range(len(self._slots)) if i not in self._running)
    slot = self._slots[index]
    cores = ",".join(map(str, slot.cores))
    wrapper = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), cores]
    with open(job.log, "ab") as log:
      log.write(states.log_header(number, shlex.join(job.command)).encode())
      log.flush()
      process = subprocess.Popen(
        [*wrapper, *job.command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Otherwise Python buffers output to a file, and the log is read live.
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | slot.variables,
        process_group=0,
      )
    self._running[index] = (job, process)
    return process.pid

  def ended(self) -> list[tuple[Job, int]]:
    """Returns the commands that have ended since the last call, with exit codes.

    A negative code is the signal that killed the command.
    """
    over = []
    for index, (job, process) in list(self._running.items()):
      code = process.poll()
      if code is not None:
        del self._running[index]
        over.append((job, code))
    return over

  def signal(self, number: signal.Signals) -> None:
    """Sends a signal to every child."""
    for _, process in self._running.values():
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)

  def kill(self) -> None:
    """Ends every child at once and waits for it."""
    self.signal(signal.SIGKILL)
    for _, process in self._running.values():
      process.wait()
