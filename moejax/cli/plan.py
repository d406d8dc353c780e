"""Which machine, mesh and batch: predicts every way to train a config, prints the best.

  python -m tools.plan --config=configs/mixtral_8x7b.py --topology=v5p:4x4x8[,h100:8x8] \\
      [--slices=2] [--tokens=1e12] [--objective=cost --price=v5p:4.2,h100:3] \\
      [--top=10] [--confirm=3] [--json=FILE] [--map=FILE.png]

Tries meshes, microbatches, recomputation and exchanges; leaves out what a run would
refuse; predicts memory, FLOPs, traffic and time by formulas (docs/planning.md), in
seconds and without a compiler. --confirm compiles the best few. The global batch stays
that of the config. Exit code 2 if nothing fits; then it prints the nearest plan and how
much it lacks.
"""

import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console

from moejax import files
from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.errors import ConfigError, UserError, did_you_mean, program

if TYPE_CHECKING:
  from moejax.config import Config
  from moejax.plan.candidates import Candidate
  from moejax.plan.search import Plan
  from moejax.plan.topology import Topology

_WIDTH = 150
_MAP_ENDINGS = (".png", ".html")


def define_flags() -> None:
  flags.DEFINE_list(
    "topology", None, "Machines to compare: v5p:4x4x8, h100:8x8 (nodes x GPUs), ..."
  )
  flags.DEFINE_integer(
    "slices", 1, "Number of TPU slices of that shape.", lower_bound=1, upper_bound=4096
  )
  flags.DEFINE_float(
    "tokens",
    None,
    "Training tokens; default: those of the config's steps.",
    lower_bound=1,
  )
  flags.DEFINE_enum(
    "objective", "throughput", ("throughput", "cost"), "What plans are ranked by."
  )
  flags.DEFINE_list(
    "price", [], "Dollars per chip hour, by kind of chip: v5p:4.2,h100:3."
  )
  flags.DEFINE_integer(
    "top",
    10,
    "Number of plans to print, one per mesh; also each machine's best.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "confirm", 0, "Compile this many of the best plans, and compare.", lower_bound=0
  )
  flags.DEFINE_float("margin", 0.1, "Fraction of memory that must stay free.", 0.0, 0.9)
  flags.DEFINE_float(
    "efficiency", 0.6, "Fraction of a chip's peak at which products run.", 0.01, 1.0
  )
  flags.DEFINE_string("json", None, "Write the plans of all meshes to this file.")
  flags.DEFINE_string("map", None, "Draw throughput over meshes: a .png or .html.")


def machines(given: Sequence[str], slices: int = 1) -> "list[Topology]":
  """Returns the machines of --topology.

  Args:
    given: names such as v5p:4x4x8 and h100:8x8.
    slices: number of slices of each TPU topology.

  Raises:
    UserError: no machine is given, or one is unknown.
  """
  from moejax.plan import topology as topology_lib

  names = [name.strip() for name in given if name.strip()]
  if not names:
    raise UserError(
      "--topology is missing: the machines to compare, such as v5p:4x4x8,h100:8x8."
    )
  found = []
  for name in dict.fromkeys(names):
    is_gpu = name.partition(":")[0] in ("h100", "h200")
    found.append(topology_lib.parse(name, 1 if is_gpu else slices))
  return found


def prices(
  topologies: "list[Topology]", given: Sequence[str], *, needed: bool
) -> dict[str, float]:
  """Returns dollars per chip hour, by kind of chip.

  Args:
    topologies: the machines.
    given: prices such as v5p:4.2.
    needed: whether cost is compared.

  Raises:
    UserError: a price is invalid, belongs to no machine, or is missing although cost is
      compared.
  """
  kinds = {topology.kind for topology in topologies}
  found = {}
  for item in given:
    kind, colon, text = item.strip().partition(":")
    if not colon:
      example = "".join(sorted(kinds & {item.partition("=")[0]})) or min(kinds)
      raise UserError(f"--price={item}: give KIND:DOLLARS, such as {example}:4.2.")
    if kind not in kinds:
      raise UserError(f"--price={item}: {did_you_mean(kind, kinds)}")
    try:
      found[kind] = float(text)
    except ValueError:
      found[kind] = 0.0
    if not 0 < found[kind] < float("inf"):
      raise UserError(f"--price={item}: give dollars per chip hour, such as {kind}:4.2.")
  missing = sorted(kinds - found.keys())
  if needed and missing:
    raise UserError(
      f"--objective=cost needs a price of {', '.join(missing)}: "
      f"--price={missing[0]}:DOLLARS_PER_CHIP_HOUR."
    )
  return found


