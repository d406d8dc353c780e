"""For a clone: runs moejax/cli/compare.py, as `moejax compare` does."""

from moejax.cli import compare

if __name__ == "__main__":
  compare.run()
