"""A batch script for Slurm: a process for each GPU, requeued until the run is done.

The script's exit code is that of srun: the highest of all tasks.
"""

import shlex

from moejax.cost.chips import CHIPS
from moejax.deploy.job import RESTARTABLE, Job
from moejax.errors import UserError


def script(job: Job) -> str:
  """Returns the text for sbatch.

  `cpu:N` is one node with N processes of one CPU device each.

  Raises:
    UserError: the topology is of TPUs, which Slurm does not offer.
  """
  kind = job.topology.kind
  if CHIPS[kind].family == "tpu":
    raise UserError(
      f"--target=slurm --topology={job.topology}: give GPUs, such as h100:2x8, or "
      "cpu:4. For TPUs, use --target=gke-tpu or tpu-vm."
    )
  is_cpu = CHIPS[kind].family == "cpu"
  nodes, tasks = (1, job.topology.shape[0]) if is_cpu else job.topology.shape
  asked = [
    f"#SBATCH --{name}={value}" for name, value in _asked(job, nodes, tasks, is_cpu)
  ]
  return "\n".join(
    [
      "#!/bin/bash",
      "# Submit it from the directory that has .venv/bin/python. Flags after its name",
      "# are added to the command: sbatch [OPTIONS] FILE [FLAGS].",
      *asked,
      "#SBATCH --requeue",
      "#SBATCH --open-mode=append",
      "",
      "# The job's processes know each other by it; srun passes it on.",
      "MOEJAX_JOB_SECRET=$(openssl rand -hex 32)",
      "export MOEJAX_JOB_SECRET",
      *_environment(job, is_cpu),
      *job.slurm.setup,
      "",
      f"srun --kill-on-bad-exit=0{'' if is_cpu else ' --gpu-bind=none'} \\",
      f'  {shlex.join(job.in_venv)} "$@"',
      "code=$?",
      "",
      *_requeue(job.max_restarts),
      "exit $code",
      "",
    ]
  )


def _asked(job: Job, nodes: int, tasks: int, is_cpu: bool) -> list[tuple[str, object]]:
  """Returns the sbatch options that have a value."""
  slurm = job.slurm
  given = [
    ("job-name", job.name),
    ("nodes", nodes),
    ("ntasks-per-node", tasks),
    ("gpus-per-node", None if is_cpu else tasks),
    ("cpus-per-task", slurm.cpus_per_task),
    ("mem", slurm.mem),
    ("partition", slurm.partition),
    ("account", slurm.account),
    ("qos", slurm.qos),
    ("constraint", slurm.constraint),
    ("time", slurm.time),
    # Every process saves and exits with 143 this long before the time limit.
    ("signal", f"TERM@{slurm.warning_seconds}"),
    ("output", f"{job.name}-%j.log"),
  ]
  return [(name, value) for name, value in given if value not in (None, "")]


def _requeue(max_restarts: int) -> list[str]:
  """Returns the lines that queue the job again after an exit code that allows it."""
  codes = " | ".join(map(str, RESTARTABLE))
  return [
    "case $code in",
    f"  {codes}) # The run resumes.",
    f"    limit=${{MOEJAX_MAX_RESTARTS:-{max_restarts}}}",
    '    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$limit" ]; then',
    '      scontrol requeue "$SLURM_JOB_ID"',
    "    else",
    '      echo "error: MOEJAX_MAX_RESTARTS=$limit: not queued again" >&2',
    "    fi ;;",
    "esac",
  ]


def _environment(job: Job, is_cpu: bool) -> list[str]:
  lines = []
  if job.slurm.cpus_per_task:
    # Since Slurm 22.05, srun no longer takes it from the lines above.
    lines.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
  if is_cpu:
    lines += ["export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1"]
  # With GPUs, jax uses the one with its index on the node (SLURM_LOCALID), so every task
  # must see all of them: no --gpus-per-task, and no binding.
  return lines
