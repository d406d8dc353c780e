"""The first line of a program, within a second: what starts, from what, and where.

Nothing here imports jax, which takes longer than a person waits without a sign.
"""

import os

_INDEX_VARIABLES = (
  "JAX_PROCESS_ID",
  "SLURM_PROCID",
  "OMPI_COMM_WORLD_RANK",
  "JOB_COMPLETION_INDEX",
  "TPU_WORKER_ID",
)
"""What launchers number processes by; see `launch.distributed`, which asks properly."""


def announce(text: str, process_id: int | None = None) -> None:
  """Prints a line at once, unless this is clearly not the first process of a job.

  Args:
    text: one line.
    process_id: --process_id, where there is such a flag.
  """
  numbers = [str(process_id)] if process_id is not None else []
  numbers += [os.environ[name] for name in _INDEX_VARIABLES if os.environ.get(name)]
  if not numbers or numbers[0] == "0":
    print(text, flush=True)
