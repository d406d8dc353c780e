"""Files of evaluations: what they are called, and what is said of what they hold."""

import itertools
import json

import pytest

from moejax.run import results

_EVALUATION = {
  "step": 4,
  "split": "test",
  "tokens": 100,
  "split_tokens": 100,
  "bytes": 90,
  "results": [{"eval_capacity_factor": 2.0, "loss": 3.0}],
}
_OWN = {"step": 4, "split": "test", "tokens": 100, "bytes": 90}


def _name(changes=(), own=2.0, **other) -> str:
  return results.name("eval", _EVALUATION | other, changes, [own])


def test_the_runs_own_settings_have_the_plain_name():
  assert _name() == "eval_4_test"


def test_whatever_differs_is_in_the_name():
  """Step, split, capacities, part of the split and overrides: no two names are equal."""
  dropless = {"eval_capacity_factor": "dropless", "loss": 3.0}
  names = [
    _name(),
    _name(step=5),
    _name(split="validation"),
    _name(results=[dropless]),
    _name(results=[*_EVALUATION["results"], dropless]),
    _name(results=[dropless, *_EVALUATION["results"]]),
    _name(tokens=50),
    _name(tokens=60),
    _name([("data.path", "a", "b")]),
    _name([("data.path", "a", "c")]),
    _name([("data.path", "a", "b"), ("model.sliding_window", 0, 8)]),
  ]
  assert all(a != b for a, b in itertools.combinations(names, 2))
  assert names[4] == "eval_4_test_capacity_2_dropless"
  assert names[6] == "eval_4_test_first_50"


def test_the_order_of_overrides_changes_no_name():
  one, two = ("data.path", "a", "b"), ("model.sliding_window", 0, 8)
  assert _name([one, two]) == _name([two, one])


@pytest.mark.parametrize(
  ("tokens", "split", "said"),
  [
    (1234, 1234, "all 1,234 tokens"),
    (5, 1234, "first 5 of 1,234 tokens"),
    (5, None, "5 tokens"),
  ],
)
def test_what_a_loss_covers_is_said(tokens, split, said):
  """None is a file of an earlier version, which does not know the whole."""
  assert results.coverage(tokens, split) == said


@pytest.mark.parametrize(
  ("own", "is_said"),
  [
    ({}, False),
    ({"step": 4, "loss": 9.0}, False),  # by an earlier version
    (_OWN | {"results": [{"eval_capacity_factor": 2.0, "loss": 3.00001}]}, False),
    (_OWN | {"results": [{"eval_capacity_factor": 2.0, "loss": 3.01}]}, True),
    (_OWN | {"results": [{"eval_capacity_factor": 1.0, "loss": 9.0}]}, False),
    (_OWN | {"tokens": 50, "results": [{"eval_capacity_factor": 2.0, "loss": 9}]}, False),
  ],
)
def test_only_the_same_text_step_and_capacity_can_contradict(own, is_said):
  """And only by more than another order of additions explains."""
  assert bool(results.disagreement(own, _EVALUATION)) == is_said


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  """What cannot be written leaves the old file and nothing beside it; NaN is null."""
  path = tmp_path / "eval.json"
  results.write(path, {"loss": float("nan"), "text": "é"})
  assert json.loads(path.read_text(encoding="utf-8")) == {"loss": None, "text": "é"}
  with pytest.raises(TypeError):
    results.write(path, {"loss": object()})
  assert results.read(path)["text"] == "é"
  assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


@pytest.mark.parametrize("content", [b"", b'{"loss": 1', b"[1]", b"\xff\xfe"])
def test_a_torn_or_foreign_file_is_read_as_none(tmp_path, content):
  (tmp_path / "eval.json").write_bytes(content)
  assert results.read(tmp_path / "eval.json") == {}
