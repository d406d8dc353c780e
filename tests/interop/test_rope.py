"""Rotary positions of config.json at the edges of what Transformers 5.24.0 accepts.

Each case was compared with the rotary module of Transformers; here by hand.
"""

import numpy as np
import pytest

from moejax.config.check import validate
from moejax.layers.rotary import make_rotary, scaled_frequencies
from tests.interop.test_absent_keys import read

PLAIN = 10_000.0 ** (-np.arange(5) / 5)
"""Frequencies of a head of 10 entries."""


def rotary(rope, **given):
  config = read("qwen3_moe", ("rope_scaling",), rope_parameters=rope, **given)
  validate(config)
  return make_rotary(config.model)


def test_a_factor_below_one_raises_frequencies_and_leaves_the_temperature():
  """0.1 ln(factor) + 1 is 1 there, as in the authors' code of YaRN."""
  linear = rotary({"rope_type": "linear", "factor": 0.5})
  np.testing.assert_allclose(np.asarray(linear.frequencies), 2 * PLAIN)
  yarn = {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64}
  assert rotary(yarn).factor == 1.0


def test_yarn_of_factor_one_may_have_a_temperature():
  """The frequencies are those without scaling."""
  yarn = {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5}
  found = rotary(yarn, max_position_embeddings=64)
  np.testing.assert_allclose(np.asarray(found.frequencies), PLAIN)
  assert found.factor == 1.5


def test_the_original_context_beside_the_dict_wins():
  """Unlike rope_theta, of which that in the dict wins."""
  yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000.0}
  given = {"original_max_position_embeddings": 32, "rope_theta": 10_000.0}
  both = read(
    "qwen3_moe",
    rope_parameters=yarn | {"original_max_position_embeddings": 64},
    **given,
  )
  assert (both.model.rope_original, both.model.rope_theta) == (32, 1000.0)
  plain = {"rope_type": "default"}
  assert read("qwen3_moe", rope_parameters=plain, **given).model.rope_original == 0


def test_null_does_not_truncate():
  """Absent means true, and null false: what Python makes of it there."""
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
  for given, wanted in (({}, True), ({"truncate": None}, False)):
    model = read("qwen3_moe", rope_parameters=yarn | given).model
    assert model.rope_truncate is wanted
    assert len(scaled_frequencies(model, 10)) == 5


@pytest.mark.parametrize(
  ("name", "tokens"),
  [("mixtral", 131_072), ("qwen3_moe", 32_768), ("olmoe", 4096), ("granitemoe", 2048)],
)
def test_an_absent_context_is_that_of_the_class(name, tokens):
  """The defaults of Transformers; evaluation uses 1,024 tokens of it at most."""
  config = read(name, ("max_position_embeddings",))
  assert config.model.max_position == tokens
  assert config.data.sequence_length == 1024
