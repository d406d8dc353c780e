"""What a damaged checkpoint prints: the lines that help, and nothing around them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.checkpoint.manager import DIRECTORY
from tests.checkpoint import test_manager as helpers

ROOT = Path(__file__).parents[2]

RESTORE = """
import gc, sys
from pathlib import Path
from absl import logging
from moejax.errors import UserError
from moejax.checkpoint import manager as checkpoint, inspect as checkpoint_inspect
from tests.checkpoint import test_manager as helpers

state = helpers.make_state()
for workdir in map(Path, sys.argv[1:]):
  try:
    checkpoint_inspect.inspect(workdir)
  except UserError as error:
    assert "is damaged" in str(error)
  checkpoint.restore_params(workdir)
  checkpoints = helpers.open_checkpoints(workdir, warn=logging.warning)
  restored, meta = checkpoints.restore(helpers.shapes(state))
  assert meta["step"] == 1
  checkpoints.close()
  gc.collect()
print("all restored")
"""

DAMAGE = {
  "deleted": lambda path: path.unlink(),
  "empty": lambda path: path.write_bytes(b""),
  "garbage": lambda path: path.write_bytes(bytes(range(256)) * 9),
  "nested": lambda path: path.write_bytes(b"[" * 100_000),
  "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_prints_its_own_lines_and_no_traceback(tmp_path, how):
  """One process, its whole stderr, each kind of file: one line a reading, no more.

  Orbax starts all reads together and leaves the others where they are when one fails;
  TensorStore, asyncio and the collector would each report every one of them.
  """
  helpers.save_steps(tmp_path / "good", [1, 2])
  step = tmp_path / "good" / DIRECTORY / "2"
  needed = ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt"]
  needed += ["state/array_metadatas/process_0"]
  files = [p.relative_to(step) for p in step.glob("state/d/*")]
  largest = max(step.glob("state/ocdbt*/d/*"), key=lambda p: p.stat().st_size)
  runs = []
  for file in [*needed, *files, largest.relative_to(step)]:
    runs.append(tmp_path / f"run_{len(runs)}")
    shutil.copytree(tmp_path / "good", runs[-1])
    DAMAGE[how](runs[-1] / DIRECTORY / "2" / file)
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    [sys.executable, "-c", RESTORE, *map(str, runs)],
    capture_output=True,
    text=True,
    env=environment,
    timeout=300,
  )
  lines = done.stderr.splitlines()
  assert done.returncode == 0 and "all restored" in done.stdout, done.stderr[-4000:]
  for run in runs:
    here = [line for line in lines if f"{run}/" in line]
    lines = [line for line in lines if line not in here]
    # Parameters alone can be read without some of the notes.
    *by_reader, by_run = here
    assert len(by_reader) <= 1, here
    assert all("checkpoint is damaged, step 2: " in line for line in by_reader)
    assert f"checkpoint {run / DIRECTORY / '2'} is damaged (" in by_run
    assert "set aside as 2.damaged, using step 1" in by_run
  assert not lines
