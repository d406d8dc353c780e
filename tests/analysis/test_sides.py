"""Both stacks of an encoder-decoder: each counts its own tokens, under its own names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import data
from moejax.analysis import collect, figures, sentences, sides, summary
from moejax.analysis.explorer import facts, page
from moejax.analysis.explorer.facts import Names
from moejax.config import MeshConfig, ModelConfig, MoEConfig
from moejax.evaluate import groups, perplexity
from moejax.models.decoder import Decoder
from moejax.models.loss import token_losses
from moejax.sharding.mesh import make_mesh
from tests.models.test_encoder_decoder import made, small
from tests.train.test_encoder_decoder import tiny


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
  """Sums of both stacks over two batches, and the routes of each batch from the model."""
  config = tiny(tmp_path_factory.mktemp("cache"))
  config.model.num_layers, config.moe.capacity_factor = 4, 0.5
  dataset = data.load(config.data)
  model = groups.make_model(config, dataset.tokenizer.vocab_size)
  params = jax.jit(model.init)(jax.random.key(0))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  what = {"split": "train", "mesh": mesh, "batch_size": 8, "limit": 2}
  words = collect.every_id(model.vocab_size)
  sums = {
    side.name: collect.collect(model, params, dataset, words=words, side=side, **what)
    for side in sides.sides(model)
  }

  @jax.jit
  def routes(params, batch):
    _, out = token_losses(model, params, batch, capacity_factor=None, return_routes=True)
    return out.encoder_routes, out.routes

  batches = list(perplexity.device_batches(dataset, **what))
  seen = [jax.device_get((batch, *routes(params, batch))) for batch in batches]
  return model, dataset, words, sums, seen


@pytest.mark.slow
def test_each_stack_counts_the_tokens_that_it_reads(collected):
  """Loads, ids and domains of both, counted again by numpy from the model's routes; the
  domain of an encoder's token is that of the decoder's segment of the same number."""
  *_, sums, seen = collected
  assert list(sums) == ["encoder", "decoder"]
  for name, index in (("encoder", 1), ("decoder", 2)):
    prefix = "encoder_" if name == "encoder" else ""
    own, load, by_input, by_domain = sums[name], 0, 0, 0
    for batch, *routes in seen:
      ids, segments = batch[f"{prefix}inputs"], batch[f"{prefix}segment_ids"]
      valid = segments > 0
      served = routes[index - 1].served[:, valid].astype(int)
      load = load + served.sum(axis=1)
      one_hot = np.eye(own["by_input"].shape[-1], dtype=int)[ids[valid]]
      by_input = by_input + np.einsum("lte,tv->lev", served, one_hot)
      domains = np.array(
        [
          batch["domain"][row][batch["segment_ids"][row] == segments[row, column]][0]
          for row, column in np.argwhere(valid)
        ]
      )
      which = np.eye(own["by_domain"].shape[-1], dtype=int)[domains]
      by_domain = by_domain + np.einsum("lte,tr->ler", served, which)
    np.testing.assert_array_equal(own["load"], load)
    np.testing.assert_array_equal(own["by_input"], by_input)
    np.testing.assert_array_equal(own["by_domain"], by_domain)
    assert own["tokens"] == sum(
      (batch[f"{prefix}segment_ids"] > 0).sum() for batch, *_ in seen
    )
  assert "loss" in sums["decoder"] and "loss" not in sums["encoder"]
  assert "by_target" in sums["decoder"] and "by_target" not in sums["encoder"]


@pytest.mark.slow
def test_each_stack_has_its_own_drops(collected):
  """With half the slots, at least half of the choices of full groups are dropped; nobody
  drops padding."""
  *_, sums, _ = collected
  for own in sums.values():
    dropped, tokens = own["dropped_place"].sum(axis=1), own["tokens_place"].sum()
    assert tokens == own["tokens"]
    assert (dropped < tokens).all() and (dropped > 0.3 * tokens).all()


@pytest.mark.slow
def test_the_summary_names_layers_by_their_stacks_and_can_be_drawn(collected):
  """Flow is within a stack. Sentences, figures and page need nothing else."""
  model, dataset, words, sums, _ = collected
  domains, pieces = list(dataset.domains), dataset.tokenizer.pieces
  parts = {
    side.name: summary.summarise(sums[side.name], side, words, domains, pieces)
    for side in sides.sides(model)
  }
  found = summary.joined(parts) | {
    "workdir": "run",
    "step": 4,
    "split": "train",
    "text": None,
  }
  names = [layer["layer"] for layer in found["layers"]]
  assert names == ["encoder.1", "decoder.1", "decoder.3"]
  assert [(row["from"], row["to"]) for row in found["flow"]] == [tuple(names[1:])]
  assert [name for name in facts.matrices(found) if "flow" in name] == ["flow1"]
  assert found["stacks"]["encoder"]["tokens"] == sums["encoder"]["tokens"]
  assert {"experts", "knockout", "text"} <= set(found["undefined"])
  said = sentences.sentences(found)
  assert "coder." in said[0] and "--knockout" not in said[2]
  assert {"load", "specialisation"} <= set(figures.draw(found))
  text = page.render(found, said, None, Names(pieces=pieces, domains=domains), {})
  assert "encoder: switch" in text and "decoder: switch" in text


def test_the_encoders_rows_have_the_domain_of_the_segment_that_reads_them():
  """Two texts in a row, of domains 3 and 1, and padding; the decoder sees what it saw."""
  batch = {
    "inputs": jnp.array([[7, 8, 9, 0]]),
    "segment_ids": jnp.array([[1, 2, 2, 0]]),
    "domain": jnp.array([[3, 1, 1, 0]]),
    "encoder_inputs": jnp.array([[4, 5, 6, 4, 0]]),
    "encoder_segment_ids": jnp.array([[1, 1, 1, 2, 0]]),
    "encoder_positions": jnp.array([[0, 1, 2, 0, 0]]),
  }
  encoder, decoder = sides.sides(made(small()))
  rows = sides.rows_of(encoder, batch)
  np.testing.assert_array_equal(rows["domain"], [[3, 3, 3, 1, 0]])
  np.testing.assert_array_equal(rows["inputs"], batch["encoder_inputs"])
  assert set(rows) == {"inputs", "segment_ids", "positions", "domain"}
  assert sides.rows_of(decoder, batch) is batch
  # Of five layers the third is MoE, of four the second and the fourth.
  assert encoder.moe_layers == ("encoder.1", "encoder.4")
  assert decoder.moe_layers == ("decoder.1", "decoder.3")


def test_a_summary_of_both_says_what_differs():
  """The decoder's loss and facts stay; what the encoder has not is said of it."""
  same = {"num_experts": 4, "capacity_factor": 1.0}
  encoder = same | {"router": "expert_choice", "num_selected": 0, "tokens": 9}
  encoder |= {"loss": None, "layers": [{"layer": "encoder.1"}]}
  encoder["undefined"] = {"margin": "experts choose"}
  decoder = same | {"router": "switch", "num_selected": 1, "tokens": 5, "loss": 2.0}
  decoder |= {"layers": [{"layer": "decoder.1"}], "undefined": {"flow": "one layer"}}
  both = summary.joined({"encoder": encoder, "decoder": decoder})
  assert (both["loss"], both["router"], both["tokens"]) == (2.0, "switch", 5)
  assert [layer["layer"] for layer in both["layers"]] == ["encoder.1", "decoder.1"]
  assert both["stacks"]["encoder"]["router"] == "expert_choice"
  assert both["undefined"]["margin of the encoder"] == "experts choose"
  assert both["undefined"]["flow"] == "one layer" and "flow" not in both
  alone = summary.joined({"encoder": encoder})
  assert alone["router"] == "expert_choice" and alone["undefined"]["margin"]


def test_a_decoder_has_no_sides():
  model = Decoder(ModelConfig(), MoEConfig(), vocab_size=8)
  assert sides.sides(model) == []
