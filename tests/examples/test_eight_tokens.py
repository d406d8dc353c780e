"""The examples run, and print what their prose says."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_eight_tokens_over_two_devices_by_hand():
  """Its own assertions hold: by hand, by the layer, and by the layer on two devices.

  Printed is what device 0 sends to device 1 (token 5 and three empty slots), what comes
  back (three times as large, since expert 2 computed it), and the dropped token.
  """
  done = subprocess.run(
    [sys.executable, "-m", "examples.eight_tokens_two_devices"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"},
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
  assert "device 0, token 2: expert 0, dropped, gate 0.0" in lines
  assert "on device 0, for device 1, expert 2: 105 -" in lines
  assert "on device 0, from device 1, expert 2: 315 -" in lines
  assert "device 0, token 2: 0.00 0.00 0.00 0.00 0.00" in lines
  assert "tokens per expert: 3 2 1 1, one of eight dropped" in lines
