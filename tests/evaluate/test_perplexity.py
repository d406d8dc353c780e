"""Evaluation: each token once, whatever the batch; drops and loads per capacity."""

import math

import jax
import numpy as np
import pytest

from moejax.config import MeshConfig, MoEConfig
from moejax.errors import ConfigError, UserError
from moejax.evaluate import groups, perplexity
from moejax.exchange import run as exchange
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [
  (b"the quick brown fox jumps over the lazy dog", 0),
  (b"x", 1),
  (bytes(range(97, 123)) * 3, 1),
  (b"", 0),
  (b"a sentence that ends in the middle of a sequence", 0),
]
_FACTORS = (0.5, None)


@pytest.fixture(scope="module")
def dataset():
  return tiny.TinyDataset(_TEXTS)


def _evaluate(dataset, batch_size, factors, devices=1, mesh=None, **changes):
  model, params = tiny.model_and_params(**changes)
  made = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
  return perplexity.evaluate(
    model,
    params,
    dataset,
    split="validation",
    mesh=made,
    batch_size=groups.batch_size(tiny.config(**changes), made, factors, batch_size),
    capacity_factors=factors,
  )


@pytest.fixture(scope="module")
def evaluation(dataset):
  """In batches of 4 rows, the last of which is padded."""
  return _evaluate(dataset, 4, _FACTORS)


def _numbers(result):
  """Every float of an evaluation that may not depend on the batch size."""
  flat = [result[k] for k in ("loss", "bits_per_byte", "perplexity", "dropped_fraction")]
  flat += [d["loss"] for d in result["domains"].values()]
  for layer in result["layers"]:
    flat += [*layer["load"], layer["drop_fraction"], layer["entropy"]]
  return np.asarray(flat)


def test_each_token_is_counted_once(evaluation):
  """Tokens are the bytes and one separator a document; bytes are the bytes."""
  num_bytes = sum(len(text) for text, _ in _TEXTS)
  assert evaluation["bytes"] == num_bytes
  assert evaluation["tokens"] == num_bytes + len(_TEXTS)
  domains = evaluation["results"][0]["domains"]
  assert sum(domain["tokens"] for domain in domains.values()) == evaluation["tokens"]
  assert domains["right"]["bytes"] == 1 + 3 * 26


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (3, 8)])
def test_results_do_not_depend_on_batch_or_devices(
  dataset, evaluation, batch_size, devices
):
  """Loss, drops and loads row by row, and on eight devices (3 is raised to 8 rows).

  Under a capacity, which is where neighbours could matter.
  """
  (result,) = _evaluate(dataset, batch_size, _FACTORS[:1], devices)["results"]
  expected = _numbers(evaluation["results"][0])
  np.testing.assert_allclose(_numbers(result), expected, rtol=2e-5, atol=1e-6)


def test_loss_is_the_mean_of_token_losses_computed_by_hand(dataset, evaluation):
  """Log-softmax in numpy over the model's logits, and the domains' weighted mean."""
  model, params = tiny.model_and_params()
  arrays = dataset.arrays
  out = jax.jit(lambda **kwargs: model(params, capacity_factor=None, **kwargs))(
    tokens=arrays["inputs"],
    segment_ids=arrays["segment_ids"],
    positions=arrays["positions"],
  )
  logits = np.asarray(out.logits, np.float64)
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logits, arrays["targets"][..., None], -1)[..., 0]
  losses = -chosen[arrays["segment_ids"] > 0]
  result = evaluation["results"][1]
  assert result["eval_capacity_factor"] == perplexity.DROPLESS
  assert result["loss"] == pytest.approx(losses.mean(), rel=1e-5)
  bits = losses.sum() / math.log(2) / evaluation["bytes"]
  assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
  weighted = sum(d["loss"] * d["tokens"] for d in result["domains"].values())
  assert weighted / result["tokens"] == pytest.approx(result["loss"], rel=1e-6)


