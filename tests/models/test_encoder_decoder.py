"""The encoder-decoder: one model however it is run, and who may see what."""

import copy
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import Config, MeshConfig
from moejax.config.check import validate
from moejax.cost.parameters import count_parameters
from moejax.layers.relative_bias import bucket_of
from moejax.models.loss import forward_sums
from moejax.models.make import make_model
from moejax.models.placement import param_shardings
from moejax.sharding import rules
from moejax.sharding.mesh import make_mesh
from moejax.train.step import loss_gradients

VOCABULARY = 24


def small() -> Config:
  config = Config()
  model, moe, data = config.model, config.moe, config.data
  model.kind, model.num_layers, model.encoder_layers = "encoder_decoder", 4, 5
  model.width, model.num_heads, model.hidden, model.activation = 8, 2, 12, "relu"
  model.positions, model.relative_buckets, model.relative_distance = "relative", 8, 12
  model.attention_scale, model.logits_divisor = 1.0, 8**0.5
  moe.num_experts, moe.hidden, moe.encoder_every = 4, 16, 3
  moe.dispatcher = "gather"  # The quickest to compile of those that share rows.
  data.objective, data.sequence_length, data.decoder_length = "span_corruption", 16, 8
  config.train.batch_size = 8
  return config


def made(config: Config) -> Any:
  validate(config)
  return make_model(config.model, config.moe, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def config():
  return small()


@pytest.fixture(scope="module")
def model(config):
  return made(config)


@pytest.fixture(scope="module")
def params(model):
  return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
  """Eight rows of two segments and padding, on both sides."""
  rng = np.random.default_rng(0)

  def side(length, first, second):
    segments = np.repeat([1, 2, 0], [first, second, length - first - second])
    places = np.concatenate([np.arange(n) for n in (first, second)])
    positions = np.concatenate([places, np.zeros(length - first - second)])
    tokens = rng.integers(1, VOCABULARY, (8, length)) * (segments > 0)
    return [np.broadcast_to(a, (8, length)) for a in (tokens, segments, positions)]

  inputs, segment_ids, positions = side(8, 3, 4)
  made = {
    "inputs": inputs,
    "targets": np.roll(inputs, -1, axis=1),
    "segment_ids": segment_ids,
    "positions": positions,
  }
  names = ("encoder_inputs", "encoder_segment_ids", "encoder_positions")
  made |= dict(zip(names, side(16, 9, 5)))
  return {name: jnp.asarray(rows, jnp.int32) for name, rows in made.items()}


@pytest.fixture(scope="module")
def expected(model, params, batch):
  """Sums and gradients on one device, with tokens dropped."""
  return jax.jit(lambda p: loss_gradients(model, p, batch, jax.random.key(2)))(params)


def close(one, other, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance),
    one,
    other,
  )


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_a_loop_over_the_published_formula(bidirectional):
  """T5's released code, distance by distance: half exact, then logarithmic ranges."""
  number, furthest = 32, 128

  def one(distance):
    own, first, back = number, 0, -distance
    if bidirectional:
      own //= 2
      first, back = (own if distance > 0 else 0), abs(distance)
    back = max(back, 0)
    exact = own // 2
    if back < exact:
      return first + back
    ranges = math.log(back / exact) / math.log(furthest / exact) * (own - exact)
    return first + min(exact + int(ranges + 1e-9), own - 1)

  distances = np.arange(-200, 201)
  found = bucket_of(
    jnp.asarray(distances[None]),
    num_buckets=number,
    furthest=furthest,
    bidirectional=bidirectional,
  )
  wanted = [one(int(d)) for d in distances]
  np.testing.assert_array_equal(np.asarray(found)[0], wanted)
  assert max(wanted) == number - 1


def test_the_bias_is_the_table_at_the_bucket_of_each_pair(model, params):
  """Encoder and decoder have tables of their own; with a cache queries start later."""
  for stack, bidirectional in ((model.encoder, True), (model.stack, False)):
    own = params["encoder" if bidirectional else "decoder"]
    bias = np.asarray(stack.bias(own, 3, 7, jnp.asarray(2)))
    table = np.asarray(own["relative_bias"]["bias"])
    for query in range(3):
      for key in range(7):
        distance = jnp.full((1, 1), key - query - 2)
        bucket = bucket_of(
          distance, num_buckets=8, furthest=12, bidirectional=bidirectional
        )
        np.testing.assert_array_equal(bias[0, :, query, key], table[int(bucket[0, 0])])


def test_parameters_are_those_that_cost_counts(config, model):
  """Closed formulas against the tree, with uneven stacks and both norm placements."""
  for placement in ("pre", "both"):
    other = copy.deepcopy(config)
    other.model.norm_placement = placement
    other.moe.dense_after = placement == "both"
    shapes = jax.tree.leaves(made(other).shapes())
    total = sum(math.prod(leaf.shape) for leaf in shapes)
    assert count_parameters(other, VOCABULARY)[0]["total"] == total


