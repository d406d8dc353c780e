"""What is not trained stays out of the optimizer; what is trained gets there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint import fingerprint
from moejax.checkpoint.manager import Checkpointer, init_from, restore_params
from moejax.errors import UserError
from moejax.models import trained as trained_lib
from moejax.models.decoder import Decoder
from moejax.routing import hashing
from moejax.routing.registry import ROUTERS
from moejax.routing.router import Router
from moejax.train import setup as setup_lib
from moejax.train import step as step_lib
from moejax.train.optimizer import make_optimizer
from tests.train.conftest import VOCAB, make_batch, make_setup, tiny_config

BY_RULE = {name for name in ROUTERS if ROUTERS[name].update is not Router.update}
"""Routers with a leaf that the train step moves by a rule of its own."""


def config_of(router: str):
  """The tiny model under a router, with decay that nobody could overlook."""
  config = tiny_config()
  config.model.num_layers = config.moe.every = 1
  config.model.width = config.model.hidden = config.moe.hidden = 16
  config.moe.router = router
  config.moe.num_selected = ROUTERS[router].fixed_selected or 1
  config.moe.dispatcher = "auto"
  config.moe.capacity_factor = config.moe.eval_capacity_factor = 2.0
  config.moe.group_size = 16
  config.optimizer.weight_decay, config.optimizer.learning_rate = 1.0, 0.1
  config.optimizer.warmup_steps = 0
  return config


def one_step(config):
  """Parameters by name before and after one optimizer step, and the state after."""
  parts = make_setup(config)
  before = parts.state()
  # Where noise has no scale yet its gradient is small, never zero.
  after, _ = jax.jit(
    lambda s, b: step_lib.train_step(parts.model, parts.optimizer, s, b)
  )(before, parts.place(make_batch(0)))
  named = fingerprint.named_leaves
  return parts.model, named(before["params"]), named(after["params"]), after


LIKE_TOP_K = {
  "base",
  "dense",
  "forced_balance",
  "group_limited",
  "random",
  "switch",
  "top2",
}
"""Routers without a parameter that `top_k` lacks: slow tests, as is one bias of three."""


def slow_if(condition: bool):
  return [pytest.mark.slow] if condition else []


@pytest.mark.parametrize(
  "router",
  [
    pytest.param(r, marks=slow_if(r in LIKE_TOP_K | {"quantile_bias", "expert_choice"}))
    for r in ROUTERS
  ],
)
def test_one_step_moves_what_is_trained_and_nothing_else(router, compilation_cache):
  """Over a whole AdamW step: a leaf that is not trained is the same to the bit (or
  moved by its router's rule, in multiples of it), has no moments, and every other leaf
  has moved."""
  model, before, after, state = one_step(config_of(router))
  untrained = trained_lib.names(model.trained())
  moments = fingerprint.named_leaves(state["opt_state"])
  for name in before:
    moved = bool(np.any(np.asarray(before[name]) != np.asarray(after[name])))
    if name not in untrained:
      assert moved, f"{name} is a parameter and nothing trains it"
      continue
    assert not [m for m in moments if m.endswith("." + name)], name
    if router not in BY_RULE:
      assert not moved, f"{name} is not trained and has moved"
  assert bool(untrained) == (router in BY_RULE or router == "hash"), untrained


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=slow_if(n != "adamw"))
    for n in ("adamw", "adafactor", "lion", "muon")
  ],
)
def test_hash_routing_keeps_its_table_under_every_optimizer(name, compilation_cache):
  """The table after a step is the table: every id keeps its experts."""
  config = config_of("hash")
  config.optimizer.name = name
  _, before, after, _ = one_step(config)
  np.testing.assert_array_equal(before["hash_table"], after["hash_table"])
  table = np.asarray(after["hash_table"])
  assert hashing.table_damage(table, config.moe.num_experts) is None
  assert sorted(set(table.astype(int).reshape(-1))) == [0, 1, 2, 3]


def test_gradients_are_taken_by_what_is_trained_alone(compilation_cache):
  """No gradient exists for a table or a bias, not even a zero one."""
  for router in ("hash", "sigmoid_bias"):
    parts = make_setup(config_of(router))
    params = parts.state()["params"]
    batch = parts.place(make_batch(0))
    _, gradients = jax.eval_shape(
      lambda p, b, m=parts.model: step_lib.loss_gradients(m, p, b, jax.random.key(0)),
      params,
      batch,
    )
    learned, kept = trained_lib.split(params, parts.model.trained())
    assert jax.tree.structure(gradients) == jax.tree.structure(learned)
    assert jax.tree.structure(params) == jax.tree.structure(
      trained_lib.join(learned, kept, parts.model.trained())
    )
    assert len(jax.tree.leaves(kept)) > 0


def _old_checkpoint(directory, config, *, decay: float):
  """What a version that trained everything alike wrote after one step."""
  model = Decoder(config.model, config.moe, vocab_size=VOCAB)
  everything = jax.tree.map(lambda _: True, model.trained())
  optimizer = make_optimizer(
    config.optimizer, num_steps=9, axes=model.logical_axes(), trained=everything
  )
  params = model.init(jax.random.key(0))
  params["hash_table"] = params["hash_table"] * (1.0 - decay)
  state = {
    "step": jnp.int32(1),
    "params": params,
    "opt_state": optimizer.init(params),
    "key": jax.random.key(1),
    "bad_steps": {"total": jnp.int32(0), "in_a_row": jnp.int32(0)},
  }
  manager = Checkpointer(
    directory / "checkpoints", keep_last=1, keep_best=0, config=config, metadata={}
  )
  manager.save(1, state, position={"step": 1, "seed": 0})
  assert manager.close()
  return model, state


def test_moments_of_what_is_not_trained_are_left_unread_in_old_checkpoints(tmp_path):
  """A checkpoint that has them restores into a state that does not; all else equal."""
  config = config_of("hash")
  model, saved = _old_checkpoint(tmp_path, config, decay=0.0)
  optimizer = make_optimizer(
    config.optimizer, num_steps=9, axes=model.logical_axes(), trained=model.trained()
  )
  target = saved | {"opt_state": optimizer.init(saved["params"])}
  manager = Checkpointer(
    tmp_path / "checkpoints",
    keep_last=1,
    keep_best=0,
    config=config,
    metadata={},
    untrained=trained_lib.names(model.trained()),
  )
  restored, _ = manager.restore(target)
  manager.close()
  assert jax.tree.structure(restored) == jax.tree.structure(target)
  before = fingerprint.named_leaves(saved["params"])
  for name, leaf in fingerprint.named_leaves(restored["params"]).items():
    np.testing.assert_array_equal(leaf, before[name])


def test_a_table_that_weight_decay_has_moved_is_named(tmp_path, caplog):
  """Entries a little below a whole number: evaluation says so, and training on, or from
  it, is refused."""
  config = config_of("hash")
  model, saved = _old_checkpoint(tmp_path, config, decay=1e-4)
  params, _, _ = restore_params(tmp_path)
  assert "hash table is damaged" in caplog.text and "Train it again" in caplog.text
  assert params["hash_table"].shape == saved["params"]["hash_table"].shape
  optimizer = make_optimizer(
    config.optimizer, num_steps=9, axes=model.logical_axes(), trained=model.trained()
  )
  mesh = make_setup(tiny_config()).mesh
  config = dataclasses.replace(config)
  for source, resumes in ((tmp_path, True), (tmp_path / "elsewhere", False)):
    manager = Checkpointer(
      source / "checkpoints",
      keep_last=1,
      keep_best=0,
      config=config,
      metadata={},
      untrained=trained_lib.names(model.trained()),
    )
    with pytest.raises(UserError, match="hash table is damaged.*id"):
      setup_lib.make_state(
        config, model, optimizer, mesh, manager, "" if resumes else str(tmp_path)
      )
    manager.close()
  assert init_from(tmp_path, model.init(jax.random.key(0)))


def test_a_whole_table_has_no_damage():
  """Tables of both kinds, as they are made; out of range and not whole are damage."""
  for counts in (None, np.arange(50)):
    table = hashing.hash_table(50, 4, 2, counts=counts).astype(np.float32)
    assert hashing.table_damage(table, 4) is None
    assert "id 0" in str(hashing.table_damage(table - 5.0, 4))
    low = table * np.float32(1 - 1e-5)
    assert "experts are 0 to 3" in str(hashing.table_damage(low, 4))
