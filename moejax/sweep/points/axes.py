"""Axes: the fields that vary, their values, and the names of points.

Each flag `--sweep.SECTION.FIELD=a,b,c` is a separate axis. All flags `--zip.…` together
are one axis: their first values make its first position, and so on. Values are parsed by
the type of their field, like `--config.SECTION.FIELD`.

An option of a router, `moe.ROUTER.OPTION`, varies only if that router is chosen: points
of other routers are not multiplied by it (`moejax.sweep.points.expand`).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.config import Config
from moejax.config import text as config_text
from moejax.config.ranges import CHOICES, RANGES
from moejax.errors import ConfigError
from moejax.options import check_choice, check_range, show
from moejax.routing.registry import ROUTERS
from moejax.sweep.spec import Axis

SWEEP = "sweep"
ZIP = "zip"

SEED = "train.seed"
"""The field that seeds set."""

_WRITES = "it changes what a run writes, not what it learns"
_MEASURES = "runs that are evaluated on different text cannot be compared"
_READS = "it changes how batches are read, not what is in them"
FIXED: Mapping[str, str] = {
  "schema_version": "it is not a setting",
  "data.cache_dir": "it is a place for files, and all runs share it",
  "data.num_workers": _READS,
  "data.prefetch": _READS,
  "moe.allow_future_leak": "only generation reads it",
  "model.max_position": "only generation reads it",
  "train.seed": "seeds are not an axis; use --seeds=N, or --seeds=0,1,5 for a list",
  "train.log_every": _WRITES,
  "train.eval_every": _WRITES,
  "train.eval_batches": _MEASURES,
  "train.final_eval_tokens": _MEASURES,
  "train.sample": _WRITES,
  "train.report": _WRITES,
  "train.trace_steps": _WRITES,
  "train.checkpoint_every": _WRITES,
  "train.keep_last": _WRITES,
  "train.keep_best": _WRITES,
  "train.max_bad_steps": "it only decides when a failing run gives up",
  "train.tensorboard": _WRITES,
}
"""Fields that may not vary within a sweep, and why."""

NAME_LENGTH = 120
"""Most characters in a point's name; file systems allow 255 for name and digest."""


def product(field: str, *values: Any) -> Axis:
  """Returns an axis of one field, for a spec file.

  Args:
    field: dotted name.
    values: at least one.
  """
  return Axis(fields=(field,), values=tuple((value,) for value in values))


def together(values: Mapping[str, Sequence[Any]]) -> Axis:
  """Returns one axis of fields that vary together, for a spec file.

  Args:
    values: dotted name to its values, equally many for each field.

  Raises:
    ConfigError: the fields have different numbers of values.
  """
  lengths = {field: len(given) for field, given in values.items()}
  for field, length in lengths.items():
    first = next(iter(lengths))
    if length != lengths[first]:
      raise ConfigError(
        f"--{ZIP}.{first} has {_count(lengths[first])} and --{ZIP}.{field} has "
        f"{length}: fields that vary together need equally many. Use --{SWEEP}. for "
        "their product."
      )
  return Axis(fields=tuple(values), values=tuple(zip(*values.values(), strict=True)))


def _count(number: int) -> str:
  return f"{number} value{'' if number == 1 else 's'}"


def parse(given: Iterable[tuple[str, str, str]]) -> tuple[Axis, ...]:
  """Parses flags into axes.

  Args:
    given: (prefix, dotted name, text) of each flag, in command-line order.

  Returns:
    The axes in that order; the zip is at the position of its first flag.

  Raises:
    ConfigError: an unknown name, a value of the wrong type or out of range, an empty
      list, zips of unequal lengths, a field given twice or one that may not vary.
  """
  given = list(given)
  seen: dict[str, str] = {}
  for prefix, name, _ in given:
    if name in seen:
      raise ConfigError(
        f"--{prefix}.{name}: the field is varied by --{seen[name]}.{name} already. Give "
        "all its values in one flag."
      )
    seen[name] = prefix
    check_varies(f"--{prefix}.{name}", name)
  # Options last: they import jax, and other mistakes should be found before that.
  options = [flag for flag in given if config_text.is_router_option(flag[1])]
  fields = [flag for flag in given if flag not in options]
  values = {name: _values(p, name, text) for p, name, text in fields + options}
  axes: list[Axis] = []
  zipped = [name for prefix, name, _ in given if prefix == ZIP]
  for prefix, name, _ in given:
    if prefix == SWEEP:
      axes.append(product(name, *values[name]))
    elif name == zipped[0]:
      axes.append(together({field: values[field] for field in zipped}))
  return tuple(axes)


