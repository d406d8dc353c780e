"""The one suite of a dispatcher: values and gradients against a loop in numpy.

`DispatcherSuite` is inherited by one class per registered dispatcher. The oracle is
tests/reference.py: float64 numpy over assignments, its gradients written out, so that
nothing in it passes through jax.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch.registry import DISPATCHERS
from moejax.experts.weights import ExpertWeights
from moejax.routing.base import (
  RouterInputs,
  RouterStats,
  Routing,
  SlotPolicy,
)
from moejax.routing.placement import Assignments
from moejax.routing.registry import ROUTERS
from tests import reference


def make_weights(key, num_experts, width, hidden, activation, dtype=jnp.float32):
  keys = jax.random.split(key, 3)
  return ExpertWeights(
    w_in=0.5 * jax.random.normal(keys[0], (num_experts, width, hidden), dtype),
    w_out=0.5 * jax.random.normal(keys[1], (num_experts, hidden, width), dtype),
    w_gate=0.5 * jax.random.normal(keys[2], (num_experts, width, hidden), dtype)
    if activation == "swiglu"
    else None,
  )


@functools.partial(jax.jit, static_argnames=("num_selected", "capacity", "router"))
def route(logits, *, num_selected=2, capacity=None, valid=None, router="top_k"):
  """Routes G groups by their logits [G, T, E]."""
  options = SlotPolicy(
    num_experts=logits.shape[-1], num_selected=num_selected, capacity=capacity
  )
  if valid is None:
    valid = jnp.ones(logits.shape[:-1], bool)
  inputs = RouterInputs(logits=logits, valid=valid)
  return jax.vmap(lambda i: ROUTERS[router]()(i, options))(inputs)


def route_to(experts, num_experts):
  """Routes one group dropless to the given expert of each token, gate 0.5 + t/T."""
  experts = np.asarray(experts)
  num_tokens = len(experts)
  order = np.argsort(experts, kind="stable")
  load = np.bincount(experts, minlength=num_experts)
  slot = np.empty_like(order)
  slot[order] = np.arange(num_tokens) - (np.cumsum(load) - load)[experts[order]]
  return _routing(
    token=np.arange(num_tokens),
    expert=experts,
    slot=slot,
    gate=0.5 + np.arange(num_tokens) / num_tokens,
    kept=np.ones(num_tokens, bool),
    order=order,
    load=load,
    num_tokens=num_tokens,
    num_selected=1,
  )


def route_expert_choice(key, num_tokens, num_experts, capacity):
  """Each expert takes C tokens of its own: some tokens several times, some never."""
  scores = jax.random.normal(key, (num_experts, num_tokens))
  gate, token = jax.lax.top_k(scores, capacity)
  index = np.arange(num_experts * capacity)
  return _routing(
    token=np.asarray(token).reshape(-1),
    expert=index // capacity,
    slot=index % capacity,
    gate=np.asarray(gate).reshape(-1),
    kept=np.ones(index.shape, bool),
    order=index,
    load=np.full(num_experts, capacity),
    num_tokens=num_tokens,
    num_selected=None,
    capacity=capacity,
  )


def _routing(*, num_tokens, num_selected, capacity=None, **fields) -> Routing:
  num_experts = len(fields["load"])
  zero, zeros = jnp.zeros((1,)), jnp.zeros((1, num_experts))
  dtypes = {"gate": jnp.float32, "kept": jnp.bool_}
  arrays: dict[str, Any] = {
    name: jnp.asarray(value, dtypes.get(name, jnp.int32))[None]
    for name, value in fields.items()
  }
  return Routing(
    placement=Assignments(
      **arrays, num_tokens=num_tokens, capacity=capacity, num_selected=num_selected
    ),
    probs=jnp.full((1, num_tokens, num_experts), 1 / num_experts),
    stats=RouterStats(
      num_valid=zero,
      chosen=zeros,
      load=zeros,
      importance=zeros,
      entropy=zero,
      dropped_tokens=zero,
    ),
  )


def gated(routing, gate):
  """The same routing with these gates."""
  placement = dataclasses.replace(routing.assignments, gate=gate)
  return dataclasses.replace(routing, placement=placement)


def run_experts(name, x, routing, weights, **options):
  """The layer's experts by the layout of this name, on one device."""
  return DISPATCHERS[name].of(routing.placement).run(x, weights, **options)


