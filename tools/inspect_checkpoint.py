"""For a clone: runs moejax/cli/inspect_checkpoint.py, as the `moejax` command does."""

from moejax.cli import inspect_checkpoint

if __name__ == "__main__":
  inspect_checkpoint.run()
