"""Muon: which parameters, what an update is; stacks and meshes change nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.checkpoint.manager import DIRECTORY, Checkpointer
from moejax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moejax.models.decoder import Decoder
from moejax.models.placement import param_shardings
from moejax.sharding.mesh import make_mesh
from moejax.train import muon
from moejax.train import state as state_lib
from moejax.train.optimizer import make_optimizer
from tests.train.conftest import VOCAB, make_batch, make_setup, tiny_config

MESHES = {
  "expert": MeshConfig(data=1, expert=4),
  "fsdp": MeshConfig(data=1, fsdp=4),
  "all": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}

DEVICES = {"": 1, "expert": 4, "fsdp": 4, "all": 8}

EXPERTS = ("layer", "expert", "width", "hidden")


def config_of(mesh: MeshConfig | None = None) -> Config:
  """The tiny model under Muon, with every kind of parameter that is no matrix."""
  config = tiny_config()
  config.optimizer.name = "muon"
  config.model.qk_norm = config.model.attention_bias = True
  config.moe.num_shared, config.moe.shared_gate = 1, True
  config.mesh = mesh or config.mesh
  return config


def random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("names", "steps", "rms"))
def orthogonalize(momentum, names=EXPERTS, steps=5, rms=1.0):
  # As in `Optimizer.apply`: optax mixes weak and strong types.
  with jax.numpy_dtype_promotion("standard"):
    return muon.orthogonalize(momentum, names, steps=steps, rms=rms)


def newton_schulz(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
  """Jordan's iteration, by the singular values, on which alone it acts:
  s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
  u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
  s /= np.sqrt(np.sum(s**2))
  for _ in range(steps):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return (u * s) @ v


def test_the_hidden_matrices_are_muons_and_nothing_else_is():
  """Of a model that has all of: biases, norms of queries, a shared expert with a gate,
  an untied head, and a router."""
  config = config_of()
  axes = Decoder(config.model, config.moe, vocab_size=VOCAB).logical_axes()
  flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda a: isinstance(a, tuple))
  found: dict[bool, set[str]] = {True: set(), False: set()}
  for path, names in flat:
    found[muon.is_matrix(names)].add(jax.tree_util.keystr(path[-1:], simple=True))
  assert found[True] == {"query", "key", "value", "out", "w_in", "w_out"}
  assert not found[True] & found[False]
  assert len(found[False]) >= 8


def test_the_matrices_of_latent_attention_are_muons():
  """Down to a latent vector, up from it to heads, and out; biases, norms and sinks are
  not. An update of a stack is one orthogonal [rank, heads * head_dim] per layer."""
  model = ModelConfig(
    attention="latent",
    q_rank=8,
    kv_rank=12,
    nope_head_dim=6,
    rope_head_dim=4,
    value_head_dim=5,
    attention_bias=True,
    attention_out_bias=True,
    attention_sinks=True,
  )
  axes = Decoder(model, MoEConfig(), vocab_size=VOCAB).logical_axes()
  own = axes["unit"]["0"]["attention"]
  vectors = {"query_norm", "kv_norm"}
  matrices = {n for n in own if n not in vectors and muon.is_matrix(own[n])}
  assert matrices == {"query_down", "query_up", "kv_down", "kv_up", "out"}
  update = orthogonalize(random((2, 12, 4, 11)), own["kv_up"])
  values = np.linalg.svd(np.asarray(update).reshape(2, 12, 44), compute_uv=False)
  assert (values / 44**0.5 > 0.65).all() and (values / 44**0.5 < 1.2).all()


def test_every_expert_of_every_layer_has_orthogonal_updates_of_its_own():
  """Singular values of each matrix in [0.65, 1.2], which is what five iterations leave
  of those above 0.01 of the norm (Jordan: 0.7 to 1.2 "or so"), however different the
  experts' gradients are in size."""
  momentum = random((2, 3, 16, 48)) * 10.0 ** np.arange(-4, 2).reshape(2, 3, 1, 1)
  update = np.asarray(orthogonalize(momentum)) / 48**0.5
  values = np.linalg.svd(update, compute_uv=False)
  assert values.shape == (2, 3, 16)
  assert values.min() > 0.65 and values.max() < 1.2


