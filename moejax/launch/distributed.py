"""Joins a process to the others of its job.

Its rank comes from flags (`--coordinator_address --num_processes --process_id`), from
the environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; set by
`tools.launch_local`), or from a launcher that jax can query: Cloud TPU pods, Slurm, MPI
and indexed Kubernetes jobs.

Without any of these, no socket stays open and no thread starts.
"""

import contextlib
import dataclasses
import os
import pathlib
import urllib.request
from collections.abc import Iterator

import jax
from absl import logging

from moejax.errors import UserError
from moejax.launch import listening, liveness, meeting, secret
from moejax.launch.agreement import Facts
from moejax.launch.meeting import JOIN_SECONDS

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_FLAGS = ("coordinator_address", "num_processes", "process_id")

_LAUNCHED_BY = {
  "SLURM_STEP_NUM_TASKS": "Slurm",
  "OMPI_COMM_WORLD_SIZE": "Open MPI",
  "MEGASCALE_NUM_SLICES": "a multislice TPU job",
}
"""Variables that count processes or slices, and the launchers that set them."""

_HEARTBEAT_SECONDS = 3600
"""The runtime's own heartbeat aborts a job without naming the lost process, even when it
is merely stopped. Our connections notice a death within seconds, so this is only a last
resort."""

_TPU_HOSTS = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
  "worker-network-endpoints"
)
"""URL of a pod's hosts, joined by commas; it answers only Cloud TPU VMs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
  """The rank of a process among those of its job."""

  address: str
  """host:port of process 0."""
  count: int
  index: int
  by_launcher: bool = False
  """Whether jax found it, and will find it again by itself."""


@contextlib.contextmanager
def joined(
  coordinator_address: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  facts: Facts | None = None,
  timeout: float = JOIN_SECONDS,
) -> Iterator[None]:
  """Joins the other processes, if any, and watches them while its body runs.

  Enter it once, before the first array is made. With several processes, an error in the
  body does not propagate: it is printed and sent to the others, and the process exits
  with the error's code. See `liveness`.

  Args:
    coordinator_address: host:port of process 0; empty leaves it to the environment.
    num_processes: in the whole job.
    process_id: of this process, from 0.
    facts: what must be the same on all processes; see `agreement`.
    timeout: seconds to wait for the others.

  Raises:
    UserError: the rank is incomplete or invalid, the job's secret is unusable, or
      process 0 cannot listen at its address.
    PeerLostError: other processes did not connect in time.
    DisagreementError: they were started differently.
  """
  rank = find_rank(coordinator_address, num_processes, process_id)
  if rank is None:
    yield
  elif rank.count < 2:
    _start_runtime(rank)
    yield
  else:
    links = meeting.meet(
      rank.address, rank.count, rank.index, facts or {}, timeout, secret.job_secret()
    )
    with liveness.Watch(rank.index, links):
      _start_runtime(rank, _HEARTBEAT_SECONDS)
      yield


def find_rank(
  coordinator_address: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Rank | None:
  """Returns the rank by flags, environment or launcher; None for a single process.

  Raises:
    UserError: the rank is incomplete or invalid.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(value not in ("", None) for value in given):
    texts = ["" if value is None else str(value) for value in given]
    return _rank(texts, [f"--{name}" for name in _FLAGS])
  if os.environ.get(_VARIABLES[0]):
    return _rank([os.environ.get(name, "") for name in _VARIABLES], list(_VARIABLES))
  return None if launcher() is None else _ask_launcher()


def launcher() -> str | None:
  """Returns what started this process as one of several; None for a single one."""
  for name, who in _LAUNCHED_BY.items():
    if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1:
      return who
  if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
    return "a Cloud TPU pod"
  if "JOB_COMPLETION_INDEX" in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
    return "an indexed Kubernetes job"
  if _on_tpu_pod():
    return "a Cloud TPU pod"
  return None


def _on_tpu_pod() -> bool:
  """Returns whether this is a TPU VM of a pod, which no environment variable shows."""
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


def _rank(values: list[str], names: list[str]) -> Rank:
  address, count, index = values
  missing = [n for n, v in zip(names, values, strict=True) if not v]
  missing += [
    n for n, v in zip(names[1:], values[1:], strict=True) if v and not v.isdecimal()
  ]
  if missing:
    raise UserError(
      f"{' '.join(missing)}: missing or not a number. Give all of {', '.join(names)}, or "
      "none of them for a single process."
    )
  if int(index) >= int(count):
    raise UserError(
      f"{names[2]}={index} is not below {names[1]}={count}: processes are numbered from "
      "0."
    )
  listening.split_address(address, names[0])
  return Rank(address=address, count=int(count), index=int(index))


def _ask_launcher() -> Rank:
  """Returns the rank that jax will find itself, before jax acts on it."""
  try:
    from jax._src import clusters

    address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(JOIN_SECONDS)
    )
    if address is None or count is None or index is None:
      raise TypeError("it found no rank")
    return Rank(address=address, count=count, index=index, by_launcher=True)
  except (ImportError, AttributeError, TypeError) as error:
    # Not a public part of jax. Training works without it, with worse errors.
    logging.warning(
      "jax %s does not report how %s placed this process (%s): the processes are neither "
      "compared nor watched.",
      jax.__version__,
      launcher(),
      error,
    )
    return Rank(address="", count=0, index=0, by_launcher=True)


def _start_runtime(rank: Rank, heartbeat: int = 100) -> None:
  # For collectives between CPU processes; no effect elsewhere.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # A launcher also says which devices are ours, so jax queries it itself.
  known = not rank.by_launcher
  jax.distributed.initialize(
    rank.address if known else None,
    rank.count if known else None,
    rank.index if known else None,
    initialization_timeout=int(JOIN_SECONDS),
    heartbeat_timeout_seconds=heartbeat,
    # The runtime checks no secret, so it listens no more widely than it must.
    coordinator_bind_address=listening.bind_address(rank.address) if known else None,
  )
