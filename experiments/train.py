"""Trains a sparse Mixture-of-Experts language model, or goes on training one.

  python -m experiments.train --config=configs/default.py --workdir=runs/default \
    --config.moe.num_experts=16 --config.moe.capacity_factor=1.5

The same command resumes a run that was stopped, and says so when it is done. A
larger --config.train.num_steps extends a finished one. SIGTERM or Ctrl-C saves a
checkpoint and leaves (a second Ctrl-C leaves at once).

Exit codes: 0 done, 1 stopped for non-finite losses, 2 refused for a mistake in what
was given, 143 and 130 left on SIGTERM and on Ctrl-C with everything saved. Of several
processes also: 3 another one was lost, 4 they were not started alike.
"""

import pathlib
import sys

from absl import flags

from moejax import cli
from moejax.config import Config
from moejax.errors import UserError
from moejax.parallel import meeting

_INIT_FROM = flags.DEFINE_string(
  "init_from", "", "Directory of a run whose parameters a new run starts from."
)
_ADDRESS = flags.DEFINE_string(
  "coordinator_address", "", "Of several processes: host:port of process 0."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "Of several processes: how many.")
_INDEX = flags.DEFINE_integer("process_id", None, "Of several processes: which one.")
_JOIN = flags.DEFINE_float(
  "join_timeout",
  meeting.JOIN_SECONDS,
  "Of several processes: seconds to wait for the others.",
  lower_bound=0,
)
_HANG = flags.DEFINE_float(
  "hang_timeout",
  None,
  "Seconds without a step after which all stacks are written; 0 never. "
  "Default: 600 with several processes, else never.",
  lower_bound=0,
)


def main() -> int:
  # ------------------------------------------------------------------ configuration
  config = cli.get_config()
  if not flags.FLAGS.workdir:
    raise UserError("--workdir is missing: give the directory of the run.")
  workdir = pathlib.Path(flags.FLAGS.workdir)

  # ------------------------------------------------------------------------ devices
  # After the configuration: a mistake there should not cost the import of jax.
  from moejax.parallel import distributed
  from moejax.train import provenance

  place = (_ADDRESS.value, _COUNT.value, _INDEX.value)
  facts = provenance.facts(config)
  facts |= {"--workdir": str(workdir), "--init_from": _INIT_FROM.value}
  with distributed.joined(*place, facts=facts, timeout=_JOIN.value):
    return train(config, workdir)


def train(config: Config, workdir: pathlib.Path) -> int:
  import jax

  from moejax.parallel import hang, host_memory

  host_memory.keep_freed_pages()

  # ----------------------------------------------------------------------- training
  from moejax.train import loop, step_log

  patience = _HANG.value
  if patience is None:
    patience = hang.DEFAULT_SECONDS if jax.process_count() > 1 else 0.0
  try:
    with hang.reported(patience, f"process {jax.process_index()}"):
      result = loop.train(config, workdir, init_from=_INIT_FROM.value)
  except step_log.TrainingStopped as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return result["exit_code"]


if __name__ == "__main__":
  cli.define_config()
  cli.run(main)
