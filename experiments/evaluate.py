"""For a clone: runs moejax/cli/evaluate.py, as `moejax evaluate` does."""

from moejax.cli import evaluate

if __name__ == "__main__":
  evaluate.run()
