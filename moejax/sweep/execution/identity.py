"""Checks that the run in a point's directory belongs to that point.

A directory is named after its point and ends in the digest of the point's config, so a
run of another config is recognised by its config.json alone.
"""

import ast
import functools
import re
from pathlib import Path
from typing import Any

from moejax import files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError
from moejax.options import show
from moejax.run.files import CONFIG_FILE

CONFIG_MODULE = ".config.py"
"""The point's config, as its sweep wrote it. Hidden, so that the run's own check of its
directory ignores it."""

RECORD_FILE = ".sweep.json"
"""The sweep's record of the run; see states.py."""

_DIGEST = re.compile(r".+-([0-9a-f]{8})")
_SHOWN = 3


def trouble(path: Path) -> str:
  """Returns one line if a directory's run has another config, or cannot be read.

  Fields that may change when a run resumes may differ.

  Args:
    path: a run's directory, named `NAME-DIGEST`; other names are not checked.

  Returns:
    The problem and the remedy; "" if there is no problem, or no run has begun.
  """
  stamp = _stamp(path / CONFIG_FILE)
  if stamp is None or not _DIGEST.fullmatch(path.name):
    return ""
  others = (_stamp(path / name) for name in (CONFIG_MODULE, RECORD_FILE))
  return _trouble(path, stamp, *others)


def _stamp(path: Path) -> tuple[int, int] | None:
  try:
    found = path.stat()
  except OSError:
    return None
  return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4096)
def _trouble(path: Path, *stamps: Any) -> str:
  """Does the work of `trouble`; cached by the files' stamps, as it runs every second."""
  del stamps
  remedy = (
    f"Move {path} away, and the same command trains the point again; or restore the "
    "point's own run."
  )
  try:
    values = files.read_json(path / CONFIG_FILE)
    if not isinstance(values, dict):
      raise ValueError("it does not contain a JSON object")
  except (OSError, ValueError) as error:
    return f"{path / CONFIG_FILE} cannot be read ({error}). {remedy}"
  try:
    config = config_text.from_dict(values)
  except ConfigError:  # A router that this process does not know, or a later version's.
    return ""
  what = _difference(path, config)
  return f"{path / CONFIG_FILE} belongs to another run: {what}. {remedy}" if what else ""


def _difference(path: Path, config: Config) -> str:
  """Returns how a config differs from the point's; "" if no difference counts."""
  # Imported here: it imports jax, and the task of a batch job should not need it.
  from moejax.run.workdir import refused_changes
  from moejax.sweep.points.expand import digest

  wanted, found = path.name.rpartition("-")[2], digest(config)
  if found == wanted:
    return ""
  own = _own_config(path)
  # A default changed since then also changes the digest of the same config; the record
  # still has the original one.
  if own is None or wanted not in (digest(own), _recorded_digest(path)):
    others = [p.name for p in path.parent.glob(f"*-{found}") if p != path]
    of = f", which is that of {others[0].rpartition('-')[0]}" if others else ""
    return f"its digest is {found}{of}, and the directory's is {wanted}"
  changes = refused_changes(config, own)
  if own.train.num_steps > config.train.num_steps:
    changes.append(("train.num_steps", config.train.num_steps, own.train.num_steps))
  more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
  return (
    "; ".join(
      f"its {name} is {show(theirs)} and the point's {show(ours)}"
      for name, theirs, ours in changes[:_SHOWN]
    )
    + more
  )


def _recorded_digest(path: Path) -> Any:
  try:
    return files.read_json(path / RECORD_FILE)["plan"]["digest"]
  except (OSError, ValueError, LookupError, TypeError):
    return None


def _own_config(path: Path) -> Config | None:
  """Returns the config that the sweep wrote for the point; None if there is none."""
  try:
    tree = ast.parse((path / CONFIG_MODULE).read_text(encoding="utf-8"))
    values = next(
      ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
    )
    return config_text.from_dict(values)
  except (OSError, SyntaxError, ValueError, TypeError, StopIteration, ConfigError):
    return None
