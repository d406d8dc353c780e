"""What is in a checkpoint: the tree, a fingerprint per expert, one SHA-256 of it all.

  python -m tools.inspect_checkpoint --workdir=DIR [--step=N] [--json]

Prints every array with shape, dtype and the sharding it was saved under; for each
layer one fingerprint per expert, over all the expert's matrices, equal for equal
experts wherever they stand; and a line `sha256 <hex>` over all parameters and
optimizer state in a fixed order, equal exactly when they are bit-identical.
The arrays are verified on the way: exit code 1 if they are not what was saved.
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
  cli.run_directory()
  from moejax.checkpoint.inspect import inspect, render

  report = inspect(values["workdir"], values["step"])
  print(json.dumps(report, sort_keys=True) if values["json"] else render(report))
  return 1 if report["damage"] else 0


def run() -> None:
  """The program, from its command line."""
  define_flags()
  cli.run(main)


if __name__ == "__main__":
  run()
