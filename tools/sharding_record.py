"""Who holds which part of each array of an MoE layer, as seen while it runs.

Nothing here is derived from the rules: parameters and results are asked where their
parts lie, and what exists only inside the layer is caught on its way into and out of
its own collectives. Those values are numbered beforehand, so what a device holds is
read off the numbers that it has: slots after an exchange name the tokens in them.

Letters: G groups, T tokens of a group, D width, F hidden width, E experts, C slots.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moejax.config import MeshConfig, ModelConfig, MoEConfig
from moejax.config.mesh import AXES
from moejax.layers.moe import MoE
from moejax.models.shell import Shell
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh, num_token_shards

Box = tuple[tuple[int, int], ...]
"""First and last + 1 along each dimension."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The smallest layer that a mesh can cut everywhere."""

  groups: int
  tokens: int
  width: int
  experts: int

  @property
  def slots(self) -> int:
    """C: every expert of a group gets T/E tokens, and has as many slots."""
    return self.tokens // self.experts

  @classmethod
  def of(cls, mesh: Mesh) -> "Sizes":
    experts = max(4, 2 * mesh.shape["expert"])
    # F = D, so that experts can be the identity.
    width = 4 * math.lcm(mesh.shape["fsdp"], mesh.shape["tensor"])
    return cls(2 * num_token_shards(mesh), 2 * experts, width, experts)


@dataclasses.dataclass(frozen=True)
class Held:
  """An array, and the part of it on each device."""

  title: str
  letters: str
  shape: tuple[int, ...]
  parts: dict[int, Box]
  """By device id. Of partial sums: what its addend contains."""

  @property
  def partial(self) -> bool:
    """Whether slots are cut over their width: each device then has an addend."""
    return self.letters == "ESD" and len({box[2] for box in self.parts.values()}) > 1


@dataclasses.dataclass(frozen=True)
class Recording:
  """What one run of a layer showed."""

  mesh: Mesh
  sizes: Sizes
  held: list[Held]
  """In the order of the layer's steps."""
  sent: dict[int, np.ndarray]
  """By device: the numbers in its buffer before the exchange [receiver, expert of the
  receiver, slot, D]; empty without an expert axis."""
  received: dict[int, np.ndarray]
  """After it: [sender, expert of this device, slot, D]."""


def record(config: MeshConfig, devices: list[Any]) -> Recording:
  """Runs an MoE layer on the mesh, and tells what was where."""
  mesh = make_mesh(config, devices)
  sizes = Sizes.of(mesh)
  model = ModelConfig(
    num_layers=1, width=sizes.width, num_heads=1, activation="relu", hidden=sizes.width
  )
  moe = MoEConfig(
    num_experts=sizes.experts,
    num_selected=1,
    hidden=sizes.width,
    router="forced_balance",  # Token t of a group goes to expert t mod E.
    capacity_factor=1.0,
  )
  shell = Shell(lambda key: MoE(model, moe, nnx.Rngs(params=key)))
  shapes = jax.eval_shape(shell.init, jax.random.key(0))
  placed = rules.shardings(mesh, shell.axes, shapes)
  tokens = rules.batch_sharding(mesh)
  shape = (sizes.groups, sizes.tokens, sizes.width)
  x = jax.device_put(_numbered(shape), tokens)

  def layer(params: Any, x: Any) -> Any:
    ones, ids = jnp.ones(x.shape[:2], bool), jnp.zeros(x.shape[:2], jnp.int32)
    key = jax.random.key(0)
    return shell.merge(params)(x, ones, ids, key=key, train=True, capacity_factor=1.0)[0]

  numbered = jax.tree.map(
    lambda s, at: jax.device_put(_numbered(s.shape), at), *(shapes, placed)
  )
  seen: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
  with jax.set_mesh(mesh), caught(mesh, seen):
    run = jax.jit(layer, in_shardings=(placed, tokens), out_shardings=tokens)
    run(numbered, x)
    jax.effects_barrier()
    weights = dict(seen)
    seen.clear()
    # Experts that change nothing: what they computed still says whose it is.
    y = run(_identity(numbered, placed), x)
    jax.effects_barrier()
  return Recording(
    mesh,
    sizes,
    _steps(sizes, numbered, x, y, weights, seen),
    dict(seen["all_to_all 0 in"]),
    dict(seen["all_to_all 0 out"]),
  )


def _numbered(shape: tuple[int, ...]) -> np.ndarray:
  """1, 2, 3, ...: every number says its place. Zero is an empty slot."""
  return 1 + np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def _identity(params: Any, placed: Any) -> Any:
  size = params["experts"]["w_in"].shape[1]
  eye = np.broadcast_to(np.eye(size, dtype=np.float32), params["experts"]["w_in"].shape)
  # Gates are probabilities, and with a zero router all the same: 1/E.
  router = jax.tree.map(jnp.zeros_like, params["router"])
  experts = {
    name: jax.device_put(eye, placed["experts"][name]) for name in params["experts"]
  }
  return params | {"router": router, "experts": experts}


