"""Our attention inside published models gives their recorded logits."""

import json

import numpy as np
import pytest
from flax import nnx

from moejax.layers.block import make_attention
from moejax.models.shell import Shell
from tests.layers import published

MODELS = (
  "deepseek_v2_a",  # latent, queries of full rank, interleaved
  "deepseek_v3_a",  # latent, queries of low rank, YaRN with both mscales
  "flex_olmo_a",  # grouped queries, norm over the full width
  "glm4_moe_a",  # half a head rotates, biases, norm per head
  "gpt_oss_a",  # sinks, alternate windows, output bias, YaRN without truncation
  "granitemoe_a",  # a scale of the logits
  "olmoe_a",  # norm over the full width
)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_logits(name):
  """Logits to 1e-4 and loss to 1e-5; the rest of the model is numpy in float64.

  The models are random, made by Hugging Face Transformers 5.24.0 in float32; norms,
  biases and sinks are far from their defaults, so none can be left out unnoticed.
  """
  folder = published.FOLDER / name
  config = json.loads((folder / "config.json").read_text())
  tensors = published.read_tensors(folder / "model.safetensors")
  golden = np.load(folder / "golden.npz")
  ours = published.attention_config(config)
  shell = Shell(lambda key: make_attention(ours, nnx.Rngs(params=key)))
  ids = golden["input_ids"]
  got = published.logits(config, tensors, ids, shell)
  np.testing.assert_allclose(got, golden["logits"], atol=1e-4, rtol=0)
  shifted = got[:, :-1] - got[:, :-1].max(-1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  loss = -np.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()
  np.testing.assert_allclose(loss, golden["lm_loss"], rtol=1e-5)
