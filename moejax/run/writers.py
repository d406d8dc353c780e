"""Where metrics go: metrics.jsonl and TensorBoard.

metrics.jsonl holds one object per line, in order of `step`, which counts the
optimizer steps done. A crash may tear the last line; opening the file for a run
that resumes at step n drops it and every line after step n, so that no step
occurs twice. TensorBoard gets a bounded number of series whatever the number of
layers and experts: scalars over all layers, and histograms of up to 16 layers.

In a bucket, metrics.jsonl is a folder of parts (`storage.parts`), and TensorBoard's files
are made on this machine and copied with each checkpoint.
"""

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from moejax import files
from moejax.errors import UserError
from moejax.run import events
from moejax.run.files import CONFIG_FILE
from moejax.storage import parts
from moejax.storage.errors import explained
from moejax.storage.paths import RunPath, in_bucket, write_bytes

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
"""A run's directory of event files."""

_EVENTS_BYTES = 4 << 20
"""Size at which a new TensorBoard file is begun in a bucket."""

MAX_HISTOGRAMS = 16
"""Most layers that get a histogram; evenly spaced if there are more."""


@runtime_checkable
class Writer(Protocol):
  """Stores the metrics of each step."""

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Stores one step's values: scalars, and a dict `moe` of per-layer lists."""
    ...

  def flush(self) -> None:
    """Makes everything written so far survive a crash."""
    ...

  def close(self) -> None: ...


@runtime_checkable
class LineWriter(Writer, Protocol):
  """Stores each step as a line, and keeps those that cannot be stored yet."""

  def late(self) -> list[str]:
    """Returns the lines that are kept."""
    ...

  def put_back(self, lines: list[str]) -> None:
    """Stores lines that another process of this run kept until its end."""
    ...


class JsonlWriter:
  """Appends to metrics.jsonl, one write per line.

  Lines that a full disk refuses are kept, and written with the next.
  """

  def __init__(self, workdir: RunPath, *, resume_step: int):
    """Opens the file and drops the steps that a resumed run will repeat."""
    self.path = pathlib.Path(workdir) / METRICS_FILE
    cut(self.path, resume_step)
    self._file = self.path.open("ab", buffering=0)
    self._late = b""
    self._warned = False

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Stores a line.

    Raises:
      UserError: the file was removed.
    """
    self._late += _line(step, values).encode()
    self._write()

  def _write(self, *, sync: bool = False) -> None:
    descriptor = self._file.fileno()
    found = os.fstat(descriptor)
    if not found.st_nlink:
      # The whole directory is gone, unless someone is still removing the rest of it.
      what = "was removed while its run was training"
      then = "starts again from step 0, unless you restore it"
      if (self.path.parent / CONFIG_FILE).exists():
        what = f"lost {METRICS_FILE}, which was removed while the run was writing it"
        then = "continues from the newest checkpoint, or from step 0 if none is left"
      raise UserError(f"--workdir={self.path.parent} {what}. The same command {then}.")
    rest = self._late
    try:
      while rest:
        rest = rest[self._file.write(rest) :]
      if sync:
        os.fsync(descriptor)
      self._late, self._warned = b"", False
    except OSError as error:
      # Otherwise the next line would follow half of this one.
      os.ftruncate(descriptor, found.st_size)
      if not self._warned:
        logging.warning(
          "%s cannot be written for now (%s): its lines are kept, and the run continues.",
          *(self.path, error.strerror),
        )
        self._warned = True

  def flush(self) -> None:
    self._write(sync=True)

  def late(self) -> list[str]:
    return self._late.decode().splitlines()

  def put_back(self, lines: list[str]) -> None:
    self._late += _missing(self.path, lines).encode()
    self._write()

  def close(self) -> None:
    try:
      self.flush()
    finally:
      self._file.close()


class BucketJsonlWriter:
  """Appends to the parts of metrics.jsonl in a bucket, several lines at a time."""

  def __init__(self, workdir: RunPath, *, resume_step: int):
    """Opens the newest part and drops the steps that a resumed run will repeat."""
    path = workdir / METRICS_FILE
    with explained(workdir):
      parts.cut(path, lambda line: bool(_parsed(line, resume_step)))
      self._file = parts.PartsFile(path)
    self._path = path

  def write(self, step: int, values: dict[str, Any]) -> None:
    self._file.append(_line(step, values))

  def late(self) -> list[str]:
    return self._file.late.splitlines()

  def put_back(self, lines: list[str]) -> None:
    if text := _missing(self._path, lines):
      self._file.append(text)
      self.flush()

  def flush(self) -> None:
    with _kept():
      self._file.flush()

  def close(self) -> None:
    self._file.flush()


@contextlib.contextmanager
def _kept() -> Iterator[None]:
  """Logs what a bucket refuses while a run trains; it is written with the next lines."""
  try:
    yield
  except UserError as error:
    logging.warning("Not written for now, and kept: %s", error)


def _missing(path: RunPath, lines: list[str]) -> str:
  """Returns the lines of steps after the last one in a metrics file."""
  if not lines:
    return ""
  last = max((entry["step"] for entry in read(path)), default=-1)
  wanted = [line for line in lines if _parsed(line).get("step", -1) > last]
  return "".join(line + "\n" for line in wanted)


def _line(step: int, values: dict[str, Any]) -> str:
  return json.dumps(finite({"step": step, **values})) + "\n"


def finite(value: Any) -> Any:
  """Returns the value with None for NaN and infinities, which are not valid JSON."""
  if isinstance(value, dict):
    return {k: finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def read(path: RunPath) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file, without any that a crash tore."""
  if in_bucket(path):
    text = parts.read_text(path)
  elif path.exists():
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  else:
    return []
  found = (_parsed(line) for line in text.splitlines())
  return [entry for entry in found if entry]


