"""A config.json with one wrong value: refused in one line, or a config like any other."""

import json

import pytest

from moejax.config import Config
from moejax.config.check import validate
from moejax.errors import UserError
from moejax.interop import architecture as architectures
from moejax.interop.published import read_config
from tests.interop.folders import ARCHITECTURES, golden

VALUES = (None, 0, -1, 1.5, "x", [], {}, [["a"]], True, 10**12)
ROPES = (
  {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
  {"rope_type": "linear", "factor": 2.0},
  {"full_attention": {"rope_theta": 5.0}},
)


def read(values) -> Config:
  found = architectures.get(values["model_type"], "config.json")
  config = read_config(found, values, "config.json")
  validate(config)
  return config


def altered(values):
  """Yields copies with one key gone, or of another value."""
  for key in set(values) - {"model_type"}:
    yield {name: value for name, value in values.items() if name != key}
    for value in VALUES:
      yield values | {key: value}
  for scaling in ROPES:
    yield values | {"rope_parameters": scaling}
    for key in scaling:
      for value in VALUES:
        yield values | {"rope_parameters": scaling | {key: value}}


def slow(name):
  return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "name", ["gpt_oss", *(slow(n) for n in (*ARCHITECTURES, "switch_transformers"))]
)
def test_one_wrong_value_is_refused_in_one_line_or_read(name):
  """No value of any key ends in another error than the one that names the file."""
  values = json.loads((golden(name) / "config.json").read_text())
  refused = 0
  for changed in altered(values):
    try:
      read(changed)
    except UserError as e:
      refused += 1
      assert ("\n" not in str(e) and "config.json" in str(e)) or "--config." in str(e)
  assert refused > 50


@pytest.mark.parametrize(
  ("name", "key", "value", "field", "wanted"),
  [
    ("deepseek_v3", "rope_interleave", None, "model.rope_interleaved", False),
    ("deepseek_v3", "norm_topk_prob", None, "moe.renormalize", "none"),
    ("gpt_oss", "rope_parameters", {}, "model.rope_scaling", "none"),
    ("gpt_oss", "rope_parameters", {}, "model.rope_theta", 150_000.0),
    ("gpt_oss", "rope_parameters", None, "model.rope_factor", 32.0),
    ("mixtral", "sliding_window", None, "model.sliding_window", 0),
    ("granitemoe", "attention_multiplier", ..., "model.attention_scale", 1.0),
    ("mixtral", "num_key_value_heads", None, "model.num_kv_heads", 6),
    ("mixtral", "num_key_value_heads", ..., "model.num_kv_heads", 8),
  ],
)
def test_null_and_nothing_mean_what_the_class_means(name, key, value, field, wanted):
  """By the classes of Transformers 5.24.0; `...` is an absent key."""
  values = json.loads((golden(name) / "config.json").read_text())
  if key == "num_key_value_heads":
    values["num_attention_heads"] = 6 if value is None else 8
    values["head_dim"] = 4
  if value is ...:
    del values[key]
  else:
    values[key] = value
  section, leaf = field.split(".")
  assert getattr(getattr(read(values), section), leaf) == wanted


def test_a_window_that_is_null_is_none_where_windows_are_used():
  """Qwen3-MoE takes its class's 4,096 only if the key is absent."""
  values = json.loads((golden("qwen3_moe") / "config.json").read_text())
  values |= {"use_sliding_window": True, "sliding_window": None}
  assert read(values).model.sliding_window == 0
  del values["sliding_window"]
  assert read(values).model.sliding_window == 4096


@pytest.mark.parametrize("name", [*ARCHITECTURES, "switch_transformers"])
def test_every_golden_is_read(name):
  """Stricter reading refuses nothing that Transformers wrote."""
  read(json.loads((golden(name) / "config.json").read_text()))


@pytest.mark.parametrize(
  ("name", "changes", "word"),
  [
    ("granitemoe", {"attention_multiplier": 0}, "attention_multiplier=0"),
    ("granitemoe", {"logits_scaling": None}, "logits_scaling=None"),
    ("gpt_oss", {"sliding_window": None}, "sliding_attention"),
    ("mixtral", {"sliding_window": 0}, "sliding_window=0"),
    ("deepseek_v3", {"head_dim": 4}, "head_dim=4"),
    ("gpt_oss", {"layer_types": [["full_attention"]] * 3}, "layer_types"),
    (
      "mixtral",
      {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
      "original_max_position_embeddings=0",
    ),
  ],
)
def test_values_that_transformers_would_compute_otherwise_are_named(name, changes, word):
  """Each was read in silence, or ended in another error."""
  values = json.loads((golden(name) / "config.json").read_text())
  with pytest.raises(UserError, match=word.replace("[", r"\[")):
    read(values | changes)
