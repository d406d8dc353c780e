"""A real Slurm of one node with two CPUs, started in a directory: `make test-slurm`."""

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

SCRIPT = pathlib.Path(__file__).with_name("mini_slurm.sh")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_DAEMONS = ("slurmctld", "slurmd", "munged")
_MISSING = [name for name in _DAEMONS if shutil.which(name, path=_PATH) is None]

MARKS = [
  pytest.mark.slurm,
  pytest.mark.slow,
  pytest.mark.skipif(
    bool(_MISSING), reason=f"{', '.join(_MISSING)}: Slurm is not installed"
  ),
  pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root"),
]


@contextlib.contextmanager
def started(place: pathlib.Path) -> Iterator[dict[str, str]]:
  """Yields the environment variables with which Slurm's programs find it."""
  environment = os.environ | {"PATH": _PATH}
  # Not captured: the daemons would hold the pipe open.
  log = place / "start.log"
  with log.open("w") as output:
    command = ["bash", str(SCRIPT), "start", str(place)]
    code = subprocess.run(command, stdout=output, stderr=output, env=environment)
  try:
    assert code.returncode == 0, log.read_text()
    yield environment | {"SLURM_CONF": str(place / "slurm.conf")}
  finally:
    subprocess.run(["bash", str(SCRIPT), "stop", str(place)], check=True)