def test_drops_shrink_with_capacity_and_loads_sum_to_one(evaluation):
  """Slots for half the places drop nearly half or more; dropless drops none.

  Nearly, because the last sequence's padding has slots and needs none.
  """
  half, dropless = evaluation["results"]
  assert half["dropped_fraction"] > 0.45
  assert dropless["dropped_fraction"] == 0
  for result in (half, dropless):
    assert [layer["layer"] for layer in result["layers"]] == [0]
    assert sum(result["layers"][0]["load"]) == pytest.approx(1)


def test_dense_models_have_one_result_and_no_routing(dataset):
  """Capacity means nothing without experts: one result whatever was asked for."""
  evaluation = _evaluate(dataset, 4, _FACTORS, moe__dense_twin=True)
  (result,) = evaluation["results"]
  assert "layers" not in result
  assert result["eval_capacity_factor"] == perplexity.DROPLESS


def test_capacity_factors_are_read_or_refused():
  """Numbers, dropless and none; anything else names the flag and the word."""
  read = perplexity.parse_capacity_factors
  assert read("1,1.25,2,dropless") == (1.0, 1.25, 2.0, None)
  assert read("none, 1,1.0") == (None, 1.0)
  for bad in ("0", "-1", "inf", "nan", "lots", "1,,2", ""):
    with pytest.raises(UserError, match="--eval_capacity_factor="):
      read(bad)


def test_an_empty_split_is_an_error():
  """Rather than a division by zero."""
  model, params = tiny.model_and_params()
  with pytest.raises(UserError, match="--split=test"):
    perplexity.evaluate(
      model,
      params,
      tiny.TinyDataset([]),
      split="test",
      mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
      batch_size=4,
    )


def test_flags_that_change_the_model_are_refused():
  """A wider model than the checkpoint's names the parameter that does not fit."""
  _, params = tiny.model_and_params()
  wider = groups.make_model(tiny.config(moe__hidden=48), 264)
  with pytest.raises(ConfigError, match=r"w_in is \(1, 4, 16, 48\) here"):
    perplexity.check_params(wider, params)


def test_experts_on_other_devices(dataset, evaluation, monkeypatch):
  """The numbers of one device, and tokens travel as in training: slots where there are
  any, rows (here all to all devices, since each token visits most) where none are."""
  travelled = []

  def noted(kind):
    real = exchange.EXCHANGES[kind]

    def call(*args):
      travelled.append(kind)
      return real(*args)

    return call

  noting = {kind: noted(kind) for kind in exchange.EXCHANGES}
  monkeypatch.setattr(exchange, "EXCHANGES", noting)
  mesh = MeshConfig(data=-1, fsdp=2, expert=2)
  apart = _evaluate(dataset, 8, _FACTORS, devices=8, mesh=mesh)
  assert set(travelled) == {"all_to_all", "ring"}
  for one, other in zip(evaluation["results"], apart["results"], strict=True):
    np.testing.assert_allclose(_numbers(other), _numbers(one), rtol=1e-5, atol=1e-6)


def test_the_mesh_is_the_runs_own_where_it_fits():
  """A run on 8 expert-parallel devices is evaluated on 1 without a flag."""
  trained = MeshConfig(data=2, expert=4)
  assert perplexity.choose_mesh(trained, 8) == trained
  assert perplexity.choose_mesh(trained, 1) == MeshConfig()


@pytest.mark.parametrize(
  ("trained", "evaluated", "wanted"),
  [
    (1.25, None, (None, 1.25)),
    (1.25, 2.0, (2.0, 1.25)),
    (2.0, 2.0, (2.0,)),
    (None, None, (None,)),
    (None, 2.0, (2.0,)),
  ],
)
def test_the_capacity_of_training_is_evaluated_beside_the_runs_own(
  trained, evaluated, wanted
):
  """Each once, the one that represents the run first; none without MoE layers."""
  moe = MoEConfig(capacity_factor=trained, eval_capacity_factor=evaluated)
  assert perplexity.own_factors(moe, True) == wanted
  assert perplexity.own_factors(moe, False) == (None,)
