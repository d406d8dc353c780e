"""Expands a specification to its points: every combination, resolved and checked.

A point is the config that a single run would get from `--config.FIELD=VALUE` for each of
its settings, and is checked by the same functions. Order: variants, the axes, budgets,
sizes and seeds, with the last varying fastest.
"""

import collections
import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config import Config
from moejax.config import text as config_text
from moejax.config.check import refuse_unread, validate
from moejax.config.devices import has_free_axis, validate_devices
from moejax.config.mesh import AXES
from moejax.errors import ConfigError, UserError
from moejax.sweep.points import axes as axes_lib
from moejax.sweep.points import budget
from moejax.sweep.points.axes import SEED
from moejax.sweep.points.check import check_spec
from moejax.sweep.points.combine import Choice, combinations, router_of
from moejax.sweep.spec import Point, Spec

NOT_IN_DIGEST = ("schema_version", "data.cache_dir", "data.num_workers", "data.prefetch")
"""Fields that may differ between machines for the same run."""

SEED_MARK = "{seed}"
"""Stands in `train.init_from` for the point's seed, so that each has its own start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
  """A point that was left out because a single run would refuse it."""

  name: str
  reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expansion:
  """All points of a specification."""

  points: list[Point]
  skipped: list[Skipped]
  """Only with `Spec.skip_impossible`."""


def points(spec: Spec) -> list[Point]:
  """Returns the points of a specification; see `expand`."""
  return expand(spec).points


def expand(spec: Spec, num_devices: int | None = None) -> Expansion:
  """Returns the points of a specification, and those left out.

  Args:
    spec: the specification.
    num_devices: of each run, if known: points must fit them. Without it, those whose
      mesh has no free axis must fit that mesh.

  Raises:
    ConfigError: the specification is wrong, a point is impossible (unless such points are
      skipped), a point occurs twice, or no point is left.
  """
  check_spec(spec)
  found: list[Point] = []
  skipped: list[Skipped] = []
  rows = combinations(spec)
  # The order of names must not depend on which points happen to have an option.
  names = dict.fromkeys(key for row in rows for c in row for key in c.settings)
  among = [*names, SEED]
  for choices in rows:
    settings = {k: v for choice in choices for k, v in choice.settings.items()}
    config, error = _resolve(spec, choices)
    # Conditions apply to configs with a seed, so some points may have fewer seeds.
    seeded = _seeded(spec, config, settings, among)
    kept = [point for point in seeded if _kept(spec, point)]
    if not kept:
      continue
    try:
      if error is not None:
        raise error
      _check(config, choices, num_devices)
    except ConfigError as reason:
      skipped.append(Skipped(name=axes_lib.name_of(settings, among), reason=str(reason)))
      continue
    found += kept
  if skipped and not spec.skip_impossible:
    raise ConfigError(_impossible(skipped))
  _refuse_lost_options(spec, rows)
  if not found:
    why = "every one of them is impossible" if skipped else "the conditions leave none"
    raise ConfigError(f"the sweep has no point: {why}. Change its axes or conditions.")
  _refuse_twice(found)
  return Expansion(points=_named_apart(found), skipped=skipped)


def _refuse_lost_options(spec: Spec, rows: list[list[Choice]]) -> None:
  """Rejects options in the base config for a router that no point has."""
  chosen = {router_of(spec, choices) for choices in rows}
  for router, options in spec.base.moe.options.items():
    if router not in chosen and options:
      raise ConfigError(
        f"--config.moe.{router}.{next(iter(options))}: no point has "
        f"--config.moe.router={router}. Leave it out, or use that router."
      )


def _impossible(skipped: list[Skipped]) -> str:
  first, *others = skipped
  more = f" ({len(others)} more like it)" if others else ""
  point = f"point {first.name}" if first.name else "the only point"
  return (
    f"{point}: {first.reason.rstrip('.')}{more}. Or leave such points out with "
    "--skip_impossible."
  )


def _seeded(
  spec: Spec, config: Config, settings: Mapping[str, Any], among: list[str]
) -> Iterator[Point]:
  for seed in spec.seeds:
    own = copy.deepcopy(config)
    own.train.seed = seed
    own.train.init_from = own.train.init_from.replace(SEED_MARK, str(seed))
    named = {**settings, SEED: seed}
    yield Point(
      name=axes_lib.name_of(named, among),
      settings=named,
      config=own,
      digest=digest(own),
    )


def _refuse_twice(found: list[Point]) -> None:
  first: dict[str, str] = {}
  for point in found:
    if point.digest in first:
      other = first[point.digest]
      names = point.name if point.name == other else f"{other} and {point.name}"
      raise ConfigError(
        f"the same point twice: {names}. Leave out a value that repeats another, or an "
        "axis that the config does not depend on."
      )
    first[point.digest] = point.name


def _named_apart(found: list[Point]) -> list[Point]:
  """Adds the digest to names that several points share, as `a/b` and `a_b` would."""
  count = collections.Counter(point.name for point in found)
  return [
    p if count[p.name] == 1 else dataclasses.replace(p, name=f"{p.name}~{p.digest}")
    for p in found
  ]


def digest(config: Config) -> str:
  """Returns the first 8 hex digits of the SHA-256 of a resolved config.

  It covers the fields that are not at their default, so a later version of moejax, with
  more config fields, gives the same digest. Paths and how files are read are left out, so
  another machine also gives the same.
  """
  given = given_fields(config)
  values = {name: v for name, v in given.items() if name not in NOT_IN_DIGEST}
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def given_fields(config: Config, base: Config | None = None) -> dict[str, Any]:
  """Returns the fields that differ from a base, by dotted name.

  Args:
    config: any config.
    base: None means the default of every field. Options that the router of `base` does
      not have count as default.
  """
  base = Config() if base is None else base
  then = config_text.leaves(base)
  now = config_text.leaves(config)
  before = {
    name: then[name] if name in then else config_text.get_field(Config(), name)
    for name in now
  }
  return {name: value for name, value in now.items() if value != before[name]}


def _resolve(spec: Spec, choices: list[Choice]) -> tuple[Config, ConfigError | None]:
  """Returns the config of a point, as far as it could be solved, and the error if any."""
  config, reference = copy.deepcopy(spec.base), spec.base
  for choice in choices:
    for field, value in choice.fields.items():
      config_text.set_field(config, field, value)
  router = config.moe.router
  config.moe.options = {r: o for r, o in config.moe.options.items() if r == router}
  flops = next((c.flops for c in choices if c.flops is not None), None)
  size = next((c.size for c in choices if c.size is not None), None)
  if size is not None:  # It is compared with the base config at the same size.
    config, reference = budget.scaled(config, size), budget.scaled(reference, size)
  try:
    if spec.match:
      budget.match(config, reference, spec.match_by)
    if flops is not None:
      budget.spend(config, flops)
  except ConfigError as error:
    return config, error
  return config, None


def _kept(spec: Spec, point: Point) -> bool:
  for condition in spec.conditions:
    try:
      if not condition(point.config):
        return False
    except Exception as error:
      words = " ".join(str(error).split())
      raise UserError(
        f"a condition fails at point {point.name}: {type(error).__name__}: {words}. It "
        "must take a moejax.config.Config and return whether the point is kept."
      ) from error
  return True


def _check(config: Config, choices: list[Choice], num_devices: int | None) -> None:
  """Runs the checks of a single run."""
  validate(config)
  if num_devices is None and not has_free_axis(config):
    num_devices = math.prod(getattr(config.mesh, axis) for axis in AXES)
  if num_devices is not None:
    validate_devices(config, num_devices)
  mine = [field for choice in choices for field in choice.fields]
  refuse_unread(config, dict.fromkeys([*mine, *given_fields(config)]))
