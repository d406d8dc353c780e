"""Change the experts of a run: upcycle, clone, split, merge, prune, add and more.

  python -m tools.surgery OPERATION --workdir=RUN --output=NEW [--dry_run]
    [--optimizer=reset|keep|broadcast] [--config.SECTION.FIELD=VALUE] [options]
  python -m tools.surgery lineage --workdir=RUN

Makes the directory of a new run, which every other program accepts; the source is only
read.
Prints, layer by layer, what the experts are made of, and the loss on the validation split
before and after, with what is expected of it: equal, close, or worse until
trained. --dry_run prints what would change and writes nothing.

With --optimizer=reset the new run holds parameters only, and training starts with
--init_from=NEW. With keep or broadcast, the optimizer's moments go through the same
operation, and training goes on in NEW.

`python -m tools.surgery OPERATION --help` shows an operation's options; docs/surgery.md
says which operation is for which aim.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.cli import help
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError, did_you_mean
from moejax.options import options_of, show
from moejax.run import compilation_cache
from moejax.surgery import registry

LINEAGE = "lineage"

_USAGE = """python -m tools.surgery OPERATION --workdir=RUN --output=NEW [--FLAG=VALUE]

docs/surgery.md says what all operations have in common."""

_chosen: list[str] = []
"""The operation on this command line."""


def define_flags(name: str) -> None:
  """Defines the flags of an operation."""
  flags.DEFINE_integer("step", None, "Checkpoint; default: the newest.", lower_bound=0)
  if name == LINEAGE:
    return
  flags.DEFINE_string("output", None, "New directory for the new run.")
  flags.DEFINE_bool("dry_run", False, "Print what would change and write nothing.")
  flags.DEFINE_enum(
    "optimizer",
    "reset",
    ["reset", "keep", "broadcast"],
    "The optimizer's state: none, kept, or also copied to experts made of dense layers.",
  )
  flags.DEFINE_integer("seed", 0, "Random seed of the operation.", lower_bound=0)
  flags.DEFINE_bool("evaluate", True, "Print the loss before and after.")
  flags.DEFINE_enum(
    "split",
    "validation",
    ["train", "validation", "test"],
    "Split on which the loss is measured.",
  )
  flags.DEFINE_enum(
    "measure_split",
    "train",
    ["train", "validation", "test"],
    "Split on which experts are measured, where the operation needs it.",
  )
  flags.DEFINE_integer(
    "max_batches", 16, "Batches per measurement; 0 means all.", lower_bound=0
  )
  flags.DEFINE_integer(
    "batch_size", None, "Sequences per batch; default: a microbatch.", lower_bound=1
  )
  for option, about in options_of(registry.operation(name)).items():
    words = f" One of {', '.join(about.choices)}." if about.choices else ""
    define = flags.DEFINE_bool if about.kind is bool else flags.DEFINE_string
    define(option, None, f"{about.text}.{words} (default: {show(about.default)})")


def main() -> int:
  name = _chosen[0]
  workdir = cli.run_directory()
  if name == LINEAGE:
    return lineage(workdir)
  values = flags.FLAGS.flag_values_dict()
  if not values["output"] and not values["dry_run"]:
    raise UserError("--output=DIR is missing: give the directory of the new run.")
  operation = _make(name, values)
  from moejax.surgery import program

  asked = program.Asked(
    workdir=workdir,
    output=pathlib.Path(values["output"]) if values["output"] else None,
    operation=operation,
    options={
      option: getattr(operation, option) for option in options_of(type(operation))
    },
    optimizer=values["optimizer"],
    step=values["step"],
    seed=values["seed"],
    dry_run=values["dry_run"],
    evaluate=values["evaluate"],
    split=values["split"],
    measure_split=values["measure_split"],
    max_batches=values["max_batches"],
    batch_size=values["batch_size"] or 0,
    given=tuple(cli.overrides()),
  )
  program.run(asked, _new_config, print)
  return 0


def _make(name: str, values: dict[str, Any]) -> Any:
  """Returns the operation with its options."""
  cls, given = registry.operation(name), {}
  for option, about in options_of(cls).items():
    if values[option] is not None:
      given[option] = about.parse(f"--{option}", str(values[option]))
      about.check(f"--{option}", given[option])
  return cls(**given)


def _new_config(operation: Any, old: Config) -> Config:
  """Returns the validated config of the new run, with the flags of this command line.

  Raises:
    ConfigError: a flag sets a field that the operation sets or keeps.
  """
  asked = cli.get_unchecked_config(base=old)
  made = operation.new_config(old, asked)
  for field in cli.overrides():
    if field.startswith(("data.tokenizer", "data.vocab_size", "data.num_sentinels")):
      raise ConfigError(f"--config.{field}: the run keeps its tokenizer. Leave it out.")
    if config_text.is_router_option(field):
      continue
    value = config_text.get_field(made, field)
    if value != config_text.get_field(asked, field):
      raise ConfigError(
        f"--config.{field}: the operation {operation.name} makes it {show(value)}. Leave "
        "the flag out."
      )
  return cli.get_config(base=made)


def lineage(workdir: pathlib.Path) -> int:
  """Prints the origin of a run's experts."""
  from moejax.surgery import lineage as lib
  from moejax.surgery.source import open_run
  from moejax.surgery.where import layers_of

  source = open_run(workdir, flags.FLAGS.step)
  prints = lib.fingerprints(source.slices.leaves, layers_of(source.model))
  for line in lib.render(workdir, source.slices.meta, prints):
    print(line)
  return 0


def overview() -> str:
  """Returns the program's docstring with its operations, one line each."""
  rows = []
  for name in registry.OPERATIONS:
    rows.append(f"  {name:10}{registry.operation(name).summary}")
  rows.append(f"  {LINEAGE:10}print where the experts of a run come from")
  about = help.as_called_here((__doc__ or "").strip())
  return "\n".join([about, "", "Operations:", *rows])


def _operation() -> str:
  """Removes the operation from the command line, and returns it.

  Raises:
    SystemExit: there is no operation, or it is unknown.
  """
  names = [*registry.OPERATIONS, LINEAGE]
  words = sys.argv[1:]
  if not words or words[0].lstrip("-") in ("help", "h"):
    print(overview())
    sys.exit(0)
  name = words[0]
  if name not in names:
    if name.startswith("-"):
      known = ", ".join(names)
      problem = f"give the operation first, before all flags. It is one of {known}."
    else:
      problem = f"{name}: there is no such operation. {did_you_mean(name, names)}"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(UserError.exit_code)
  sys.argv[1:2] = []
  return name


def run() -> None:
  """Runs the program."""
  name = _operation()
  _chosen[:] = [name]
  if name != LINEAGE and any(word.lstrip("-") in ("help", "h") for word in sys.argv):
    about = sys.modules[registry.operation(name).__module__].__doc__ or ""
    sys.modules[main.__module__].__doc__ = f"{about.strip()}\n\n{_USAGE}"
  cli.define_config(default=None)
  define_flags(name)
  compilation_cache.define_flag()
  cli.run(main)


if __name__ == "__main__":
  run()
