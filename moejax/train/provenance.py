"""Where a run's numbers come from: versions of what computed them, and the revision."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def versions() -> dict[str, str]:
  """Version by package, python included; "not installed" for a bare checkout."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = "not installed"
  return found


@functools.cache
def revision() -> str | None:
  """The git commit of the running code, "+dirty" if files differ from it.

  None where the code is not in a git checkout (an installed wheel) or there is no
  git. Untracked files do not count: runs and caches are untracked.
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


def _git(root: Path, *arguments: str) -> str:
  # No optional locks: a look must not collide with a commit someone makes meanwhile.
  command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
  return done.stdout.strip()
