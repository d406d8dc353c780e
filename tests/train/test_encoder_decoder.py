"""A whole run of an encoder-decoder: trained, resumed, evaluated, loaded, generated."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moejax.config import MeshConfig
from moejax.errors import UserError
from moejax.evaluate.load import load_run
from moejax.train.loop import train
from tests.data.conftest import small_config
from tests.models.test_encoder_decoder import small


def tiny(cache, **changes):
  config = small()
  config.model.num_layers = config.model.encoder_layers = 2
  config.moe.encoder_every = 0
  config.data = small_config(
    cache,
    objective="span_corruption",
    sequence_length=32,
    num_sentinels=8,
  )
  config.train = dataclasses.replace(
    config.train,
    num_steps=4,
    eval_every=0,
    checkpoint_every=2,
    eval_batches=1,
    sample=False,
    report=False,
    tensorboard=False,
    **changes,
  )
  return config


@pytest.mark.slow
def test_a_run_stopped_half_way_ends_bit_for_bit_where_an_uninterrupted_one_does(
  tmp_path,
):
  """On a mesh of 8; bits per byte are absent, and the loss is of targets."""
  config = tiny(tmp_path / "cache", log_every=1)
  config.mesh = MeshConfig(data=2, fsdp=2, expert=2)
  whole = train(config, tmp_path / "whole")
  half = dataclasses.replace(config.train, num_steps=2)
  train(dataclasses.replace(config, train=half), tmp_path / "parts")
  again = train(config, tmp_path / "parts")
  assert whole["loss"] == again["loss"]
  evaluation = json.loads((tmp_path / "whole" / "eval.json").read_text())
  assert evaluation["bits_per_byte"] is None
  assert "baselines" not in evaluation
  one, other = (load_run(tmp_path / name) for name in ("whole", "parts"))
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
  read, ids = [[1, 2, one.model.vocab_size - 1]], [[256, 5]]
  assert one.logits(read, decoder_tokens=ids).shape == (1, 2, 264 + 8)
  with pytest.raises(UserError, match="needs decoder_tokens too"):
    one.logits(read)
  with pytest.raises(UserError, match="1 rows of tokens and 2 of decoder_tokens"):
    one.logits(read, decoder_tokens=ids * 2)
