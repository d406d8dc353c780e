"""Dense runs become the experts of one model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import data
from moejax.checkpoint import lazy, slices
from moejax.checkpoint.manager import restore_params
from moejax.data.tokenizer import BPETokenizer
from moejax.errors import UserError
from moejax.surgery import lineage
from moejax.surgery.btx import Btx
from moejax.surgery.domain_means import means, router_rows
from moejax.surgery.measured import Text
from moejax.surgery.operation import DROP, EQUAL
from moejax.surgery.source import open_run
from tests.surgery.conftest import make_run, mesh, run_config
from tests.surgery.test_program import operate

NEW = {"num_selected": 2, "renormalize": "before_drop", "every": 2}


def dense(domains: str = "", **changes):
  made = run_config(**{"dense_twin": True, "num_selected": 1} | changes)
  made.data.domains = domains
  return made


def begun_from(run, seed):
  """Records that a run started from another."""
  (run / "run.json").write_text(json.dumps({"init_from": str(seed)}))
  return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Three dense runs from one seed, on domains of their own."""
  root = tmp_path_factory.mktemp("runs")
  made = []
  for seed, name in enumerate(("a", "b", "c")):
    run = make_run(root / name, dense(f"{name},shared"), seed=seed, step=7 + seed)
    made.append(begun_from(run, root / "seed"))
  return made


@pytest.fixture(scope="module")
def joined(runs, tmp_path_factory):
  """The three joined with weights 2, 1, 1: directory, record and what was said."""
  output, said = tmp_path_factory.mktemp("joined") / "new", []
  operation = Btx(
    runs=f"{runs[0].parent}/[abc]", weights="2,1,1", router="zero", frozen=True
  )
  record = operate(operation, runs[0], output, said, fields=NEW)
  return output, record, said


def leaves(directory):
  params, _, _ = restore_params(directory)
  return params


def test_experts_are_the_feed_forwards_and_all_else_is_averaged(runs, joined):
  """Against numpy: expert e of each layer is run e's, times the scale; attention, norms,
  embeddings and dense layers are (2a + b + c) / 4."""
  old, new = [leaves(run) for run in runs], leaves(joined[0])

  def average(*parts):
    a, b, c = (np.asarray(x, np.float64) for x in parts)
    return ((2 * a + b + c) / 4).astype(np.float32)

  for part in ("attention", "attention_norm", "feed_forward_norm"):
    for block in ("0", "1"):
      wanted = jax.tree.map(average, *(p["unit"][block][part] for p in old))
      jax.tree.map(np.testing.assert_array_equal, new["unit"][block][part], wanted)
  for tree in ("embedding",):
    wanted = jax.tree.map(average, *(p[tree] for p in old))
    jax.tree.map(np.testing.assert_array_equal, new[tree], wanted)
  wanted = jax.tree.map(average, *(p["unit"]["0"]["feed_forward"] for p in old))
  jax.tree.map(np.testing.assert_array_equal, new["unit"]["0"]["feed_forward"], wanted)
  experts = new["unit"]["1"]["moe"]["experts"]
  for expert, params in enumerate(old):
    for name, matrix in params["unit"]["1"]["feed_forward"].items():
      np.testing.assert_array_equal(experts[name][:, expert], matrix)
  assert not np.any(new["unit"]["1"]["moe"]["router"]["weight"])


def test_the_new_run_says_what_it_is(runs, joined):
  """Domains of all runs, the first expert frozen, every parent in its lineage, and the
  loss expected to drop."""
  output, record, said = joined
  opened = open_run(output)
  assert opened.config.data.domains == "a,shared,b,c"
  assert opened.config.train.frozen == "*.moe.experts.*[0:1]"
  assert opened.config.moe.num_experts == 3 and not opened.config.moe.dense_twin
  assert record["expected"] == DROP
  assert [s["step"] for s in record["sources"]] == [7, 8, 9]
  lines = lineage.render(output, {}, {1: ["x"] * 3})
  for run, step in zip(runs, (7, 8, 9)):
    wanted = f"feed-forward of {run}, step {step}: btx of 3 runs"
    assert any(wanted in line for line in lines)
  assert any("layer 1: dense -> E 3, K 2" in line for line in said)


def test_copies_of_one_run_compute_what_it_did(tmp_path, monkeypatch):
  """Saved on data 2 x fsdp 2, joined with itself: the dense run's logits, to 1e-5; no
  read is larger than one matrix of one layer."""
  run = make_run(tmp_path / "run", dense(), mesh(data=2, fsdp=2))
  sizes = []
  read = slices.Slices.read

  def recording(self, name, index=()):
    found = read(self, name, index)
    if "feed_forward.w" in name:
      sizes.append(found.size)
    return found

  monkeypatch.setattr(slices.Slices, "read", recording)
  monkeypatch.setattr(slices, "_PART_BYTES", 1)
  monkeypatch.setattr(lazy, "_CHUNK_BYTES", 4 * 8 * 12)
  record = operate(Btx(runs=f"{run},{run}"), run, tmp_path / "new", fields=NEW)
  assert record is not None and record["expected"] == EQUAL
  assert max(sizes) == 8 * 12
  tokens = jnp.asarray(np.random.default_rng(1).integers(256, size=(2, 8)), jnp.int32)
  logits = []
  for directory in (run, tmp_path / "new"):
    model = open_run(directory).model
    logits.append(jax.jit(lambda p, m=model: m(p, tokens).logits)(leaves(directory)))
  size = np.abs(logits[0]).max()
  np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * size, rtol=0)