@contextlib.contextmanager
def caught(mesh: Mesh, seen: dict[str, dict[int, np.ndarray]]) -> Iterator[None]:
  """Notes, by device, what goes into and comes out of collectives traced in here.

  Under the names `all_gather 0 in`, `all_gather 0 out`, `all_gather 1 in` and so on.
  """
  real = {name: getattr(jax.lax, name) for name in ("all_gather", "all_to_all")}
  count: collections.Counter[str] = collections.Counter()

  def note(key: str, x: Any) -> None:
    def store(x: np.ndarray, *index: np.ndarray) -> None:
      seen[key][mesh.devices[tuple(int(i) for i in index)].id] = np.asarray(x)

    jax.debug.callback(store, x, *(jax.lax.axis_index(axis) for axis in AXES))

  def noted(name: str) -> Callable[..., Any]:
    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
      key = f"{name} {count[name]}"
      count[name] += 1
      note(f"{key} in", x)
      out = real[name](x, *args, **kwargs)
      note(f"{key} out", out)
      return out

    return call

  for name in real:
    setattr(jax.lax, name, noted(name))
  try:
    yield
  finally:
    for name, function in real.items():
      setattr(jax.lax, name, function)


def _steps(
  sizes: Sizes,
  params: Any,
  x: jax.Array,
  y: jax.Array,
  weights: dict[str, dict[int, np.ndarray]],
  seen: dict[str, dict[int, np.ndarray]],
) -> list[Held]:
  w_in, router = params["experts"]["w_in"], params["router"]["weight"]
  # The first gather is that of the router's weight.
  gathered = weights.get("all_gather 1 out")
  held = [
    Held("tokens", "GTD", x.shape, placed(x)),
    Held("router weight, at rest", "DE", router.shape, placed(router)),
    Held("expert weight, at rest", "EDF", w_in.shape, placed(w_in)),
    Held(
      "expert weight, in use",
      "EDF",
      w_in.shape,
      # Used as it lies where nothing cuts it over fsdp.
      {d: box_of(a, w_in.shape) for d, a in gathered.items()}
      if gathered
      else placed(w_in),
    ),
  ]
  slots = (sizes.experts, sizes.groups * sizes.slots, sizes.width)
  moves = {
    "slots, before the exchange": "all_to_all 0 in",
    "slots, after the exchange": "all_to_all 0 out",
    "experts' output": "all_to_all 1 in",
    "results, back": "all_to_all 1 out",
  }
  held += [
    Held(title, "ESD", slots, {d: slot_box(a, sizes) for d, a in seen[key].items()})
    for title, key in moves.items()
    if seen[key]
  ]
  return [*held, Held("output", "GTD", y.shape, placed(y))]


def placed(array: jax.Array) -> dict[int, Box]:
  """The part of a real array that each device has."""
  return {
    shard.device.id: tuple(
      (s.start or 0, size if s.stop is None else s.stop)
      for s, size in zip(shard.index, array.shape, strict=True)
    )
    for shard in array.addressable_shards
  }


def box_of(numbers: np.ndarray, shape: tuple[int, ...]) -> Box:
  """The part of a numbered array that these numbers are: all of a box, and no other."""
  index = np.unravel_index(np.unique(numbers).astype(np.int64) - 1, shape)
  box = tuple((int(i.min()), int(i.max()) + 1) for i in index)
  assert len(index[0]) == math.prod(stop - start for start, stop in box), box
  return box


def slot_numbers(rows: np.ndarray, sizes: Sizes) -> np.ndarray:
  """Numbers of tokens' values, as those of the slots [E, G*C, D] they must stand in."""
  found = np.unique(np.round(rows)).astype(np.int64)
  group, token, width = place_of(found[found > 0], sizes)
  expert, slot = token % sizes.experts, token // sizes.experts
  slots = (sizes.experts, sizes.groups * sizes.slots, sizes.width)
  return 1 + np.ravel_multi_index((expert, group * sizes.slots + slot, width), slots)


def place_of(numbers: np.ndarray, sizes: Sizes) -> tuple[np.ndarray, ...]:
  """Group, token and dimension of values of `x`."""
  shape = (sizes.groups, sizes.tokens, sizes.width)
  return np.unravel_index(numbers.astype(np.int64) - 1, shape)


def slot_box(rows: np.ndarray, sizes: Sizes) -> Box:
  slots = (sizes.experts, sizes.groups * sizes.slots, sizes.width)
  return box_of(slot_numbers(rows, sizes), slots)
