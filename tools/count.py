"""For a clone: runs moejax/cli/count.py, as `moejax count` does."""

from moejax.cli import count

if __name__ == "__main__":
  count.run()
