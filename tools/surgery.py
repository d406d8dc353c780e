"""For a clone: runs moejax/cli/surgery.py, as `moejax surgery` does."""

from moejax.cli import surgery

if __name__ == "__main__":
  surgery.run()
