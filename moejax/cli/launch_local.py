"""Run several processes of one job on one machine, connected as on a cluster.

  python -m tools.launch_local --processes=4 --devices_per_process=2 -- \\
      python -m experiments.train --config=configs/default.py --workdir=DIR ...

Each process gets --devices_per_process CPU devices and communicates through gloo.
Process 0 writes to this terminal, the others to LOGS/process_N.log. They connect at
127.0.0.1 with a secret made for this job (MOEJAX_JOB_SECRET, unless already set). The
exit code is that of the first process that failed; the others then get some time to
notice before they are killed.
"""

import argparse
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time

from moejax.cli import flags as cli
from moejax.launch import secret

GRACE_SECONDS = 60.0
"""Time for the others to notice that a process is gone."""
_MOST = 1024
_TAIL = 15
"""Number of lines shown of a failed process's log."""


def parse(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser(__doc__)
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--devices_per_process", type=int, default=1)
  parser.add_argument("--logs", default="", help="directory; default: a temporary one")
  parser.add_argument("command", nargs="+", help="after --: what each process runs")
  args = parser.parse_args(argv)
  for name in ("processes", "devices_per_process"):
    if not 1 <= getattr(args, name) <= _MOST:
      parser.error(f"--{name}={getattr(args, name)}: at least 1, at most {_MOST}")
  return args


def free_port() -> int:
  """Returns a port that is currently unused."""
  with socket.socket() as opened:
    opened.bind(("127.0.0.1", 0))
    return opened.getsockname()[1]


def environment(
  index: int, count: int, devices: int, port: int, shared: str = ""
) -> dict[str, str]:
  """Returns a process's environment variables; see moejax/launch/distributed.py.

  Args:
    index: of the process.
    count: number of processes.
    devices: number of devices of each process.
    port: of process 0.
    shared: the job's secret; empty keeps the one in this process's environment.
  """
  # So that `python` is this interpreter, even if its virtualenv is not activated.
  own = os.path.dirname(sys.executable)
  return (
    os.environ
    | {
      "PATH": os.pathsep.join([own, os.environ.get("PATH", os.defpath)]),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
    | ({secret.ENV: shared} if shared else {})
  )


def start(args: argparse.Namespace, logs: pathlib.Path) -> list[subprocess.Popen]:
  """Starts all processes; process 0 uses the terminal."""
  port, processes = free_port(), []
  # Passed by environment: a command line is readable by every user of the machine.
  given = os.environ.get(secret.ENV) or os.environ.get(secret.FILE_ENV)
  shared = "" if given else secrets.token_hex(32)
  for index in range(args.processes):
    env = environment(index, args.processes, args.devices_per_process, port, shared)
    if index == 0:
      processes.append(subprocess.Popen(args.command, env=env, process_group=0))
      continue
    with open(logs / f"process_{index}.log", "wb") as log:
      processes.append(
        subprocess.Popen(
          args.command, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )
      )
  return processes


def wait(processes: list[subprocess.Popen], logs: pathlib.Path) -> int:
  """Waits for all; after the first failure the others get `GRACE_SECONDS`.

  Returns:
    The exit code of the process that failed first, 0 if none did. Signal N gives
    128 + N, as in a shell.
  """
  first: tuple[int, int] | None = None
  deadline = float("inf")
  running = True
  while running:
    # Before the check for failures, so that the last process to end is checked too.
    running = any(p.poll() is None for p in processes)
    if first is None and (first := _failed(processes)) is not None:
      deadline = time.monotonic() + GRACE_SECONDS
      _report(first, logs)
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
    if running:
      time.sleep(0.1)
  if first is None:
    return 0
  return first[1] if first[1] > 0 else 128 - first[1]


def _failed(processes: list[subprocess.Popen]) -> tuple[int, int] | None:
  for index, process in enumerate(processes):
    if process.poll():
      return index, process.returncode
  return None


def _report(failed: tuple[int, int], logs: pathlib.Path) -> None:
  index, code = failed
  how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
  if -code == signal.SIGKILL:
    # The kernel reports this only in its own log.
    how += " (killed from outside, probably out of memory)"
  print(f"launch_local: process {index} ended with {how}.", file=sys.stderr)
  log = logs / f"process_{index}.log"
  if log.exists():
    lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
    print(f"The end of {log}:", *(f"  {x}" for x in lines), sep="\n", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  logs = pathlib.Path(args.logs or tempfile.mkdtemp(prefix="launch_local_"))
  logs.mkdir(parents=True, exist_ok=True)
  print(f"launch_local: {args.processes} processes, logs in {logs}", file=sys.stderr)
  processes = start(args, logs)

  def forward(number: int, frame: object) -> None:
    del frame
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  # The children are in their own process groups, so they get each signal only from here.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, forward)
  return wait(processes, logs)


def run() -> None:
  """Runs the program."""
  sys.exit(main())


if __name__ == "__main__":
  run()