def test_segments_cut_each_run_into_experts_of_its_own(runs, tmp_path):
  """With m = 2, experts 2r and 2r + 1 are the halves of run r, with equal router rows."""
  fields = NEW | {"segments": 2, "num_selected": 1}
  operate(Btx(runs=str(runs[1])), runs[0], tmp_path / "new", fields=fields)
  moe = leaves(tmp_path / "new")["unit"]["1"]["moe"]
  w_in = leaves(runs[1])["unit"]["1"]["feed_forward"]["w_in"]
  np.testing.assert_array_equal(moe["experts"]["w_in"][:, 2], w_in[..., :6])
  np.testing.assert_array_equal(moe["experts"]["w_in"][:, 3], w_in[..., 6:])
  rows = moe["router"]["weight"]
  np.testing.assert_array_equal(rows[..., 0], rows[..., 1])


def test_what_does_not_fit_is_named_before_anything_is_written(runs, source, tmp_path):
  """Another model, experts, tokenizer or seed run; missing runs, weights, moments."""
  wide = make_run(tmp_path / "wide", dense(model__width=16))
  same = make_run(tmp_path / "same", dense())
  BPETokenizer.train([b"some text, some more text"] * 9, 300).save(same)
  other = begun_from(make_run(tmp_path / "other", dense()), tmp_path / "elsewhere")
  cases = [
    (Btx(), {}, "--runs=RUN_B,RUN_C is missing"),
    (Btx(runs=str(wide)), {}, r"--config\.model\.width is 16 there and 8 in --workdir"),
    (Btx(runs=f"{runs[0]}*"), {}, "matches no other directory"),
    (Btx(runs="a=1,seed=0"), {}, "--runs=a=1 is not a directory. If .* commas, write ?"),
    (Btx(runs=str(source)), {}, "has MoE layers already"),
    (Btx(runs=str(same)), {}, "has another tokenizer"),
    (Btx(runs=str(other)), {}, "started from .*seed and .*other from .*elsewhere"),
    (Btx(runs=str(runs[1]), weights="1"), {}, "give 2 numbers"),
    (Btx(runs=str(runs[1])), {"optimizer": "keep"}, "joins several runs"),
  ]
  for operation, asked, words in cases:
    with pytest.raises(UserError, match=words):
      operate(operation, runs[0], tmp_path / "new", fields=NEW, **asked)
  assert not (tmp_path / "new").exists()


def test_the_seed_may_be_joined_and_an_unknown_one_is_warned_of(runs, tmp_path, caplog):
  seed = runs[0].parent / "seed"
  if not seed.exists():
    make_run(seed, dense())
  operate(Btx(runs=str(seed)), runs[0], None, fields=NEW, dry_run=True)
  assert "does not record" not in caplog.text
  unknown = make_run(tmp_path / "unknown", dense())
  operate(Btx(runs=str(unknown)), runs[0], None, fields=NEW, dry_run=True)
  assert "unknown does not record that it started from the same run" in caplog.text


def test_a_run_that_is_joined_twice_is_warned_of_in_one_line(runs, tmp_path, caplog):
  """By its place, whatever it is called; runs that are named once are not."""
  operate(Btx(runs=str(runs[1])), runs[0], None, fields=NEW, dry_run=True)
  assert "times" not in caplog.text
  (tmp_path / "link").symlink_to(runs[1])
  names = f"{runs[1]},{tmp_path}/link,{runs[0]}"
  operate(Btx(runs=names), runs[0], None, fields=NEW, dry_run=True)
  (line,) = [r.getMessage() for r in caplog.records if "times" in r.getMessage()]
  assert f"name {runs[0]} 2 times, {runs[1]} 2 times: " in line


def test_router_rows_are_centred_and_of_one_norm():
  """By hand: means (3, 0) and (0, 4) differ by (3, -4); equal means give zero rows."""
  one, other = {0: np.array([3.0, 0.0])}, {0: np.array([0.0, 4.0])}
  rows = router_rows([one, other], 2.0)[0]
  np.testing.assert_allclose(rows, [[1.2, -1.2], [-1.6, 1.6]])
  assert not np.any(router_rows([one, one], 2.0)[0])


def test_the_mean_input_of_a_layer_is_that_of_numpy(tmp_path):
  """Without attention, the first feed-forward reads the norm of the embedding: its mean
  over all tokens that are no padding."""
  config = dense(model__num_layers=1, every=1, offset=0)
  config.data.cache_dir = str(tmp_path / "cache")
  opened = open_run(make_run(tmp_path / "run", config))
  params = leaves(tmp_path / "run")
  block = params["unit" if params["unit"] else "prefix"]["0"]
  block["attention"]["out"] = jnp.zeros_like(block["attention"]["out"])
  dataset = data.load(config.data, workdir=tmp_path / "run", store=False)
  text = Text(
    model=opened.model,
    params=params,
    dataset=dataset,
    split="validation",
    mesh=mesh(),
    batch_size=4,
    limit=2,
  )
  x = np.asarray(params["embedding"]["table"], np.float64)
  x = x / np.sqrt((x**2).mean(1, keepdims=True) + config.model.norm_eps)
  x = x * np.asarray(block["feed_forward_norm"]["scale"]).reshape(-1)
  counts = np.zeros(len(x))
  for batch in dataset.eval_batches("validation", 4, limit=2):
    np.add.at(counts, batch["inputs"][batch["segment_ids"] > 0], 1)
  np.testing.assert_allclose(means(text, [0])[0], counts @ x / counts.sum(), rtol=1e-4)