def check_outputs(json_file: str | None, map_file: str | None) -> None:
  """Rejects, before the search, files that cannot be written, and a --map of an unknown
  format."""
  if map_file and pathlib.Path(map_file).suffix not in _MAP_ENDINGS:
    raise ConfigError(f"--map={map_file}: give a file that ends in .png or .html.")
  for flag, path in (("--json", json_file), ("--map", map_file)):
    if path:
      arguments.writable_file(pathlib.Path(path), flag)


def commands(config: "Config", candidate: "Candidate") -> tuple[str, str]:
  """Returns two commands for a plan, with this command line's config and settings.

  Args:
    config: of this command line.
    candidate: of the plan.

  Returns:
    The command that trains it, and the one that makes a job for its machine.
  """
  from moejax.cost.chips import CHIPS
  from moejax.plan.candidates import changes

  given = flags.FLAGS["config"].value or cli.DEFAULT_CONFIG
  settings = cli.overrides() | changes(config, candidate)
  name = pathlib.Path(given).stem
  config_flag = f"--config={given}"
  own = [f"--config.{field}={cli.spelled(value)}" for field, value in settings.items()]
  train = [config_flag, f"--workdir=runs/{name}", *own]
  topology = candidate.topology
  launch = [f"--target=gke-{CHIPS[topology.kind].family}", f"--topology={topology}"]
  launch += [f"--slices={topology.slices}"] * (topology.slices > 1)
  launch += ["--image=IMAGE", config_flag, f"--workdir=/runs/{name}", *own]
  return (
    f"{program('train', 'experiments.train')} {shlex.join(train)}",
    f"{program('launch', 'tools.launch')} {shlex.join(launch)}",
  )


def main() -> int:
  given = flags.FLAGS
  topologies = machines(given.topology or (), given.slices)
  costs = prices(topologies, given.price, needed=given.objective == "cost")
  check_outputs(given.json, given.map)
  from moejax.plan import topology as topology_lib

  # Before anything imports jax. Only --confirm needs the compilers.
  topology_lib.use_no_device()
  if given.confirm:
    for topology in topologies:
      topology_lib.prepare(topology)
  config = cli.get_config()
  from moejax.plan import report, search

  found = search.search(
    config,
    topologies,
    prices=costs if given.objective == "cost" else None,
    margin=given.margin,
    efficiency=given.efficiency,
  )
  tokens = given.tokens or float(config.train.num_steps * found.plans[0].tokens)
  view = report.View(tokens=tokens, prices=costs, margin=given.margin)
  plans = found.best(given.top)
  console = Console()
  console = console if console.is_terminal else Console(width=_WIDTH)
  report.show(found, plans, view, console)
  _show_commands(config, found.best(min(3, given.top)), console)
  if given.map:
    from moejax.plan import throughput_map

    throughput_map.draw(found, given.map)
    console.print(f"Wrote {given.map}.", markup=False)
  confirmed = []
  if given.confirm:
    confirmed = _confirm(config, found.plans[: given.confirm], console)
  if given.json:
    values: dict[str, Any] = report.as_json(found, view)
    for kind in ("plans", "too_large"):
      for value, plan in zip(values[kind], getattr(found, kind), strict=True):
        value["command"], value["launch"] = commands(config, plan.candidate)
    if given.confirm:
      values["confirmed"] = confirmed
    files.write_text(given.json, json.dumps(values, indent=1) + "\n")
    console.print(f"Wrote {given.json}.", markup=False)
  return 0


def _show_commands(
  config: "Config", plans: "list[tuple[int, Plan]]", console: Console
) -> None:
  """Prints the commands to train plans, also as a job of a cluster."""
  for rank, plan in plans:
    train, _ = commands(config, plan.candidate)
    console.print(f"{rank}. {train}", markup=False, soft_wrap=True)
  best: "dict[Topology, Candidate]" = {}
  for _, plan in plans:
    best.setdefault(plan.candidate.topology, plan.candidate)
  for candidate in best.values():
    _, launch = commands(config, candidate)
    said = f"As a job on {candidate.topology.name} (docs/launching.md): {launch}"
    console.print(said, markup=False, soft_wrap=True)


def _confirm(config: Any, plans: list[Any], console: Console) -> list[dict[str, Any]]:
  """Compiles plans one after another, and prints each result at once."""
  from moejax.plan import confirm

  values = []
  for plan in plans:
    values.append(confirm.compare(config, plan))
    console.print(confirm.line(values[-1]), markup=False, soft_wrap=True)
  return values


def run() -> None:
  """Runs the program."""
  cli.define_config(workdir=False)
  define_flags()
  cli.run(main)


if __name__ == "__main__":
  run()
