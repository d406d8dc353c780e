"""The train state: a plain dict of arrays, and their shardings.

Everything that determines the next step is in the state or, for the data, a function
of `step`. A resumed run is therefore bit-identical to an uninterrupted one.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from moejax.models import trained as trained_lib
from moejax.models.placement import check_rows, param_shardings
from moejax.sharding import rules
from moejax.train.optimizer import Optimizer
from moejax.types import Params


class BadSteps(TypedDict):
  """Steps skipped as non-finite."""

  total: Int[Array, ""]
  in_a_row: Int[Array, ""]


class State(TypedDict):
  """The train state: a plain dict at run time, so that jax and Orbax need no class."""

  step: Int[Array, ""]
  """Optimizer steps taken, skipped ones included."""
  params: Params
  opt_state: Any
  """The optimizer's moments and counts."""
  key: Key[Array, ""]
  """PRNG key of the run; step n uses fold_in(key, n)."""
  bad_steps: BadSteps


def initial_state(model: Any, optimizer: Optimizer, key: Key[Array, ""]) -> State:
  """Returns the state before the first step. Pure: jit it with the state's shardings."""
  init_key, run_key = jax.random.split(key)
  return _state_of(model.init(init_key), optimizer, run_key)


def _state_of(params: Params, optimizer: Optimizer, key: Key[Array, ""]) -> State:
  return {
    "step": jnp.zeros((), jnp.int32),
    "params": params,
    "opt_state": optimizer.init(params),
    "key": key,
    "bad_steps": {
      "total": jnp.zeros((), jnp.int32),
      "in_a_row": jnp.zeros((), jnp.int32),
    },
  }


def state_shapes(model: Any, optimizer: Optimizer, mesh: Mesh) -> State:
  """Returns the state as ShapeDtypeStructs with shardings: the target of a restore."""
  check_rows(model, mesh)
  with jax.set_mesh(mesh):
    # The key is made inside eval_shape: described devices cannot hold an array.
    shapes = jax.eval_shape(
      lambda params: _state_of(params, optimizer, jax.random.key(0)), model.shapes()
    )
  params = param_shardings(model, mesh)
  everywhere = rules.replicated(mesh)
  shardings = jax.tree.map(lambda _: everywhere, shapes)
  shardings["params"] = params
  trained = optimizer.trained
  shardings["opt_state"] = rules.like_parameters(
    mesh,
    shapes["opt_state"],
    trained_lib.shapes(shapes["params"], trained),
    trained_lib.of_trained(params, trained),
  )
  return jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def shardings_of(shapes: Any) -> Any:
  """Returns the shardings of a tree of ShapeDtypeStructs or arrays."""
  return jax.tree.map(lambda s: s.sharding, shapes)


def make_init(
  model: Any, optimizer: Optimizer, mesh: Mesh
) -> Callable[[Key[Array, ""]], State]:
  """Compiles `initial_state` with sharded output, so no device holds the whole state."""
  shardings = shardings_of(state_shapes(model, optimizer, mesh))
  init = jax.jit(
    lambda key: initial_state(model, optimizer, key), out_shardings=shardings
  )

  def with_mesh(key: Key[Array, ""]) -> State:
    with jax.set_mesh(mesh):
      return init(key)

  return with_mesh


def replace_params(state: State, optimizer: Optimizer, params: Params) -> State:
  """Returns the state of a new run that starts from another run's parameters."""
  opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(state["opt_state"]))(
    params
  )
  return {**state, "params": params, "opt_state": opt_state}
