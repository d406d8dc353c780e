"""Eight tokens, four experts, two devices: an MoE layer by hand, every number printed.

  python -m examples.eight_tokens_two_devices

Each cell takes one step of the layer with the function that moejax itself uses, inside
a real `jax.shard_map` over two (fake) devices, and prints what each device then holds.
The end compares with moejax's layer. The file opens as a notebook where `# %%` marks a
cell (VS Code, PyCharm, Jupyter with jupytext). tests/examples runs it.

Letters: G groups, T tokens of a group, D width, E experts, C slots per expert and group.
"""

# %% [markdown]
# ## The tokens
#
# Those of docs/routing.md, with their router probabilities, as two sequences of four:
# tokens 0, 1, 2, 5 and tokens 3, 4, 6, 7. A sequence is a routing group, and each device
# has one. Their first number is a name, 100 for token 0, which the router does not look
# at: wherever a row goes, it says whose it is. The other four are log-probabilities.

# %%
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from moejax.config import MeshConfig, ModelConfig, MoEConfig
from moejax.dispatch.slots import Slots
from moejax.experts.weights import ExpertWeights, apply_experts
from moejax.layers.moe import MoE
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import capacity_of
from moejax.routing.registry import ROUTERS
from moejax.sharding.mesh import TOKEN_AXES, make_mesh

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

E, D, F = 4, 5, 10
PROBABILITIES = {
  0: (0.6, 0.2, 0.1, 0.1),
  1: (0.5, 0.3, 0.1, 0.1),
  2: (0.7, 0.1, 0.1, 0.1),
  3: (0.1, 0.6, 0.2, 0.1),
  4: (0.4, 0.3, 0.2, 0.1),
  5: (0.1, 0.2, 0.6, 0.1),
  6: (0.2, 0.5, 0.2, 0.1),
  7: (0.1, 0.1, 0.2, 0.6),
}
ORDER = ((0, 1, 2, 5), (3, 4, 6, 7))
TOKENS = np.asarray(
  [[(100 + t, *np.log(PROBABILITIES[t])) for t in group] for group in ORDER], np.float32
)


def show(title: str, lines: list[str]) -> None:
  print(f"\n{title}", *(f"  {line}" for line in lines), sep="\n")


def numbers(row: Any, digits: int = 2) -> str:
  return " ".join(f"{value:7.{digits}f}" for value in row)


show(
  "tokens [G, T, D], one group per device",
  [
    f"device {g}, token {t}: {numbers(TOKENS[g, i])}"
    for g, group in enumerate(ORDER)
    for i, t in enumerate(group)
  ],
)

# %% [markdown]
# ## The layer
#
# Expert e multiplies a row by e + 1, so that a result says who computed it. A ReLU layer
# can do that exactly: `relu(x) - relu(-x) = x`. Experts 0 and 1 are on device 0, experts
# 2 and 3 on device 1. The router's weight picks the four log-probabilities out of a row.

# %%
EYE = np.eye(D, dtype=np.float32)
SCALE = np.arange(1, E + 1, dtype=np.float32)[:, None, None]
ROUTER = np.concatenate([np.zeros((1, E)), np.eye(E)]).astype(np.float32)
W_IN = np.broadcast_to(np.concatenate([EYE, -EYE], axis=1), (E, D, F))
W_OUT = SCALE * np.concatenate([EYE, -EYE])

MESH = make_mesh(MeshConfig(data=1, expert=2), jax.devices())
GROUPS, EXPERTS = PartitionSpec(TOKEN_AXES), PartitionSpec("expert")


def on_devices(function: Any, in_specs: Any, *args: Any) -> Any:
  """What `function` gives on each device, from its part of the arguments; all joined."""
  with jax.set_mesh(MESH):
    return jax.jit(jax.shard_map(function, in_specs=in_specs, out_specs=GROUPS))(*args)


# %% [markdown]
# ## Who goes where
#
# Router `switch`: each token to its most probable expert, gate its probability. With
# capacity factor 2 an expert has C = ceil(2 * 1 * 4 / 4) = 2 slots for each group.
# Device 0 has three tokens for expert 0, so token 2, the last of them, is dropped.

# %%
C = capacity_of(num_tokens=4, num_experts=E, num_selected=1, factor=2.0) or 4
assert C == 2


def route(tokens: Any) -> Routing:
  logits = tokens @ ROUTER
  inputs = RouterInputs(logits=logits, valid=jnp.ones(logits.shape[:2], bool))
  policy = SlotPolicy(num_experts=E, num_selected=1, capacity=C)
  return jax.vmap(lambda group: ROUTERS["switch"]()(group, policy))(inputs)


routing = on_devices(route, GROUPS, TOKENS)
placed = routing.assignments
show(
  "routing: token -> expert, slot, gate",
  [
    f"device {g}, token {t}: expert {placed.expert[g, i]}, "
    + (f"slot {placed.slot[g, i]}, " if placed.kept[g, i] else "dropped, ")
    + f"gate {placed.gate[g, i]:.1f}"
    for g, group in enumerate(ORDER)
    for i, t in enumerate(group)
  ],
)
np.testing.assert_array_equal(placed.expert, [[0, 0, 0, 2], [1, 0, 1, 3]])
np.testing.assert_array_equal(placed.kept, [[1, 1, 0, 1], [1, 1, 1, 1]])

# %% [markdown]
# ## Slots, before the exchange
#
# Each device copies its tokens into a buffer [receiver, expert of the receiver, slot, D].
# What stands under "for device 1" on device 0 is what it will send: token 5, and three
# empty slots. Buffers have the same size whatever the load: that is what makes the
# exchange one all-to-all of known shape.