def test_each_stack_has_its_own_pattern(model):
  """Every third of five layers, then every second of four; the encoder's come first."""
  assert model.moe_layers == (1, 4, 6, 8)


def test_a_gradient_is_the_slope_of_the_loss(config, params, batch):
  """Finite differences along one random direction through all parameters.

  Dropless, with a smooth activation and all experts chosen, so that nothing jumps.
  """
  smooth = copy.deepcopy(config)
  smooth.model.activation, smooth.moe.capacity_factor = "gelu", None
  smooth.moe.num_selected = 4
  smooth.moe.use_router("top_k")
  model = made(smooth)

  def loss(params):
    sums = forward_sums(model, params, batch, train=True, key=None)
    return (sums.loss + 0.1 * sums.aux["z_loss"]) / sums.tokens

  keys = jax.random.split(jax.random.key(7), len(jax.tree.leaves(params)))
  keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
  direction = jax.tree.map(lambda p, k: jax.random.normal(k, p.shape), params, keys)
  gradient = jax.jit(jax.grad(loss))(params)
  products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
  along = float(sum(jax.tree.leaves(products)))
  value, step = jax.jit(loss), 3e-4

  def moved(sign):
    return jax.tree.map(lambda p, d: p + sign * step * d, params, direction)

  measured = (float(value(moved(1))) - float(value(moved(-1)))) / (2 * step)
  assert along == pytest.approx(measured, rel=2e-2)


def test_unrolled_and_recomputed_it_is_the_same_model(config, params, batch, expected):
  """Neither the loop over layers nor recomputation changes loss or gradient."""
  other = copy.deepcopy(config)
  other.model.scan_layers, other.model.remat = False, "full"
  again = jax.jit(lambda p: loss_gradients(made(other), p, batch, jax.random.key(2)))(
    params
  )
  close(again, expected)


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch(model, params, batch, expected):
  """Also where they have unequal shares of encoder tokens: aux terms stay means."""
  uneven: Any = dict(batch)
  ids = batch["encoder_segment_ids"].at[:4, 9:].set(0)
  uneven["encoder_segment_ids"] = ids
  uneven["segment_ids"] = jnp.where(
    (batch["segment_ids"] == 2) & (jnp.arange(8)[:, None] < 4), 0, batch["segment_ids"]
  )
  run = jax.jit(
    lambda p, parts: loss_gradients(
      model, p, uneven, jax.random.key(2), accumulation=parts
    ),
    static_argnums=1,
  )
  (one, gradient), (both, sum_of_two) = run(params, 1), run(params, 2)
  close(gradient, sum_of_two)
  close(dict(one.aux), dict(both.aux), 1e-3)


@pytest.mark.parametrize(
  "axes",
  [
    {"expert": 4, "fsdp": 2},
    pytest.param({"tensor": 2, "data": 4}, marks=pytest.mark.slow),
  ],
)
def test_on_eight_devices_it_is_the_same_model(model, params, batch, expected, axes):
  """Loss, router statistics and gradients do not depend on the mesh."""
  mesh = make_mesh(MeshConfig(**({"data": 1} | axes)))
  placed = jax.device_put(params, param_shardings(model, mesh))
  rows = {name: rules.put_rows(mesh, np.asarray(a)) for name, a in batch.items()}
  with jax.set_mesh(mesh):
    found = jax.jit(lambda p, b: loss_gradients(model, p, b, jax.random.key(2)))(
      placed, rows
    )
  close(jax.device_get(found), expected)


def test_with_a_cache_the_logits_are_the_same(model, params, batch):
  """The encoder runs once; the decoder gets two tokens, then one at a time."""
  read, tokens = batch["encoder_inputs"], batch["inputs"]
  seen = (batch["encoder_segment_ids"] > 0).astype(jnp.int32)
  whole = jax.jit(
    lambda p: model(p, tokens, encoder_tokens=read, encoder_segment_ids=seen).logits
  )(params)
  cache = jax.jit(lambda p: model.start(p, read, segment_ids=seen, length=8))(params)
  step = jax.jit(lambda p, tokens, cache: model(p, tokens, cache=cache))
  out = step(params, tokens[:, :2], cache)
  logits = [out.logits]
  for index in range(2, 5):
    out = step(params, tokens[:, index : index + 1], out.cache)
    logits.append(out.logits)
  close(jnp.concatenate(logits, axis=1), whole[:, :5])


