"""Several real processes save and restore one state; one process reads it back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.checkpoint.manager import DIRECTORY, restore_params
from moejax.checkpoint.read import read_meta
from moejax.cli import launch_local
from moejax.cli.launch_local import free_port
from tests.checkpoint import layouts
from tests.checkpoint.test_layouts import W_IN, change

ROOT = Path(__file__).parents[2]

_SCRIPT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jax.numpy as jnp
from pathlib import Path
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moejax.config import Config
from moejax.checkpoint.manager import Checkpointer

mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
split = NamedSharding(mesh, P("expert", "data"))
shapes = {
  "params": {"w": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=split)},
  "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P())),
}
shardings = jax.tree.map(lambda s: s.sharding, shapes)
make = lambda: {"params": {"w": jnp.arange(32.0).reshape(4, 8)}, "step": jnp.int32(3)}
state = jax.jit(make, out_shardings=shardings)()
said = []
checkpoints = Checkpointer(
  Path(sys.argv[3]) / "checkpoints", keep_last=3, keep_best=0, config=Config(),
  metadata={}, logical_axes={"w": ("expert", "width")}, warn=said.append)
for step in (1, 2):
  assert checkpoints.save(step, state, position={"step": step})
  assert checkpoints.wait()
if jax.process_index() == 0:
  (checkpoints.directory / "2" / "meta" / "metadata").unlink()
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("damaged")
restored, meta = checkpoints.restore(shapes)
assert meta["step"] == 1 and len(said) == 1 and "2.damaged" in said[0], (meta, said)
same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.all(x == y), a, b))
assert all(bool(x) for x in jax.tree.leaves(same(restored, state)))
checkpoints.close()
print("done", flush=True)
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_agree_on_damage(tmp_path):
  """Each holds half; the sums add up, both pass over the damaged step, one reads all."""
  address = f"127.0.0.1:{free_port()}"
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _SCRIPT, address, str(index), str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for index in range(2)
  ]
  for process in processes:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "done" in out, err[-3000:]
  params, _, meta = restore_params(tmp_path)
  assert meta["step"] == 1
  np.testing.assert_array_equal(params["w"], np.arange(32.0).reshape(4, 8))
  assert len(meta["leaves"]["params.w"]["experts"]) == 4
  names = sorted(p.name for p in (tmp_path / DIRECTORY).iterdir())
  assert names == ["1", "2.damaged"]


def launch(tmp_path: Path, script: str, *args: object) -> int:
  """Two processes with four devices each."""
  command = [sys.executable, "-c", script, *(str(arg) for arg in args)]
  flags = ["--devices_per_process=4", f"--logs={tmp_path}", "--", *command]
  return launch_local.main(flags)


_ACROSS = """
import contextlib
import sys
from pathlib import Path
from moejax.launch import distributed
stack = contextlib.ExitStack()
stack.enter_context(distributed.joined())
from tests.checkpoint import layouts

source, goal = map(Path, sys.argv[1:])
for mesh in ("data 8", "expert 2 x fsdp 2 x tensor 2"):
  state = layouts.resume(source, mesh)
  step = int(state["step"])
  assert step == layouts.STEP
  layouts.assert_whole(state, mesh)
checkpoints = layouts.open_checkpoints(goal, mesh)
assert checkpoints.save(step, state, position={"step": step})
assert checkpoints.close()
stack.close()
"""


@pytest.mark.slow
def test_another_number_of_processes_restores_the_same_bits(tmp_path):
  """One process saves, two restore on two meshes and save, one restores again.

  Every part is compared on the device where it lies, and the checksums of both
  checkpoints are the same. Both processes wrote arrays.
  """
  one, two = tmp_path / "one", tmp_path / "two"
  layouts.save(one, "expert 4 x data 2")
  assert launch(tmp_path, _ACROSS, one, two) == 0
  for mesh in ("1", "fsdp 8"):
    state = layouts.restore(two, mesh, warn=pytest.fail)
    layouts.assert_whole(state, mesh)
  steps = [path / DIRECTORY / str(layouts.STEP) for path in (one, two)]
  first, second = (read_meta(step)["leaves"] for step in steps)
  assert first == second
  for index in range(2):
    files = (steps[1] / "state" / f"ocdbt.process_{index}").rglob("*")
    assert sum(f.stat().st_size for f in files if f.is_file()) > 100_000


_OWN_DISK = """
import contextlib
import sys
from pathlib import Path
import jax
from moejax.launch import distributed
stack = contextlib.ExitStack()
stack.enter_context(distributed.joined())
from moejax.errors import UserError
from tests.checkpoint import layouts

for case in sys.argv[1].split(","):
  mesh, name = case.split(":")
  workdir = Path(sys.argv[2 + jax.process_index()]) / name
  try:
    layouts.resume(workdir, mesh)
    print("said: restored", flush=True)
  except UserError as error:
    print("said:", " ".join(str(error).split()), flush=True)
stack.close()
"""


@pytest.mark.slow
def test_a_process_that_reads_something_else_is_found_out(tmp_path, capfd):
  """Process 1 has a disk of its own, on which a checkpoint has changed.

  In parts that it alone holds, in copies of what process 0 holds too, and in a file
  that it cannot read. Each time both refuse, and neither waits for the other.
  """
  good, bad = tmp_path / "0", tmp_path / "1"
  layouts.save(good / "own", "expert 8")
  shutil.copytree(good / "own", bad / "own")

  def swap(w):
    w[0, [5, 6]] = w[0, [6, 5]]

  change(bad / "own", f"params.{W_IN}", swap)
  for root in (good, bad):
    for name in ("copy", "file"):
      shutil.copytree(root / "own", root / name)
  shutil.rmtree(bad / "file" / DIRECTORY / str(layouts.STEP) / "state" / "d")
  cases = "expert 8:own,data 8:copy,data 8:file"
  assert launch(tmp_path, _OWN_DISK, cases, good, bad) == 0
  texts = capfd.readouterr().out, (tmp_path / "process_1.log").read_text()
  first, second = (
    [line for line in text.splitlines() if line.startswith("said:")] for text in texts
  )
  changed = (
    f"params.{W_IN} changed: expert 5 of layer 0 holds what was expert 6 of layer 0"
  )
  apart = f"params.{W_IN} is not the same in all processes: expert 5 of layer 0, expert 6"
  for said in (first, second):
    assert len(said) == 3
    assert changed in said[0] and apart in said[1]
  assert "another process found it damaged" in first[2]
  assert "its arrays cannot be read" in second[2]
