"""What a router is told of the step and the text: its number, positions, who is in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.models.decoder import Decoder
from moejax.routing import registry
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.bias import SigmoidBias
from moejax.routing.expert_groups import GroupedRouter
from moejax.routing.losses import first_choices
from moejax.routing.registry import ROUTERS
from moejax.routing.router import Sizes
from moejax.routing.token_choice import TopK
from moejax.train import step as step_lib

MODEL = ModelConfig(num_layers=2, width=8, num_heads=2, hidden=8)
MOE = MoEConfig(
  num_experts=4,
  num_selected=2,
  hidden=8,
  router="top_k",
  every=1,
  capacity_factor=None,
  dispatcher="gather",  # The quickest to compile.
)
B, S = 4, 8


def batch(seed: int = 0):
  tokens = np.random.default_rng(seed).integers(0, 16, (B, S + 1)).astype(np.int32)
  positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
  return {
    "inputs": jnp.asarray(tokens[:, :-1]),
    "targets": jnp.asarray(tokens[:, 1:]),
    "segment_ids": jnp.ones((B, S), jnp.int32),
    "positions": jnp.asarray(positions),
  }


def decoder(**changes) -> tuple[Decoder, dict]:
  model = Decoder(MODEL, dataclasses.replace(MOE, **changes), vocab_size=16)
  return model, model.init(jax.random.key(0))


def sums(model, params, accumulation: int, **kwargs):
  return jax.jit(
    lambda p, b: step_lib.loss_gradients(
      model, p, b, jax.random.key(5), accumulation=accumulation, **kwargs
    )
  )(params, batch())


def test_a_router_can_anneal_by_the_step(monkeypatch):
  """Temperature 1/(1 + step): the step number reaches every layer of every microbatch,
  and evaluation has none."""
  seen = []

  class Annealed(TopK):
    name = "annealed"

    def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
      seen.append(inputs.step is not None)
      step = jnp.zeros((), jnp.int32) if inputs.step is None else inputs.step
      hot = inputs.logits * (1.0 + step.astype(jnp.float32))
      return super().__call__(dataclasses.replace(inputs, logits=hot), policy)

  monkeypatch.setitem(ROUTERS, "annealed", Annealed)
  model, params = decoder(router="annealed")
  plain, _ = decoder()
  cold = sums(model, params, 2, step=jnp.int32(0))[0].stats.entropy
  np.testing.assert_allclose(cold, sums(plain, params, 2)[0].stats.entropy, rtol=1e-6)
  hot = sums(model, params, 2, step=jnp.int32(50))[0].stats.entropy
  assert (hot < 0.9 * cold).all()
  assert all(seen)
  jax.eval_shape(model, params, batch()["inputs"])
  assert not seen[-1]


def test_one_set_of_experts_is_out_for_a_whole_step():
  """Expert dropout: every microbatch of a step leaves out the same experts of a layer,
  layers leave out different ones, and another step others."""
  model, params = decoder(expert_dropout=0.5, num_selected=1)
  loads = {}
  for accumulation in (1, 4):
    stats = sums(model, params, accumulation)[0].stats
    out = np.asarray(stats.chosen) == 0
    loads[accumulation] = out
    assert (out.sum(axis=1) >= 2).all(), "half of the experts are out of all microbatches"
    np.testing.assert_array_equal(np.asarray(stats.present) == 0, loads[1])
  keys = [model.present_experts(jax.random.key(i)) for i in range(8)]
  assert len({np.asarray(key).tobytes() for key in keys}) > 4
  assert any((np.asarray(key)[0] != np.asarray(key)[1]).any() for key in keys)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_the_balance_loss_is_one_among_those_who_are_in(scope):
  """Router weights of zero: probabilities are equal among the present experts, and the
  loss of any loads is then exactly 1, as it is without expert dropout."""
  model, params = decoder(expert_dropout=0.5, balance_scope=scope)
  params = jax.tree.map(jnp.zeros_like, params)
  got, _ = sums(model, params, 2)
  tokens = float(got.tokens)
  np.testing.assert_allclose(got.aux["balance_loss"] / tokens, len(model.moe_layers))


@pytest.mark.parametrize("name", [n for n, s in ROUTERS.items() if s.by_logits])
def test_an_absent_expert_takes_nobody(name):
  """Under every router that allows expert dropout; with one group of two experts per
  token a group may have a single expert left, and the other choice is given up."""
  groups = issubclass(ROUTERS[name], GroupedRouter)
  router = registry.make(name, {"num_expert_groups": 4} if groups else {})
  policy = SlotPolicy(num_experts=8, num_selected=router.fixed_selected or 2)
  sizes = Sizes(
    width=4,
    num_experts=8,
    num_selected=policy.num_selected,
    num_tokens=64,
    capacity=None,
  )
  own = router.parameters(sizes).items()
  present = jnp.asarray([False, True, True, False, True, True, False, True])
  logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  inputs = RouterInputs(
    logits=jnp.where(present, jnp.asarray(logits), -1e9),
    valid=jnp.ones(64, bool),
    key=jax.random.key(0),
    params={n: jnp.full(p.shape, p.value) for n, p in own if p.by_group},
    features={"noise_logits": jnp.zeros((64, 8))},
    present=present,
  )
  routing = jax.jit(lambda inputs: router(inputs, policy))(inputs)
  np.testing.assert_array_equal(
    np.asarray(routing.assignments.load)[~np.asarray(present)], 0
  )
  np.testing.assert_array_equal(np.asarray(routing.stats.chosen)[~np.asarray(present)], 0)
  assert routing.assignments.load.sum() > 0
  if groups:
    assert routing.assignments.load.sum() < 64 * 2
  assert int(routing.stats.dropped_tokens) == 0


def test_groups_that_lack_an_expert_are_chosen_by_those_they_have():
  """A group's score sums its two best (DeepSeek-V3), and half of each group is out: the
  better of the live experts decide, and no token is lost while an expert is free."""
  options = SlotPolicy(num_experts=8, num_selected=2)
  router = SigmoidBias(num_expert_groups=4, num_selected_groups=2, group_best=2)
  logits = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
  for here in ([1, 3, 5, 7], [5, 7]):
    present = jnp.zeros(8, bool).at[jnp.asarray(here)].set(True)
    inputs = RouterInputs(
      logits=jnp.where(present, jnp.asarray(logits), -1e9),
      valid=jnp.ones(64, bool),
      key=jax.random.key(0),
      params={"bias": jnp.zeros(8)},
      present=present,
    )
    routing = router(inputs, options)
    best = np.argsort(-logits[:, here], axis=1)[:, :2]
    expected = np.bincount(np.asarray(here)[best].reshape(-1), minlength=8)
    np.testing.assert_array_equal(routing.assignments.load, expected)


@pytest.mark.parametrize("name", ["random", "forced_balance"])
def test_generation_uses_the_experts_of_evaluation(name):
  """Token by token through a cache gives the logits of the whole sequence: what chooses
  without looking at the token counts by its position."""
  model, params = decoder(router=name)
  tokens = batch()["inputs"]
  whole = model(params, tokens).logits
  cache = model.init_cache(B, S)
  first = model(params, tokens[:, :3], cache=cache)
  steps, cache = [first.logits], first.cache
  for i in range(3, S):
    out = model(params, tokens[:, i : i + 1], cache=cache)
    steps, cache = [*steps, out.logits], out.cache
  np.testing.assert_allclose(jnp.concatenate(steps, axis=1), whole, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["random", "forced_balance"])
def test_in_evaluation_the_position_in_the_document_decides(name):
  """Two documents in one group: the second gets the experts of the first again, and
  positions differ, or perfect balance would be one expert for all."""

  def experts(positions):
    inputs = RouterInputs(
      logits=jnp.zeros((len(positions), 4)),
      valid=jnp.ones(len(positions), bool),
      positions=jnp.asarray(positions, jnp.int32),
    )
    return ROUTERS[name]()(inputs, SlotPolicy(num_experts=4)).assignments.expert

  first = experts(range(8))
  np.testing.assert_array_equal(experts([*range(8), *range(5)]), [*first, *first[:5]])
  if name == "forced_balance":
    np.testing.assert_array_equal(first, [0, 1, 2, 3] * 2)
  else:
    assert len({*first.tolist()}) > 1


def test_dense_has_room_for_every_token_at_every_expert():
  """Its K is E, whatever num_selected says: a capacity factor of 1 drops nothing."""
  model, params = decoder(router="dense", num_selected=1, capacity_factor=1.0)
  stats = sums(model, params, 1)[0].stats
  np.testing.assert_array_equal(stats.load, B * S)
  np.testing.assert_array_equal(stats.chosen, B * S)


def test_first_choices_are_counted_before_overflow_moves_them():
  """Six tokens that all want expert 0, two slots: [6,0,0] asked, [2,2,2] served."""
  logits = jnp.tile(jnp.asarray([[3.0, 2.0, 1.0]]), (6, 1))
  options = SlotPolicy(num_experts=3, capacity=2, overflow="next_best")
  inputs = RouterInputs(logits=logits, valid=jnp.ones(6, bool))
  routing = jax.jit(lambda inputs: ROUTERS["switch"]()(inputs, options))(inputs)
  np.testing.assert_array_equal(routing.assignments.load, [2, 2, 2])
  np.testing.assert_array_equal(first_choices(routing, inputs.valid), [6, 0, 0])
