"""The router module: what every registered router is given, and what learns from it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ModelConfig, MoEConfig
from moejax.errors import ConfigError
from moejax.layers.moe import MoE
from moejax.layers.router import RouterLayer
from moejax.models.shell import Shell
from moejax.routing.base import RouterInputs, SlotPolicy
from moejax.routing.registry import ROUTERS
from moejax.routing.router import Parameter, Sizes

B, S, D, E = 2, 12, 8, 4
MODEL = ModelConfig(num_layers=2, width=D, num_heads=2, hidden=16)


def config(router: str, **changes) -> MoEConfig:
  """A small layer under this router; routing groups are the sequences."""
  k = ROUTERS[router].fixed_selected or 2
  settings = {"num_selected": k, "hidden": 16, "group_size": S, "dispatcher": "einsum"}
  return MoEConfig(num_experts=E, router=router, **(settings | changes))


def draw(shell: Shell, seed: int = 0):
  """Every leaf at random, so that none is told from another by being zero."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(shell.init, jax.random.key(0))
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def layer(name: str, capacity_factor: float | None):
  """An MoE layer under a router: parameters, and (params, x, key) -> (y, aux)."""
  moe = config(name, capacity_factor=capacity_factor)
  shell = Shell(lambda key: MoE(MODEL, moe, nnx.Rngs(params=key)))
  _, valid, assigned = batch()
  ids = jnp.zeros((B, S), jnp.int32)

  def call(params, x, key=None):
    return shell.merge(params)(
      x, valid, ids, assigned, key=key, train=True, capacity_factor=capacity_factor
    )

  return draw(shell), call


def batch():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
  valid = jnp.arange(S)[None, :] < jnp.array([[S], [S - 3]])
  assigned = jnp.asarray(rng.integers(0, E, (B, S, 1)), jnp.int32)
  return x, valid, jnp.concatenate([assigned, (assigned + 1) % E], axis=-1)


