"""A disk that is full: how to see it in an error, and arrays whose writing tells it."""

import errno
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import numpy as np

_WORDS = ("No space left", "Disk quota exceeded")
"""What libraries in C++ leave of the system's error in theirs."""


def is_full(error: BaseException) -> bool:
  """Whether an error, or what it came from, says that a disk has no room."""
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
  """Only a file's `write`, so that numpy uses it.

  Given a file, numpy writes with C's fwrite and raises an OSError without its errno.
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
