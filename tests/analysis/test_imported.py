"""Published models: the same passes on what other codebases trained."""

import jax
import numpy as np
import pytest

from moejax.analysis import collect, knockout, probe, replay
from moejax.config import MeshConfig
from moejax.models.decoder import Decoder
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny
from tests.interop.folders import opened, recorded


class _Recorded(tiny.TinyDataset):
  """The token ids of a golden, as one domain."""

  domains = ("all",)

  def __init__(self, ids: np.ndarray):
    shape = ids.shape
    self.arrays = {
      "inputs": ids.astype(np.int32),
      "targets": np.roll(ids, -1, axis=1).astype(np.int32),
      "segment_ids": np.ones(shape, np.int32),
      "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
      "domain": np.zeros(shape, np.int32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_published_model_is_analyzed_like_any_other(architecture):
  """Windows, latent attention, biases, groups of experts, dense and shared layers."""
  published = opened(architecture)
  config = published.config
  model = Decoder(config.model, config.moe, vocab_size=config.model.vocab_size)
  params = published.loader.params()
  ids = np.asarray(recorded(architecture)["input_ids"])
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  what = {
    "model": model,
    "params": params,
    "dataset": _Recorded(ids),
    "split": "validation",
    "mesh": mesh,
    "batch_size": len(ids),
  }
  counts = np.bincount(ids.reshape(-1), minlength=model.vocab_size)
  record = replay.make_recorder(model, mesh)
  replayer = replay.Replay(config, model, mesh, [{"capacity_factor": 1.0}])
  sums = collect.collect(
    words=collect.vocabulary(counts),
    visit=lambda routes, _, batch: replayer.see(*record(params, routes, batch)),
    **what,
  )
  assert sums["tokens"] == ids.size
  losses = knockout.knock_out(sets={model.moe_layers[-1]: [(0,)]}, **what)
  # Block by block it is the loss of the whole model.
  np.testing.assert_allclose(losses.base.sum(), sums["loss"], rtol=1e-5)
  assert len(probe.probe(**what)["layers"]) == len(model.moe_layers)
  assert replayer.result()[0]["layers"][0]["drop_fraction"] > 0
