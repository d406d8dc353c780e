"""What every test runs under: eight fake devices, and nothing implicit.

Set before anything builds an array: eight CPU devices, so that every sharding is
exercised; dtype promotion is an error and so is rank promotion, because both
hide mistakes that a large run pays for; and every jaxtyping signature of
`moejax` is checked at run time, shapes included.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# The fake devices share few cores: one thread each is fastest and most even.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The key by which evaluation knows the tests' runs is none of the user's.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="moejax_tests_")
# The programs that tests start write bytecode, as they do at a user's.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Tests compile far more than they compute: two to three times faster so.
os.environ["XLA_FLAGS"] = " ".join(
  (os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0")
).strip()
# Each test process has one core, which compiles a program in one piece sooner.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# The older emitters compile twice as fast. Later versions have none and refuse the flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# A program that one test compiled is loaded by the others, by what they start, and by
# the other test processes, which inherit the name of the directory.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  compiled = tempfile.mkdtemp(prefix="moejax_tests_xla_")
  atexit.register(shutil.rmtree, compiled, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
  # Others are compiled as quickly as they are read.
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

from tests import thorough

NUM_DEVICES = 8

jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def modules_with_shapes() -> list[str]:
  """Returns the modules of moejax that name an array's shape.

  Checking every call of the others, which compute with Python's numbers, would take
  the tests a tenth of their time.
  """
  root = pathlib.Path(__file__).resolve().parent.parent
  found = []
  for path in sorted((root / "moejax").rglob("*.py")):
    if "jaxtyping" in path.read_text(encoding="utf-8"):
      parts = path.relative_to(root).with_suffix("").parts
      found.append(".".join(parts).removesuffix(".__init__"))
  return found


# Must precede the first import of moejax, by a test or by another hook. The tower:
# an int is accepted where a float is declared, as Python's typing rules have it.
TYPE_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(modules_with_shapes(), TYPE_CHECKER)

# Grain's worker processes refuse to start while absl's flags are unparsed.
flags.FLAGS.mark_as_parsed()


# Before pytest selects by markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  whole_files = not any("::" in argument for argument in config.args)
  thorough.mark(items, whole_files=whole_files)


def pytest_collection_finish():
  """Spares the garbage collector the thousands of objects that every test keeps."""
  gc.collect()
  gc.freeze()
