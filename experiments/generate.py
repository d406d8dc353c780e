"""For a clone: runs moejax/cli/generate.py, as `moejax generate` does."""

from moejax.cli import generate

if __name__ == "__main__":
  generate.run()