def test_a_packed_segment_is_computed_as_if_it_were_alone(model, params, batch):
  """The second segments of both sides, moved to rows of their own, give the same."""
  packed = jax.jit(
    lambda p: (
      model(
        p,
        batch["inputs"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        encoder_tokens=batch["encoder_inputs"],
        encoder_segment_ids=batch["encoder_segment_ids"],
        encoder_positions=batch["encoder_positions"],
      ).logits
    )
  )(params)
  read, tokens = batch["encoder_inputs"][:, 9:14], batch["inputs"][:, 3:7]
  alone = jax.jit(lambda p: model(p, tokens, encoder_tokens=read).logits)(params)
  close(packed[:, 3:7], alone)


def test_padding_is_routed_in_neither_stack(model, params, batch):
  """14 of 16 encoder tokens and 7 of 8 decoder tokens of each of 8 rows are routed."""
  sums = jax.jit(lambda p: forward_sums(model, p, batch))(params)
  np.testing.assert_array_equal(sums.stats.num_valid, [112, 112, 56, 56])


def test_the_decoder_sees_all_of_the_input_and_none_of_the_targets_to_come(
  config, params
):
  """By gradients of one logit with respect to the embedded tokens, position by position.

  Each token has an id of its own, so that a row of the embedding's gradient is that of
  its position; the head is untied.
  """
  other = copy.deepcopy(config)
  other.model.tie_embeddings = False
  model = made(other)
  weights = jax.jit(model.init)(jax.random.key(3))
  read, tokens = jnp.arange(6)[None], jnp.arange(6, 12)[None]

  def logit(table, place):
    own = weights | {"embedding": weights["embedding"] | {"table": table}}
    return model(own, tokens, encoder_tokens=read).logits[0, place].sum()

  gradient = jax.jit(jax.grad(logit), static_argnums=1)
  for place in (0, 3):
    rows = np.abs(gradient(weights["embedding"]["table"], place)).sum(axis=1)
    assert (rows[:6] > 0).all()
    assert (rows[6 : 7 + place] > 0).all()
    assert (rows[7 + place : 12] == 0).all()


@pytest.mark.parametrize(
  ("router", "group"),
  [pytest.param("expert_choice", 0, marks=pytest.mark.slow), ("soft", 8)],
)
def test_the_encoder_may_have_a_router_that_looks_ahead(config, batch, router, group):
  """It trains, and decodes dropless: the encoder has slots where the decoder has none."""
  other = copy.deepcopy(config)
  other.moe.encoder_router, other.moe.group_size = router, group
  other.moe.dispatcher = "auto"  # Soft mixtures have no rows to gather.
  if group:
    other.moe.capacity_factor = other.moe.eval_capacity_factor = 1.0
  model = made(other)
  params = jax.jit(model.init)(jax.random.key(1))
  run = jax.jit(lambda p: loss_gradients(model, p, batch, jax.random.key(2)))
  sums, gradient = run(params)
  assert np.isfinite(sums.loss)
  experts = gradient["encoder"]["unit"]["1"]["moe"]["experts"]["w_in"]
  assert np.abs(experts).max() > 0
  cache = jax.jit(lambda p: model.start(p, batch["encoder_inputs"], length=8))(params)
  out = jax.jit(lambda p, c: model(p, batch["inputs"], cache=c))(params, cache)
  assert np.isfinite(out.logits).all()


def test_a_decoder_alone_can_have_relative_positions():
  """With a cache it computes what it computes without."""
  config = Config()
  config.model = dataclasses.replace(
    small().model, kind="decoder", encoder_layers=0, num_layers=2
  )
  config.moe.num_experts, config.moe.hidden = 4, 16
  model = made(config)
  params = jax.jit(model.init)(jax.random.key(1))
  tokens = jnp.arange(7)[None]
  whole = jax.jit(lambda p: model(p, tokens).logits)(params)
  step = jax.jit(lambda p, t, c: model(p, t, cache=c))
  out = step(params, tokens[:, :4], model.init_cache(1, 7))
  out = step(params, tokens[:, 4:], out.cache)
  close(out.logits, whole[:, 4:])


def test_an_encoder_may_have_a_table_of_its_own(batch):
  """The encoder reads it alone: gradients of both tables are those of what each embeds,
  and it counts as parameters. The other parameters are drawn as without it."""
  config = small()
  plain = made(config)
  config.model.encoder_embedding = True
  model = made(config)
  params = jax.jit(model.init)(jax.random.key(1))
  table = params["encoder"]["embedding"]["table"]
  assert table.shape == params["embedding"]["table"].shape
  assert not np.array_equal(table, params["embedding"]["table"])
  shapes = jax.tree.leaves(model.shapes())
  total, _ = count_parameters(config, VOCABULARY)
  assert total["total"] == sum(leaf.size for leaf in shapes)
  assert len(shapes) == 1 + len(jax.tree.leaves(plain.shapes()))

  def loss(params):
    out = model(
      params,
      jnp.asarray(batch["inputs"][:, :3] % 5, jnp.int32),
      encoder_tokens=jnp.asarray(batch["encoder_inputs"][:, :3] % 5 + 10, jnp.int32),
    )
    return jnp.mean(out.logits[..., 0])

  gradient = jax.jit(jax.grad(loss))(params)
  read = np.abs(gradient["encoder"]["embedding"]["table"]).sum(axis=1) > 0
  assert read[10:15].any() and not read[:10].any() and not read[15:].any()
