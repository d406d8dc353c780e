"""Checks a specification as a whole, before its points are made."""

from moejax.config import Config
from moejax.config import text as config_text
from moejax.config.check import validate_values
from moejax.errors import ConfigError
from moejax.sweep.points import axes as axes_lib
from moejax.sweep.points import budget
from moejax.sweep.points.axes import SEED
from moejax.sweep.points.combine import varied
from moejax.sweep.spec import TOKENS_FIELD, Axis, Spec

MAX_POINTS = 100_000
"""Most points of a sweep: more must be a mistake in the command line."""


def check_spec(spec: Spec) -> None:
  """Rejects a wrong specification; one made from flags has passed most checks already.

  Raises:
    ConfigError: names the flag or the part of the spec, and the remedy.
  """
  validate_values(spec.base)
  for check in (_check_axes, _check_variants, _check_numbers, _check_solved):
    check(spec)


def _check_axes(spec: Spec) -> None:
  seen: set[str] = set()
  size = 1
  for axis in spec.axes:
    size *= len(axis.values)
    for field in axis.fields:
      flag = f"--{axes_lib.ZIP if len(axis.fields) > 1 else axes_lib.SWEEP}.{field}"
      config_text.check_name(field, flag.removesuffix(field))
      axes_lib.check_varies(flag, field)
      if field in seen:
        raise ConfigError(f"{flag}: two axes vary this field. Join them, or drop one.")
      seen.add(field)
    if not axis.fields or not axis.values:
      what = ", ".join(axis.fields) or "of no field"
      raise ConfigError(f"the axis {what} has no values. Give at least one.")
    _check_values(axis)
  if size * len(spec.seeds) * max(len(spec.variants), 1) > MAX_POINTS:
    raise ConfigError(
      f"the sweep has more than {MAX_POINTS:,} points. Give fewer values or axes, or "
      "let fields vary together with --zip."
    )


def _flag(spec: Spec, field: str) -> str:
  """Returns the flag that varies a field of the spec."""
  zipped = {f for axis in spec.axes if len(axis.fields) > 1 for f in axis.fields}
  return f"--{axes_lib.ZIP if field in zipped else axes_lib.SWEEP}.{field}"


def _check_values(axis: Axis) -> None:
  for row in axis.values:
    if len(row) != len(axis.fields):
      raise ConfigError(
        f"the axis {', '.join(axis.fields)} has {len(axis.fields)} fields, and one of "
        f"its positions {len(row)} values. Give each field a value."
      )
    for field, value in zip(axis.fields, row):
      config_text.set_field(Config(), field, value)
      axes_lib.check_value(f"--{axes_lib.SWEEP}.{field}", field, value)


def _check_variants(spec: Spec) -> None:
  on_axes = {field for axis in spec.axes for field in axis.fields}
  for name, settings in spec.variants.items():
    for field, value in settings.items():
      config_text.check_name(field)
      what = f"variant {name!r}, {field}"
      axes_lib.check_varies(what, field)
      if field in on_axes:
        raise ConfigError(f"{what}: an axis varies this field too. Drop one of them.")
      config_text.set_field(Config(), field, value)


def _check_numbers(spec: Spec) -> None:
  if not spec.seeds:
    raise ConfigError("--seeds: no seed is given. Give at least 1.")
  for seed in spec.seeds:
    axes_lib.check_value("--seeds", SEED, seed)
  if len(set(spec.seeds)) != len(spec.seeds):
    raise ConfigError(
      f"seeds {', '.join(map(str, spec.seeds))}: one of them is given twice."
    )
  for flops in spec.isoflop:
    budget.check_budget(flops)


def _check_solved(spec: Spec) -> None:
  solved = {}
  if spec.match:
    budget.check_match(spec.match, spec.match_by)
    solved[spec.match_by] = f"--match={spec.match}"
  if spec.isoflop:
    solved[TOKENS_FIELD] = "--isoflop"
    if not varied(spec) & set(budget.SIZE_FIELDS):
      budget.refuse_scaled(varied(spec))
  for field in sorted(solved.keys() & varied(spec)):
    raise ConfigError(
      f"{_flag(spec, field)}: {solved[field]} solves this field, so it cannot "
      "vary. Drop one of them"
      + (", or solve another by --match_by." if field == spec.match_by else ".")
    )
