"""Errors that end a program with one line, no traceback, and an exit code of their own.

A message names the flag, the value and the way out. Anything else that goes
wrong is a bug, and keeps its traceback (exit code 1).
"""

import difflib
from collections.abc import Iterable

EXIT_CODE = 2
"""What a process returns when it refuses what it was asked to do."""

PEER_LOST = 3
"""... when another process of the job died or never came."""

NOT_IN_AGREEMENT = 4
"""... when the processes of a job were not started alike."""


class UserError(Exception):
  """Something the user gave (a path, a prompt, a directory) cannot be used."""

  exit_code = EXIT_CODE


class ConfigError(UserError):
  """A configuration value, alone or beside another, makes no sense."""


class PeerLostError(UserError):
  """Another process of the job is gone; starting the job again goes on."""

  exit_code = PEER_LOST


class DisagreementError(UserError):
  """The processes of a job run different configs, code or versions."""

  exit_code = NOT_IN_AGREEMENT


def nearest(name: str, choices: Iterable[str]) -> str | None:
  """The choice that a misspelt name most likely meant, or None if none is near."""
  # Hyphens and capitals are the commonest slip and should not count as distance.
  plain = {c.lower().replace("-", "_"): c for c in choices}
  match = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1)
  return plain[match[0]] if match else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
  """A sentence that names the nearest choice, or all of them if none is near."""
  choices = tuple(choices)
  near = nearest(name, choices)
  return f"Did you mean {near}?" if near else f"Choose from {', '.join(choices)}."
