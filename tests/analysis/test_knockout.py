"""Knock-out: the loss without an expert, exactly that of a run that cannot choose it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis import knockout
from moejax.config import MeshConfig
from moejax.errors import UserError
from moejax.models.decoder import Decoder
from moejax.models.loss import token_losses
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [(b"aaab" * 24, 0), (b"bcbc" * 24, 1), (b"axyz" * 10, 0)]
_CHANGES = {"model__num_layers": 4, "moe__every": 2, "moe__capacity_factor": 0.75}
_SETS = {1: [(0,), (2, 3)], 3: [(1,)]}


def _losses(fallback: str, **mesh):
  model, params = tiny.model_and_params(**_CHANGES)
  devices = math.prod(mesh.values()) if mesh else 1
  return knockout.knock_out(
    model,
    params,
    tiny.TinyDataset(_TEXTS),
    split="validation",
    mesh=make_mesh(MeshConfig(**mesh), jax.devices()[:devices]),
    batch_size=8,
    sets=_SETS,
    fallback=fallback,
  )


@pytest.fixture(scope="module")
def next_best():
  return _losses("next_best")


@pytest.fixture(scope="module")
def biased():
  """A layer's set -> each sequence's loss in a run whose router has bias -1e9 there."""
  plain, params = tiny.model_and_params(**_CHANGES)
  config = tiny.config(**_CHANGES, moe__router_bias=True)
  model = Decoder(config.model, config.moe, vocab_size=plain.vocab_size)
  batch = jax.tree.map(jnp.asarray, tiny.TinyDataset(_TEXTS).arrays)
  call = jax.jit(
    lambda p: jnp.sum(token_losses(model, p, batch, capacity_factor=None)[0], axis=1)
  )

  def run(layer: int | None, experts: tuple[int, ...] = ()) -> np.ndarray:
    bias = np.zeros((2, 4), np.float32)
    if layer is not None:
      bias[(1, 3).index(layer), list(experts)] = -1e9
    own = jax.tree.map(lambda leaf: leaf, params)
    own["unit"]["1"]["moe"]["router"]["logit_bias"] = jnp.asarray(bias)
    return np.asarray(call(own))

  return run


def test_next_best_is_a_run_that_cannot_choose_the_expert(next_best, biased):
  """Every set of every layer, sequence by sequence, against another parameter."""
  np.testing.assert_allclose(next_best.base, biased(None), rtol=1e-6)
  for layer, sets in _SETS.items():
    for row, experts in zip(next_best.removed[layer], sets, strict=True):
      np.testing.assert_allclose(row, biased(layer, experts), rtol=1e-6)
      assert np.abs(row - next_best.base).max() > 1e-3


def test_none_is_a_run_whose_expert_writes_zeros():
  """Choices and gates stay, and so does every other expert."""
  model, params = tiny.model_and_params(**_CHANGES)
  losses = _losses("none")
  batch = jax.tree.map(jnp.asarray, tiny.TinyDataset(_TEXTS).arrays)
  own = jax.tree.map(lambda leaf: leaf, params)
  experts = own["unit"]["1"]["moe"]["experts"]
  experts["w_out"] = experts["w_out"].at[0, 0].set(0)  # Layer 1, expert 0.
  call = jax.jit(lambda p: token_losses(model, p, batch, capacity_factor=None)[0])
  np.testing.assert_allclose(losses.removed[1][0], call(own).sum(axis=1), rtol=1e-6)


@pytest.mark.slow
def test_a_mesh_finds_the_same_losses(next_best):
  found = _losses("next_best", data=2, expert=2)
  np.testing.assert_allclose(found.base, next_best.base, rtol=1e-5)
  for layer, rows in next_best.removed.items():
    np.testing.assert_allclose(found.removed[layer], rows, rtol=1e-5)


def test_effect_and_error_by_hand():
  """Two sequences of 2 and 4 tokens: differences 1 and 2 are 1/2 a token, no error.

  Differences 0 and 3: change 1/2, residuals -1 and 1, error sqrt(2 * 2) / 6 = 1/3.
  """
  tokens, base = np.array([2, 4]), np.array([5.0, 7.0])
  assert knockout.effect(base, base + [1, 2], tokens) == (0.5, 0)
  change, error = knockout.effect(base, base + [0, 3], tokens)
  assert (change, error) == (0.5, pytest.approx(1 / 3))


def test_interaction_is_what_two_cost_beyond_their_sum():
  """Alone they cost 1 each, together 5: three more, in one token a sequence."""
  tokens, base = np.array([1, 1]), np.array([1.0, 1.0])
  single = knockout.Losses(tokens=tokens, base=base, removed={1: np.full((2, 2), 2.0)})
  double = knockout.Losses(tokens=tokens, base=base, removed={1: np.full((1, 2), 6.0)})
  (row,) = knockout.pair_table(single, double, knockout.pairs(single, 1))
  assert (row["experts"], row["delta"], row["interaction"]) == ([0, 1], 5, 3)


@pytest.mark.parametrize(
  ("changes", "remedy"),
  [({"router": "hash"}, "does not choose by logits"), ({"num_selected": 4}, "no next")],
)
def test_without_a_next_best_the_removal_is_refused(changes, remedy):
  model, _ = tiny.model_and_params(**{f"moe__{k}": v for k, v in changes.items()})
  with pytest.raises(UserError, match=remedy):
    knockout.check(model, "next_best", 1)
  knockout.check(model, "none", 1)
