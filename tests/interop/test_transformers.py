"""Against Transformers itself, in many variants of each architecture.

Needs torch and transformers (extra hf-test), in this Python or in another one:

  MOEJAX_TRANSFORMERS_PYTHON=PYTHON pytest tests/interop/test_transformers.py
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
from tests.interop.folders import ARCHITECTURES, golden
from tests.interop.transformers_script import VARIANTS

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("MOEJAX_TRANSFORMERS_PYTHON", sys.executable)

pytestmark = pytest.mark.slow


def script(command: str, folder: pathlib.Path) -> None:
  arguments = [PYTHON, "-m", "tests.interop.transformers_script", command, str(folder)]
  environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
  check = "import torch, transformers"
  if subprocess.run([PYTHON, "-c", check], capture_output=True).returncode:
    pytest.skip(f"{PYTHON} has no torch and transformers")
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