# %%
def fill(tokens: Any, routing: Routing) -> Any:
  rows = Slots.of(routing.placement).to_experts(tokens)  # [E, 1, C, D]
  return rows.reshape(2, E // 2, C, D)


def names(rows: Any) -> str:
  return " ".join(f"{row[0]:5.0f}" if np.any(row) else "    -" for row in rows)


slots = on_devices(fill, (GROUPS, GROUPS), TOKENS, routing).reshape(2, 2, 2, C, D)
show(
  "slots before the exchange: names of the tokens in them",
  [
    f"on device {at}, for device {to}, expert {2 * to + e}: {names(slots[at, to, e])}"
    for at in range(2)
    for to in range(2)
    for e in range(2)
  ],
)
sent = slots[0, 1]
show(
  "everything that device 0 sends to device 1, [2 experts, C, D]",
  [
    f"expert {2 + e}, slot {c}: {numbers(sent[e, c])}" for e in range(2) for c in range(C)
  ],
)
assert names(sent[0]).split() == ["105", "-"] and not np.any(sent[1])

# %% [markdown]
# ## The exchange
#
# `all_to_all` over the `expert` axis: device d keeps its part d and gets part d of the
# other one. Afterwards the first index is not the receiver but the sender, and every row
# is on the device that has its expert.


# %%
def exchange(rows: Any) -> Any:
  return jax.lax.all_to_all(rows, "expert", split_axis=0, concat_axis=0, tiled=True)


received = on_devices(exchange, GROUPS, slots.reshape(4, 2, C, D))
received = received.reshape(2, 2, 2, C, D)
show(
  "slots after the exchange",
  [
    f"on device {at}, expert {2 * at + e}, from device {by}: {names(received[at, by, e])}"
    for at in range(2)
    for e in range(2)
    for by in range(2)
  ],
)
np.testing.assert_array_equal(received[1, 0], slots[0, 1])
np.testing.assert_array_equal(received[0, 1], slots[1, 0])

# %% [markdown]
# ## The experts, and back
#
# Each device runs its two experts on what it got: a row of expert e comes out e + 1 times
# as large. The same exchange once more, and each result is where its token is.


# %%
def compute(rows: Any, w_in: Any, w_out: Any) -> Any:
  weights = ExpertWeights(w_in=w_in, w_out=w_out)
  flat = rows.swapaxes(0, 1).reshape(E // 2, 2 * C, D)
  out = apply_experts(flat, weights, "relu")
  return out.reshape(E // 2, 2, C, D).swapaxes(0, 1)


computed = on_devices(
  compute, (GROUPS, EXPERTS, EXPERTS), received.reshape(4, 2, C, D), W_IN, W_OUT
)
back = on_devices(exchange, GROUPS, computed).reshape(2, 2, 2, C, D)
show(
  "results, back on the device of their token",
  [
    f"on device {at}, from device {by}, expert {2 * by + e}: {names(back[at, by, e])}"
    for at in range(2)
    for by in range(2)
    for e in range(2)
  ],
)
assert names(back[0, 1, 0]).split() == ["315", "-"]  # Token 5, three times as large.

# %% [markdown]
# ## Combine
#
# Each token takes the result out of its slot, times its gate. Token 2, which was dropped,
# gets exactly zero: the residual connection around the layer carries it.


# %%
def combine(rows: Any, routing: Routing) -> Any:
  return Slots.of(routing.placement).from_experts(rows.reshape(E, 1, C, D))


y = on_devices(combine, (GROUPS, GROUPS), back.reshape(4, 2, C, D), routing)
show(
  "output [G, T, D]: gate * (expert + 1) * token",
  [
    f"device {g}, token {t}: {numbers(y[g, i])}"
    for g, group in enumerate(ORDER)
    for i, t in enumerate(group)
  ],
)
assert not np.any(y[0, 2])
np.testing.assert_allclose(y[0, 3], 0.6 * 3 * TOKENS[0, 3], rtol=1e-6)

# %% [markdown]
# ## The same by moejax's layer
#
# With these weights, on one device, where nothing is exchanged, and on the two.

# %%
MODEL = ModelConfig(num_layers=1, width=D, num_heads=1, activation="relu")
MOE = MoEConfig(
  num_experts=E,
  num_selected=1,
  hidden=F,
  router="switch",
  capacity_factor=2.0,
  exchange="all_to_all",
)


def layer(x: Any) -> Any:
  moe = MoE(MODEL, MOE, nnx.Rngs(params=0))
  graph, state = nnx.split(moe)
  params = nnx.to_pure_dict(state)
  params["router"]["weight"] = jnp.asarray(ROUTER)
  params["experts"] |= {"w_in": jnp.asarray(W_IN), "w_out": jnp.asarray(W_OUT)}
  nnx.replace_by_pure_dict(state, params)
  ones = jnp.ones(x.shape[:2], bool)
  ids = jnp.zeros(x.shape[:2], jnp.int32)
  out, aux = nnx.merge(graph, state)(
    x, ones, ids, key=jax.random.key(0), train=True, capacity_factor=2.0
  )
  return out, aux.stats.load


one, load = jax.jit(layer)(TOKENS)
with jax.set_mesh(MESH):
  two, load_of_two = jax.jit(layer, in_shardings=(jax.NamedSharding(MESH, GROUPS),))(
    TOKENS
  )
np.testing.assert_allclose(y, one, rtol=1e-6, atol=1e-6)
np.testing.assert_allclose(y, two, rtol=1e-6, atol=1e-6)
np.testing.assert_array_equal(load, load_of_two)
show(
  "moejax's layer",
  [
    f"largest difference on one device:  {np.max(np.abs(y - one)):.1e}",
    f"largest difference on two devices: {np.max(np.abs(y - two)):.1e}",
    f"tokens per expert: {' '.join(str(int(n)) for n in load)}, one of eight dropped",
  ],
)
