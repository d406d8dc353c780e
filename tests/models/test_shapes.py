"""The shapes that a model declares are those that it allocates."""

import jax
import pytest

from moejax.config import Config
from moejax.models.make import make_model
from moejax.routing.registry import ROUTERS
from tests.models.test_encoder_decoder import small

V = 32


def check(config: Config) -> None:
  model = make_model(config.model, config.moe, vocab_size=V)
  allocated = jax.eval_shape(model.init, jax.random.key(0))
  declared = model.shapes()
  assert declared == allocated
  assert [*declared] == [*allocated]  # Dicts are equal in any order.
  assert jax.tree.structure(model.trained()) == jax.tree.structure(allocated)


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_of_every_router(router):
  """Some have parameters, a table or a bias of their own."""
  config = Config()
  config.moe.router = router
  check(config)


@pytest.mark.parametrize(
  ("num_layers", "every", "dense_prefix"), [(1, 1, 0), (4, 2, 0), (6, 2, 1), (5, 3, 2)]
)
def test_of_every_pattern(num_layers, every, dense_prefix):
  """Prefix, repeated unit and suffix, each empty in one of these."""
  config = Config()
  config.model.num_layers = num_layers
  config.moe.every, config.moe.dense_prefix = every, dense_prefix
  check(config)


def test_of_an_encoder_decoder():
  check(small())