def _values(prefix: str, name: str, text: str) -> list[Any]:
  flag = f"--{prefix}.{name}"
  if not text.strip():
    raise ConfigError(f"{flag}=: the list is empty. Write {flag}=VALUE,VALUE.")
  words = text.split(",")
  if not all(word.strip() for word in words):
    raise ConfigError(f"{flag}={text}: a value is missing between two commas.")
  values = [config_text.parse_value(name, w.strip(), f"--{prefix}.") for w in words]
  for value in values:
    check_value(flag, name, value)
  return values


def check_varies(flag: str, name: str) -> None:
  """Rejects a field that may not vary within a sweep.

  Raises:
    ConfigError: names the field and the reason.
  """
  if name in FIXED:
    settable = name not in ("schema_version", SEED)
    remedy = f" Set it for all runs by --config.{name}." if settable else ""
    raise ConfigError(
      f"{flag}: this field may not vary within a sweep: {FIXED[name]}.{remedy}"
    )


def check_value(flag: str, name: str, value: Any) -> None:
  """Rejects a value that no config may have in this field.

  Raises:
    ConfigError: names the flag, the value and what is allowed.
  """
  if config_text.is_router_option(name):
    config_text.set_field(Config(), name, value)
    return
  if name == "moe.router":
    check_choice(flag, value, list(ROUTERS))
  if name in CHOICES:
    check_choice(flag, value, CHOICES[name])
  if name in RANGES and value is not None:
    check_range(flag, value, RANGES[name])


def name_of(settings: Mapping[str, Any], among: Iterable[str]) -> str:
  """Returns a point's name: `num_experts=16,capacity_factor=1.25,seed=0`.

  It has only characters that are safe in a path. A long name is cut before its seed, and
  ends in a hash of the full name.

  Args:
    settings: settings of the point, in the order of the name.
    among: all fields that any point of the sweep sets, so that a field has the same
      short name everywhere.
  """
  short = _short_names(among)
  words = [f"{short[key]}={_safe(value)}" for key, value in settings.items()]
  name = ",".join(words)
  if len(name) <= NAME_LENGTH:
    return name
  # Hashes all but the seed, so that seeds of one setting differ only in the seed.
  own = words[:-1] if SEED in settings else words
  mark = "~" + hashlib.sha256(",".join(own).encode()).hexdigest()[:6]
  end = ",".join([mark, *words[len(own) :]])
  return name[: NAME_LENGTH - len(end)] + end


def _short_names(fields: Iterable[str]) -> dict[str, str]:
  """Returns the last part of each dotted name, or as many parts as make it unique."""
  fields = list(dict.fromkeys(fields))
  short = {}
  for field in fields:
    parts = field.split(".")
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    others = [f for f in fields if f != field]
    unique = (e for e in ends if not any(f == e or f.endswith("." + e) for f in others))
    short[field] = next(unique, field)
  return short


def _safe(value: Any) -> str:
  if type(value) is float:
    return number(value)
  return re.sub(r"[^A-Za-z0-9._+-]", "_", show(value))


def number(value: float) -> str:
  """Formats a float, exactly: 1.25, 1e13, 3e-05."""
  short = f"{value:g}"
  return (short if float(short) == value else repr(value)).replace("e+", "e")
