"""Operations on arrays of any shape, against experts written in numpy."""

import dataclasses
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import MoEConfig
from moejax.surgery.clone import Clone
from moejax.surgery.join import Join
from moejax.surgery.measured import Measured
from moejax.surgery.merge import Merge
from moejax.surgery.operation import Choice, Kind, Layer, Operation, Source
from moejax.surgery.permute import Permute
from moejax.surgery.split import Split

AXES = {
  "moe.experts.w_in": ("expert", "width", "hidden"),
  "moe.experts.w_gate": ("expert", "width", "hidden"),
  "moe.experts.w_out": ("expert", "hidden", "width"),
  "moe.experts.in_bias": ("expert", "hidden"),
  "moe.experts.gate_bias": ("expert", "hidden"),
  "moe.experts.out_bias": ("expert", "width"),
  "moe.router.weight": ("width", "router_expert"),
  "moe.router.bias": ("router_expert",),
}


class Sizes(NamedTuple):
  width: int
  experts: int
  half: int
  gated: bool
  biased: bool
  seed: int


# The layer is made in the test: its runtime checks draw numbers, which no strategy may.
SIZES = st.builds(
  Sizes,
  st.integers(1, 4),
  st.integers(2, 6),
  st.integers(1, 3),
  st.booleans(),
  st.booleans(),
  st.integers(0, 99),
)


def layer_of(sizes: Sizes) -> Layer:
  """A layer of any sizes, gated or not, with or without biases."""
  hidden, experts = 2 * sizes.half, sizes.experts
  axis_sizes = {
    "width": sizes.width,
    "hidden": hidden,
    "expert": experts,
    "router_expert": experts,
  }
  rng = np.random.default_rng(sizes.seed)
  arrays = {
    name: rng.normal(size=[axis_sizes[axis] for axis in axes]).astype(np.float32)
    for name, axes in AXES.items()
    if (sizes.gated or "gate" not in name)
    and (sizes.biased or "experts." not in name or "w_" in name)
  }
  moe = MoEConfig(
    num_experts=experts, num_selected=2, hidden=hidden, router="top_k", every=1, offset=0
  )
  return Layer(
    number=0,
    width=sizes.width,
    old=moe,
    new=moe,
    arrays=arrays,
    axes=AXES,
    shapes={},
    choice=Choice(parents=[]),
    seed=sizes.seed,
  )


def made(operation: Operation, layer: Layer, scale: float = 1.0, kind=Kind.VALUE):
  """The arrays that an operation makes of a layer's, and its choice."""
  source = Source(layers={0: layer}, measured=Measured())
  choice = dataclasses.replace(operation.choose(source)[0], scale=scale)
  layer = dataclasses.replace(layer, choice=choice, kind=kind)
  return {name: operation.leaf(name, layer) for name in layer.arrays}, choice


def apply(arrays, x):
  """The outputs of all experts, [E, T, D], with tanh for an activation."""

  def product(name, bias):
    out = np.einsum("td,edf->etf", x, arrays[f"moe.experts.{name}"])
    b = arrays.get(f"moe.experts.{bias}")
    return out if b is None else out + b[:, None]

  hidden = np.tanh(product("w_in", "in_bias"))
  if "moe.experts.w_gate" in arrays:
    hidden = hidden * product("w_gate", "gate_bias")
  out = np.einsum("etf,efd->etd", hidden, arrays["moe.experts.w_out"])
  b = arrays.get("moe.experts.out_bias")
  return out if b is None else out + b[:, None]


def tokens(layer):
  return np.random.default_rng(1).normal(size=(3, layer.width)).astype(np.float32)


def close(one, other):
  np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_the_parts_of_a_split_sum_to_the_expert(sizes):
  """With a scale of m, as where gates are shares, each part has m times its share."""
  layer = layer_of(sizes)
  new, _ = made(Split(pieces=2), layer, scale=2.0)
  x = tokens(layer)
  whole = apply(layer.arrays, x)
  parts = apply(new, x).reshape(len(whole), 2, *whole.shape[1:])
  close(parts.sum(1) / 2.0, whole)
  rows = new["moe.router.weight"]
  close(rows[:, ::2], layer.arrays["moe.router.weight"])
  close(rows[:, 1::2], layer.arrays["moe.router.weight"])


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_join_is_the_inverse_of_split(sizes):
  layer = layer_of(sizes)
  new, _ = made(Split(pieces=2), layer, scale=2.0)
  fine = dataclasses.replace(
    layer, old=dataclasses.replace(layer.old, segments=2), arrays=new
  )
  back, _ = made(Join(pieces=2), fine, scale=0.5)
  for name, x in layer.arrays.items():
    close(back[name], x)


@settings(max_examples=25, deadline=None)
@given(SIZES)
def test_a_permutation_moves_each_expert_with_its_row(sizes):
  layer = layer_of(sizes)
  new, choice = made(Permute(), layer)
  x = tokens(layer)
  close(apply(new, x), apply(layer.arrays, x)[choice.sources])
  close(new["moe.router.weight"], layer.arrays["moe.router.weight"][:, choice.sources])
  assert sorted(choice.sources) == list(range(layer.old.num_experts))


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(2, 3))
def test_merging_the_copies_of_a_clone_gives_the_experts_back(sizes, factor):
  """Values bit by bit; a moment is divided among copies, and adds up again."""
  layer = layer_of(sizes)
  for kind in Kind:
    arrays = layer.arrays
    if kind is Kind.SQUARE:
      arrays = {name: np.square(x) for name, x in arrays.items()}
    own = dataclasses.replace(layer, arrays=arrays)
    copies, _ = made(Clone(factor=factor), own, kind=kind)
    many = dataclasses.replace(layer.old, num_experts=layer.old.num_experts * factor)
    merge = Merge(experts=layer.old.num_experts, group_by="order", weigh="even")
    there = dataclasses.replace(layer, old=many, arrays=copies)
    back, choice = made(merge, there, kind=kind)
    for name, x in arrays.items():
      if kind is Kind.VALUE:
        np.testing.assert_array_equal(back[name], x)
      else:
        close(back[name], x)
    assert choice.exact


@settings(max_examples=15, deadline=None)
@given(SIZES, st.integers(0, 9))
def test_aligned_merges_find_a_permutation_of_neurons(sizes, seed):
  """Two experts with the same neurons in another order have that expert as their mean."""
  layer = layer_of(sizes)
  order = np.random.default_rng(seed).permutation(layer.old.hidden)
  arrays = {name: x.copy() for name, x in layer.arrays.items()}
  for name, x in arrays.items():
    if name.startswith("moe.experts."):
      hidden = AXES[name].index("hidden") if "hidden" in AXES[name] else None
      x[1] = x[0] if hidden is None else np.take(x[0], order, hidden - 1)
  experts = layer.old.num_experts
  own = dataclasses.replace(layer, arrays=arrays)
  merge = Merge(experts=experts - 1, group_by="weights", weigh="even")
  choice = merge._choice(
    own, [(0, 1), *((e,) for e in range(2, experts))], np.ones(experts)
  )
  assert choice.exact
  new = {
    name: merge.leaf(name, dataclasses.replace(own, choice=choice)) for name in arrays
  }
  x = tokens(layer)
  close(apply(new, x)[0], apply(arrays, x)[0])
