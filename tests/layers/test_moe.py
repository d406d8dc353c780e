"""The MoE layer as a whole against the numpy oracle, and what it promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ModelConfig, MoEConfig
from moejax.layers.moe import MoE
from moejax.models.shell import Shell
from moejax.routing.base import SlotPolicy
from moejax.routing.capacity import capacity_of
from tests import reference

B, S, D = 2, 12, 8
MODEL = ModelConfig(num_layers=2, width=D, num_heads=2, hidden=16)


def make(moe: MoEConfig, model: ModelConfig = MODEL):
  if moe.dispatcher == "auto":
    moe = dataclasses.replace(moe, dispatcher="einsum")  # The quickest to compile.
  shell = Shell(lambda key: MoE(model, moe, nnx.Rngs(params=key)))
  params = shell.init(jax.random.key(0))
  # Larger router weights than the initial ones, so that routing is decided and uneven.
  params["router"]["weight"] = params["router"]["weight"] * 40.0
  return shell, params


def call(shell, params, x, valid=None, *, train=True, capacity_factor=None, key=None):
  valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
  ids = jnp.zeros(x.shape[:2], jnp.int32)

  @jax.jit
  def run(params, x, valid, ids, key):
    return shell.merge(params)(
      x, valid, ids, key=key, train=train, capacity_factor=capacity_factor
    )

  return run(params, x, valid, ids, key)


def inputs(seed=0, dtype=jnp.float32):
  x = jax.random.normal(jax.random.key(seed), (B, S, D), jnp.float32)
  return x.astype(dtype), jnp.arange(S)[None, :] < jnp.array([[S], [S - 3]])


CASES = {
  "switch": MoEConfig(num_experts=4, hidden=16, capacity_factor=1.0),
  "top2": MoEConfig(
    num_experts=4, num_selected=2, hidden=16, router="top2", renormalize="before_drop"
  ),
  "dropless": MoEConfig(
    num_experts=4, num_selected=2, hidden=16, router="top_k", capacity_factor=None
  ),
  "fine_grained": MoEConfig(
    num_experts=3, num_selected=1, segments=2, hidden=16, router="top_k"
  ),
}


@pytest.mark.parametrize("dispatcher", ["einsum", "gather", "grouped"])
@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_oracle_in_value_and_gradient(name, dispatcher):
  """Every router and dispatcher: output and gradients of input and parameters."""
  moe = dataclasses.replace(CASES[name], dispatcher=dispatcher)
  shell, params = make(moe)
  x, valid = inputs()
  cotangent = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

  @jax.jit
  def run(params, x):
    factor = moe.capacity_factor
    y, vjp = jax.vjp(
      lambda p, x: call(shell, p, x, valid, capacity_factor=factor)[0], params, x
    )
    return y, *vjp(cotangent)

  y, d_params, d_x = run(params, x)
  m = moe.segments
  options = SlotPolicy(
    num_experts=moe.num_experts * m,
    num_selected=moe.num_selected * m,
    capacity=capacity_of(
      S, moe.num_experts * m, moe.num_selected * m, moe.capacity_factor
    ),
    renormalize=moe.renormalize,  # pyright: ignore[reportArgumentType]
  )
  weights = {k: np.asarray(v, np.float64) for k, v in params["experts"].items()}
  router = np.asarray(params["router"]["weight"], np.float64)
  total = {k: np.zeros(v.shape) for k, v in {**weights, "router": router}.items()}
  for group in range(B):
    expected, _, backward = reference.moe_layer(
      moe.router, np.asarray(x[group]), np.asarray(valid[group]), router, weights, options
    )
    gradients = backward(np.asarray(cotangent[group], np.float64))
    np.testing.assert_allclose(y[group], expected, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(d_x[group], gradients["x"], atol=1e-5, rtol=1e-4)
    for key in total:
      total[key] += gradients[key]
  np.testing.assert_allclose(
    d_params["router"]["weight"], total["router"], atol=1e-5, rtol=1e-4
  )
  for key in weights:
    np.testing.assert_allclose(
      d_params["experts"][key], total[key], atol=1e-5, rtol=1e-4, err_msg=key
    )


def test_a_dropped_token_contributes_exactly_zero():
  """Capacity 1 for many tokens: every token without a slot comes back as zeros."""
  shell, params = make(MoEConfig(num_experts=2, hidden=16, capacity_factor=0.01))
  x, _ = inputs()
  y, aux = call(shell, params, x, capacity_factor=0.01)
  zero_rows = int(jnp.sum(jnp.all(y == 0, axis=-1)))
  assert zero_rows == int(aux.stats.dropped_tokens) == B * S - int(aux.stats.load.sum())
  assert int(aux.stats.load.sum()) <= B * 2


def test_padding_is_never_routed_and_counts_in_no_loss():
  """Garbage in padded positions changes nothing anywhere else, not even a drop."""
  shell, params = make(CASES["switch"])
  x, valid = inputs()
  y, aux = call(shell, params, x, valid, capacity_factor=1.0)
  garbage = jnp.where(valid[..., None], x, 1e3)
  y2, aux2 = call(shell, params, garbage, valid, capacity_factor=1.0)
  np.testing.assert_array_equal(
    jnp.where(valid[..., None], y, 0.0), jnp.where(valid[..., None], y2, 0.0)
  )
  for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(aux2), strict=True):
    np.testing.assert_array_equal(a, b)
  assert float(aux.stats.num_valid) == float(valid.sum())


def test_evaluation_is_batch_invariant():
  """Dropless evaluation: a row's output does not depend on the rows beside it."""
  shell, params = make(CASES["dropless"])
  x, _ = inputs()
  both, _ = call(shell, params, x, train=False)
  alone, _ = call(shell, params, x[:1], train=False)
  np.testing.assert_allclose(both[:1], alone, atol=1e-6)


