"""Applies an operation to a run's directory: check, choose, write, record the origin.

The source is only read. The new directory is made next to its final place, under a name
that no program takes for a run, and is renamed when it is complete. Arrays are read and
made one layer at a time, so the host holds only one matrix of one layer's experts, old
and new, whatever mesh the source was saved on. The result can be restored on any mesh.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax import files
from moejax.checkpoint import lazy
from moejax.checkpoint.read import DamagedCheckpointError
from moejax.config import Config
from moejax.config import text as config_text
from moejax.data.tokenizer import FILE as TOKENIZER_FILE
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.models.decoder import TABLE
from moejax.run import owner, provenance
from moejax.run import workdir as workdir_lib
from moejax.run.files import CONFIG_FILE, DIRECTORY
from moejax.surgery import lineage, state
from moejax.surgery.change import Arrays, Change, new_table, router_arrays
from moejax.surgery.gates import Gates, gates
from moejax.surgery.measured import Measured
from moejax.surgery.operation import (
  CLOSE,
  DROP,
  EQUAL,
  ROUTER,
  Choice,
  Operation,
  Source,
)
from moejax.surgery.source import Opened, damaged

_PARTIAL = ".partial"
_CONVERTED = "converted_from"
"""In a checkpoint's meta, of a model that was imported; see `interop.importing`."""
_ROUNDING = 1e-5


def make_change(
  source: Opened, operation: Operation, new: Config, seed: int = 0
) -> Change:
  """Returns the change that an operation makes, after all checks.

  Args:
    source: the run with the old arrays.
    operation: checked against the old config.
    new: validated config of the new run.
    seed: seed of all random draws.

  Raises:
    ConfigError: the flags change more than the operation does.
  """
  change = Change(
    operation=operation,
    old=source.config,
    new=new,
    old_model=source.model,
    new_model=groups.make_model(new, source.vocab_size),
    seed=seed,
  )
  change.check()
  return change


def choose(change: Change, arrays: Arrays, measured: Measured) -> dict[int, Choice]:
  """Returns what the new experts of each layer are made from, with the scale of outputs.

  Args:
    change: the operation's change.
    arrays: the arrays of the old run.
    measured: measurements over a text, or without one.
  """
  layers = {n: change.layer(n, arrays) for n in change.made}
  has_table = bool(change.old_model.moe_layers) and change.old_model.router.has_table
  choices = change.operation.choose(
    Source(
      layers=layers,
      measured=measured,
      same_in_all=has_table or change.new_model.router.has_table,
      seed=change.seed,
    )
  )
  scaled = {}
  for number, choice in choices.items():
    found = seen_gates(change, arrays, number, choice)
    scale = snapped(change.operation.scale(found, choice))
    scaled[number] = dataclasses.replace(choice, scale=scale)
  return scaled


def snapped(scale: float) -> float:
  """Returns a scale, made an exact integer or the inverse of one if it is nearly so."""
  for value in (float(round(scale)), 1.0 / max(round(1.0 / scale), 1) if scale else 0.0):
    if abs(value - scale) <= _ROUNDING * abs(scale):
      return value
  return scale


def seen_gates(change: Change, arrays: Arrays, number: int, choice: Choice) -> Gates:
  """Returns the gates of a layer's router on random tokens, before and after."""
  layer = change.layer(number, arrays, choice)
  old = {
    name.removeprefix(ROUTER): layer.arrays[name]
    for name in layer.arrays
    if name.startswith(ROUTER)
  }
  before = after = None
  width, table = layer.width, None
  if arrays.names(f"params.{TABLE}"):
    # Stored in floats.
    table = arrays.read(f"params.{TABLE}").astype(np.int32)
  if old:
    before = gates(layer.old, width, old, table)
  if change.new_model.router.has_table:
    selected = layer.new.fine_selected
    if table is None:
      table = new_table(change.new_model)
    else:
      table = change.operation.table(table, choice, selected)
  else:
    table = None
  after = gates(layer.new, width, router_arrays(change.operation, layer), table)
  return Gates(moe=layer.new, before=before, after=after)


def expectation(change: Change, arrays: Arrays, choices: Mapping[int, Choice]) -> str:
  """Returns what is expected of the loss: the worst of all layers."""
  found = {
    change.operation.expected(seen_gates(change, arrays, number, choice), choice)
    for number, choice in choices.items()
  }
  return next((worst for worst in (DROP, CLOSE) if worst in found), EQUAL)


