"""Collection: sums that agree with counting token by token, on any mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis import collect, decide, streaks, summary
from moejax.config import MeshConfig
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [(b"aaab" * 24, 0), (b"bcbc" * 24, 1), (b"axyz" * 10, 0)]
_CHANGES = {"model__num_layers": 2, "moe__capacity_factor": 0.75}


def _collected(devices: int, batch_size: int = 8, **changes):
  model, params = tiny.model_and_params(**_CHANGES | changes)
  dataset = tiny.TinyDataset(_TEXTS)
  counts = np.bincount(dataset.arrays["inputs"].reshape(-1), minlength=264)
  seen = []
  sums = collect.collect(
    model,
    params,
    dataset,
    split="validation",
    mesh=make_mesh(MeshConfig(), jax.devices()[:devices]),
    batch_size=batch_size,
    words=collect.vocabulary(counts),
    visit=lambda routes, _, batch: seen.append(jax.device_get((routes, batch))),
  )
  return model, params, sums, seen


@pytest.fixture(scope="module")
def collected():
  return _collected(1)


def test_sums_are_those_of_single_tokens(collected):
  """Load, pairs, flow, domains and words, counted again by numpy from the routes."""
  _, _, sums, seen = collected
  ((routes, batch),) = seen
  valid = batch["segment_ids"] > 0
  served = routes.served[:, valid].astype(int)  # [L, tokens, E]
  assert sums["tokens"] == valid.sum()
  np.testing.assert_array_equal(sums["load"], served.sum(axis=1))
  for layer in range(2):
    pairs = served[layer].T @ served[layer]
    np.testing.assert_array_equal(sums["pairs"][layer], pairs)
  np.testing.assert_array_equal(sums["flow"][0], served[0].T @ served[1])
  for domain in range(2):
    of_domain = served[:, batch["domain"][valid] == domain].sum(axis=1)
    np.testing.assert_array_equal(sums["by_domain"][..., domain], of_domain)
  for name in ("input", "target", "predicted"):
    assert sums[f"by_{name}"].sum() == served.sum()
    assert sums[f"seen_{name}"].sum() == sums["tokens"]
  # The most frequent id has the first row.
  ids = batch["inputs"][valid]
  first = served[:, ids == np.bincount(ids).argmax()].sum(axis=1)
  np.testing.assert_array_equal(sums["by_input"][..., 0], first)
  assert sums["seen_input"][0] == np.bincount(ids).max()


def test_importance_margin_and_entropy_are_those_of_probabilities(collected):
  _, _, sums, seen = collected
  ((routes, batch),) = seen
  probs = routes.probs[:, batch["segment_ids"] > 0]
  np.testing.assert_allclose(sums["importance"], probs.sum(axis=1), rtol=1e-5)
  uncertain = -(probs * np.log(probs)).sum(axis=(1, 2))
  np.testing.assert_allclose(sums["entropy"], uncertain, rtol=1e-5)
  ordered = -np.sort(-probs, axis=-1)
  margin = (ordered[..., 1] - ordered[..., 2]).sum(axis=1)
  np.testing.assert_allclose(sums["margin"], margin, rtol=1e-4)
  assert (sums["margin_bins"].sum(axis=1) == sums["tokens"]).all()


def test_drops_by_every_kind_are_the_same_drops(collected):
  """Summed over domains, classes, places or positions: one number, and some drop."""
  _, _, sums, _ = collected
  totals = [sums[f"dropped_{kind}"].sum(axis=-1) for kind in summary.KINDS]
  assert totals[0].min() > 0
  for total in totals[1:]:
    np.testing.assert_array_equal(total, totals[0])
  for kind in summary.KINDS:
    assert sums[f"tokens_{kind}"].sum() == sums["tokens"]


def test_drops_at_the_first_layer_are_those_of_the_model(collected):
  """Decided again from dropless logits, and exactly what the model drops there."""
  model, params, sums, seen = collected
  ((_, batch),) = seen
  out = jax.jit(lambda p, b: _run(model, p, b))(params, batch)
  valid = batch["segment_ids"] > 0
  dropped = (~np.asarray(out.kept[0]) & valid[..., None]).sum()
  assert sums["dropped_domain"][0].sum() == dropped


def _run(model, params, batch):
  out = model(
    params,
    batch["inputs"],
    segment_ids=batch["segment_ids"],
    positions=batch["positions"],
    capacity_factor=model.moe.capacity_factor,
    return_routes=True,
  )
  return out.routes


@pytest.mark.parametrize(
  ("devices", "batch_size"), [(4, 8), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_devices_and_batches_count_the_same(collected, devices, batch_size):
  """Where tokens lie changes no count, and a float only by rounding."""
  _, _, sums, _ = collected
  _, _, other, _ = _collected(devices, batch_size)
  for name, value in sums.items():
    exact = np.issubdtype(value.dtype, np.integer)
    np.testing.assert_allclose(
      other[name], value, rtol=0 if exact else 1e-5, err_msg=name
    )


def test_a_summary_is_finite_and_says_what_is_missing(collected):
  """Every number of the page can be written as JSON, and nothing is left out silently."""
  model, _, sums, _ = collected
  dataset = tiny.TinyDataset(_TEXTS)
  words = collect.vocabulary(np.bincount(dataset.arrays["inputs"].reshape(-1)))
  found = summary.summarise(
    sums, model, words, list(dataset.domains), dataset.tokenizer.pieces
  )
  assert found["undefined"] == {}
  first = found["layers"][0]
  assert {"load", "choices", "coactivation", "domains", "drops", "words"} <= set(first)
  assert sum(first["load"]["share"]) == pytest.approx(1)
  assert 0 <= found["flow"][0]["information_fraction"] <= 1


def test_rows_of_words_are_by_frequency():
  """Ids 2, 0 and 3 occur; 1 never, and shares the last row."""
  words = collect.vocabulary(np.array([3, 0, 9, 1]))
  assert words.ids.tolist() == [2, 0, 3]
  assert words.row.tolist() == [1, 3, 0, 2]
  assert words.frequency_class[2] == 0 and words.frequency_class[3] == 4


def test_distances_by_hand():
  """Tokens use experts 0, 0, 1, 0: first uses of two, then distances 0 and 1."""
  served = jax.nn.one_hot(jnp.array([0, 0, 1, 0]), 3, dtype=bool)[None, None]
  assert streaks.distances(served)[0].tolist() == [1, 1, 0, 2]


def test_segments_by_hand():
  """Sixteen tokens, twelve of expert 1 and four of expert 0; padding is no segment."""
  expert = jnp.array([0] * 4 + [1] * 12 + [2] * 16)
  served = jax.nn.one_hot(expert, 3, dtype=bool)[None, None]
  valid = (jnp.arange(32) < 20)[None]
  found = streaks.sums(served & valid[None, ..., None], valid)
  assert found["segments_16"] == 1
  assert found["covered_16"][0].tolist() == [12, 16, 16]


def test_the_best_cache_keeps_what_is_used_soonest():
  """0 1 2 0 1 2 with room for two: the stalest never hits, the best one twice."""
  served = jax.nn.one_hot(jnp.array([0, 1, 2, 0, 1, 2]), 3, dtype=bool)[None, None]
  valid = jnp.ones((1, 6), bool)
  assert streaks.best_hits(served, valid, 2).tolist() == [2]
  assert streaks.distances(served)[0].tolist()[:2] == [0, 0]


@pytest.mark.parametrize(
  ("router", "reason"),
  [("expert_choice", "experts choose tokens"), ("soft", "mixes all tokens")],
)
def test_what_a_router_has_not_is_said(router, reason):
  """No made-up zeros: the measure is left out, with the reason."""
  model, _ = tiny.model_and_params(
    moe__router=router, moe__eval_capacity_factor=1.0, moe__num_selected=1
  )
  missing = summary.undefined(model)
  assert reason in missing["replay"] and "margin" in missing
  assert decide.undecidable(model) == missing["replay"]


@pytest.mark.slow
@pytest.mark.parametrize("router", ["expert_choice", "soft", "noisy_top_k", "hash"])
def test_every_kind_of_router_is_summarised(router):
  """With what it has: loads always, drops where a token can go without, and JSON."""
  changes = {"moe__router": router, "moe__eval_capacity_factor": 1.0}
  if router == "soft":
    changes |= {"moe__capacity_factor": 1.0, "moe__dispatcher": "einsum"}
    changes |= {"moe__group_size": tiny.LENGTH}
  model, _, sums, _ = _collected(1, 8, **changes | {"moe__num_selected": 1})
  words = collect.vocabulary(
    np.bincount(tiny.TinyDataset(_TEXTS).arrays["inputs"].reshape(-1), minlength=264)
  )
  found = summary.summarise(
    sums, model, words, ["left", "right"], tiny.TinyDataset.tokenizer.pieces
  )
  json.dumps(found, allow_nan=False)
  first = found["layers"][0]
  assert sum(first["load"]["share"]) == pytest.approx(1)
  assert ("drops" in first) == ("words" in first) == (router != "soft")
  assert ("margin" in first["choices"]) == (router in ("noisy_top_k", "hash"))
