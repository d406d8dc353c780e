"""For a clone: runs moejax/cli/analyze.py, as `moejax analyze` does."""

from moejax.cli import analyze

if __name__ == "__main__":
  analyze.run()