def location(workdir: RunPath) -> RunPath:
  """Returns the path of a run's metrics, for messages."""
  path = workdir / METRICS_FILE
  return parts.folder(path) if in_bucket(path) else path


def _parsed(line: str, last_step: int | None = None) -> dict[str, Any]:
  """Returns a line's values; empty if it is torn or of a step after `last_step`."""
  try:
    entry = json.loads(line)
  except json.JSONDecodeError:
    return {}
  if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
    return {}
  return entry if last_step is None or entry["step"] <= last_step else {}


def cut(path: pathlib.Path, last_step: int) -> None:
  """Drops lines after `last_step` and torn lines, atomically; the file may be missing."""
  if not path.exists():
    return
  kept = [entry for entry in read(path) if entry["step"] <= last_step]
  files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


class TensorBoardWriter:
  """Writes scalars, and per MoE layer a histogram whose buckets are the experts."""

  def __init__(self, workdir: RunPath, *, resume_step: int):
    self._alarms: set[str] = set()
    self._writer = self._open(
      str(workdir / TENSORBOARD), purge=resume_step + 1 if resume_step else None
    )

  def _open(self, directory: str, suffix: str = "", purge: int | None = None) -> Any:
    return events.EventFile(directory, suffix=suffix, purge_step=purge)

  def write(self, step: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
      if isinstance(value, int | float) and not isinstance(value, bool):
        self._writer.scalar(name, value, step)
    if "alarms_active" in values:
      self._write_alarms(step, values.get("alarms", {}))
    if layers := values.get("moe"):
      self._write_layers(step, layers)

  def _write_alarms(self, step: int, active: dict[str, Any]) -> None:
    """Writes 1 while an alarm is raised, and 0 from then on."""
    self._alarms |= active.keys()
    for name in sorted(self._alarms):
      self._writer.scalar(f"alarm/{name}", int(name in active), step)

  def _write_layers(self, step: int, layers: dict[str, Any]) -> None:
    for name, per_layer in layers.items():
      if not name.startswith("load"):
        self._writer.scalar(f"moe_mean/{name}", float(np.mean(per_layer)), step)
        self._writer.scalar(f"moe_max/{name}", float(np.max(per_layer)), step)
    load = layers.get("load", [])
    count = min(len(load), MAX_HISTOGRAMS)
    for layer in np.unique(np.linspace(0, len(load) - 1, count).round().astype(int)):
      self._histogram(f"load/moe_layer_{layer:03d}", np.asarray(load[layer]), step)

  def _histogram(self, tag: str, load: np.ndarray, step: int) -> None:
    """Adds a histogram whose bucket e is the load of expert e over the mean load."""
    experts = np.arange(len(load), dtype=np.float64)
    weight = load * len(load)
    self._writer.histogram(
      tag,
      step,
      min=0.0,
      max=float(len(load)),
      num=float(weight.sum()),
      sum=float((experts * weight).sum()),
      sum_squares=float((experts**2 * weight).sum()),
      bucket_limits=(experts + 1.0).tolist(),
      bucket_counts=weight.tolist(),
    )

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class BucketTensorBoardWriter(TensorBoardWriter):
  """Writes event files on this machine, and copies them to a bucket at each flush.

  A new file is begun when one reaches `_EVENTS_BYTES`, so that each checkpoint copies
  little again.
  """

  def __init__(self, workdir: RunPath, *, resume_step: int):
    self._target = workdir / TENSORBOARD
    self._local = tempfile.TemporaryDirectory(prefix="moejax_tensorboard_")
    self._sizes: dict[str, int] = {}
    """Bytes copied so far of each event file."""
    self._count = 0
    super().__init__(pathlib.Path(self._local.name), resume_step=resume_step)

  def flush(self) -> None:
    super().flush()
    with _kept(), explained(self._target.parent):
      for file in sorted(pathlib.Path(self._local.name, TENSORBOARD).iterdir()):
        if (size := file.stat().st_size) != self._sizes.get(file.name):
          write_bytes(self._target / file.name, file.read_bytes())
          self._sizes[file.name] = size
    if max(self._sizes.values(), default=0) >= _EVENTS_BYTES:
      self._begin_file()

  def _begin_file(self) -> None:
    super().close()
    directory = pathlib.Path(self._local.name, TENSORBOARD)
    for file in directory.iterdir():
      file.unlink()
    self._sizes.clear()
    self._count += 1
    self._writer = self._open(str(directory), suffix=f".{self._count}")

  def close(self) -> None:
    self.flush()
    super().close()
    self._local.cleanup()


def make_writers(
  workdir: RunPath, *, resume_step: int, tensorboard: bool
) -> list[Writer]:
  """Returns the writers of process 0; other processes have none."""
  if in_bucket(workdir):
    found: list[Writer] = [BucketJsonlWriter(workdir, resume_step=resume_step)]
    if tensorboard:
      found.append(BucketTensorBoardWriter(workdir, resume_step=resume_step))
    return found
  writers: list[Writer] = [JsonlWriter(workdir, resume_step=resume_step)]
  if tensorboard:
    writers.append(TensorBoardWriter(workdir, resume_step=resume_step))
  return writers
