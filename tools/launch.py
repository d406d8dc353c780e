"""For a clone: runs moejax/cli/launch.py, as `moejax launch` does."""

from moejax.cli import launch

if __name__ == "__main__":
  launch.run()
