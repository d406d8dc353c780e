"""For a clone: runs moejax/cli/fit_law.py, as `moejax fit-law` does."""

from moejax.cli import fit_law

if __name__ == "__main__":
  fit_law.run()