def own_parameters(name: str) -> dict[str, Parameter]:
  """What a router declares."""
  k = ROUTERS[name].fixed_selected or 2
  sizes = Sizes(width=D, num_experts=E, num_selected=k, num_tokens=S, capacity=S * k // E)
  return dict(ROUTERS[name]().parameters(sizes))


def inputs_by_hand(name, params, x, valid, assigned) -> RouterInputs:
  """What `Router` promises its subclasses, made in numpy."""
  x = np.asarray(x, np.float64)
  weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
  project = lambda w: jnp.asarray(x @ w, jnp.float32)  # noqa: E731
  made = RouterInputs(logits=project(weights["weight"]), valid=valid, assigned=assigned)
  # A router's own parameters are the same for every group.
  given = {n: params[n] for n, p in own_parameters(name).items() if p.by_group}
  groups = {n: jnp.broadcast_to(v, (len(x), *v.shape)) for n, v in given.items()}
  made = dataclasses.replace(made, params=groups)
  if "noise" in weights:
    made = dataclasses.replace(made, features={"noise_logits": project(weights["noise"])})
  if "slots" in weights:
    unit = weights["slots"] / np.linalg.norm(weights["slots"], axis=0)
    tokens = x / np.linalg.norm(x, axis=-1, keepdims=True)
    logits = np.einsum("gtd,dec->gtec", tokens, unit) * weights["slot_scale"]
    features = {"slot_logits": jnp.asarray(logits, jnp.float32)}
    made = dataclasses.replace(made, features=features)
  return made


@pytest.mark.parametrize("name", ROUTERS)
def test_the_layer_gives_every_router_what_it_needs(name):
  """Output of the layer = combine * experts(dispatch * x), routed by inputs by hand."""
  params, call = layer(name, 1.0)
  x, valid, assigned = batch()
  y, aux = jax.jit(call)(params, x)
  k = E if name == "dense" else config(name).num_selected
  options = SlotPolicy(num_experts=E, num_selected=k, capacity=S * k // E)
  made = inputs_by_hand(name, params["router"], x, valid, assigned)
  route = jax.jit(jax.vmap(lambda group: ROUTERS[name]()(group, options)))
  routing = route(made)
  dense = jax.jit(jax.vmap(lambda r: (r.dispatch_weights(), r.combine_weights())))
  send, back = (np.asarray(w, np.float64) for w in dense(routing.placement))
  w = {k: np.asarray(v, np.float64) for k, v in params["experts"].items()}
  rows = np.einsum("gtec,gtd->gecd", send, np.asarray(x, np.float64))
  hidden = np.einsum("gecd,edf->gecf", rows, w["w_in"])
  act = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
  out = np.einsum("gecf,efd->gecd", act, w["w_out"])
  expected = np.einsum("gtec,gecd->gtd", back, out)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  terms = routing.losses or {}
  common = {"balance_loss", "z_loss"}
  assert set(aux.losses) == common | set(terms)
  assert set(terms) == set(ROUTERS[name]().loss_weights())
  for term, value in terms.items():
    total = jnp.sum(value * routing.stats.num_valid)
    np.testing.assert_allclose(aux.losses[term], total, rtol=1e-4)


DECIDED_OTHERWISE = {"hash", "soft"}
"""Routers whose [D, E] weight gets no gradient: a table decides, or other scores."""


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_reach_what_is_learned_and_nothing_else(name):
  """In training, with noise, from the output alone."""
  params, call = layer(name, 1.0)
  x, _, _ = batch()

  @jax.jit
  def gradient(params):
    def total(params):
      y, _ = call(params, x, jax.random.key(3))
      return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    return jax.grad(total)(params)

  grads = gradient(params)["router"]
  without = {n for n, p in own_parameters(name).items() if not p.trained}
  if name in DECIDED_OTHERWISE:
    without.add("weight")
  for leaf, grad in grads.items():
    assert (float(jnp.max(jnp.abs(grad))) > 1e-4) == (leaf not in without), leaf


def test_an_unlearned_router_passes_no_loss_to_the_tokens():
  """hash: the z-loss and balance loss of logits that decide nothing are constants."""
  params, call = layer("hash", None)
  x, _, _ = batch()

  def loss(x):
    _, aux = call(params, x)
    return aux.losses["z_loss"] + aux.losses["balance_loss"]

  assert not np.any(jax.jit(jax.grad(loss))(x))


def route(moe: MoEConfig, key, *, factor=None):
  """One call of a router with random weights, compiled."""
  shell = Shell(lambda key: RouterLayer(D, moe, nnx.Rngs(params=key)))
  params = draw(shell)
  x, valid, assigned = batch()
  ids = jnp.zeros((B, S), jnp.int32)
  call = jax.jit(
    lambda p, k: shell.merge(p)(x, valid, ids, assigned, key=k, capacity_factor=factor)
  )
  return call(params, key)[1]


def test_expert_dropout_leaves_out_that_many_experts_in_training_only():
  """The same experts for all groups of a step, others in the next, none at test."""
  moe = config("top_k", num_selected=1, expert_dropout=0.5)
  seen = [np.asarray(route(moe, jax.random.key(i)).stats.load).sum(0) for i in range(6)]
  assert all((load == 0).sum() == 2 for load in seen)
  assert len({tuple(load == 0) for load in seen}) > 1
  assert all(load.sum() == 2 * S - 3 for load in seen)
  assert (np.asarray(route(moe, None).stats.load).sum(0) > 0).all()


@pytest.mark.parametrize("name", [n for n, s in ROUTERS.items() if s.by_logits])
def test_overflow_never_goes_to_an_expert_that_is_out(name):
  """Half of the experts are out and the others have too few slots for all."""
  moe = config(name, expert_dropout=0.5, overflow="next_best")
  load = np.asarray(route(moe, jax.random.key(0), factor=0.75).stats.load)
  assert ((load > 0).any(0)).sum() == E - int(0.5 * E)


def test_expert_dropout_never_leaves_fewer_experts_than_choices():
  """K=3 of 4 experts: at most one can be out."""
  moe = config("top_k", num_selected=3, expert_dropout=0.9)
  load = np.asarray(route(moe, jax.random.key(0)).stats.load).sum(0)
  assert (load == 0).sum() == 1


def test_soft_refuses_another_number_of_slots():
  """Its slots are parameters: another capacity is another model."""
  with pytest.raises(ConfigError, match="learned slots"):
    route(config("soft", capacity_factor=1.0), None, factor=2.0)