def refuse_output(output: Path, sources: Sequence[Path] = ()) -> None:
  """Rejects a directory that exists, is part of a source or cannot be made.

  Args:
    output: the new directory.
    sources: directories of the runs that are read.

  Raises:
    UserError: it is rejected; the message names the directory.
  """
  for source in sources:
    if output.resolve().is_relative_to(source.resolve()):
      raise UserError(
        f"--output={output} is inside {source}, which is only read. Choose a directory "
        "outside it."
      )
  try:
    if output.exists() or output.is_symlink():
      raise UserError(f"--output={output} exists already. Choose a new directory.")
    _partial(output).exists()  # An error if the name is too long.
    parent = output.absolute().parent
    while not (parent.exists() or parent.is_symlink()):
      parent = parent.parent
    # Permissions alone are not enough on file systems such as /proc.
    Path(tempfile.mkdtemp(prefix=".", dir=parent)).rmdir()
  except OSError as e:
    raise UserError(
      f"--output={output} cannot be made ({e.strerror or e}). Choose a directory whose "
      "parent can be written to."
    ) from e


def _partial(output: Path) -> Path:
  """Returns the directory's name until it is complete."""
  return output.with_name(f".{output.name}{_PARTIAL}")


def verify(source: Opened, with_moments: bool) -> None:
  """Reads all arrays once, layer by layer, and compares them with their checksums.

  Raises:
    UserError: the source is damaged.
  """
  try:
    source.slices.verify("params.")
    if with_moments:
      source.slices.verify("opt_state.")
  except DamagedCheckpointError as e:
    raise damaged(f"--workdir={source.workdir}", source.step, e) from e


def write(
  change: Change,
  source: Opened,
  choices: Mapping[int, Choice],
  output: Path,
  *,
  record: lineage.Record,
  optimizer: str = state.RESET,
  finish: Callable[[Path], Mapping[str, Any]] | None = None,
) -> lineage.Record:
  """Writes the new run.

  Args:
    change: from `make_change`.
    source: the run with the old arrays.
    choices: from `choose`.
    output: the new directory; must not exist.
    record: the operation's record, without the experts' fingerprints.
    optimizer: what happens to the optimizer's state: one of `state.MODES`.
    finish: called with the directory while it has a temporary name; returns entries to
      add to the record.

  Returns:
    The record as it is stored.

  Raises:
    UserError: the directory exists, the disk is full, or the operation cannot change the
      optimizer state.
  """
  refuse_output(output)
  partial = _partial(output)
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    tokenizer = (source.workdir / TOKENIZER_FILE).parent
    if tokenizer.is_dir():
      shutil.copytree(tokenizer, (partial / TOKENIZER_FILE).parent)
    files.write_json(partial / CONFIG_FILE, config_text.to_dict(change.new))
    record = _write_checkpoint(change, source, choices, partial, record, optimizer)
    if finish is not None:
      record = record | dict(finish(partial))
    _write_run_file(source, partial, record)
    partial.rename(output)
  except OSError as e:
    raise UserError(
      f"--output={output} could not be written ({e.strerror or e}). Make room, or choose "
      "another directory."
    ) from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return record


def _write_checkpoint(
  change: Change,
  source: Opened,
  choices: Mapping[int, Choice],
  directory: Path,
  record: lineage.Record,
  optimizer: str,
) -> lineage.Record:
  meta, complete = source.slices.meta, dict(record)
  before = lineage.fingerprints(source.slices.leaves, change.old_layers)

  def describe(leaves: dict[str, Any]) -> dict[str, Any]:
    after = lineage.fingerprints(leaves, change.new_layers)
    complete["layers"] = lineage.of_layers(choices, before, after)
    return {lineage.KEY: [*lineage.chain(source.workdir, meta), complete]}

  metadata: dict[str, Any] = {
    n: meta.get(n) for n in ("dataset_fingerprint", "corpus_fingerprint")
  }
  if isinstance(converted := meta.get(_CONVERTED), dict):
    # Kept for exports; without the digest, it does not count as a conversion of that
    # model.
    kept = {n: converted[n] for n in ("folder", "kept") if n in converted}
    metadata[_CONVERTED] = kept
  if owner.is_own(change.old, meta.get("owner")):
    metadata["owner"] = owner.mark(change.new)
  goes_on = optimizer != state.RESET
  others = state.others(change, source.slices, choices, optimizer) if goes_on else None
  lazy.save(
    (directory / DIRECTORY).resolve(),
    source.step if goes_on else 0,
    change.arrays(source.slices, choices),
    config=change.new,
    metadata=metadata,
    logical_axes=change.new_model.logical_axes(),
    others=others,
    position=meta.get("position") if goes_on else None,
    describe=describe,
  )
  return complete


def _write_run_file(source: Opened, directory: Path, record: lineage.Record) -> None:
  meta = source.slices.meta
  files.write_json(
    directory / workdir_lib.RUN_FILE,
    {
      lineage.KEY: [*lineage.chain(source.workdir, meta), record],
      "dataset_fingerprint": meta.get("dataset_fingerprint"),
      "corpus_fingerprint": meta.get("corpus_fingerprint"),
      "mesh": None,
      "versions": provenance.versions(),
      "revision": provenance.revision(),
    },
  )
