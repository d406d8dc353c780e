"""Several processes, one program: the seam where a run joins the others.

Who is who comes from flags (`--coordinator_address --num_processes --process_id`),
from the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; this
is what `tools.launch_local` sets), or from the launcher, which jax knows how to ask:
Cloud TPU pods, Slurm, MPI, and Kubernetes jobs with an index.
"""

import os
import pathlib
import urllib.request

import jax

from moejax.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FLAGS = ("coordinator_address", "num_processes", "process_id")

_LAUNCHED_BY = {
  "SLURM_STEP_NUM_TASKS": "Slurm",
  "OMPI_COMM_WORLD_SIZE": "Open MPI",
  "MEGASCALE_NUM_SLICES": "a multislice TPU job",
}
"""Variables that count processes, and who sets them."""

_TPU_HOSTS = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
  "worker-network-endpoints"
)
"""The hosts of a pod, joined by commas; only a Cloud TPU VM gets an answer."""

TIMEOUT_SECONDS = 120
"""After so long without the coordinator a process gives up."""


def initialize(
  coordinator_address: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes, if there are any.

  To be called once, before the first array is made.

  Args:
    coordinator_address: host:port of process 0; empty leaves it to the environment.
    num_processes: of the whole job.
    process_id: of this one, from 0.

  Raises:
    UserError: a place among others is named by halves, or is no such place.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(value not in ("", None) for value in given):
    texts = ["" if value is None else str(value) for value in given]
    _join(texts, [f"--{name}" for name in _FLAGS])
  elif os.environ.get(_VARIABLES[0]):
    _join([os.environ.get(name, "") for name in _VARIABLES], list(_VARIABLES))
  elif launcher() is not None:
    _use_gloo()
    jax.distributed.initialize(initialization_timeout=TIMEOUT_SECONDS)


def launcher() -> str | None:
  """Who started this process as one of several; None for a single one."""
  for name, who in _LAUNCHED_BY.items():
    if os.environ.get(name, "").isdigit() and int(os.environ[name]) > 1:
      return who
  if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    return "a Cloud TPU pod"
  if "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
    return "an indexed Kubernetes job"
  if _on_tpu_pod():
    return "a Cloud TPU pod"
  return None


def _on_tpu_pod() -> bool:
  """Whether this machine is a TPU VM of a pod: those set no variable in a shell."""
  chips = [
    *pathlib.Path("/dev").glob("accel*"),
    *pathlib.Path("/dev/vfio").glob("[0-9]*"),
  ]
  if not chips or "TPU_SKIP_MDS_QUERY" in os.environ:
    return False
  request = urllib.request.Request(_TPU_HOSTS, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=2) as answer:
      return b"," in answer.read()
  except OSError:
    return False


def _join(values: list[str], names: list[str]) -> None:
  address, count, index = values
  missing = [n for n, v in zip(names, values, strict=True) if not v]
  missing += [
    n for n, v in zip(names[1:], values[1:], strict=True) if v and not v.isdigit()
  ]
  if missing:
    raise UserError(
      f"{' '.join(missing)}: missing or no number. Give all of {', '.join(names)}, "
      "or none of them for a single process."
    )
  if int(index) >= int(count):
    raise UserError(
      f"{names[2]}={index} is not below {names[1]}={count}: they are numbered from 0."
    )
  _use_gloo()
  jax.distributed.initialize(
    address,
    num_processes=int(count),
    process_id=int(index),
    initialization_timeout=TIMEOUT_SECONDS,
  )


def _use_gloo() -> None:
  """What CPU processes talk through; of no effect elsewhere."""
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