def test_shared_experts_are_added_to_every_token():
  """Shared experts are a dense feed-forward of width num_shared*F/m beside the sum."""
  moe = MoEConfig(num_experts=4, hidden=16, num_shared=2, capacity_factor=None)
  shell, params = make(moe)
  assert params["shared"]["w_in"].shape == (D, 32)
  x, _ = inputs()
  y, _ = call(shell, params, x)
  silenced = {**params, "shared": jax.tree.map(jnp.zeros_like, params["shared"])}
  routed, _ = call(shell, silenced, x)
  hidden = jax.nn.gelu(x @ params["shared"]["w_in"], approximate=True)
  np.testing.assert_allclose(y, routed + hidden @ params["shared"]["w_out"], atol=1e-5)


def test_router_is_float32_in_a_bfloat16_model():
  """The same tokens in bfloat16 get exactly the float32 router's decisions."""
  model = ModelConfig(num_layers=2, width=D, num_heads=2, dtype="bfloat16")
  shell, params = make(CASES["dropless"], model)
  x, _ = inputs(dtype=jnp.bfloat16)
  y, aux = call(shell, params, x)
  assert y.dtype == jnp.bfloat16
  _, wide = call(shell, params, x.astype(jnp.float32))
  for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(wide), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a, b)


def test_losses_are_linear_in_groups():
  """Two batches' terms add to the joint batch's: what accumulation rests on."""
  shell, params = make(CASES["switch"])
  x, valid = inputs()
  _, joint = call(shell, params, x, valid, capacity_factor=1.0)
  parts = [
    call(shell, params, x[i : i + 1], valid[i : i + 1], capacity_factor=1.0)[1]
    for i in range(B)
  ]
  summed = jax.tree.map(lambda *a: sum(a[1:], a[0]), *parts)
  for a, b in zip(jax.tree.leaves(joint), jax.tree.leaves(summed), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_batch_scope_balances_over_all_groups():
  """Scope batch: E * sum_e f_e P_e with fractions over the whole batch, by hand."""
  moe = MoEConfig(num_experts=4, hidden=16, balance_scope="batch", capacity_factor=None)
  shell, params = make(moe)
  x, _ = inputs()
  _, aux = call(shell, params, x)
  stats, tokens = aux.stats, B * S
  expected = 4 * float(jnp.sum(stats.chosen / tokens * stats.importance / tokens))
  assert float(aux.losses["balance_loss"]) / tokens == pytest.approx(expected, rel=1e-5)


def test_jitter_changes_routing_in_training_only():
  """Input jitter needs a key and training; evaluation is deterministic."""
  moe = MoEConfig(num_experts=4, hidden=16, jitter=0.9, capacity_factor=None)
  shell, params = make(moe)
  x, _ = inputs()
  key = jax.random.key(3)
  quiet, _ = call(shell, params, x, train=False, key=key)
  again, _ = call(shell, params, x, train=False)
  noisy, _ = call(shell, params, x, train=True, key=key)
  np.testing.assert_array_equal(quiet, again)
  assert not np.allclose(quiet, noisy)


def test_one_group_for_the_whole_batch():
  """group_size=-1: slots are shared by all sequences, whichever the tokens stand in."""
  moe = MoEConfig(num_experts=4, hidden=16, capacity_factor=1.0, group_size=-1)
  shell, params = make(moe)
  x, _ = inputs()
  y, aux = call(shell, params, x, capacity_factor=1.0)
  wide, other = call(shell, params, x.reshape(1, B * S, D), capacity_factor=1.0)
  np.testing.assert_allclose(y.reshape(1, B * S, D), wide, atol=1e-6)
  np.testing.assert_array_equal(aux.stats.load, other.stats.load)
  assert float(aux.stats.load.max()) <= B * S / 4


def test_the_entropy_term_is_there_only_when_asked_for():
  """Minus the mean entropy per token; times its weight it is part of the loss."""
  x, _ = inputs()
  shell, params = make(MoEConfig(num_experts=4, hidden=16, capacity_factor=None))
  assert "entropy_bonus" not in call(shell, params, x)[1].losses
  moe = MoEConfig(num_experts=4, hidden=16, capacity_factor=None, entropy_weight=0.1)
  shell, params = make(moe)
  _, aux = call(shell, params, x)
  np.testing.assert_allclose(aux.losses["entropy_bonus"], -aux.stats.entropy, rtol=1e-5)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_the_balance_loss_of_first_choices(scope):
  """E * sum of (share of first choices) * (mean probability), by numpy, per scope."""
  moe = MoEConfig(
    num_experts=4,
    num_selected=2,
    hidden=16,
    router="top_k",
    capacity_factor=None,
    balance_counts="first",
    balance_scope=scope,
  )
  shell, params = make(moe)
  x, _ = inputs()
  _, aux = call(shell, params, x)
  logits = np.asarray(x, np.float64) @ np.asarray(params["router"]["weight"], np.float64)
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  if scope == "batch":
    probs = probs.reshape(1, -1, 4)
  expected = 0.0
  for group in probs:
    first = np.bincount(group.argmax(-1), minlength=4) / len(group)
    expected += 4 * np.sum(first * group.mean(0)) * len(group)
  np.testing.assert_allclose(aux.losses["balance_loss"], expected, rtol=1e-5)
