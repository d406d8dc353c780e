"""The default: a small Switch decoder on the interpreter's own standard library.

Command:  make train
Hardware: 2 CPU cores
Result:   not yet recorded.
"""

from moejax.config import Config


def get_config() -> Config:
  return Config()
