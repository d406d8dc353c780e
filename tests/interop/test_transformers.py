"""Against Transformers itself, in many variants of each architecture.

`make test-hf` runs these. They need torch and transformers (extra hf-test), in this
Python or in another one, MOEJAX_TRANSFORMERS_PYTHON.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.interop import exporting
from moejax.interop.published import open_folder
from tests.interop import random_variants
from tests.interop.folders import ARCHITECTURES, golden
from tests.interop.transformers_script import VARIANTS

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("MOEJAX_TRANSFORMERS_PYTHON", sys.executable)

pytestmark = [pytest.mark.hf, pytest.mark.slow]


def script(command: str, folder: pathlib.Path, *kinds: str) -> None:
  module = "tests.interop.transformers_script"
  arguments = [PYTHON, "-m", module, command, str(folder), *kinds]
  environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", autouse=True)
def transformers() -> None:
  check = "import torch, transformers"
  if subprocess.run([PYTHON, "-c", check], capture_output=True).returncode:
    pytest.fail(f"{PYTHON} has no torch and transformers (extra hf-test)")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("variants")
  script("make", folder)
  return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_the_logits_of_transformers(name, made):
  """Other options than the goldens: tied, windows, scalings, groups, biases."""
  published, wanted = open_folder(made / name), np.load(made / name / "golden.npz")
  ids = jnp.asarray(wanted["input_ids"], jnp.int32)
  run = jax.jit(lambda params: published.model(params, ids).logits)
  logits = run(published.loader.params())
  np.testing.assert_allclose(logits, wanted["logits"], atol=1e-4, rtol=0)


def test_transformers_loads_every_export_with_the_same_logits(made, tmp_path):
  """All variants and goldens, imported and exported again: no bit of a logit differs."""
  sources = [made / name for name in VARIANTS] + [golden(name) for name in ARCHITECTURES]
  for source in sources:
    published, out = open_folder(source), tmp_path / source.name
    exporting.export(published.config, published.model, published.loader.params(), out)
    shutil.copyfile(source / "golden.npz", out / "golden.npz")
  script("load", tmp_path)
  for source in sources:
    loaded = np.load(tmp_path / source.name / "loaded.npz")["logits"]
    wanted = np.load(source / "golden.npz")["logits"]
    np.testing.assert_allclose(loaded, wanted, atol=1e-5, rtol=0, err_msg=source.name)


@pytest.mark.parametrize("kind", random_variants.ARCHITECTURES)
def test_random_configs_agree_in_both_directions(kind, tmp_path):
  """Sizes that coincide, group limits, biases, ties, windows, rope, capacities: our
  logits are those of Transformers, and its own are the same again from our export."""
  made, out = tmp_path / "made", tmp_path / "out"
  script("make", made, kind)
  for source in sorted(made.iterdir()):
    published, wanted = open_folder(source), np.load(source / "golden.npz")
    params = published.loader.params()
    logits = logits_of(published, params, wanted)
    close(logits, wanted["logits"], 1e-4, source.name)
    exporting.export(published.config, published.model, params, out / source.name)
    shutil.copyfile(source / "golden.npz", out / source.name / "golden.npz")
  script("load", out)
  for folder in out.iterdir():
    loaded, wanted = np.load(folder / "loaded.npz"), np.load(folder / "golden.npz")
    close(loaded["logits"], wanted["logits"], 1e-5, folder.name)


def logits_of(published, params, arrays):
  ids, read = jnp.asarray(arrays["input_ids"], jnp.int32), {}
  if "decoder_input_ids" in arrays:
    read = {"encoder_tokens": ids}
    ids = jnp.asarray(arrays["decoder_input_ids"], jnp.int32)
  run = jax.jit(
    lambda params: published.model(params, ids, **read).logits,
    # Compiles twice as fast, and runs once.
    compiler_options={"xla_backend_optimization_level": 0},
  )
  return run(params)


def close(found, wanted, tolerance: float, name: str) -> None:
  scale = max(1.0, float(np.abs(wanted).max()) / 10)
  np.testing.assert_allclose(found, wanted, atol=tolerance * scale, rtol=0, err_msg=name)
