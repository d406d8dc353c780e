r"""Train a sparse Mixture-of-Experts language model, or resume its training.

  python -m experiments.train --config=configs/default.py --workdir=runs/default \
    --config.moe.num_experts=16 --config.moe.capacity_factor=1.5

The same command resumes a stopped run and reports a finished one. A larger
--config.train.num_steps extends a finished run. SIGTERM or Ctrl-C saves a checkpoint
and exits (a second Ctrl-C exits at once).

Exit codes: 0 done, 1 stopped because of non-finite losses, 2 invalid input, 143 and 130
stopped by SIGTERM and Ctrl-C with everything saved. With several processes also: 3
another process was lost, 4 the processes were started differently.
"""

import pathlib
import signal
import sys
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.cli import startup
from moejax.config import Config
from moejax.errors import UserError
from moejax.launch import meeting
from moejax.run import compilation_cache, emergency_dir
from moejax.storage import errors as storage_errors
from moejax.storage.paths import RunPath, in_bucket, run_path

_SHOWN = 5
"""Number of overrides named in the first line."""
_DAYS = 30 * 86_400.0

_INIT_FROM = flags.DEFINE_string(
  "init_from", "", "Directory of a run whose parameters a new run starts from."
)
_ADDRESS = flags.DEFINE_string(
  "coordinator_address", "", "With several processes: host:port of process 0."
)
_COUNT = flags.DEFINE_integer(
  "num_processes",
  None,
  "With several processes: their number.",
  lower_bound=1,
  upper_bound=65_536,
)
_INDEX = flags.DEFINE_integer(
  "process_id",
  None,
  "With several processes: the index of this one.",
  lower_bound=0,
  upper_bound=65_535,
)
_JOIN = flags.DEFINE_float(
  "join_timeout",
  meeting.JOIN_SECONDS,
  "With several processes: seconds to wait for the others.",
  lower_bound=0,
  upper_bound=_DAYS,
)
_HANG = flags.DEFINE_float(
  "hang_timeout",
  None,
  "Seconds without a step after which all stacks are written; 0 means never. Default: "
  "600 with several processes, else never.",
  lower_bound=0,
  upper_bound=_DAYS,
)
_IGNORE_MEMORY = flags.DEFINE_bool(
  "ignore_memory",
  False,
  "Start even if the run's shapes show that it cannot fit into memory.",
)
_EMERGENCY_DIR = flags.DEFINE_string(
  "emergency_local_dir",
  "",
  "Directory on a disk of this machine for frequent checkpoints between those of "
  "--workdir; a restart uses the newest of the two.",
)
_EMERGENCY_EVERY = flags.DEFINE_integer(
  "emergency_every",
  None,
  "Steps between checkpoints in --emergency_local_dir; 0 writes none. Default: "
  f"{emergency_dir.DEFAULT_EVERY}.",
  lower_bound=0,
  upper_bound=2**31 - 1,
)
_ANALYZE = flags.DEFINE_bool(
  "analyze", False, "After the last step, write DIR/analysis: what the routers do."
)


def main() -> int:
  # ------------------------------------------------------------------ configuration
  if not flags.FLAGS.workdir:
    raise UserError("--workdir=DIR is missing: give the directory of the run.")
  workdir = run_path(flags.FLAGS.workdir)
  config = cli.get_config(announce=_announce)
  storage_errors.reach(workdir)
  if in_bucket(_INIT_FROM.value):
    storage_errors.reach(run_path(_INIT_FROM.value, "--init_from"), "--init_from")
  if _ANALYZE.value and in_bucket(workdir):
    raise UserError(
      f"--analyze: results cannot be written to a bucket ({workdir}). Leave it out."
    )
  emergency = _emergency(workdir)

  # ------------------------------------------------------------------------ devices
  # After the configuration, so that a mistake there does not cost the import of jax.
  from moejax.launch import distributed
  from moejax.run import provenance

  place = (_ADDRESS.value, _COUNT.value, _INDEX.value)
  facts = provenance.facts(config)
  facts |= {"--workdir": str(workdir), "--init_from": _INIT_FROM.value}
  if emergency is not None:  # Each machine may have its own directory.
    facts["--emergency_every"] = emergency.every
  with distributed.joined(*place, facts=facts, timeout=_JOIN.value):
    return train(config, workdir, emergency)


