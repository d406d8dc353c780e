"""Becomes a program that runs on given cores and stops when its starter dies.

  python child.py STARTER_PID CORES PROGRAM ARGUMENT ...

CORES is a list such as 0,1; empty means all. The program replaces this process, so it
keeps the process id, and `ps` shows the plain command. This is a separate file, run by
its path, because a hook between fork and exec (`preexec_fn`) would run Python inside a
forked copy of a process with jax's threads.
"""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of linux/prctl.h; the setting survives exec."""


def main(arguments: list[str]) -> None:
  starter, cores, *command = arguments
  if sys.platform.startswith("linux"):
    # SIGTERM, so that a run saves a checkpoint even if its starter got kill -9.
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM))
  if os.getppid() != int(starter):
    sys.exit(128 + signal.SIGTERM)  # It died before the line above.
  if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
  os.execv(command[0], command)


if __name__ == "__main__":
  main(sys.argv[1:])
