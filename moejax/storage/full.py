"""Full disks: recognising one in an error, and saving arrays so that one is reported."""

import errno
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import numpy as np

_WORDS = ("No space left", "Disk quota exceeded")
"""The part of the system's error that C++ libraries keep in theirs."""


def is_full(error: BaseException) -> bool:
  """Returns whether an error, or one of its causes, is a full disk."""
  seen: list[BaseException] = []
  while error not in seen:
    seen.append(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(word in str(error) for word in _WORDS):
      return True
    error = error.__cause__ or error.__context__ or error
  return False


class _Stream:
  """A file with only its `write` method, so that numpy uses it.

  Given a real file, numpy writes with C's fwrite and raises an OSError without errno.
  """

  def __init__(self, file: Any):
    self.write = file.write


def save_array(file: Any, array: "np.ndarray") -> None:
  """Writes an array to a file opened for bytes, in numpy's format.

  Raises:
    OSError: with the system's errno.
  """
  import numpy as np  # Not before a program needs it.

  np.save(_Stream(file), array)
