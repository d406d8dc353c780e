"""For a clone: runs moejax/cli/launch_local.py, as `moejax launch-local` does."""

from moejax.cli import launch_local

if __name__ == "__main__":
  launch_local.run()
