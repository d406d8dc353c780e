"""What `import moejax` offers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.checkpoint import manager as checkpoint
from moejax.errors import UserError
from moejax.train import loop
from tests.train.conftest import cache_dir, compilation_cache, tiny_config

__all__ = ["cache_dir", "compilation_cache"]
"""Fixtures, shared with the tests of training."""


def test_the_package_alone_imports_neither_jax_nor_flax():
  code = (
    "import sys, moejax\n"
    "assert set(moejax.__all__) == set(dir(moejax)), dir(moejax)\n"
    "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_name_is_there_and_no_other():
  assert all(getattr(moejax, name) is not None for name in moejax.__all__)
  with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
    _ = moejax.Trainer  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("factor", [None, 1.0])
def test_a_run_gives_the_logits_of_its_own_model(
  factor, cache_dir, compilation_cache, tmp_path
):
  """At any of its steps, with its tokenizer, at its own capacity in evaluation."""
  config = tiny_config(num_steps=2, checkpoint_every=1)
  config.data.cache_dir, config.moe.eval_capacity_factor = cache_dir, factor
  config.train.sample = config.train.report = False
  loop.train(config, tmp_path, devices=jax.devices()[:1])
  run = moejax.load_run(tmp_path)
  assert (run.step, run.config.moe.num_experts) == (2, 4)
  assert run.tokenizer is not None
  ids = run.tokenizer.encode("def main():\n  return the words" * 4)[:64]
  tokens = np.asarray(ids, np.int32).reshape(2, -1)
  logits = run.logits(tokens)
  np.testing.assert_array_equal(logits, run.logits(tokens.tolist()))
  assert logits.shape == (*tokens.shape, run.model.vocab_size)
  assert logits.dtype == jnp.float32
  params, _, _ = checkpoint.restore_params(tmp_path, 2)
  direct = run.model(params, jnp.asarray(tokens), capacity_factor=factor).logits
  np.testing.assert_allclose(logits, direct, rtol=1e-5, atol=1e-5)
  other = run.model(params, jnp.asarray(tokens), capacity_factor=0.25).logits
  assert np.abs(np.asarray(logits) - np.asarray(other)).max() > 1e-3
  first = moejax.load_run(tmp_path, step=1)
  assert first.step == 1
  assert np.abs(np.asarray(first.logits(tokens)) - np.asarray(logits)).max() > 1e-4
  with pytest.raises(UserError, match="vocabulary has ids from 0"):
    run.logits(tokens + 10_000)
  with pytest.raises(UserError, match="step=7"):
    moejax.load_run(tmp_path, step=7)
