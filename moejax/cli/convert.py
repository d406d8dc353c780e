"""Convert a published model into a run, or a run into a folder for Transformers.

  python -m experiments.convert --from_hf=DIR --workdir=RUN [--dry_run]
  python -m experiments.convert --from_hf=hf://org/name --workdir=RUN
  python -m experiments.convert --workdir=RUN --to_hf=DIR [--step=N] [--dry_run]

Import reads config.json, safetensors (sharded or not, bfloat16, FP8 or MXFP4) and
tokenizer.json, if there is one, and writes a run that the other programs take like any
other. Parameters are read one tensor at a time; with --config.mesh.expert=4 or another
mesh, straight into its shards. If a conversion is killed, run the same command again.
Export writes what `AutoModelForCausalLM.from_pretrained` loads, or says what
Transformers cannot represent.

Both print the architecture, the number of parameters (total and active) and a
fingerprint of each parameter. --dry_run writes nothing and prints the mapping, tensor by
tensor. docs/models.md lists the architectures.
"""

import pathlib
from typing import Any

from absl import flags

from moejax.cli import flags as cli
from moejax.config import Config
from moejax.errors import ConfigError, UserError


def define_flags() -> None:
  """Defines the program's flags, other than those of a config and a run."""
  text = flags.DEFINE_string
  text("from_hf", None, "Folder of a published model, or hf://org/name.")
  text("to_hf", None, "New folder to write a run's model to.")
  flags.DEFINE_bool("dry_run", False, "Only print what would be done, by tensor.")
  text(
    "architecture", None, "--to_hf: the model_type to write; default: the one that fits."
  )
  flags.DEFINE_integer(
    "step", None, "--to_hf: which checkpoint; default: the newest.", lower_bound=0
  )


def main() -> None:
  given = flags.FLAGS
  if (given.from_hf is None) == (given.to_hf is None):
    raise UserError("Give either --from_hf=DIR to import or --to_hf=DIR to export.")
  if given.to_hf is not None:
    export(
      cli.run_directory(),
      pathlib.Path(given.to_hf),
      step=given.step,
      architecture=given.architecture,
      dry_run=given.dry_run,
    )
    return
  if not given.workdir and not given.dry_run:
    raise UserError("--workdir=DIR is missing: give the directory of the new run.")
  if given.architecture is not None or given.step is not None:
    raise UserError("--architecture and --step belong to --to_hf. Leave them out.")
  import_(given.from_hf, given.workdir, dry_run=given.dry_run)


def import_(folder: str | None, workdir: str | None, *, dry_run: bool = False) -> None:
  """Imports a published model as a run."""
  from moejax.interop import importing, published

  found = published.open_folder(folder or "")
  config = _config(found.config)
  if dry_run:
    _print_rows(found.loader.rows)
    for name, reason in found.loader.left_out.items():
      print(f"{name}  left out: {reason}")
    _print_summary(found.architecture.name, config)
    return
  shardings = _shardings(config, found.model)
  run_directory = pathlib.Path(workdir or "")
  sums = importing.make_run(found, run_directory, config, shardings)
  for name, value in sums.items():
    print(f"{name}  {value}")
  left_out = sorted(set(found.loader.left_out.values()))
  for reason in left_out:
    names = [n for n, r in found.loader.left_out.items() if r == reason]
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    print(f"Left out ({reason}): {len(names)} tensors, {shown}")
  for remark in found.architecture.remarks(found.values):
    print(remark)
  if found.tokenizer is None:
    print(
      "The folder has no tokenizer.json: programs that read or write text will "
      "refuse the run."
    )
  _print_summary(found.architecture.name, config)
  print(f"{run_directory}")
  print(
    f"Fine-tune it with --config={run_directory}/config.json "
    f"--init_from={run_directory} --workdir=NEW."
  )


