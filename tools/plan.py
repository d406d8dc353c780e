"""For a clone: runs moejax/cli/plan.py, as `moejax plan` does."""

from moejax.cli import plan

if __name__ == "__main__":
  plan.run()
