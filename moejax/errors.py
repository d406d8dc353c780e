"""Errors that are the user's to mend: one line, no traceback, exit code 2.

A message names the flag, the value and the way out. Anything else that goes
wrong is a bug, and keeps its traceback.
"""

EXIT_CODE = 2
"""What a process returns when it refuses what it was asked to do."""


class UserError(Exception):
  """Something the user gave (a path, a prompt, a directory) cannot be used."""


class ConfigError(UserError):
  """A configuration value, alone or beside another, makes no sense."""
