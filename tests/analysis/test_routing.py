"""Routing analysis: counts that add up, and preferences that are really there."""

import jax
import numpy as np
import pytest

from moejax.analysis import routing as routing_analysis
from moejax.config import MeshConfig
from moejax.errors import UserError
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

_TEXTS = [(b"aaab" * 12, 0), (b"bcbc" * 12, 1), (b"a", 0)]


@pytest.fixture(scope="module")
def counts():
  model, params = tiny.model_and_params()
  return routing_analysis.count(
    model,
    params,
    tiny.TinyDataset(_TEXTS),
    split="validation",
    mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
    batch_size=4,
  )


def test_every_assignment_is_counted_once_for_its_domain_and_token(counts):
  """Dropless top-2: two assignments a token, by whichever axis they are summed."""
  inputs = tiny.TinyDataset(_TEXTS).arrays
  valid = inputs["segment_ids"] > 0
  token = np.bincount(inputs["inputs"][valid], minlength=264)
  domain = np.bincount(inputs["domain"][valid], minlength=2)
  np.testing.assert_array_equal(counts.token, token)
  np.testing.assert_array_equal(counts.domain, domain)
  np.testing.assert_array_equal(counts.by_token.sum(axis=1)[0], 2 * token)
  np.testing.assert_array_equal(counts.by_domain.sum(axis=1)[0], 2 * domain)


def test_top_tokens_rank_by_lift_and_ignore_the_rare():
  """By hand: expert 0 serves id 1 always, half of id 2, and a rare id that says nothing.

  Served 40 + 20 + 5 of 85 tokens, a share of 65/85; lift of id 1 is 85/65, of id 2
  half of it.
  """
  served = np.array([[0, 40, 20, 5]])
  seen = np.array([0, 40, 40, 5])
  ((first, second),) = routing_analysis._top_tokens(
    served, seen, [b"", b"x", b"\xc3", b"z"], 10
  )
  assert first == {"token": "x", "lift": round(85 / 65, 3), "count": 40}
  assert second == {"token": "\\xc3", "lift": round(85 / 130, 3), "count": 20}


def test_a_model_without_experts_is_refused():
  """Nothing is routed in a dense twin."""
  model, params = tiny.model_and_params(moe__dense_twin=True)
  with pytest.raises(UserError, match="--routing"):
    routing_analysis.analyse(
      model,
      params,
      tiny.TinyDataset(_TEXTS),
      split="validation",
      mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
      batch_size=4,
    )


def test_the_picture_is_drawn(tmp_path):
  """One row of pixels an expert; a domain's shares sum to one."""
  layer = {"layer": 1, "domain_load": [[0.25, 0.75], [0.5, 0.5]], "top_tokens": [[], []]}
  analysis = {
    "split": "validation",
    "domains": ["left", "right"],
    "domain_tokens": [3, 4],
    "layers": [layer, layer | {"layer": 3}],
  }
  path = tmp_path / "routing.png"
  routing_analysis.draw(analysis, path)
  assert path.read_bytes().startswith(b"\x89PNG")
