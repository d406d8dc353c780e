"""From one directory to another: what is written, kept and refused."""

import copy
import hashlib
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from moejax.checkpoint import lazy, slices
from moejax.checkpoint.manager import Checkpointer, restore_params
from moejax.config.check import validate
from moejax.errors import UserError
from moejax.models.placement import param_shardings
from moejax.run.files import DIRECTORY
from moejax.surgery import add, lineage, program
from moejax.surgery.add import Add
from moejax.surgery.clone import Clone
from moejax.surgery.merge import Merge
from moejax.surgery.operation import EQUAL
from moejax.surgery.permute import Permute
from moejax.surgery.prune import Prune
from moejax.surgery.reroute import Reroute
from moejax.surgery.select import Select
from moejax.surgery.source import open_run
from moejax.surgery.split import Split
from moejax.surgery.where import layers_of
from moejax.train import state as state_lib
from moejax.train.optimizer import make_optimizer
from tests.surgery.conftest import make_run, mesh, run_config


def operate(operation, source, output, said=None, fields=None, **asked):
  """Does an operation without measuring the loss; returns its record."""

  def new_config(operation, old):
    given = copy.deepcopy(old)
    for name, value in (fields or {}).items():
      setattr(given.moe, name, value)
    new = operation.new_config(old, given)
    validate(new)
    return new

  return program.run(
    program.Asked(
      workdir=source,
      output=output,
      operation=operation,
      options={},
      **{"evaluate": False, **asked},
    ),
    new_config,
    (said if said is not None else []).append,
  )


def digest(directory: pathlib.Path) -> str:
  out = hashlib.sha256()
  for path in sorted(directory.rglob("*")):
    out.update(str(path.relative_to(directory)).encode())
    if path.is_file():
      out.update(path.read_bytes())
  return out.hexdigest()


@pytest.fixture(scope="module")
def cloned(source, tmp_path_factory):
  """The source with twice the experts, optimizer kept; and the source's digest before."""
  before = digest(source)
  output = tmp_path_factory.mktemp("cloned") / "new"
  operate(Clone(), source, output, optimizer="keep")
  return output, before


def test_the_source_is_only_read_and_nothing_else_is_left(source, cloned):
  output, before = cloned
  assert digest(source) == before
  assert [p.name for p in output.parent.iterdir()] == ["new"]


def test_the_new_run_holds_the_operation_on_every_layer(source, cloned):
  """Copies side by side in both MoE layers; attention and dense layers bit for bit."""
  old, _, _ = restore_params(source)
  new, config, meta = restore_params(cloned[0])
  assert (config.moe.num_experts, meta["step"]) == (8, 7)
  for name, x in old["unit"]["1"]["moe"]["experts"].items():
    np.testing.assert_array_equal(
      new["unit"]["1"]["moe"]["experts"][name], np.repeat(x, 2, axis=1)
    )
  weight = old["unit"]["1"]["moe"]["router"]["weight"]
  np.testing.assert_array_equal(
    new["unit"]["1"]["moe"]["router"]["weight"], np.repeat(weight, 2, axis=2)
  )
  for block in ("0", "1"):
    jax.tree.map(
      np.testing.assert_array_equal,
      new["unit"][block]["attention"],
      old["unit"][block]["attention"],
    )
  jax.tree.map(np.testing.assert_array_equal, new["embedding"], old["embedding"])


def restored(run):
  """The whole train state of a run's newest checkpoint."""
  opened = open_run(run)
  optimizer = make_optimizer(
    opened.config.optimizer,
    num_steps=20,
    axes=opened.model.logical_axes(),
    trained=opened.model.trained(),
  )
  target = state_lib.state_shapes(opened.model, optimizer, mesh())
  checkpointer = Checkpointer(
    run / DIRECTORY, keep_last=1, keep_best=0, config=opened.config, metadata={}
  )
  state, meta = checkpointer.restore(target)
  checkpointer.close()
  return state, meta


def test_training_can_go_on_with_kept_moments(source, cloned):
  """Step, key and data position are the source's; a copy has its part of a moment."""
  old, _ = restored(source)
  new, meta = restored(cloned[0])
  assert int(new["step"]) == 7
  assert meta["position"] == {"step": 7, "seed": 0}
  np.testing.assert_array_equal(
    jax.random.key_data(new["key"]), jax.random.key_data(old["key"])
  )
  for moment, part in (("mu", 2), ("nu", 4)):
    was, now = (
      getattr(s["opt_state"][0], moment)["unit"]["1"]["moe"]["experts"]["w_in"]
      for s in (old, new)
    )
    np.testing.assert_allclose(now, np.repeat(was, 2, axis=1) / part, rtol=1e-6)


