"""The trace on disk: every token once, and enough to decide again."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.analysis import trace
from moejax.config import MeshConfig
from moejax.errors import UserError
from moejax.sharding.mesh import make_mesh
from tests.evaluate import tiny

pytest.importorskip("pyarrow")

_TEXTS = [(b"aaab" * 24, 0), (b"bcbc" * 24, 1), (b"axyz" * 10, 0)]
_META = {"router": "top_k", "layers": [0], "num_experts": 4, "step": 3, "routers": "ab"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """A trace of two batches, one of them with padding, and the routes themselves."""
  model, params = tiny.model_and_params()
  path = tmp_path_factory.mktemp("trace") / "trace.parquet"
  call = jax.jit(lambda p, t, s: model(p, t, segment_ids=s, return_routes=True).routes)
  kept = []
  with trace.writing(path, model, _META, "logits") as writer:
    for batch in tiny.TinyDataset(_TEXTS).eval_batches("validation", 4):
      tokens, segments = (jnp.asarray(batch[n]) for n in ("inputs", "segment_ids"))
      routes = jax.device_get(call(params, tokens, segments))
      writer.write(routes, batch)
      kept.append((routes, batch))
  return model, params, path, kept


def test_rows_are_the_tokens_in_stored_order(recorded):
  """Experts, gates and ids of every token, and no padding, read by a plain reader."""
  from pyarrow import parquet

  _, _, path, kept = recorded
  table = parquet.read_table(path)
  valid = [batch["segment_ids"] > 0 for _, batch in kept]
  assert table.num_rows == sum(v.sum() for v in valid)
  for name, key in (("expert_0", "expert"), ("gate_0", "gate"), ("logits_0", "logits")):
    rows = [getattr(r, key)[0][v] for (r, _), v in zip(kept, valid, strict=True)]
    np.testing.assert_array_equal(
      np.array(table[name].to_pylist(), np.float32), np.concatenate(rows)
    )
  ids = np.concatenate([b["inputs"][v] for (_, b), v in zip(kept, valid, strict=True)])
  assert table["token"].to_pylist() == ids.tolist()
  assert table["sequence"].to_pylist()[-1] == sum(v.any(axis=1).sum() for v in valid) - 1


def test_the_page_on_analysis_defines_every_column(recorded):
  """And what it says of `kept_n` holds: nothing is dropped where tokens are recorded."""
  from pyarrow import parquet

  table = parquet.read_table(recorded[2])
  page = (pathlib.Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
  defined = re.findall(r"`(\w+)`", page.split("| column |")[1].split("```")[0])
  columns = {name.replace("_0", "_n") for name in table.column_names}
  assert columns <= set(defined)
  assert np.all(table["kept_0"].to_pylist())


def test_batches_come_back_in_any_size(recorded):
  """Recorded four sequences at a time, read eight at a time: the same logits."""
  model, _, path, kept = recorded
  (batch,) = trace.read(path, model, batch_size=8, length=tiny.LENGTH)
  logits = np.concatenate([routes.logits for routes, _ in kept], axis=1)
  valid = np.concatenate([b["segment_ids"] > 0 for _, b in kept])
  np.testing.assert_array_equal(batch["valid"], valid)
  np.testing.assert_array_equal(batch["logits"][:, valid], logits[:, valid])
  np.testing.assert_array_equal(
    batch["token_ids"], np.concatenate([b["inputs"] for _, b in kept])
  )


def test_the_size_told_beforehand_is_not_below_the_file(recorded):
  model, _, path, kept = recorded
  tokens = sum(int((b["segment_ids"] > 0).sum()) for _, b in kept)
  # Two row groups of headers are most of so small a file.
  assert path.stat().st_size < trace.num_bytes(model, tokens, "logits") + 20_000
  assert trace.num_bytes(model, 10, "choices") == 10 * (7 * 4 + 2 * 7)


def test_another_model_or_no_logits_is_refused(recorded, tmp_path):
  _, _, path, _ = recorded
  meta = trace.read_meta(path)
  trace.check_meta(path, meta, _META)
  with pytest.raises(UserError, match="another model: its step is 3"):
    trace.check_meta(path, meta, _META | {"step": 4})
  with pytest.raises(UserError, match="only choices"):
    trace.check_meta(path, meta | {"what": "choices"}, _META)
  other = tmp_path / "other.parquet"
  other.write_text(json.dumps({}))
  with pytest.raises(UserError, match="is not a trace"):
    trace.read_meta(other)


def test_what_cannot_be_written_is_refused_first(recorded, tmp_path):
  model = recorded[0]
  with pytest.raises(UserError, match="is not a directory"):
    trace.check(model, tmp_path / "none" / "x.parquet", 10, "choices")
  with pytest.raises(UserError, match="--trace=/proc/x cannot be written"):
    trace.check(model, pathlib.Path("/proc/x"), 10, "choices")
  with pytest.raises(UserError, match="GiB are free"):
    trace.check(model, tmp_path / "x.parquet", 10**15, "logits")


def test_an_error_leaves_no_half_a_trace(recorded, tmp_path):
  model = recorded[0]
  with pytest.raises(ZeroDivisionError):
    with trace.writing(tmp_path / "x.parquet", model, _META, "choices"):
      raise ZeroDivisionError
  assert list(tmp_path.iterdir()) == []


def test_the_digest_changes_with_a_router_only():
  model, params = tiny.model_and_params()
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  own = trace.identity(model, params, mesh)
  changed = jax.tree.map(lambda leaf: leaf, params)
  changed["embedding"]["norm"] = jax.tree.map(lambda x: x + 1, changed["embedding"])
  assert trace.identity(model, changed, mesh) == own
  router = changed["unit"]["0"]["moe"]["router"]
  router["weight"] = router["weight"] + 1
  assert trace.identity(model, changed, mesh) != own