def oracle(x, routing, weights, activation, dy):
  """Y of tests/reference.py, and its gradients of sum(dy * y)."""
  f64 = functools.partial(np.asarray, dtype=np.float64)
  names = ("w_in", "w_out", "w_gate")
  arrays = {n: f64(w) for n in names if (w := getattr(weights, n)) is not None}
  placed = routing.assignments
  y, dx, d_gate, d_weights = [], [], [], []
  for group in range(len(x)):
    fields = (placed.token, placed.expert, f64(placed.gate), placed.kept)
    to = reference.Assigned(*(np.asarray(field[group]) for field in fields))
    row, d_row = f64(x[group]), f64(dy[group])
    y.append(reference.experts_forward(row, to, arrays, activation))
    found = reference.experts_backward(row, to, arrays, activation, d_row)
    for made, part in zip((dx, d_gate, d_weights), found, strict=True):
      made.append(part)
  grads = {name: sum(d[name] for d in d_weights) for name in arrays}
  return np.stack(y), {"x": np.stack(dx), "gate": np.stack(d_gate), **grads}


@functools.partial(
  jax.jit, static_argnames=("dispatcher", "activation", "implementation")
)
def run(dispatcher, x, routing, weights, dy, activation, implementation=None):
  """y, and the gradients of sum(dy * y) by name."""

  chosen = {} if implementation is None else {"implementation": implementation}

  def layer(x, gate, weights):
    routed = gated(routing, gate)
    return run_experts(dispatcher, x, routed, weights, activation=activation, **chosen)

  y, pull = jax.vjp(layer, x, routing.assignments.gate, weights)
  dx, d_gate, dw = pull(dy)
  grads = {"x": dx, "gate": d_gate, "w_in": dw.w_in, "w_out": dw.w_out}
  if dw.w_gate is not None:
    grads["w_gate"] = dw.w_gate
  return y, grads


