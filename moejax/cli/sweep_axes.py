"""Flags given with a sweep's file: the axes they replace, and flags without effect."""

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.cli import flags as cli
from moejax.errors import ConfigError
from moejax.sweep.spec import TOKENS_FIELD, Axis, Spec

_MOST_SEEDS = 100_000


def joined(
  own: Sequence[Axis], given: Sequence[Axis], typed: Mapping[str, str]
) -> tuple[Axis, ...]:
  """Returns a file's axes with those of flags, which replace the axes of their fields.

  Args:
    own: axes of the file.
    given: axes from flags.
    typed: the flag of each field of `given`.

  Raises:
    ConfigError: an axis of the file has more fields, which would be lost.
  """
  axes = list(own)
  for new in given:
    old = [axis for axis in axes if set(axis.fields) & set(new.fields)]
    for axis in old:
      if others := [field for field in axis.fields if field not in new.fields]:
        field = next(field for field in new.fields if field in axis.fields)
        whole = " ".join(f"--zip.{field}=..." for field in axis.fields)
        raise ConfigError(
          f"{typed[field]}: in the file of --spec this field varies together with "
          f"{', '.join(others)}. Replace all of them, by {whole}, or change the file."
        )
    at = axes.index(old[0]) if old else len(axes)
    axes[at : at + bool(old)] = [new]
    axes = [axis for axis in axes if axis not in old[1:]]
  return tuple(axes)


def seeds(text: str) -> tuple[int, ...]:
  """Returns the seeds of --seeds: `3` means 0, 1, 2, and `0,1,5` these three.

  Args:
    text: value of the flag.

  Raises:
    ConfigError: it is neither.
  """
  words = text.split(",")
  try:
    found = tuple(int(word) for word in words)
  except ValueError:
    found = ()
  if found and len(found) > 1 and min(found) >= 0:
    return found
  if len(found) == 1 and 1 <= found[0] <= _MOST_SEEDS:
    return tuple(range(found[0]))
  raise ConfigError(
    f"--seeds={text}: give a number of seeds from 1 to {_MOST_SEEDS:,} (3 is 0, 1, "
    "2), or a list of two or more, such as 0,1,5. A single seed is given by "
    "--config.train.seed=5."
  )


def refuse_overridden(spec: Spec, overrides: Mapping[str, Any]) -> None:
  """Rejects a --config flag for a field that every point overrides.

  With --match, points are still compared with the base config.

  Args:
    spec: specification with the flags of this command line.
    overrides: fields given by --config flags, with their values.

  Raises:
    ConfigError: names the flag and the remedy.
  """
  by_axis = {field for axis in spec.axes for field in axis.fields if not spec.match}
  settings = [set(fields) for fields in spec.variants.values()]
  by_variants = set.intersection(*settings) if settings and not spec.match else set()
  for field, value in overrides.items():
    if spec.isoflop and field == TOKENS_FIELD:
      raise ConfigError(
        f"--config.{field}={cli.spelled(value)} changes nothing: --isoflop solves this "
        "field for each budget. Drop one of them."
      )
    if field in by_axis:
      who, remedy = "an axis", "replace the axis"
    elif field in by_variants:
      who, remedy = "every variant", "change the variants"
    else:
      continue
    raise ConfigError(
      f"--config.{field}={cli.spelled(value)} changes nothing: {who} of this sweep sets "
      f"the field. Leave it out, or {remedy}."
    )
