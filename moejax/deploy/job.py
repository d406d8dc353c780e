"""A training job on machines that others administer: the settings for every target."""

import dataclasses
import re

from moejax.config import Config
from moejax.config.devices import validate_devices
from moejax.config.mesh import AXES, mesh_shape
from moejax.cost import memory, parameters
from moejax.cost.chips import CHIPS
from moejax.errors import UserError
from moejax.models.frozen_count import count_frozen
from moejax.plan.topology import Topology
from moejax.storage.paths import in_bucket
from moejax.sweep.execution.slurm_options import SlurmOptions

PYTHON = "python"
"""Stands in a command for the interpreter of the place where it will run."""

RESTARTABLE = (3, 130, 137, 143)
"""Exit codes after which a job resumes: a lost process, Ctrl-C, killed, asked to stop."""

HOPELESS = (1, 2, 4)
"""Exit codes that a restart would only repeat: a bug, wrong input, disagreement."""

MAX_NAME = 40
"""Most letters in a job's name: Kubernetes adds up to 23, and a pod's may have 63."""

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A command, the machines it needs, and the settings that their owner requires."""

  name: str
  command: tuple[str, ...]
  """Words, the same for every process; `PYTHON` stands for the interpreter."""
  topology: Topology
  workdir: str
  """The run's directory: on a disk that all processes share, or in a bucket."""
  image: str = ""
  """Kubernetes: the container image."""
  claim: str = "moejax-runs"
  """Kubernetes: the PersistentVolumeClaim (ReadWriteMany) with the shared disk."""
  namespace: str = ""
  """Kubernetes: if empty, that of kubectl's context."""
  secret: str = ""
  """Kubernetes: the Secret whose key `secret` holds the job's secret."""
  max_restarts: int = 100
  """Kubernetes, Slurm: most restarts; Slurm also counts those after a preemption."""
  grace_seconds: int = 300
  """Kubernetes: time to save between the notice and the end."""
  spot: bool = False
  """Whether to use cheap machines that may be preempted."""
  zone: str = ""
  """TPU VMs: the Google Cloud zone."""
  share: str = ""
  """TPU VMs: the NFS export with the shared disk, ADDRESS:/PATH."""
  emergency_local_dir: str = ""
  """Kubernetes: directory on the node's disk that outlives the pod; as in `command`."""
  config_file: str = ""
  """TPU VMs: the config's path in the clone, if it must be sent with the clone."""
  slurm: SlurmOptions = dataclasses.field(default_factory=SlurmOptions)
  """Slurm: its options, except for the numbers of nodes, tasks and GPUs."""

  @property
  def in_venv(self) -> list[str]:
    """The command with the interpreter of the virtual environment `.venv`."""
    return [".venv/bin/python" if word == PYTHON else word for word in self.command]

  @property
  def needs_disk(self) -> bool:
    """Whether the run is kept on a shared disk, and not in a bucket."""
    return not in_bucket(self.workdir)

  @property
  def mount(self) -> str:
    """Where the shared disk is mounted: the first directory of `workdir`."""
    return "/" + self.workdir.strip("/").split("/")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """How a config fits on a machine."""

  devices: int
  mesh: dict[str, int]
  """Devices along each axis."""
  least_bytes: int
  """Lower bound of the memory that a device needs."""
  device_bytes: int
  """Memory of a device."""


def fit(config: Config, topology: Topology) -> Fit:
  """Returns how a config fits on a machine.

  Args:
    config: validated.
    topology: the machine.

  Raises:
    ConfigError: the mesh, or a size it cuts, does not divide over the devices.
    UserError: a device needs more memory than it has.
  """
  devices, chip = topology.num_devices, CHIPS[topology.kind]
  validate_devices(config, devices)
  shape = mesh_shape(config.mesh, devices)
  mesh: dict[str, int] = dict(zip(AXES, shape, strict=True))
  vocab_size = parameters.resolve_vocab_size(config)
  need = memory.least_bytes(config, mesh, vocab_size, count_frozen(config))
  total, there = sum(need.values()), chip.hbm_bytes // chip.devices
  if chip.family != "cpu" and total > there:
    parts = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in need.items())
    raise UserError(
      f"--topology={topology}: a device needs at least {total / 1e9:.1f} GB ({parts}; "
      f"buffers not counted) and has {there / 1e9:.1f} GB. Shard the model over more "
      "devices with --config.mesh.fsdp or expert, lower --config.train.batch_size, or "
      "use a larger machine."
    )
  return Fit(devices=devices, mesh=mesh, least_bytes=total, device_bytes=there)


def checked_name(name: str) -> str:
  """Returns a job's name if every target accepts it.

  Raises:
    UserError: it is too long, or has characters that a target does not accept.
  """
  if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
    raise UserError(
      f"--name={name}: at most {MAX_NAME} lower-case letters, digits and hyphens, "
      f"beginning with a letter, such as {name_of(name)}."
    )
  return name


def name_of(text: str, ending: str = "") -> str:
  """Returns a name for a job, made from any text.

  Args:
    text: any text; cut if it is too long.
    ending: kept whole, such as a hash; letters and digits.
  """
  kept = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
  kept = kept if kept[:1].isalpha() else f"run-{kept}".strip("-")
  ending = ending and f"-{ending}"
  return kept[: MAX_NAME - len(ending)].strip("-") + ending
