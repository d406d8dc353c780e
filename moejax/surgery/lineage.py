"""The origin of a run's experts: a record of each operation, with fingerprints.

A run's run.json and its first checkpoint's meta hold the records of all operations up to
this run, oldest first, so that no other directory is needed. An expert's fingerprint is
that of `moejax.checkpoint.inspect`: equal for equal experts, in any position, layer or
run.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax import files
from moejax.checkpoint.inspect import expert_fingerprints
from moejax.errors import UserError, program
from moejax.run import provenance
from moejax.run import workdir as workdir_lib
from moejax.surgery.operation import Choice
from moejax.surgery.where import Where

KEY = workdir_lib.RECORDS
"""In run.json and in a checkpoint's meta: a list of records."""

Record = dict[str, Any]
"""JSON: operation, options, source, expected, loss, and for each layer the fingerprints
of its experts before and after, and what each is made of."""


def fingerprints(leaves: Mapping[str, Any], layers: Sequence[Where]) -> dict[int, Any]:
  """Returns the fingerprint of every expert, by the number of its layer.

  Args:
    leaves: of a checkpoint's meta.
    layers: where each layer is.
  """
  found, out = expert_fingerprints(dict(leaves)), {}
  for number, where in enumerate(layers):
    name = f"params.{where.block}.moe.experts"
    if where.repeat is not None:
      name += f".{where.repeat}"
    if name in found:
      out[number] = found[name]
  return out


def record(
  operation: str,
  options: Mapping[str, Any],
  source: Path,
  step: int,
  seed: int,
  *,
  others: Sequence[tuple[Path, int]] = (),
) -> Record:
  """Returns a record without experts; `others` are additional runs that were read."""
  sources = [
    {"workdir": str(path.resolve()), "step": at} for path, at in ((source, step), *others)
  ]
  return {
    "operation": operation,
    "options": dict(options),
    "source": sources[0],
    **({"sources": sources} if others else {}),
    "seed": seed,
    "versions": provenance.versions(),
    "revision": provenance.revision(),
  }


def of_layers(
  choices: Mapping[int, Choice],
  before: Mapping[int, list[str]],
  after: Mapping[int, list[str]],
) -> dict[str, Any]:
  """Returns the experts of a record, by the number of their layer."""
  out = {}
  for number, choice in choices.items():
    made = choice.made or ["new"] * len(choice.parents)
    out[str(number)] = {
      "parents": [list(map(int, parents)) for parents in choice.parents],
      "made": [None if parents else what for parents, what in zip(choice.parents, made)],
      "before": before.get(number, []),
      "after": after.get(number, []),
      "scale": float(choice.scale),
    }
  return out


def chain(workdir: Path, meta: Mapping[str, Any] | None = None) -> list[Record]:
  """Returns the records of a run, oldest first.

  Args:
    workdir: of the run.
    meta: of its checkpoint, used if run.json has no records.
  """
  found: Any = None
  with contextlib.suppress(OSError, ValueError):
    found = files.read_json(workdir / workdir_lib.RUN_FILE)
  records = found.get(KEY) if isinstance(found, dict) else None
  if records is None and meta is not None:
    records = meta.get(KEY)
  return list(records) if isinstance(records, list) else []


def ancestors(
  records: Sequence[Record], layer: int, expert: int
) -> list[tuple[str, list[str]]]:
  """Returns the ancestors of an expert, latest operation first.

  Args:
    records: of the run, oldest first.
    layer: number of its layer.
    expert: its index in that layer.

  Returns:
    For each operation, the source in words and the experts there that it was made from.
  """
  now, out = [expert], []
  for entry in reversed(records):
    of_layer = entry["layers"].get(str(layer))
    if of_layer is None:
      break
    before: list[int] = []
    words: list[str] = []
    for index in now:
      parents = of_layer["parents"][index]
      if not parents:
        words.append(of_layer["made"][index] or "new")
      before += [p for p in parents if p not in before]
    prints = of_layer["before"]
    words += [f"expert {p} ({prints[p]})" if prints else f"expert {p}" for p in before]
    source = f"{entry['source']['workdir']}, step {entry['source']['step']}"
    if "sources" in entry and not before:  # each expert names its own
      source = f"{len(entry['sources'])} runs"
    out.append((f"{entry['operation']} of {source}", words))
    now = before
    if not now:
      break
  return out


def render(
  workdir: Path, meta: Mapping[str, Any], now: Mapping[int, list[str]]
) -> list[str]:
  """Returns a run's lineage as lines.

  Args:
    workdir: of the run.
    meta: of its checkpoint.
    now: fingerprints of its experts, by layer.

  Raises:
    UserError: no operation is recorded.
  """
  records = chain(workdir, meta)
  if not records:
    raise UserError(
      f"--workdir={workdir} records no operation: it was trained or converted as it is. "
      f"Give a run that {program('surgery', 'tools.surgery')} made, or one that started "
      "from such a run."
    )
  lines = []
  for number, prints in sorted(now.items()):
    made = records[-1]["layers"].get(str(number), {}).get("after", [])
    lines.append(f"layer {number}")
    for expert, value in enumerate(prints):
      same = expert < len(made) and made[expert] == value
      lines.append(f"  expert {expert}  {value}{'' if same else '  trained since'}")
      for source, words in ancestors(records, number, expert):
        lines.append(f"    {', '.join(words)}: {source}")
  return lines