class DispatcherSuite:
  """Inherited by one class per dispatcher, which gives its name."""

  name: str
  implementation: str | None = None
  """Of the ragged products; None is the layout's own choice."""

  def run(self, x, routing, weights, dy, activation):
    return run(self.name, x, routing, weights, dy, activation, self.implementation)

  def check(self, routing, *, activation="gelu", width=6, hidden=10, tolerance=2e-5):
    """Values and every gradient against the oracle."""
    num_groups, num_tokens, num_experts = routing.probs.shape
    keys = jax.random.split(jax.random.key(7), 3)
    x = jax.random.normal(keys[0], (num_groups, num_tokens, width))
    dy = jax.random.normal(keys[1], x.shape)
    weights = make_weights(keys[2], num_experts, width, hidden, activation)
    y, grads = self.run(x, routing, weights, dy, activation)
    want, want_grads = oracle(x, routing, weights, activation, dy)
    np.testing.assert_allclose(y, want, atol=tolerance, rtol=tolerance)
    kept = np.asarray(routing.assignments.kept)
    for name, grad in grads.items():
      grad = np.asarray(grad)
      if name == "gate":  # A dropped assignment's gate is a constant 0 already.
        grad = np.where(kept, grad, 0)
      scale = max(1.0, np.abs(want_grads[name]).max())
      np.testing.assert_allclose(
        grad / scale, want_grads[name] / scale, atol=tolerance, err_msg=name
      )
    return y, grads

  # Every pair of values occurs; all triples would only compile more.
  @pytest.mark.parametrize(
    "num_groups, capacity, activation",
    [
      (2, None, "gelu"),
      (2, 3, "gelu"),
      (1, None, "swiglu"),
      (4, 3, "swiglu"),
      (1, 3, "relu"),
      (4, None, "relu"),
    ],
  )
  def test_agrees_with_the_oracle(self, num_groups, capacity, activation):
    """Every activation, with drops and without, in one group and in several."""
    logits = jax.random.normal(jax.random.key(1), (num_groups, 12, 5))
    self.check(route(logits, capacity=capacity), activation=activation)

  @pytest.mark.parametrize("num_experts, num_selected", [(1, 1), (3, 3), (8, 1)])
  def test_extreme_shapes(self, num_experts, num_selected):
    """One expert; every expert chosen by every token; more experts than choices."""
    logits = jax.random.normal(jax.random.key(2), (2, 7, num_experts))
    self.check(route(logits, num_selected=num_selected))

  def test_all_patterns_of_empty_experts(self):
    """Any subset of experts may get nothing: its gradient is zero, no row leaks."""
    num_experts, num_tokens = 4, 9
    for pattern in range(1, 2**num_experts):
      used = [e for e in range(num_experts) if pattern >> e & 1]
      experts = [used[t * 7 % len(used)] for t in range(num_tokens)]
      _, grads = self.check(route_to(experts, num_experts))
      for e in set(range(num_experts)) - set(experts):
        assert not np.any(grads["w_in"][e]), (pattern, e)
        assert not np.any(grads["w_out"][e]), (pattern, e)

  def test_everything_to_one_expert(self):
    """The most skewed routing there is."""
    self.check(route_to([2] * 40, 4))

  def test_padding_everywhere(self):
    """A batch of nothing gives nothing, and no gradient."""
    logits = jax.random.normal(jax.random.key(3), (2, 12, 5))
    routing = route(logits, valid=jnp.zeros((2, 12), bool))
    y, grads = self.check(routing)
    assert not np.any(y)
    assert not any(np.any(grads[name]) for name in ("x", "w_in", "w_out"))

  def test_dropped_and_padded_tokens_get_exactly_zero(self):
    """Not scaled identity, not rounding: bits of zero, for any later content."""
    logits = jax.random.normal(jax.random.key(4), (2, 12, 5))
    # All choices fall on one pair of experts for some tokens, so that C=3 overflows.
    logits = logits.at[:, :6, :2].add(5.0)
    valid = jnp.ones((2, 12), bool).at[:, -3:].set(False)
    routing = route(logits, capacity=3, valid=valid)
    served = np.zeros((2, 12), bool)
    for g in range(2):
      served[
        g,
        np.asarray(routing.assignments.token[g])[np.asarray(routing.assignments.kept[g])],
      ] = True
    assert not served.all()
    y, grads = self.check(routing)
    assert not np.any(np.asarray(y)[~served])
    assert not np.any(np.asarray(grads["x"])[~served])

  def test_expert_choice(self):
    """Assignments that are not token-major: tokens served many times, or never."""
    routing = route_expert_choice(jax.random.key(5), 10, 4, 3)
    assert len(set(np.asarray(routing.assignments.token[0]).tolist())) < 10
    self.check(routing)

  def test_loads_on_both_sides_of_every_block_size(self):
    """Experts with about 1, 16, 33, 100, 520 rows in one batch."""
    loads = [1, 0, 15, 17, 33, 100, 130]
    experts = np.repeat(np.arange(len(loads)), loads)
    experts = np.random.default_rng(0).permutation(experts)
    self.check(route_to(experts, len(loads)), activation="swiglu", tolerance=5e-5)

  def test_bfloat16(self):
    """Compute in bf16: the result is bf16, and near the float32 one."""
    keys = jax.random.split(jax.random.key(6), 3)
    x = jax.random.normal(keys[0], (2, 12, 16))
    routing = route(jax.random.normal(keys[1], (2, 12, 4)))
    weights = make_weights(keys[2], 4, 16, 24, "swiglu")
    want, want_grads = oracle(x, routing, weights, "swiglu", np.ones(x.shape))
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, weights))
    y, grads = self.run(low[0], routing, low[1], jnp.ones_like(low[0]), "swiglu")
    assert y.dtype == jnp.bfloat16
    for name, grad in {**grads, "y": y}.items():
      reference = want if name == "y" else want_grads[name]
      assert grad.dtype == (jnp.float32 if name == "gate" else jnp.bfloat16), name
      error = np.abs(np.asarray(grad, np.float64) - reference).max()
      assert error < 0.05 * np.abs(reference).max(), name

  def test_in_scan_and_remat(self):
    """Stacked layers, recomputed in the backward pass, give the same gradient."""
    keys = jax.random.split(jax.random.key(8), 3)
    x = jax.random.normal(keys[0], (2, 8, 6))
    layers = jax.vmap(lambda k: make_weights(k, 4, 6, 10, "gelu"))(
      jax.random.split(keys[1], 2)
    )
    router = jax.random.normal(keys[2], (6, 4))

    def layer(x, weights):
      routing = route(x @ router, capacity=4)
      return x + run_experts(self.name, x, routing, weights, activation="gelu"), None

    def scanned(layers):
      return jnp.sum(jnp.square(jax.lax.scan(jax.checkpoint(layer), x, layers)[0]))

    def unrolled(layers):
      y = x
      for i in range(2):
        y, _ = layer(y, jax.tree.map(lambda w: w[i], layers))
      return jnp.sum(jnp.square(y))

    got = jax.jit(jax.grad(scanned))(layers)
    want = jax.jit(jax.grad(unrolled))(layers)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
