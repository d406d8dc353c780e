"""For a clone: runs moejax/cli/sweep.py, as `moejax sweep` does."""

from moejax.cli import sweep

if __name__ == "__main__":
  sweep.run()
