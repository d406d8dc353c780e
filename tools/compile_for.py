"""For a clone: runs moejax/cli/compile_for.py, as `moejax compile-for` does."""

from moejax.cli import compile_for

if __name__ == "__main__":
  compile_for.run()
