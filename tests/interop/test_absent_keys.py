"""A key that config.json leaves out means what the class of Transformers 5.24.0 means."""

import json
import pathlib

import pytest

from moejax.errors import UserError
from moejax.interop import architecture as architectures
from moejax.interop.published import read_config

GOLDENS = pathlib.Path(__file__).parents[1] / "golden/lm"


def read(name, drop=(), **given):
  values = json.loads((GOLDENS / f"{name}_a" / "config.json").read_text())
  values = {k: v for k, v in values.items() if k not in drop} | given
  found = architectures.get(values["model_type"], "config.json")
  return read_config(found, values, "config.json")


def test_deepseek_v3():
  """8 groups of which 4 count, one shared expert, three dense layers, scale 2.5."""
  drop = ("n_group", "topk_group", "n_shared_experts", "routed_scaling_factor")
  moe = read("deepseek_v3", (*drop, "first_k_dense_replace"), num_hidden_layers=5).moe
  assert moe.router_options["num_expert_groups"] == 8
  assert moe.router_options["num_selected_groups"] == 4
  assert (moe.num_shared, moe.dense_prefix, moe.gate_scale) == (1, 3, 2.5)


def test_deepseek_v2_and_glm4_moe():
  drop = ("n_group", "topk_group", "n_shared_experts", "routed_scaling_factor")
  moe = read("deepseek_v2", (*drop, "first_k_dense_replace")).moe
  assert (moe.num_shared, moe.dense_prefix, moe.gate_scale) == (2, 0, 1.0)
  moe = read("glm4_moe", (*drop, "first_k_dense_replace")).moe
  assert (moe.num_shared, moe.dense_prefix, moe.gate_scale) == (1, 1, 1.0)
  assert "num_expert_groups" not in moe.router_options


@pytest.mark.parametrize(
  ("name", "key", "harmless", "harmful"),
  [
    ("qwen3_moe", "use_qk_norm", True, False),
    ("qwen3_moe", "qkv_bias", False, True),
    ("qwen3_moe", "shared_expert_intermediate_size", 0, 34),
    ("mixtral", "attention_bias", False, True),
    ("glm4_moe", "mlp_bias", False, True),
    ("deepseek_v3", "mlp_bias", False, True),
    ("gpt_oss", "swiglu_limit", 7, 6),
  ],
)
def test_a_key_that_says_what_is_so_is_read_and_another_value_refused(
  name, key, harmless, harmful
):
  """Published files hold such keys."""
  assert read(name, **{key: harmless}) == read(name)
  with pytest.raises(UserError, match=key):
    read(name, **{key: harmful})