def test_lineage_tells_where_each_expert_comes_from(source, cloned, tmp_path):
  """Two operations: each copy's half, back to the first run, by equal fingerprints."""
  merge = Merge(experts=4, group_by="order", weigh="even")
  record = operate(merge, cloned[0], tmp_path / "merged")
  assert record is not None
  first = lineage.fingerprints(
    open_run(source).slices.leaves, layers_of(open_run(source).model)
  )
  assert {int(n): layer["after"] for n, layer in record["layers"].items()} == first
  opened = open_run(tmp_path / "merged")
  prints = lineage.fingerprints(opened.slices.leaves, layers_of(opened.model))
  lines = lineage.render(tmp_path / "merged", opened.slices.meta, prints)
  at = lines.index(f"  expert 2  {first[1][2]}")
  assert lines[at + 1].startswith(f"    expert 4 ({first[1][2]}), expert 5 (")
  assert lines[at + 2] == (
    f"    expert 2 ({first[1][2]}): clone of {source.resolve()}, step 7"
  )
  with pytest.raises(UserError, match="records no operation"):
    lineage.render(source, {}, {})


def test_a_sharded_source_is_changed_a_layer_at_a_time(tmp_path, monkeypatch):
  """Saved on data 2 x expert 4, restored on fsdp 2; no read is larger than one matrix of
  one layer, though the arrays stack two."""
  run = make_run(tmp_path / "run", run_config(), mesh(data=2, expert=4))
  sizes = []
  read = slices.Slices.read

  def recording(self, name, index=()):
    found = read(self, name, index)
    if "moe.experts" in name:
      sizes.append(found.size)
    return found

  monkeypatch.setattr(slices.Slices, "read", recording)
  monkeypatch.setattr(slices, "_PART_BYTES", 1)
  monkeypatch.setattr(lazy, "_CHUNK_BYTES", 4 * 4 * 8 * 12)
  operate(Prune(experts=2, by="weights"), run, tmp_path / "new")
  assert max(sizes) == 4 * 8 * 12
  opened = open_run(tmp_path / "new")
  params, _, _ = restore_params(
    tmp_path / "new", shardings=param_shardings(opened.model, mesh(fsdp=2))
  )
  kept = opened.slices.meta["surgery"][0]["layers"]["3"]["parents"]
  old, _, _ = restore_params(run)
  np.testing.assert_array_equal(
    params["unit"]["1"]["moe"]["experts"]["w_in"][1],
    old["unit"]["1"]["moe"]["experts"]["w_in"][1][np.array(kept)[:, 0]],
  )


@pytest.mark.slow
def test_the_loss_before_and_after_is_printed_with_what_is_expected(source, tmp_path):
  """Over real text: a permutation by measured load changes nothing."""
  said = []
  permute = Permute(by="load", devices=2)
  record = operate(permute, source, tmp_path / "new", said, evaluate=True, max_batches=1)
  assert record is not None
  loss = record["loss"]
  assert record["expected"] == EQUAL
  assert abs(loss["after"] - loss["before"]) < 1e-4
  line = next(line for line in said if line.startswith("validation loss"))
  assert line.endswith("expected: equal")


def test_a_dry_run_writes_nothing(source, tmp_path):
  said = []
  operate(Split(), source, None, said, dry_run=True)
  assert "  layer 3: E 4, K 2, F 12 -> E 8, K 4, F 6" in said
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("operation", "fields", "words"),
  [
    (Prune(experts=1, by="weights"), {}, "2 experts, and 1 would be left"),
    (
      Select(num_selected=5),
      {},
      "more than the 4 experts that there are. Give at most 4",
    ),
    (Reroute(), {}, "is the run's router"),
    (Permute(by="order", order="0,1"), {}, "name each of the experts 0 to 3 once"),
    (Clone(), {"expert_bias": True}, "expert_bias=true changes the shapes"),
    (Add(number=1, init="run", from_run="nowhere"), {}, "not a directory"),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
  source, tmp_path, operation, fields, words
):
  given = tuple(f"moe.{name}" for name in fields)
  with pytest.raises(UserError, match=words):
    operate(operation, source, tmp_path / "new", fields=fields, given=given)
  assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_stays(source, tmp_path):
  (tmp_path / "new").mkdir()
  with pytest.raises(UserError, match=r"--output=.*new exists already"):
    operate(Clone(), source, tmp_path / "new")
  assert not list((tmp_path / "new").iterdir())


def test_an_output_inside_a_source_is_refused(source, tmp_path):
  """A source is only read: no part of it, nor of another run's, is a new run's place."""
  before = digest(source)
  other = tmp_path / "other"
  shutil.copytree(source, other)
  (tmp_path / "link").symlink_to(source)
  take = Add(number=1, init="run", from_run=str(other))
  for operation, output in (
    (Clone(), source / "checkpoints" / "99"),
    (Clone(), tmp_path / "link" / "new"),
    (take, other / "new"),
  ):
    with pytest.raises(UserError, match="--output=.* is inside .* Choose"):
      operate(operation, source, output)
  assert digest(source) == digest(other) == before


@pytest.mark.parametrize("output", ["/proc/x/y", "file/new", "dangling/new", "x" * 250])
def test_an_output_that_cannot_be_made_is_refused_before_the_source_is_opened(
  tmp_path, output
):
  """No parent, a file as one, a link to nothing, and a name that is too long."""
  (tmp_path / "file").touch()
  (tmp_path / "dangling").symlink_to("nowhere")
  with pytest.raises(UserError, match="--output=.* cannot be made"):
    operate(Clone(), tmp_path / "no_run", tmp_path / output)
  assert len(list(tmp_path.iterdir())) == 2


