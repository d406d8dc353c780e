"""The sample: tokens of the text as the routers decided, on any mesh, and bounded."""

from typing import Any

import jax
import numpy as np
import pytest

from moejax.analysis import collect
from moejax.analysis.explorer import sample
from moejax.config import MeshConfig
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [(b"aaab" * 24, 0), (b"bcbc" * 24, 1), (b"axyz" * 10, 0)]
_CHANGES = {"model__num_layers": 2, "moe__capacity_factor": 0.75}


def sampled(
  devices=1, batch_size=8, tokens=1000, mesh: MeshConfig | None = None, **changes: Any
):
  """A sample of a random model, and the routes and kept choices of each batch."""
  model, params = tiny.model_and_params(**_CHANGES | changes)
  dataset = tiny.TinyDataset(_TEXTS)
  counts = np.bincount(dataset.arrays["inputs"].reshape(-1), minlength=264)
  made = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
  total = dataset.num_tokens("validation")
  taken = sample.Sampler(made, tokens=tokens, length=tiny.LENGTH, total=total)
  seen = []

  def visit(routes, kept, batch):
    taken.see(routes, kept, batch)
    seen.append(jax.device_get((routes, kept, batch)))

  sums = collect.collect(
    model,
    params,
    dataset,
    split="validation",
    mesh=made,
    batch_size=batch_size,
    words=collect.vocabulary(counts),
    visit=visit,
  )
  found = taken.result()
  assert found is not None
  return found, seen, sums


@pytest.fixture(scope="module")
def whole():
  return sampled()


def test_choices_are_those_of_the_routes(whole):
  """Every token once, with the model's experts and weights, and what training keeps."""
  found, seen, sums = whole
  ((routes, kept, batch),) = seen
  valid = batch["segment_ids"] > 0
  assert found.num_tokens == sums["tokens"] == valid.sum()
  np.testing.assert_array_equal(found.token, batch["inputs"][valid])
  np.testing.assert_array_equal(found.domain, batch["domain"][valid])
  np.testing.assert_array_equal(found.sequence, np.nonzero(valid)[0])
  np.testing.assert_array_equal(found.expert, routes.expert[:, valid])
  np.testing.assert_array_equal(found.gate, routes.gate[:, valid])
  np.testing.assert_array_equal(found.kept, kept[:, valid])
  dropped = (~found.kept).sum(axis=(1, 2))
  np.testing.assert_array_equal(dropped, sums["dropped_domain"].sum(axis=-1))
  assert dropped.min() > 0


def test_alternatives_are_the_best_of_the_rest(whole):
  """By numpy: probabilities with the chosen ones taken away, in descending order."""
  found, ((routes, _, batch),), _ = whole
  probs = routes.probs[:, batch["segment_ids"] > 0].copy()
  np.put_along_axis(probs, found.expert, -1.0, axis=-1)
  order = np.argsort(-probs, axis=-1, kind="stable")[..., :2]
  np.testing.assert_array_equal(found.other, order)
  np.testing.assert_array_equal(
    found.other_probability, np.take_along_axis(probs, order, axis=-1)
  )


def test_a_small_sample_is_spread_and_bounded():
  """Forty tokens of 235, in eight sequences: one of each half, the second one cut."""
  found, seen, _ = sampled(batch_size=3, tokens=40)
  assert len(seen) == 3 and found.num_tokens == 40
  first, second = np.unique(found.sequence)
  assert first < 4 <= second
  batch = seen[second // 3][2]
  rest = batch["inputs"][second % 3][: 40 - (found.sequence == first).sum()]
  np.testing.assert_array_equal(found.token[found.sequence == second], rest)


def test_the_sample_is_not_bound_to_a_place_in_a_group():
  """Groups of four sequences, every eighth taken: each place of a group has its turn."""
  made = sample.Sampler(make_mesh(MeshConfig()), tokens=3200, length=32, total=32 * 800)
  assert made._stride == 8
  places = np.bincount(made._rows[:100] % 4, minlength=4)
  assert places.min() > 10


def _assert_same(ours: sample.Sample, theirs: sample.Sample) -> None:
  for name in ("token", "sequence", "document", "position", "domain", "kept"):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
  for name in ("expert", "other"):
    np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
  for name in ("gate", "other_probability"):
    np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5)


def test_a_mesh_of_eight_devices_gives_the_same(whole):
  """Experts and data both cut: the same tokens, choices, sums and alternatives."""
  found, _, sums = whole
  ours, _, others = sampled(devices=8, mesh=MeshConfig(data=-1, expert=2))
  _assert_same(ours, found)
  for name, value in sums.items():
    exact = np.issubdtype(value.dtype, np.integer)
    rtol = 0 if exact else 1e-5
    np.testing.assert_allclose(others[name], value, rtol=rtol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["expert_choice", "soft", "hash", "noisy_top_k"])
def test_every_router_shows_what_it_has(router):
  """Choices, or the experts that compute a token; never one that does not."""
  changes: dict[str, Any] = {"moe__router": router, "moe__eval_capacity_factor": 1.0}
  if router == "soft":
    changes |= {"moe__capacity_factor": 1.0, "moe__dispatcher": "einsum"}
    changes |= {"moe__group_size": tiny.LENGTH}
  found, ((routes, _, batch),), _ = sampled(moe__num_selected=1, **changes)
  served = routes.served[:, batch["segment_ids"] > 0]
  computed = found.kept & (found.expert < 4)
  if routes.expert is None:
    np.testing.assert_array_equal(computed.sum(axis=-1), served.sum(axis=-1))
    layer, token, rank = np.nonzero(computed)
    assert served[layer, token, found.expert[layer, token, rank]].all()
  assert (found.gate >= 0).all() and np.isfinite(found.gate).all()
