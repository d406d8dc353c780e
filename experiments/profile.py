"""For a clone: runs moejax/cli/profile.py, as `moejax profile` does."""

from moejax.cli import profile

if __name__ == "__main__":
  profile.run()
