"""For a clone: runs moejax/cli/convert.py, as `moejax convert` does."""

from moejax.cli import convert

if __name__ == "__main__":
  convert.run()
