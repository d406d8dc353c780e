"""Show what is in a checkpoint: the tree, a fingerprint per expert, one SHA-256.

  python -m tools.inspect_checkpoint --workdir=DIR [--step=N] [--json]

Prints every array with shape, dtype and the sharding it was saved with; for each layer
one fingerprint per expert, over all its matrices, equal for equal experts at any
position; and a line `sha256 <hex>` over all parameters and optimizer state in a fixed
order, equal exactly when they are bit-identical. Also verifies the arrays: exit code 1
if they differ from what was saved.
"""

import json

from absl import flags

from moejax.cli import flags as cli


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Directory of the run.")
  flags.DEFINE_integer(
    "step", None, "Which checkpoint; the newest if not given.", lower_bound=0
  )
  flags.DEFINE_bool("json", False, "Print one JSON object, with config and meta.")


def main() -> int:
  values = flags.FLAGS.flag_values_dict()
  cli.run_location()
  from moejax.checkpoint.inspect import inspect, render

  report = inspect(values["workdir"], values["step"])
  print(json.dumps(report, sort_keys=True) if values["json"] else render(report))
  return 1 if report["damage"] else 0


def run() -> None:
  """Runs the program."""
  define_flags()
  cli.run(main, buckets=("workdir",))


if __name__ == "__main__":
  run()