def spoil(run: pathlib.Path) -> None:
  """Changes one byte of every file of arrays."""
  # Orbax keeps arrays in one of these, and may leave others behind.
  for data in run.rglob("d/*"):
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))


def test_a_damaged_source_is_refused(source, tmp_path):
  """One byte of one array, without which the result would be wrong in silence."""
  run = tmp_path / "run"
  shutil.copytree(source, run)
  spoil(run)
  with pytest.raises(UserError, match="checkpoint 7 is damaged"):
    operate(Clone(), run, tmp_path / "new", optimizer="keep")
  assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_another_run_is_verified_before_its_experts_are_taken(source, tmp_path):
  """One byte of the other run's arrays that is not as it was written is refused."""
  other = tmp_path / "other"
  shutil.copytree(source, other)
  spoil(other)
  operation = Add(number=1, init="run", from_run=str(other))
  words = "--from_run=.*other: checkpoint 7 is damaged .* another --from_step,"
  with pytest.raises(UserError, match=words):
    operate(operation, source, tmp_path / "new")
  assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_the_record_names_the_other_run_with_step_and_fingerprint(source, tmp_path):
  """A new expert's lineage is that expert of the other run; old ones keep theirs."""
  other = make_run(tmp_path / "other", run_config(), seed=1)
  record = operate(
    Add(number=1, init="run", from_run=str(other), of="2"), source, tmp_path / "new"
  )
  assert record is not None
  assert record["sources"] == [
    {"workdir": str(path.resolve()), "step": 7} for path in (source, other)
  ]
  opened = open_run(other)
  prints = lineage.fingerprints(opened.slices.leaves, layers_of(opened.model))
  after = record["layers"]["3"]["after"]
  assert after[4] == prints[3][2]
  ((of, words),) = lineage.ancestors([record], 3, 4)
  assert words == [f"expert 2 ({after[4]}) of {other.resolve()}, step 7"]
  assert of == "add of 2 runs"
  ((of, words),) = lineage.ancestors([record], 3, 1)
  assert (of, words) == (f"add of {source.resolve()}, step 7", [f"expert 1 ({after[1]})"])


@pytest.mark.slow
def test_experts_of_another_run_are_added_if_they_fit(
  source, cloned, tmp_path, monkeypatch
):
  """Those of another width are refused by name; then rows are new and moments reset."""
  wide = make_run(tmp_path / "wide", run_config(hidden=16))
  with pytest.raises(UserError, match="width of an expert .* is 16 there and 12 here"):
    operate(Add(number=1, init="run", from_run=str(wide)), source, tmp_path / "no")
  late = make_run(tmp_path / "late", run_config(), step=8)
  with pytest.raises(UserError, match="at step 8 and --workdir at 7"):
    operate(Add(number=1, init="run", from_run=str(late)), source, tmp_path / "no")
  other = Add(number=2, init="run", from_run=str(source), of="3,1", row="zero")
  with monkeypatch.context() as changed:
    changed.setattr(add, "tokenizer_of", str)
    with pytest.raises(UserError, match="has another tokenizer"):
      operate(other, cloned[0], tmp_path / "no")
  operate(
    other,
    source,
    tmp_path / "new",
  )
  new, _, _ = restore_params(tmp_path / "new")
  experts, router = (new["unit"]["1"]["moe"][n] for n in ("experts", "router"))
  np.testing.assert_array_equal(experts["w_out"][:, 4], experts["w_out"][:, 3])
  np.testing.assert_array_equal(experts["w_out"][:, 5], experts["w_out"][:, 1])
  assert not np.any(router["weight"][..., 4:])
  assert np.all(
    router["weight"][..., :4]
    == restore_params(source)[0]["unit"]["1"]["moe"]["router"]["weight"]
  )


def test_an_optimizer_without_moments_of_each_parameter_is_refused(tmp_path):
  """Adafactor keeps sums of rows and columns, which no operation goes through."""
  config = run_config()
  config.optimizer.name = "adafactor"
  run = make_run(tmp_path / "run", config)
  with pytest.raises(UserError, match="optimizer adafactor .* --optimizer=reset"):
    operate(Clone(), run, tmp_path / "new", optimizer="keep")


@pytest.mark.parametrize(
  ("words", "part"),
  [
    ([], None),
    (["clown"], "Did you mean clone?"),
    (["--workdir=x"], "give the operation first"),
    (["prune", "--workdir=nowhere", "--output=x"], "does not exist"),
    (["clone", "--factor=many", "--workdir=."], "--output=DIR is missing"),
  ],
)
@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_line(words, part):
  done = subprocess.run(
    [sys.executable, "-m", "tools.surgery", *words],
    capture_output=True,
    text=True,
    timeout=120,
  )
  if part is None:
    assert done.returncode == 0
    assert "  upcycle   a dense model becomes a Mixture of Experts" in done.stdout
    return
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert part in done.stderr
