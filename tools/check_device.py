"""For a clone: runs moejax/cli/check_device.py, as `moejax check-device` does."""

from moejax.cli import check_device

if __name__ == "__main__":
  check_device.run()
