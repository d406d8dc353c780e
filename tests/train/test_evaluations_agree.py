"""One loss of one text: while training, after the last step, and by the program."""

import json
import os
import subprocess
import sys

import jax
import pytest

from moejax import data
from moejax.checkpoint import manager as checkpoint
from moejax.config import MeshConfig
from moejax.evaluate import groups, perplexity
from moejax.run import writers
from moejax.sharding.mesh import make_mesh
from moejax.train import loop
from tests.train.conftest import tiny_config

FACTOR = 0.5
"""Half of all assignments are dropped, so that it matters which."""

SEQUENCE = 32
BATCH = 8


def run_config(cache_dir, group_size: int, **train):
  config = tiny_config(num_steps=1, eval_every=1, eval_batches=0, **train)
  config.data.cache_dir = cache_dir
  config.moe.eval_capacity_factor = FACTOR
  config.moe.group_size = group_size
  return config


def by_program(workdir, cache, *flags: str, devices: int = 1):
  """What `experiments.evaluate` finds with these flags, and what it prints."""
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_NUM_CPU_DEVICES": str(devices),
  }
  command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={workdir}", *flags]
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, check=False, timeout=300
  )
  assert done.returncode == 0, done.stderr
  return json.loads((workdir / "eval_1_validation.json").read_text()), done.stdout


def numbers(values) -> list[float]:
  """Loss, drops and how many tokens they are of."""
  found = values["results"][0] if "results" in values else values
  return [found["loss"], found["dropped_fraction"]]


@pytest.mark.parametrize(
  ("group_size", "flags"),
  [
    pytest.param(SEQUENCE // 2, ["--batch_size=3"], marks=pytest.mark.slow),
    (0, ["--batch_size=3"]),
    pytest.param(2 * SEQUENCE, [], marks=pytest.mark.slow),
    pytest.param(-1, [], marks=pytest.mark.slow),
  ],
  ids=["part", "one", "two", "batch"],
)
def test_the_same_text_has_the_same_loss_and_drops_everywhere(
  cache_dir, compilation_cache, tmp_path, group_size, flags
):
  """While training, at the end, by the program, in other batches, on 8 devices.

  Under a capacity that drops half, with groups of half a sequence, one, two, and the
  microbatch (4 sequences: accumulation is 2).
  """
  config = run_config(cache_dir, group_size, accumulation=2)
  final = loop.train(config, tmp_path, devices=jax.devices()[:1])
  [line] = writers.read(tmp_path / writers.METRICS_FILE)
  expected = pytest.approx(numbers(final), rel=1e-5)
  assert final["tokens"] == line["validation_num_tokens"]
  assert [
    line["validation_loss"],
    line["validation_dropped_fraction"],
  ] == expected
  assert 0.2 < final["dropped_fraction"] < 0.8

  found, told = by_program(tmp_path, compilation_cache, *flags)
  assert numbers(found) == expected and found["tokens"] == final["tokens"]
  assert "raised" not in told

  mesh = make_mesh(MeshConfig(data=4, expert=2), jax.devices())
  params, _, _ = checkpoint.restore_params(tmp_path, 1)
  dataset = data.load(config.data)
  elsewhere = perplexity.evaluate(
    groups.make_model(config, dataset.tokenizer.vocab_size),
    params,
    dataset,
    split="validation",
    mesh=mesh,
    batch_size=groups.batch_size(config, mesh, (FACTOR,)),
    capacity_factors=(FACTOR,),
  )
  assert numbers(elsewhere) == expected


@pytest.mark.slow
def test_a_batch_size_that_would_cut_a_group_is_raised_and_that_is_said(
  cache_dir, compilation_cache, tmp_path
):
  """Three sequences hold no two groups of two: four do, with the same loss."""
  config = run_config(cache_dir, 2 * SEQUENCE)
  config.train.sample = config.train.report = False
  final = loop.train(config, tmp_path, devices=jax.devices()[:1])
  found, told = by_program(tmp_path, compilation_cache, "--batch_size=3")
  assert "--batch_size=3 is raised to 4" in told
  assert numbers(found) == pytest.approx(numbers(final), rel=1e-5)


@pytest.mark.parametrize(
  ("group_size", "exchange", "factors", "wanted", "expected"),
  [
    # Sequences of 32 tokens, microbatches of 4 sequences, 8 devices.
    (0, "auto", (1.0,), 0, 8),  # a group for each device
    (0, "auto", (1.0,), 9, 16),
    (16, "auto", (1.0,), 0, 8),  # two for each
    (64, "auto", (1.0,), 0, 16),  # one of two sequences for each
    (96, "auto", (1.0,), 0, 24),
    (48, "auto", (1.0,), 0, 24),  # two of 1.5 sequences for each
    (-1, "auto", (1.0,), 0, 32),  # a microbatch for each
    (-1, "gspmd", (1.0,), 0, 8),  # shared, as in training
    (-1, "auto", (None,), 0, 8),  # dropless: no groups
    (-1, "auto", (None, 2.0), 0, 32),
  ],
)
def test_a_batch_holds_whole_groups_on_every_device(
  cache_dir, group_size, exchange, factors, wanted, expected
):
  """By hand: the least multiple of both, at least what was asked for."""
  config = run_config(cache_dir, group_size, accumulation=2)
  config.moe.exchange = exchange
  mesh = make_mesh(MeshConfig(data=4, expert=2), jax.devices())
  assert groups.batch_size(config, mesh, factors, wanted) == expected


def test_a_dense_twin_has_no_groups(cache_dir):
  """Whatever the fields of its sparse sister say."""
  config = run_config(cache_dir, -1)
  config.moe.dense_twin = True
  mesh = make_mesh(MeshConfig(data=4, expert=2), jax.devices())
  assert groups.batch_size(config, mesh, (1.0,)) == BATCH
