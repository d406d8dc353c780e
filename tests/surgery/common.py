"""Tiny models in memory, operated on without a directory, and one layer of them run."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.checkpoint import fingerprint
from moejax.config import Config, ModelConfig, MoEConfig
from moejax.config.check import validate
from moejax.layers.feed_forward import FeedForward
from moejax.layers.moe import MoE
from moejax.models.make import make_model
from moejax.models.shell import Shell
from moejax.surgery import run
from moejax.surgery.change import Change, InMemory
from moejax.surgery.measured import Measured
from moejax.surgery.operation import Choice, Kind, Operation, Source
from moejax.types import Params

VOCAB = 11
D = 8
B, S = 2, 16


def config(**changes: Any) -> Config:
  """One MoE layer of four experts; fields of `moe`, or of others as model__width."""
  made = Config(
    model=ModelConfig(num_layers=1, width=D, num_heads=2, hidden=12),
    moe=MoEConfig(
      num_experts=4,
      num_selected=2,
      hidden=12,
      every=1,
      offset=0,
      router="top_k",
      dispatcher="einsum",
      capacity_factor=None,
    ),
  )
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    setattr(getattr(made, section or "moe"), field, value)
  return made


def draw(config: Config, seed: int = 0) -> Params:
  """Random parameters of a config's model."""
  model = make_model(config.model, config.moe, vocab_size=VOCAB)
  rng = np.random.default_rng(seed)

  def one(path: Any, leaf: Any) -> np.ndarray:
    values = rng.normal(size=leaf.shape) * 0.5
    name = fingerprint.leaf_name(path)
    if name == "hash_table":
      values = np.argsort(rng.random((leaf.shape[0], model.moe.fine_experts)), axis=1)
      values = values[:, : leaf.shape[1]]
    return np.asarray(values, leaf.dtype)

  return jax.tree_util.tree_map_with_path(one, model.shapes())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """An operation done in memory."""

  change: Change
  choices: dict[int, Choice]
  expected: str
  params: Params
  """Of the new model."""

  def moments(self, tree: Params, kind: Kind) -> Params:
    """The same operation on moments like the old parameters, or on gradients."""
    make = self.change.maker(InMemory({"m": tree}), self.choices, "m.", kind)
    return jax.tree_util.tree_map_with_path(
      lambda path, shape: np.asarray(make(fingerprint.leaf_name(path), shape)),
      self.change.shapes,
    )


def operate(
  operation: Operation,
  old: Config,
  params: Params,
  *,
  asked: Config | None = None,
  sums: dict[int, Any] | None = None,
  seed: int = 0,
) -> Result:
  """Does an operation on parameters in memory; `asked` has the user's own fields."""
  change = make_change(operation, old, asked, seed)
  arrays = InMemory({"params": params})
  choices = run.choose(change, arrays, Measured(sums=sums))
  return Result(
    change=change,
    choices=choices,
    expected=run.expectation(change, arrays, choices),
    params=jax.tree.map(np.asarray, change.arrays(arrays, choices)),
  )


def make_change(
  operation: Operation, old: Config, asked: Config | None = None, seed: int = 0
) -> Change:
  """The change of an operation, after all checks."""
  operation.check(old)
  new = operation.new_config(old, old if asked is None else asked)
  validate(new)
  models = [make_model(c.model, c.moe, vocab_size=VOCAB) for c in (old, new)]
  change = Change(
    operation=operation,
    old=old,
    new=new,
    old_model=models[0],
    new_model=models[1],
    seed=seed,
  )
  change.check()
  return change


def chosen(
  change: Change, params: Params, sums: dict[int, Any] | None = None
) -> dict[int, Choice]:
  """The choices alone, without the scale of outputs: nothing is compiled."""
  arrays = InMemory({"params": params})
  layers = {n: change.layer(n, arrays) for n in change.made}
  measured = Measured(sums=sums)
  same = change.new_model.router.has_table
  return change.operation.choose(
    Source(layers=layers, measured=measured, same_in_all=same)
  )


def unscaled(
  change: Change, params: Params, sums: dict[int, Any] | None = None
) -> Params:
  """The new parameters, without the scale of outputs: nothing is compiled."""
  arrays = change.arrays(InMemory({"params": params}), chosen(change, params, sums))
  return jax.tree.map(np.asarray, arrays)


def layer_of(params: Params, what: str = "moe") -> Params:
  """The arrays of the only layer's feed-forward."""
  part = "unit" if params["unit"] else "prefix"
  block = params[part]["0"][what]
  return jax.tree.map(lambda x: x[0], block) if part == "unit" else block


def with_layer(params: Params, layer: Params, what: str = "moe") -> Params:
  """A tree like the parameters, zero but for the only layer's feed-forward."""
  tree = jax.tree.map(np.zeros_like, params)
  part = "unit" if params["unit"] else "prefix"
  stacked = jax.tree.map(lambda x: x[None] if part == "unit" else x, layer)
  tree[part]["0"][what] = stacked
  return tree


@functools.lru_cache(maxsize=64)
def _runner(text: str, width: int, holder: "_Holder") -> Any:
  del text
  config = holder.config
  shell = Shell(lambda key: MoE(config.model, config.moe, nnx.Rngs(params=key)))

  @jax.jit
  def run(params: Any, x: Any, cotangent: Any, assigned: Any) -> Any:
    def apply(params: Any, x: Any) -> Any:
      valid, ids = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], jnp.int32)
      return shell.merge(params)(
        *(x, valid, ids, assigned),
        key=None,
        train=False,
        capacity_factor=config.moe.eval_capacity_factor,
      )[0]

    y, vjp = jax.vjp(apply, params, x)
    return y, *vjp(cotangent)

  return run


class _Holder:
  """A config as an argument of a cached function, equal to any other."""

  def __init__(self, config: Config):
    self.config = config

  def __hash__(self) -> int:
    return 0

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Holder)


def inputs(seed: int) -> Any:
  """A generator, random tokens and a random cotangent."""
  rng = np.random.default_rng(seed)
  x, cotangent = (jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32) for _ in "ab")
  return rng, x, cotangent


def run_layer(config: Config, params: Params, table: Any = None, seed: int = 0) -> Any:
  """The layer's output on random tokens, and the gradients of parameters and input."""
  rng, x, cotangent = inputs(seed)
  assigned = None
  if table is not None:
    ids = rng.integers(len(table), size=(B, S))
    assigned = jnp.asarray(np.asarray(table)[ids], jnp.int32)
  run = _runner(repr((config.model, config.moe)), D, _Holder(config))
  params = jax.tree.map(jnp.asarray, layer_of(params))
  return jax.tree.map(np.asarray, run(params, x, cotangent, assigned))


def run_dense(config: Config, params: Params, seed: int = 0) -> Any:
  """As `run_layer`, of the only layer's dense feed-forward."""
  _, x, cotangent = inputs(seed)
  dense = layer_of(params, "feed_forward")
  activation = config.moe.activation or config.model.activation
  hidden = dense["w_in"].shape[1]
  model = config.model
  shell = Shell(lambda key: FeedForward(model, hidden, nnx.Rngs(params=key), activation))

  @jax.jit
  def run(params: Any, x: Any) -> Any:
    y, vjp = jax.vjp(lambda params, x: shell.merge(params)(x), params, x)
    return y, *vjp(cotangent)

  return jax.tree.map(np.asarray, run(jax.tree.map(jnp.asarray, dense), x))