def test_an_expert_is_moved_by_its_own_gradient_alone():
  """Another gradient of one expert changes its update and no bit of the others'; no
  gradient at all is no update."""
  momentum = random((2, 3, 8, 16))
  before = np.asarray(orthogonalize(momentum))
  momentum[1, 2] = random((8, 16), seed=1)
  momentum[0, 1] = 0.0
  after = np.asarray(orthogonalize(momentum))
  same = np.all(before == after, axis=(2, 3))
  np.testing.assert_array_equal(same, [[True, False, True], [True, True, False]])
  assert not after[0, 1].any()


@pytest.mark.parametrize("steps", [1, 5])
def test_the_iteration_is_jordans(steps):
  """Against singular values in float64, wide and tall. Float32 leaves 1e-7 of the norm in
  each entry, which five iterations enlarge up to 3.4445^5 = 485 times: 1e-4."""
  for names, shape in ((EXPERTS, (1, 2, 12, 20)), (("hidden", "width"), (20, 12))):
    momentum = random(shape)
    update = np.asarray(orthogonalize(momentum, names=names, steps=steps))
    expected = np.stack(
      [newton_schulz(m, steps) for m in momentum.reshape(-1, *shape[-2:])]
    )
    np.testing.assert_allclose(
      update, 20**0.5 * expected.reshape(shape), atol=20**0.5 * 1e-4
    )


def test_heads_together_are_one_matrix():
  """[D, H, head_dim] is the matrix [D, H*head_dim], and [H, head_dim, D] likewise."""
  momentum = random((2, 12, 4, 6))
  update = orthogonalize(momentum, names=("layer", "width", "heads", "head_dim"))
  flat = orthogonalize(momentum.reshape(2, 12, 24), names=("layer", "width", "hidden"))
  np.testing.assert_array_equal(np.reshape(update, (2, 12, 24)), flat)
  momentum = random((4, 6, 12))
  update = orthogonalize(momentum, names=("heads", "head_dim", "width"))
  flat = orthogonalize(momentum.reshape(24, 12), names=("hidden", "width"))
  np.testing.assert_array_equal(np.reshape(update, (24, 12)), flat)


def test_stacked_layers_are_updated_like_single_ones():
  """As scanned, and in a prefix. XLA may sum in another order: within 1e-4, as above."""
  momentum = random((3, 4, 8, 16))
  stacked = orthogonalize(momentum)
  for layer in range(3):
    single = orthogonalize(momentum[layer], names=EXPERTS[1:])
    np.testing.assert_allclose(stacked[layer], single, atol=4e-4)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_the_size_of_an_update_does_not_depend_on_the_shape(shape):
  """Moonlight, section 2.2: a root mean square of 0.2, AdamW's in practice. Singular
  values of 0.65 to 1.2, in place of 1, leave 0.13 to 0.24."""
  update = orthogonalize(random(shape), names=("width", "hidden"), rms=0.2)
  assert 0.13 < float(jnp.sqrt(jnp.mean(jnp.square(update)))) < 0.24


def test_momentum_is_nesterovs():
  """Two steps by hand with momentum 0.5 and no other option: g1 + 0.5 g1, of the first;
  t = 0.5 g1 + g2 and g2 + 0.5 t, of the second. Adam moves the norm by the rate."""
  config = config_of()
  config.optimizer.momentum, config.optimizer.update_rms = 0.5, 1.0
  config.optimizer.weight_decay = config.optimizer.clip_norm = 0.0
  axes = {"w": ("width", "hidden"), "scale": ("norm",)}
  trained = {"w": True, "scale": True}
  optimizer = make_optimizer(config.optimizer, num_steps=9, axes=axes, trained=trained)
  params = {"w": jnp.zeros((8, 12)), "scale": jnp.ones(4)}
  state, moved = optimizer.init(params), [params]
  gradients = [random((8, 12), seed) for seed in (1, 2)]
  for g in gradients:
    new, state = optimizer.apply(
      {"w": jnp.asarray(g), "scale": jnp.ones(4)},
      state,
      moved[-1],
      learning_rate=jnp.float32(0.1),
      gradient_norm=jnp.float32(1.0),
    )
    moved.append(new)
  first, second = gradients
  for i, momentum in enumerate([first, second + 0.5 * (0.5 * first + second)]):
    step = np.asarray(moved[i + 1]["w"] - moved[i]["w"])
    expected = -0.1 * 12**0.5 * newton_schulz(momentum)
    np.testing.assert_allclose(step, expected, atol=1e-4)
  np.testing.assert_allclose(moved[1]["scale"], 0.9, rtol=1e-5)


