"""Two real processes save and restore one state; one process reads it back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.train.checkpoint import DIRECTORY, restore_params
from tools.launch_local import free_port

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
from moejax.train.checkpoint import Checkpointer

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