def export(
  workdir: pathlib.Path,
  folder: pathlib.Path,
  *,
  step: int | None = None,
  architecture: str | None = None,
  dry_run: bool = False,
) -> None:
  """Exports a run's model."""
  if folder.resolve().is_relative_to(workdir.resolve()):
    raise UserError(
      f"--to_hf={folder} is inside --workdir={workdir}, which is only read. Choose a "
      "folder outside it."
    )
  from moejax.checkpoint.manager import peek, restore_params
  from moejax.data.tokenizer import FILE, load_tokenizer
  from moejax.evaluate import groups
  from moejax.interop import exporting
  from moejax.interop.mapping import rows

  shapes, stored, _ = peek(workdir, step)
  config = _config(stored, allowed=("moe.eval_capacity_factor",))
  tokenizer = load_tokenizer(workdir) if (workdir / FILE).exists() else None
  vocab_size = config.model.vocab_size or int(shapes["embedding"]["table"].shape[0])
  if config.model.vocab_multiple > 1 and tokenizer and not config.model.vocab_size:
    vocab_size = tokenizer.vocab_size  # Additional rows are padding.
  model = groups.make_model(config, vocab_size)
  config.model.vocab_size = vocab_size
  found, _ = exporting.choose(config, architecture)
  if dry_run:
    _print_rows(rows(found, model))
    _print_summary(found.name, config)
    return
  params, _, meta = restore_params(workdir, step)
  exporting.export(
    config,
    model,
    params,
    folder,
    tokenizer=tokenizer,
    taken_along=workdir,
    name=found.name,
    kept=meta.get("converted_from", {}).get("kept"),
  )
  for name, leaf in meta["leaves"].items():
    if name.startswith("params."):
      print(f"{name.removeprefix('params.')}  {leaf['sum']}")
  _print_summary(found.name, config)
  print(folder)


def _config(own: Config, allowed: tuple[str, ...] = ()) -> Config:
  """Returns the config of the command line, which must describe the same model.

  Args:
    own: config of the model.
    allowed: fields of a model that may change.

  Raises:
    ConfigError: it describes another model.
  """
  from moejax.interop import canonical

  try:
    config = cli.get_config(base=own)
  except ConfigError:
    # Errors about how to specify another model would not help.
    asked = cli.get_unchecked_config(base=own)
    _refuse(canonical.changes(own, asked), allowed)
    raise
  found = canonical.differences(own, config)
  if own.model.vocab_multiple != config.model.vocab_multiple:
    found.append(("model.vocab_multiple", None, None))
  _refuse(found, allowed)
  return config


def _refuse(changes: list[tuple[str, Any, Any]], allowed: tuple[str, ...]) -> None:
  for name, _, _ in changes:
    if name not in allowed:
      raise ConfigError(
        f"--config.{name}: the stored model fixes this field. Leave it out: a conversion "
        "changes where and how it runs, not what it computes."
      )


def _shardings(config: Config, model: Any) -> Any:
  """Returns the shardings of the requested mesh; None if none was requested."""
  if not any(name.startswith("mesh.") for name in cli.overrides()):
    return None
  from moejax.models.placement import param_shardings
  from moejax.sharding.mesh import make_mesh

  return param_shardings(model, make_mesh(config.mesh))


def _print_rows(rows: Any) -> None:
  for row in rows:
    parts = ", ".join(
      p.leaf if p.repeat is None else f"{p.leaf}[{p.repeat}]" for p in row.parts
    )
    for number, (name, shape) in enumerate(row.tensors()):
      expert = f" expert {number}" if "{expert}" in row.theirs else ""
      ours = " + ".join(str(list(shape)) for shape in row.own_shapes)
      print(f"{name} {list(shape)} -> {parts}{expert} {ours}")


def _print_summary(architecture: str, config: Config) -> None:
  from moejax.cost.parameters import count_parameters, resolve_vocab_size

  total, active = count_parameters(config, resolve_vocab_size(config))
  print(
    f"{architecture}: {total['total']:,} parameters, {active['total']:,} active, in "
    f"{config.model.param_dtype}"
  )


def run() -> None:
  """Runs the program."""
  cli.define_config(default=None)
  define_flags()
  # hf:// is not a bucket, and `published` refuses the others.
  cli.run(main, buckets=("from_hf",))


if __name__ == "__main__":
  run()
