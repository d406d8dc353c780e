"""Runs for `tools.campaign`: on a disk, in an emulated bucket, and by two processes.

Each is started as a user starts it, and looked at from outside: its files, its log and
its exit codes. The bucket is the emulator of tests/buckets behind the proxy there, which
keeps its objects as files, so that a checkpoint is seen in the same way everywhere.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from moejax.cli import launch_local
from moejax.errors import UserError
from moejax.run.files import DIRECTORY
from tests.buckets import emulator, proxy

_POLL_SECONDS = 0.002
_END_SECONDS = 1800.0
"""A run that has been told to end, or lost a process, has this long."""

_SHIFTED_CLOCK = '''"""Shifts this process's wall clock by the seconds in a file."""
import os
import time

_time = time.time


def _shift():
  try:
    with open(os.environ["CAMPAIGN_CLOCK"]) as file:
      return float(file.read() or 0)
  except (KeyError, OSError, ValueError):
    return 0.0


time.time = lambda: _time() + _shift()
time.time_ns = lambda: int((_time() + _shift()) * 1e9)
'''


class Job:
  """One run on a disk, and the process that trains it."""

  place = "disk"
  count = 1

  def __init__(self, root: pathlib.Path, name: str, arguments: list[str]):
    """Args:
    root: of the campaign: logs, caches and runs on a disk.
    name: of the run, below root.
    arguments: flags of experiments.train, without --workdir.
    """
    self.root, self.name, self.arguments = root, name, arguments
    self.seen = root / name
    """The run's directory, as this machine sees it."""
    self.workdir = str(self.seen)
    self.processes: list[subprocess.Popen] = []
    self.fresh = True
    """Whether nothing was done to the run since it was started."""
    self.since = 0.0
    """Monotonic time of the last start, or of the end of the last fault."""
    self._before = self._begun = 0
    self.clock = root / f"{name}.clock"
    self._log = root / f"{name}.log"
    shifted = root / "clock"
    shifted.mkdir(exist_ok=True)
    (shifted / "sitecustomize.py").write_text(_SHIFTED_CLOCK)
    path = [str(shifted), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(root / "jax"))
    self._environment = {
      # The same compiled code for every start: faster, and one variable less.
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "PYTHONPATH": os.pathsep.join(filter(None, path)),
      "CAMPAIGN_CLOCK": str(self.clock),
    }

  def start(self) -> None:
    command = [sys.executable, "-m", "experiments.train", f"--workdir={self.workdir}"]
    with open(self._log, "ab") as log:
      self._begun = log.tell()
      self.processes = [
        subprocess.Popen(
          command + self.arguments, stdout=log, stderr=subprocess.STDOUT, env=variables
        )
        for variables in self._variables()
      ]
    self.mark()
    self.fresh = True

  def mark(self) -> None:
    """Begins to look for progress."""
    self.fresh, self.since, self._before = False, time.monotonic(), self.newest()

  def has_gone_on(self) -> bool:
    """Returns whether there is a complete checkpoint that `mark` did not see."""
    return self.newest() > self._before

  def _variables(self) -> list[dict[str, str]]:
    return [os.environ | self._environment]

  def signal(self, number: signal.Signals, *indices: int) -> None:
    """Sends a signal to some processes, or to all; no error if they have ended."""
    for index in indices or range(self.count):
      self.processes[index].send_signal(number)

  def running(self) -> bool:
    return any(process.poll() is None for process in self.processes)

  def codes(self) -> list[int]:
    """Waits for the end of all processes; returns their exit codes.

    Raises:
      UserError: they do not end.
    """
    deadline = time.monotonic() + _END_SECONDS
    for process in self.processes:
      try:
        process.wait(max(deadline - time.monotonic(), 0.1))
      except subprocess.TimeoutExpired:
        self.close()
        raise UserError(
          f"{self.name}: still running after {_END_SECONDS:.0f} s:\n{self.log()[-3000:]}"
        ) from None
    return [process.returncode for process in self.processes]

  def wait_until(self, condition: Callable[[], bool], seconds: float = 1800.0) -> bool:
    """Whether the condition came true before a process of the run ended.

    Raises:
      UserError: neither happened.
    """
    deadline = time.monotonic() + seconds
    while not condition():
      if any(process.poll() is not None for process in self.processes):
        return False
      if time.monotonic() > deadline:
        raise UserError(
          f"{self.name}: no progress in {seconds:.0f} s:\n{self.log()[-3000:]}"
        )
      time.sleep(_POLL_SECONDS)
    return True

  def close(self) -> None:
    """Ends what still runs."""
    for process in self.processes:
      process.kill()
      process.wait()

  def log(self, *, of_last_start: bool = False) -> str:
    data = self._log.read_bytes() if self._log.exists() else b""
    return data[self._begun if of_last_start else 0 :].decode(errors="replace")

  def numbered(self) -> list[pathlib.Path]:
    try:
      return [p for p in (self.seen / DIRECTORY).iterdir() if p.name.isdigit()]
    except FileNotFoundError:
      return []

  def steps(self) -> list[int]:
    """Complete checkpoints, ascending."""
    return sorted(int(p.name) for p in self.numbered())

  def saving(self) -> bool:
    return any((self.seen / DIRECTORY).glob("*.orbax-checkpoint-tmp*"))

  def newest(self) -> int:
    return max(self.steps(), default=0)

  def vanish(self) -> None:
    shutil.rmtree(self.seen, ignore_errors=True)


class Processes(Job):
  """A run on a disk by two processes."""

  place = "processes"
  count = 2

  def _variables(self) -> list[dict[str, str]]:
    port = launch_local.free_port()
    places = [launch_local.environment(i, self.count, 1, port) for i in range(self.count)]
    return [place | self._environment for place in places]


class Cloud:
  """An emulated bucket and a proxy before it, which injects faults."""

  def __init__(self, root: pathlib.Path):
    if emulator.binary() is None:
      raise UserError(
        f"--where=bucket needs {emulator.PACKAGE}: pip install -e '.[test]'."
      )
    self.objects, self.faults = root / "objects", proxy.Faults()
    self.objects.mkdir()
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      self._port = probe.getsockname()[1]
    self._server = contextlib.ExitStack()
    self._proxy = contextlib.ExitStack()
    self.start()
    self.url = self._proxy.enter_context(
      proxy.started(f"http://127.0.0.1:{self._port}", self.faults)
    )
    emulator.use(self.url)

  def start(self) -> None:
    self._server.enter_context(emulator.started(self.objects, self._port))

  def stop(self) -> None:
    self._server.close()

  def close(self) -> None:
    self._proxy.close()
    self._server.close()


class Bucket(Job):
  """A run in the bucket."""

  place = "bucket"

  def __init__(self, root: pathlib.Path, name: str, arguments: list[str], cloud: Cloud):
    super().__init__(root, name, arguments)
    self.cloud = cloud
    self.workdir = f"gs://{emulator.BUCKET}/{name}"
    self.seen = cloud.objects / emulator.BUCKET / name
    self._environment |= emulator.environment(cloud.url)

  def steps(self) -> list[int]:
    whole = [p for p in self.numbered() if (p / "commit_success.txt").exists()]
    return sorted(int(p.name) for p in whole)

  def saving(self) -> bool:
    return any(not (p / "commit_success.txt").exists() for p in self.numbered())
