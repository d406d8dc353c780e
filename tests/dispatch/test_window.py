"""A placement seen by some of its experts: what `ring` lays out on each device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.dispatch.registry import DISPATCHERS
from moejax.routing.placement import Assignments, Mixture, Placement
from tests.dispatch.suite import make_weights, route, route_expert_choice
from tests.routing.test_token_choice import check_order

G, T, E, D, WINDOW = 2, 12, 6, 4, 2


def placements() -> dict[str, Placement]:
  logits = 2.0 * jax.random.normal(jax.random.key(0), (G, T, E))
  valid = jnp.ones((G, T), bool).at[:, -3:].set(False)
  weights = jax.nn.softmax(jax.random.normal(jax.random.key(1), (2, G, T, E, 3)), axis=2)
  everywhere = jnp.zeros_like(logits).at[..., 0].set(9.0)
  return {
    "dropless": route(logits).placement,
    "capacity and padding": route(logits, capacity=3, valid=valid).placement,
    "one expert has all": route(everywhere, num_selected=1).placement,
    "nothing is kept": route(logits, valid=jnp.zeros((G, T), bool)).placement,
    "expert choice": route_expert_choice(jax.random.key(2), T, E, 3).placement,
    "mixture": Mixture(dispatch=weights[0], combine=weights[1]),
  }


@functools.partial(jax.jit, static_argnames="count")
def seen(placement: Placement, first: jax.Array, count: int) -> Placement:
  return jax.vmap(lambda group: group.window(first, count))(placement)


@pytest.mark.parametrize("name", placements())
def test_a_window_is_a_slice_of_the_dense_weights(name):
  """For every first expert, also where windows overlap; and it keeps the contract."""
  placement = placements()[name]
  send = jax.jit(jax.vmap(lambda group: group.dispatch_weights()))
  back = jax.jit(jax.vmap(lambda group: group.combine_weights()))
  for first in range(E - WINDOW + 1):
    part = seen(placement, jnp.int32(first), WINDOW)
    here = slice(first, first + WINDOW)
    np.testing.assert_array_equal(send(part), send(placement)[:, :, here])
    np.testing.assert_array_equal(back(part), back(placement)[:, :, here])
    if isinstance(part, Assignments):
      np.testing.assert_array_equal(part.gate != 0, part.kept & (part.gate != 0))
      for g in range(part.num_groups):
        group = jax.tree.map(lambda leaf, g=g: leaf[g], part)
        check_order(group)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("name", placements())
def test_windows_add_up_to_the_whole(name, dispatcher):
  """Devices that hold two experts each compute, in sum, what one with all six does."""
  placement = placements()[name]
  layout = DISPATCHERS[dispatcher]
  if isinstance(placement, Mixture) and dispatcher != "einsum":
    with pytest.raises(TypeError, match=f"{dispatcher} reads Assignments, not Mixture"):
      layout.of(placement)
    return
  groups = placement.num_groups
  x = jax.random.normal(jax.random.key(3), (groups, T, D))
  weights = make_weights(jax.random.key(4), E, D, 6, "gelu")
  run = jax.jit(lambda part, own: layout.of(part).run(x, own, activation="gelu"))
  total = jnp.zeros_like(x)
  for first in range(0, E, WINDOW):
    own = jax.tree.map(lambda w, first=first: w[first : first + WINDOW], weights)
    total += run(seen(placement, jnp.int32(first), WINDOW), own)
  whole = run(placement, weights)
  np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-5)
