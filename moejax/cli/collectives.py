"""What a train step sends between devices, on a mesh that need not exist.

  python -m tools.collectives --config=configs/default.py --devices=8 \\
      --config.mesh.expert=4 [--json]

Compiles the train step for that many fake CPU devices, without data or parameters, and
prints each collective: how often it runs in a step, the mesh axes, its buffer and what a
device sends, the line of moejax it comes from, and what it is for. Exit code 1 if the
program has an unintended one.
"""

import json

from absl import flags
from rich.console import Console

from moejax.cli import flags as cli
from moejax.cli.collective_table import make_table
from moejax.config import Config

_DEVICES = flags.DEFINE_integer(
  "devices", 8, "Number of fake devices.", lower_bound=1, upper_bound=4096
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")

_TABLE_WIDTH = 150


def compile_step(config: Config, devices: int) -> tuple[str, tuple[int, ...]]:
  """Returns the optimised program of a train step, and the sizes of the mesh's axes.

  Raises:
    ConfigError: the config does not fit this number of devices.
  """
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)

  from moejax.plan import compile as plan_compile

  step = plan_compile.compile_step(config, jax.devices())
  return step.compiled.as_text(), step.mesh.devices.shape


def main() -> int:
  config = cli.get_config()
  text, sizes = compile_step(config, _DEVICES.value)

  from moejax.hlo import traffic

  rows = traffic.rows_of(config, text, sizes, platform="cpu")
  if _JSON.value:
    print(json.dumps(rows, indent=1))
  else:
    console = Console()
    console = console if console.is_terminal else Console(width=_TABLE_WIDTH)
    console.print(make_table(rows))
    console.print("Bytes are those of one device; sent/step is over all its executions.")
  return int(any(not row["purpose"] for row in rows))


def run() -> None:
  """Runs the program on the command line's arguments."""
  cli.define_config(workdir=False)
  cli.run(main)
