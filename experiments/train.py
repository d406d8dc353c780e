"""For a clone: runs moejax/cli/train.py, as `moejax train` does."""

from moejax.cli import train

if __name__ == "__main__":
  train.run()
