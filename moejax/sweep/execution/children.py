"""The loop that keeps a pool of children busy until a queue is empty or it is stopped."""

import signal
import time
from typing import Protocol, runtime_checkable

from moejax.run.signals import StopRequest
from moejax.sweep.execution.local import Job, Pool

POLL_SECONDS = 0.1


@runtime_checkable
class Queue(Protocol):
  """A queue of commands to run, which is notified of their progress."""

  def next(self, running: list[Job]) -> tuple[Job, int] | None:
    """Takes the next command off the queue, with the number of its attempt.

    Returns None if no command can start now.
    """
    ...

  def is_empty(self) -> bool:
    """Returns whether there are no more commands to take."""
    ...

  def started(self, job: Job, pid: int) -> None: ...

  def not_started(self, job: Job, error: OSError) -> None:
    """Called if a command could not be started, for example if the log's disk is full."""
    ...

  def ended(self, job: Job, exit_code: int) -> None: ...

  def tick(self) -> None:
    """Called between two checks of the children."""
    ...


def work_off(queue: Queue, pool: Pool) -> int | None:
  """Runs the queue's commands in the pool's slots.

  SIGTERM or Ctrl-C asks the children to save and stop, and starts no more; a further
  Ctrl-C kills them.

  Returns:
    The signal that stopped it, or None.

  Raises:
    KeyboardInterrupt: at the further Ctrl-C.
  """
  told = False
  with StopRequest("every run (one that compiles does so first)") as stop:
    try:
      while True:
        _tell_of_ended(queue, pool)
        if stop.signal is None:
          _fill(queue, pool, stop)
        elif not told:
          pool.signal(signal.SIGTERM)
          told = True
        if not pool.jobs and (stop.signal is not None or queue.is_empty()):
          queue.tick()
          return stop.signal
        queue.tick()
        time.sleep(POLL_SECONDS)
    except BaseException:
      pool.kill()
      _tell_of_ended(queue, pool)
      raise


def _fill(queue: Queue, pool: Pool, stop: StopRequest) -> None:
  while pool.num_free and stop.signal is None:
    found = queue.next(pool.jobs)
    if found is None:
      return
    job, number = found
    try:
      pid = pool.start(job, number)
    except OSError as error:
      queue.not_started(job, error)
    else:
      queue.started(job, pid)


def _tell_of_ended(queue: Queue, pool: Pool) -> None:
  for job, code in pool.ended():
    queue.ended(job, code)
