"""The first line that a program prints, within a second of its start.

Nothing here imports jax, since the user should not wait that long without output.
"""

import os

_INDEX_VARIABLES = (
  "JAX_PROCESS_ID",
  "SLURM_PROCID",
  "OMPI_COMM_WORLD_RANK",
  "JOB_COMPLETION_INDEX",
  "TPU_WORKER_ID",
)
"""Variables that launchers set to the process index; see `launch.distributed`."""


def announce(text: str, process_id: int | None = None) -> None:
  """Prints a line at once, unless this is clearly not the first process of a job.

  Args:
    text: one line.
    process_id: --process_id, if the program has that flag.
  """
  numbers = [str(process_id)] if process_id is not None else []
  numbers += [os.environ[name] for name in _INDEX_VARIABLES if os.environ.get(name)]
  if not numbers or numbers[0] == "0":
    print(text, flush=True)
