"""For a clone: runs moejax/cli/collectives.py, as `moejax collectives` does."""

from moejax.cli import collectives

if __name__ == "__main__":
  collectives.run()
