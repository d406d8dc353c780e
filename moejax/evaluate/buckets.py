"""Sizes that generation and scoring are compiled for: each is rounded up to a bucket."""

CHUNK = 256
"""Maximum prompt tokens of a row that are read at once."""

LEAST = 16
"""Smallest bucket of tokens."""


def power_of_two(size: int, least: int) -> int:
  """Returns the smallest power of two that is at least `size` and `least`."""
  return max(least, 1 << max(size - 1, 0).bit_length())


def prompt_size(longest: int) -> tuple[int, int]:
  """Returns the padded length of prompts, and the length of the chunks they are read in.

  One token is a separate bucket, with which an encoder-decoder starts.
  """
  if longest <= CHUNK:
    size = power_of_two(longest, LEAST) if longest > 1 else 1
    return size, size
  return -(-longest // CHUNK) * CHUNK, CHUNK