@functools.cache
def updated(mesh: str) -> tuple:
  """Parameters before and after one update by random gradients, on a mesh."""
  config = config_of(MESHES.get(mesh))
  placed = make_mesh(config.mesh, jax.devices()[: DEVICES[mesh]])
  model = Decoder(config.model, config.moe, vocab_size=VOCAB)
  optimizer = make_optimizer(
    config.optimizer, num_steps=9, axes=model.logical_axes(), trained=model.trained()
  )
  shardings = param_shardings(model, placed)
  seeds = iter(range(1000))
  draw = lambda s: random(s.shape, next(seeds)) * 0.1  # noqa: E731
  params = jax.tree.map(draw, model.shapes())
  gradients = jax.tree.map(draw, model.shapes())

  @functools.partial(jax.jit, out_shardings=shardings)
  def update(params, gradients):
    new, _ = optimizer.apply(
      gradients,
      optimizer.init(params),
      params,
      learning_rate=jnp.float32(0.1),
      gradient_norm=optax.tree.norm(gradients),
    )
    return new

  with jax.set_mesh(placed):
    args = (jax.device_put(t, shardings) for t in (params, gradients))
    return params, jax.device_get(update(*args))


@pytest.mark.parametrize(
  "mesh", ["expert", pytest.param("fsdp", marks=pytest.mark.slow), "all"]
)
def test_an_update_does_not_depend_on_the_mesh(mesh):
  """Entries move by about 0.02; between meshes they differ by float32 sums that the
  iteration enlarges: at most 1e-5."""
  before, alone = updated("")
  _, sharded = updated(mesh)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), alone, sharded
  )
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, alone)
  assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_a_checkpoint_goes_on_bit_for_bit_and_on_another_mesh(
  tmp_path, compilation_cache
):
  """Two steps, saved and restored, and two more are four steps. The moments restored
  over fsdp are those saved over experts, and sharded like their parameters."""
  config = config_of(MESHES["expert"])
  parts = make_setup(config, num_devices=4)
  batches = [make_batch(i) for i in range(4)]
  half, _ = parts.run(parts.state(), *batches[:2])
  checkpoints = Checkpointer(
    tmp_path / DIRECTORY,
    keep_last=2,
    keep_best=0,
    config=config,
    metadata={},
    logical_axes=parts.model.logical_axes(),
  )
  assert checkpoints.save(2, half, position={"step": 2, "seed": 0})
  target = state_lib.state_shapes(parts.model, parts.optimizer, parts.mesh)
  restored, _ = checkpoints.restore(target)
  other = make_mesh(MESHES["fsdp"], jax.devices()[:4])
  target = state_lib.state_shapes(parts.model, parts.optimizer, other)
  elsewhere, _ = checkpoints.restore(target)
  checkpoints.close()
  equal = lambda a, b: np.testing.assert_array_equal(  # noqa: E731
    *(jax.device_get(x) for x in (a, b))
  )
  jax.tree.map(equal, elsewhere["opt_state"], half["opt_state"])
  whole, _ = parts.run(half, *batches[2:])
  resumed, _ = parts.run(restored, *batches[2:])
  jax.tree.map(equal, resumed["params"], whole["params"])
  jax.tree.map(equal, resumed["opt_state"], whole["opt_state"])


def test_moments_are_cut_like_their_parameters():
  """One moment of a matrix, two of anything else, none replicated where it is cut."""
  config = config_of(MESHES["all"])
  parts = make_setup(config, num_devices=8)
  shapes = state_lib.state_shapes(parts.model, parts.optimizer, parts.mesh)
  params = jax.tree_util.tree_leaves_with_path(shapes["params"])
  moments = {
    tuple(jax.tree_util.keystr((k,), simple=True) for k in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["opt_state"])
  }
  axes = parts.model.logical_axes()
  for path, leaf in params:
    keys = tuple(jax.tree_util.keystr((k,), simple=True) for k in path)
    own = [m for k, m in moments.items() if k[-len(keys) :] == keys]
    names: Any = functools.reduce(lambda tree, key: tree[key], keys, axes)
    assert len(own) == (1 if muon.is_matrix(names) else 2), keys
    assert all(m.sharding == leaf.sharding for m in own), keys
