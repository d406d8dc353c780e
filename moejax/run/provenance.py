"""Provenance of a run's numbers: package versions and the code's revision."""

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from moejax.config import Config
from moejax.config import text as config_text

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_OWN = ("data.cache_dir", "data.num_workers", "data.prefetch")
"""Fields that may differ between machines: paths, and how files are read."""


@functools.cache
def versions() -> dict[str, str]:
  """Returns versions by package, with Python; "not installed" for a bare checkout."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found


@functools.cache
def revision() -> str | None:
  """Returns the git commit of the running code, with "+dirty" if files differ from it.

  None if the code is not in a git checkout (an installed wheel) or git fails.
  Untracked files are ignored: runs and caches are untracked.
  """
  root = Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return None
  try:
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.SubprocessError):
    return None
  return commit + ("+dirty" if changed else "")


@functools.cache
def sources() -> dict[str, str]:
  """Returns a SHA-256 prefix of each source file, by path, to compare two copies.

  A revision does not tell two dirty checkouts apart, and a wheel has none.
  """
  root = Path(__file__).resolve().parents[2]
  files = [f for d in ("moejax", "experiments") for f in (root / d).rglob("*.py")]
  return {
    str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()[:12]
    for f in sorted(files)
  }


def facts(config: Config) -> dict[str, Any]:
  """Returns what a run's processes must agree on: config, code and versions, by name."""
  found: dict[str, Any] = {
    f"--config.{name}": config_text.get_field(config, name)
    for name in config_text.field_types()
    if name not in _OWN
  }
  found["code revision"] = revision()
  found |= {f"version of {name}": version for name, version in versions().items()}
  return found | {f"SHA-256 of {name}": digest for name, digest in sources().items()}


def _git(root: Path, *arguments: str) -> str:
  # No optional locks: reading must not collide with a commit made meanwhile.
  command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
  return done.stdout.strip()
