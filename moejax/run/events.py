"""TensorBoard's event file, written without a background thread.

tensorboardX makes the records. Its own writer has a thread that ends at the first error,
such as a full disk or a clock set back by weeks. After that, the eleventh record waits
for ever, and so does the run.
"""

import os
import pathlib
import socket
import time
from typing import Any

from absl import logging


class EventFile:
  """Appends records to a new event file; if it cannot, it warns once and gives up."""

  def __init__(self, directory: str, *, suffix: str = "", purge_step: int | None = None):
    """Args:
    directory: made if missing.
    suffix: of the file's name, after this process's number.
    purge_step: TensorBoard hides this step and later ones of earlier files.
    """
    # Imported here: only needed with TensorBoard.
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2

    self._proto: Any = event_pb2
    self._directory = directory
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    # With the process's number, since a clock that was set back may repeat a second.
    place = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}{suffix}"
    path = os.path.join(directory, f"events.out.tfevents.{place}")
    self._file: Any = record_writer.RecordWriter(path)
    self._add(self._proto.Event(file_version="brain.Event:2"))
    if purge_step is not None:
      start = self._proto.SessionLog(status=self._proto.SessionLog.START)
      self._add(self._proto.Event(step=purge_step, session_log=start))

  def scalar(self, name: str, value: float, step: int) -> None:
    from tensorboardX import summary

    self._add(self._proto.Event(summary=summary.scalar(name, value), step=step))

  def histogram(self, name: str, step: int, **values: Any) -> None:
    """Adds a histogram; takes the values of `tensorboardX.summary.histogram_raw`."""
    from tensorboardX import summary

    made = summary.histogram_raw(name, **values)
    self._add(self._proto.Event(summary=made, step=step))

  def _add(self, event: Any) -> None:
    if self._file is None:
      return
    event.wall_time = time.time()
    try:
      self._file.write(event.SerializeToString())
    except OSError as error:
      self._give_up(error)

  def flush(self) -> None:
    if self._file is None:
      return
    try:
      self._file.flush()
    except OSError as error:
      self._give_up(error)

  def _give_up(self, error: OSError) -> None:
    logging.warning(
      "%s: TensorBoard's file cannot be written (%s): nothing more is added to it until "
      "the next start.",
      *(self._directory, error.strerror),
    )
    file, self._file = self._file, None
    _close(file)

  def close(self) -> None:
    self.flush()
    if self._file is not None:
      _close(self._file)
      self._file = None


def _close(file: Any) -> None:
  try:
    file.close()
  except OSError:  # buffered records cannot be written either
    return
