"""Errors that end a program with one line, no traceback, and their own exit code.

A message names the flag, the value and the remedy. Any other exception is a bug and
keeps its traceback (exit code 1).
"""

import difflib
import sys
from collections.abc import Iterable

EXIT_CODE = 2
"""Exit code of a process that refuses its input."""

PEER_LOST = 3
"""Exit code when another process of the job died or never connected."""

NOT_IN_AGREEMENT = 4
"""Exit code when the processes of a job were started differently."""


def program(name: str, in_a_clone: str) -> str:
  """Returns how the user of this process calls another program of moejax."""
  installed = sys.argv[0].startswith("moejax ")
  return f"moejax {name}" if installed else f"python -m {in_a_clone}"


class UserError(Exception):
  """Something the user gave (a path, a prompt, a directory) cannot be used."""

  exit_code = EXIT_CODE


class ConfigError(UserError):
  """A configuration value, or a combination of values, is invalid."""


class PeerLostError(UserError):
  """Another process of the job is gone; restarting the job resumes it."""

  exit_code = PEER_LOST


class DisagreementError(UserError):
  """The processes of a job run different configs, code or versions."""

  exit_code = NOT_IN_AGREEMENT


def nearest(name: str, choices: Iterable[str]) -> str | None:
  """Returns the choice closest to a misspelt name, or None if none is close."""
  # Hyphens and capitals are the commonest mistakes and should not count as distance.
  plain = {c.lower().replace("-", "_"): c for c in choices}
  match = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1)
  return plain[match[0]] if match else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
  """Returns a sentence naming the closest choice, or all of them if none is close."""
  choices = tuple(choices)
  near = nearest(name, choices)
  return f"Did you mean {near}?" if near else f"Choose from {', '.join(choices)}."
