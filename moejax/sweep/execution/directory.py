"""A sweep's directory: which sweep owns it, its lock, and the directories of its runs.

    spec.json             the specification with which the directory was first used
    runs/NAME-HASH/       an ordinary run directory, plus two hidden files:
      .config.py          the resolved config, as a file that --config= reads
      .sweep.json         the sweep's record of the run; see states.py

Nothing here imports jax.
"""

import contextlib
import fnmatch
import pprint
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax import files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError
from moejax.run import claim
from moejax.run.files import CONFIG_FILE
from moejax.sweep.execution.identity import CONFIG_MODULE
from moejax.sweep.spec import RUNS, SPEC_FILE

TIMING_FILE = "timing.json"

OURS = (
  SPEC_FILE,
  RUNS,
  TIMING_FILE,
  "results.*",
  "report.html",
  "figures",
  "tables",
  ".*",
  "*.log",
)
"""Files allowed in a directory without a spec.json: a sweep's, and a launcher's logs."""

_SHOWN = 5

Differences = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
"""(stored, now) -> lines on what changed; empty if both are the same sweep."""

_CONFIG_TEXT = '''"""The config of the run {name}, written by its sweep.

moejax train --config=THIS_FILE --workdir=DIR
"""

from moejax.config import text

VALUES = {values}


def get_config():
  return text.from_dict(VALUES)
'''


@contextlib.contextmanager
def opened(
  workdir: Path,
  spec: Mapping[str, Any],
  *,
  differences: Differences | None = None,
  allow_changes: bool = False,
) -> Iterator[None]:
  """Claims a directory for a sweep while the `with` body runs.

  Args:
    workdir: of the sweep; created if missing.
    spec: JSON form of the sweep, stored as spec.json.
    differences: compares a stored form with `spec`; None is `plain_differences`.
    allow_changes: replace the stored form if it differs, instead of refusing.

  Raises:
    UserError: not writable, in use, an ordinary run, holding unrelated files, or a
      damaged spec.json.
    ConfigError: the directory holds another sweep; every difference is named.
  """
  claim.make_writable(workdir)
  claim.lock(workdir, "sweep", wait_seconds=0.0)
  try:
    stored = read_spec(workdir)
    if stored is None:
      _refuse_foreign(workdir)
    elif not allow_changes:
      _refuse_other(workdir, (differences or plain_differences)(stored, spec))
    (workdir / RUNS).mkdir(exist_ok=True)
    if stored is None or (allow_changes and stored != spec):
      files.write_json(workdir / SPEC_FILE, spec)
    yield
  finally:
    claim.unlock(workdir)


def read_spec(workdir: Path) -> dict[str, Any] | None:
  """Returns the content of spec.json; None if there is none.

  Raises:
    UserError: it cannot be read.
  """
  path = workdir / SPEC_FILE
  remedy = (
    "Restore it, or move it away: the same command then writes it again and keeps the "
    "runs whose configs have not changed."
  )
  try:
    found = files.read_json(path)
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error}). {remedy}") from error
  if not isinstance(found, dict):
    raise UserError(
      f"{path} is not a sweep's specification: it is not an object. {remedy}"
    )
  return found


def plain_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Returns a line for each differing entry, at any depth: `a.b was 1 and is now 2`."""
  lines = []
  for name in [*stored, *(name for name in now if name not in stored)]:
    before, after = stored.get(name), now.get(name)
    if before == after:
      continue
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      lines += [f"{name}.{line}" for line in plain_differences(before, after)]
    else:
      lines.append(f"{name} was {_short(before)} and is now {_short(after)}")
  return lines


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def _refuse_foreign(workdir: Path) -> None:
  names = sorted(p.name for p in workdir.iterdir())
  if CONFIG_FILE in names:
    raise UserError(
      f"--workdir={workdir} holds an ordinary run ({CONFIG_FILE}), not a sweep. Choose a "
      "new directory."
    )
  foreign = [n for n in names if not any(fnmatch.fnmatch(n, p) for p in OURS)]
  if foreign:
    more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
    raise UserError(
      f"--workdir={workdir} is not a sweep's directory (it has no {SPEC_FILE}) and is "
      f"not empty: it holds {', '.join(foreign[:_SHOWN])}{more}. Choose a new directory."
    )


def _refuse_other(workdir: Path, changes: Sequence[str]) -> None:
  if not changes:
    return
  more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
  raise ConfigError(
    f"--workdir={workdir} holds another sweep: {'; '.join(changes[:_SHOWN])}{more}. Give "
    "the same flags to go on, another --workdir for a new sweep, or --allow_changes to "
    "go on with the changes (runs whose config is the same are kept)."
  )


def write_config(run: Path, name: str, config: Config) -> Path:
  """Writes a run's config as a file for --config=, unless it exists already.

  Args:
    run: the run's directory; created if missing.
    name: name of the point, for the file's docstring.
    config: resolved.

  Returns:
    The file.
  """
  values = pprint.pformat(config_text.to_dict(config), indent=1, width=88)
  path = run / CONFIG_MODULE
  text = _CONFIG_TEXT.format(name=name, values=values)
  run.mkdir(parents=True, exist_ok=True)
  if not path.exists() or path.read_text(encoding="utf-8") != text:
    files.write_text(path, text)
  return path


def point_directories(spec: Mapping[str, Any] | None) -> list[str]:
  """Returns the directory names of a stored specification's points, in order.

  Args:
    spec: content of spec.json; the result is empty if it is None or has no points.
  """
  points = (spec or {}).get("points", [])
  if isinstance(points, Mapping):  # Points without a specification.
    pairs = list(points.items())
  elif isinstance(points, list):
    pairs = [(p.get("name"), p.get("digest")) for p in points if isinstance(p, Mapping)]
  else:
    return []
  return [f"{name}-{digest}" for name, digest in pairs]


def run_directories(workdir: Path) -> list[Path]:
  """Returns the directories of a sweep's runs, sorted by name; empty if none."""
  runs = workdir / RUNS
  return sorted(p for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []
