"""Every converted architecture computes what Transformers computed.

Tolerances are those of float32 with sums in another order: 1e-4 in logits of size 4 to 6,
1e-5 in the loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MeshConfig
from moejax.interop import exporting
from moejax.interop.published import open_folder
from moejax.models.decoder import Decoder
from moejax.models.loss import cross_entropy
from moejax.models.placement import param_shardings
from moejax.sharding.mesh import make_mesh
from tests.interop.folders import ARCHITECTURES, copy, golden, opened, recorded

DIFFERENT = ("mixtral", "gpt_oss", "deepseek_v3")
"""Grouped queries and windows, sinks and biases, latent attention."""


def close(logits, wanted, tolerance=1e-4):
  np.testing.assert_allclose(np.asarray(logits), wanted, atol=tolerance, rtol=0)


def run(published, ids):
  """Returns loss, logits and the gradient of the loss by the parameters."""

  def forward(params):
    logits = published.model(params, ids).logits
    return jnp.mean(cross_entropy(logits[:, :-1], ids[:, 1:])), logits

  step = jax.jit(jax.value_and_grad(forward, has_aux=True))
  (loss, logits), gradient = step(published.loader.params())
  return loss, logits, gradient


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_loss_and_embedding_gradient_are_the_recorded_ones(name):
  """Logits show the forward pass, the gradient that every branch is connected."""
  published, wanted = opened(name), recorded(name)
  loss, logits, gradient = run(published, jnp.asarray(wanted["input_ids"]))
  close(logits, wanted["logits"])
  assert loss == pytest.approx(float(wanted["lm_loss"]), rel=1e-5)
  table = gradient["embedding"]["table"]
  np.testing.assert_allclose(table, wanted["grad_embed"], atol=1e-5, rtol=1e-3)


def test_one_expert_per_token_has_gate_one(tmp_path):
  """Renormalised, as Transformers does it: no gradient reaches the router."""

  def one_expert(values):
    values["num_experts_per_tok"] = 1

  published = open_folder(copy("mixtral", tmp_path / "x", config=one_expert))
  wanted = np.load(golden("mixtral") / "one_expert.npz")
  _, logits, gradient = run(published, jnp.asarray(recorded("mixtral")["input_ids"]))
  close(logits, wanted["logits"])
  table = gradient["embedding"]["table"]
  np.testing.assert_allclose(table, wanted["embedding_gradient"], atol=1e-5, rtol=1e-3)
  router = gradient["unit"]["0"]["moe"]["router"]["weight"]
  np.testing.assert_allclose(router, 0, atol=1e-6)
  assert exporting.choose(published.config)[0].name == "mixtral"


@pytest.mark.parametrize(
  "name",
  [
    name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow)
    for name in ARCHITECTURES
  ],
)
def test_with_a_cache_and_unrolled_the_logits_are_the_same(name):
  """A prompt of 9 tokens in one call, then one more token in each, layers unrolled."""
  published, wanted = opened(name), recorded(name)
  config = dataclasses.replace(published.config.model, scan_layers=False)
  model = Decoder(config, published.config.moe, vocab_size=config.vocab_size)
  params, ids = published.loader.params(), wanted["input_ids"]
  step = jax.jit(lambda params, ids, cache: model(params, ids, cache=cache))
  out = step(params, ids[:, :9], model.init_cache(ids.shape[0], ids.shape[1]))
  logits = [out.logits]
  for index in range(9, 14):
    out = step(params, ids[:, index : index + 1], out.cache)
    logits.append(out.logits)
  close(np.concatenate(logits, axis=1), wanted["logits"][:, :14])


@pytest.mark.parametrize(
  ("name", "expert", "fsdp"),
  [("deepseek_v3", 4, 2), pytest.param("glm4_moe", 2, 4, marks=pytest.mark.slow)],
)
def test_on_a_mesh_parameters_arrive_in_their_shards(name, expert, fsdp):
  """On eight devices the logits are the same, and no device holds all experts."""
  published, wanted = opened(name), recorded(name)
  mesh = make_mesh(MeshConfig(data=1, expert=expert, fsdp=fsdp))
  params = published.loader.params(param_shardings(published.model, mesh))
  ids = jnp.asarray(np.concatenate([wanted["input_ids"]] * 4))
  with jax.set_mesh(mesh):
    logits = jax.jit(lambda params: published.model(params, ids).logits)(params)
  close(logits[:2], wanted["logits"])
  experts = params["unit"]["0"]["moe"]["experts"]["w_in"]
  held = experts.addressable_shards[0].data.shape
  assert held[1] == experts.shape[1] // expert
  assert held[2] == experts.shape[2] // fsdp


def test_a_square_expert_is_transposed_all_the_same(tmp_path):
  """Where F == D nothing can be told from shapes: the table says it (and F == D/2)."""
  for size in (24, 12):

    def resize(arrays, size=size):
      for name, array in arrays.items():
        if ".experts." in name:
          shape = (24, size) if "w2" in name else (size, 24)
          values = np.arange(array.size, dtype=np.float32)
          arrays[name] = np.resize(values, shape)

    def config(values, size=size):
      values["intermediate_size"] = size

    folder = copy("mixtral", tmp_path / str(size), config=config, tensors=resize)
    published = open_folder(folder)
    experts = published.loader.params()["unit"]["0"]["moe"]["experts"]
    for ours, theirs in {"w_gate": "w1", "w_out": "w2", "w_in": "w3"}.items():
      name = f"model.layers.1.block_sparse_moe.experts.2.{theirs}.weight"
      on_disk = published.loader.source.read(name)
      np.testing.assert_array_equal(experts[ours][1, 2], on_disk.T)
      assert not np.array_equal(on_disk, on_disk.T)
