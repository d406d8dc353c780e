"""A specification and its points as JSON, for `spec.json`, and later changes.

The file describes a sweep: its base config (fields that are not at their default), axes,
variants, conditions (as source text), seeds and budgets, every point with its changes to
the base, and the code revision. Points are read back completely. Conditions are not,
since the file has the points that they kept.
"""

import copy
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax import files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError, program
from moejax.options import show
from moejax.routing import registry
from moejax.routing.registry import ROUTERS
from moejax.run import provenance
from moejax.sweep.points.expand import Skipped, digest, given_fields
from moejax.sweep.spec import SPEC_FILE, Axis, Point, Spec

FORMAT = 1
"""Incremented when the meaning of the file changes."""

_SHOWN = 5
"""Number of names in a message."""


def variant_names(points: Iterable[Point]) -> dict[str, str]:
  """Returns the variant of each point that has one, by the name of its directory."""
  return {p.directory: p.settings["variant"] for p in points if "variant" in p.settings}


def to_json(
  spec: Spec, points: Sequence[Point], skipped: Sequence[Skipped] = ()
) -> dict[str, Any]:
  """Returns the content of spec.json."""
  return {
    "format": FORMAT,
    "title": spec.title,
    "notes": spec.notes,
    "revision": provenance.revision(),
    "routers": ROUTERS.files(),
    "base": given_fields(spec.base) | _options(spec.base),
    "axes": [
      {"fields": list(axis.fields), "values": [list(row) for row in axis.values]}
      for axis in spec.axes
    ],
    "variants": {name: dict(settings) for name, settings in spec.variants.items()},
    # A sorted file would lose the order of variants, which determines that of points.
    "variant_order": list(spec.variants),
    "conditions": [source(condition) for condition in spec.conditions],
    "seeds": list(spec.seeds),
    "match": spec.match,
    "match_by": spec.match_by,
    "isoflop": list(spec.isoflop),
    "skip_impossible": spec.skip_impossible,
    "points": [
      {
        "name": point.name,
        "digest": point.digest,
        "settings": [[key, value] for key, value in point.settings.items()],
        "config": given_fields(point.config, spec.base),
      }
      for point in points
    ],
    "skipped": [{"name": s.name, "reason": s.reason} for s in skipped],
  }


def _options(base: Config) -> dict[str, Any]:
  """Returns options of all routers, since a point may choose another router."""
  return {
    f"moe.{router}.{name}": value
    for router, options in base.moe.options.items()
    for name, value in options.items()
  }


def source(condition: Callable[[Config], bool]) -> str:
  """Returns a condition's source text; its name if it has none."""
  try:
    text = inspect.getsource(condition)
  except (OSError, TypeError):
    return getattr(condition, "__qualname__", None) or repr(condition)
  return textwrap.dedent(text).strip()


def read(workdir: Path) -> tuple[Spec, list[Point]]:
  """Returns the sweep of a directory; see `from_json`.

  Raises:
    UserError: there is none, or its file is damaged.
  """
  path = Path(workdir) / SPEC_FILE
  try:
    values = files.read_json(path)
  except FileNotFoundError:
    raise UserError(
      f"--workdir={workdir} holds no sweep (it has no {SPEC_FILE}). Give the directory "
      f"that {program('sweep', 'experiments.sweep')} was given as --workdir."
    ) from None
  except (OSError, ValueError) as error:
    raise UserError(_damaged(path, error)) from error
  _add_routers(path, values)
  try:
    if unknown := _unknown_routers(values):
      # The file itself is fine: moving it away would lose the sweep.
      raise UserError(
        f"{path}: the router {unknown[0]} is unknown. {registry.OF_YOUR_OWN}"
      )
  except (LookupError, TypeError, AttributeError) as error:
    raise UserError(_damaged(path, error)) from error
  try:
    return from_json(values)
  except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
    raise UserError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
  words = " ".join(str(error).split()).rstrip(".")
  return (
    f"{path} cannot be read ({type(error).__name__}: {words}). Restore it, or move it "
    "away and give the sweep's flags again: finished runs are kept."
  )


def _add_routers(path: Path, values: Any) -> None:
  """Registers the user's own routers that the sweep was started with.

  Raises:
    UserError: one of their files is gone, or fails.
  """
  found = values.get("routers") if isinstance(values, dict) else None
  known = [file for file in os.environ.get(registry.ENV, "").split(os.pathsep) if file]
  added = [*known, *ROUTERS.files()]
  for file in found if isinstance(found, list) else ():
    if file in added:
      continue
    if not Path(str(file)).is_file():
      raise UserError(
        f"{path}: this sweep uses a router from {file}, which no longer exists. Restore "
        f"it, or give its new path as {registry.ENV}=FILE and the sweep's flags again."
      )
    known.append(str(file))
  if known:
    os.environ[registry.ENV] = os.pathsep.join(known)