def _emergency(workdir: RunPath) -> emergency_dir.Wish | None:
  """Returns the emergency checkpoints that the flags ask for.

  Raises:
    UserError: the directory cannot be used, or is missing.
  """
  directory, every = _EMERGENCY_DIR.value, _EMERGENCY_EVERY.value
  if not directory:
    if every:
      raise UserError(
        f"--emergency_every={every} needs --emergency_local_dir=DIR, on a disk of this "
        "machine. Give both or none."
      )
    return None
  if every == 0:
    return None
  emergency_dir.check(directory, workdir)
  every = every or emergency_dir.DEFAULT_EVERY
  return emergency_dir.Wish(directory=directory, every=every)


def _announce() -> None:
  """Prints the first line, before imports that take seconds."""
  changed = [f"{name}={value}" for name, value in cli.overrides().items()]
  if len(changed) > _SHOWN:
    changed[_SHOWN:] = [f"{len(changed) - _SHOWN} more"]
  text = f"Training {flags.FLAGS.config} in {flags.FLAGS.workdir}"
  startup.announce(
    text + (f" with {', '.join(changed)}" if changed else "") + ".", _INDEX.value
  )


def train(
  config: Config, workdir: RunPath, emergency: emergency_dir.Wish | None = None
) -> int:
  import jax

  from moejax.launch import hang, host_memory

  host_memory.keep_freed_pages()
  compilation_cache.enable(config.data.cache_dir)

  # ----------------------------------------------------------------------- training
  from moejax.train import loop, step_log

  if _ANALYZE.value:
    _check_analysis(config)
  patience = _HANG.value
  if patience is None:
    patience = hang.DEFAULT_SECONDS if jax.process_count() > 1 else 0.0
  try:
    with hang.reported(patience, f"process {jax.process_index()}"):
      result = loop.train(
        config,
        workdir,
        init_from=_INIT_FROM.value,
        ignore_memory=_IGNORE_MEMORY.value,
        config_flags=cli.config_flags(),
        emergency=emergency,
      )
      if result["exit_code"]:
        # Another SIGTERM, of a launcher beside the scheduler, must not replace the code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
      elif _ANALYZE.value:
        _analyze(config, workdir, result)
  except step_log.TrainingStopped as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return result["exit_code"]


def _check_analysis(config: Config) -> None:
  """Refuses, before training, a model that could not be analyzed after it.

  Raises:
    UserError: no MoE layer.
  """
  from moejax.models.make import make_model

  # Which layers have experts does not depend on the vocabulary.
  if not make_model(config.model, config.moe, vocab_size=1).moe_layers:
    raise UserError("--analyze: this model has no MoE layer. Leave it out.")


def _analyze(config: Config, workdir: RunPath, result: dict[str, Any]) -> None:
  """Analyzes the last checkpoint on about as much text as the final evaluation read."""
  from moejax.cli import analysis_passes, restored
  from moejax.config.spans import target_length

  evaluated, limit = result.get("tokens", 0), 0
  if evaluated < result.get("split_tokens", 0):
    limit = -(-evaluated // (config.train.batch_size * target_length(config.data)))
  request = restored.Request(
    workdir=workdir,
    steps=None,
    split="validation" if evaluated else "train",
    text=None,
    batch_size=config.train.batch_size,
  )
  analysis_passes.analyze(
    request, restored.Asked(out=pathlib.Path(workdir) / restored.ANALYSIS, limit=limit)
  )


def run() -> None:
  """Runs the program."""
  cli.define_config()
  compilation_cache.define_flag()
  cli.run(main, buckets=("workdir", "init_from", "emergency_local_dir"))


if __name__ == "__main__":
  run()