def _unknown_routers(values: Mapping[str, Any]) -> list[str]:
  configs = [values["base"], *(point["config"] for point in values["points"])]
  names = dict.fromkeys(c["moe.router"] for c in configs if "moe.router" in c)
  return [name for name in names if name not in ROUTERS]


def from_json(values: Mapping[str, Any]) -> tuple[Spec, list[Point]]:
  """Returns a specification, without its conditions, and its points.

  Raises:
    ConfigError: another format, or a config that does not match its digest.
    LookupError, TypeError, ValueError: `values` did not come from `to_json`.
  """
  if values["format"] != FORMAT:
    raise ConfigError(f"it has format {values['format']}, and this moejax reads {FORMAT}")
  base = _with_fields(Config(), values["base"])
  spec = Spec(
    base=base,
    title=values["title"],
    notes=values["notes"],
    axes=tuple(
      Axis(fields=tuple(a["fields"]), values=tuple(map(tuple, a["values"])))
      for a in values["axes"]
    ),
    variants={name: values["variants"][name] for name in values["variant_order"]},
    seeds=tuple(values["seeds"]),
    match=values["match"],
    match_by=values["match_by"],
    isoflop=tuple(values["isoflop"]),
    skip_impossible=values["skip_impossible"],
  )
  return spec, [_point(base, point) for point in values["points"]]


def _point(base: Config, values: Mapping[str, Any]) -> Point:
  config = _with_fields(base, values["config"])
  router = config.moe.router
  config.moe.options = {r: o for r, o in config.moe.options.items() if r == router}
  if digest(config) != values["digest"]:
    raise ConfigError(
      f"the config of {values['name']} does not have the digest {values['digest']}"
    )
  return Point(
    name=values["name"],
    settings=dict(values["settings"]),
    config=config,
    digest=values["digest"],
  )


def _with_fields(base: Config, fields: Mapping[str, Any]) -> Config:
  config = copy.deepcopy(base)
  for field, value in fields.items():
    config_text.set_field(config, field, value)
  return config


# ------------------------------------------------------------------------- differences


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns lines on how a specification differs from the stored one.

  Title, notes and skipped points do not count, since they change no run.

  Args:
    stored: content of spec.json, possibly changed by hand.
    now: from `to_json`.
  """
  try:
    return _differences(stored, now)
  except (AttributeError, LookupError, TypeError, ValueError):
    return [f"{SPEC_FILE} does not contain a specification of this moejax"]


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  found = []
  if stored.get("revision") != now["revision"]:
    was, now_at = (_short(x.get("revision")) for x in (stored, now))
    found.append(f"the code was at {was} and is at {now_at}")
  found += _changed_fields(stored.get("base", {}), now["base"])
  found += _changed_axes(stored.get("axes", []), now["axes"])
  names = {
    "variants": "variants",
    "conditions": "conditions",
    "seeds": "seeds",
    "match": "--match",
    "match_by": "--match_by",
    "isoflop": "--isoflop",
  }
  for key, name in names.items():
    before, after = stored.get(key), now[key]
    if before != after:
      found.append(f"{name}: {_said(before)} before, {_said(after)} now")
  return found + _changed_points(stored.get("points", []), now["points"])


def _short(revision: str | None) -> str:
  if not revision:
    return "no revision"
  commit, plus, dirty = revision.partition("+")
  return commit[:10] + plus + dirty


def _said(value: Any) -> str:
  if isinstance(value, Mapping):
    return ", ".join(value) or "none"
  if isinstance(value, list):
    return ", ".join(map(_said, value)) or "none"
  return " ".join(show(value).split()) or "none"


def _changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  def of(fields: Mapping[str, Any], name: str) -> str:
    return show(fields[name]) if name in fields else "at its default"

  return [
    f"--config.{name} was {of(before, name)} and is {of(now, name)}"
    for name in sorted(before.keys() | now.keys())
    if of(before, name) != of(now, name)
  ]


def _changed_axes(
  before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
  def by_fields(axes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {
      " with ".join(axis["fields"]): ", ".join(
        "/".join(map(_said, row)) for row in axis["values"]
      )
      for axis in axes
    }

  old, new = by_fields(before), by_fields(now)
  found = [f"axis {name} is gone" for name in old if name not in new]
  found += [f"axis {name} is new: {new[name]}" for name in new if name not in old]
  return found + [
    f"axis {name} was {old[name]} and is {new[name]}"
    for name in new
    if name in old and old[name] != new[name]
  ]


def _changed_points(
  before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
  old = {point["digest"]: point["name"] for point in before}
  new = {point["digest"]: point["name"] for point in now}
  found = []
  for what, ours, others in (("more", new, old), ("fewer", old, new)):
    names = [name for digest_, name in ours.items() if digest_ not in others]
    if names:
      more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
      listed = "; ".join(names[:_SHOWN])
      found.append(f"{len(names)} run{'s' * (len(names) > 1)} {what}: {listed}{more}")
  return found
