"""A run's directory: taken, refused or gone on with, and never half-written."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moejax import data, files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError
from moejax.run import claim, workdir

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def release_locks():
  yield
  for path in list(claim._locks):
    workdir.release(path)


def begin(path, config=None, fingerprint="corpus-a", mesh=None):
  """A run with one logged step: from here on the directory is bound to its config."""
  found = workdir.prepare(path, config or Config(), fingerprint, mesh)
  (path / "metrics.jsonl").write_text('{"step": 1}\n')
  return found


def changed(**fields):
  config = Config()
  for name, value in fields.items():
    config_text.set_field(config, name.replace("__", "."), value)
  return config


def test_a_new_directory_holds_the_resolved_config(tmp_path):
  """Sorted JSON that reads back as the same config; where it came from beside it."""
  path = tmp_path / "a" / "b"
  config = changed(moe__num_experts=16, moe__capacity_factor=None)
  assert isinstance(workdir.prepare(path, config, "corpus-a"), workdir.New)
  text = (path / "config.json").read_text()
  assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
  assert workdir.read_config(path) == config
  run = json.loads((path / "run.json").read_text())
  assert run["dataset_fingerprint"] == "corpus-a" and "jax" in run["versions"]
  assert sorted(p.name for p in path.iterdir()) == ["config.json", "run.json"]


def test_another_text_is_refused_before_it_is_prepared(tmp_path):
  """By the fingerprint of its files: no dataset is made of it, no token written."""
  text, cache = tmp_path / "text", tmp_path / "cache"
  text.mkdir()
  for number in range(8):
    (text / f"{number}.txt").write_text(f"document {number}, " * 20)
  config = changed(data__name="text", data__path=str(text), data__tokenizer="bytes")
  config.data.cache_dir = str(cache)
  path = tmp_path / "run"

  def load():
    workdir.prepare(path, config)
    check = functools.partial(workdir.check_corpus, path)
    return data.load(config.data, workdir=path, check_corpus=check)

  dataset = load()
  workdir.prepare(
    path, config, dataset.fingerprint, corpus_fingerprint=dataset.corpus_fingerprint
  )
  (path / "metrics.jsonl").write_text('{"step": 1}\n')
  assert load().fingerprint == dataset.fingerprint
  before = sorted(cache.rglob("*"))
  (text / "0.txt").write_text("another text")
  with pytest.raises(ConfigError, match="begun on other data: the corpus fingerprint"):
    load()
  assert sorted(cache.rglob("*")) == before


def test_another_config_is_refused_and_every_field_named(tmp_path):
  """Both fields, their values before and now, and two ways out; nothing is changed."""
  begin(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  other = changed(moe__num_experts=16, optimizer__learning_rate=0.5, train__log_every=1)
  with pytest.raises(ConfigError) as error:
    workdir.prepare(tmp_path, other, "corpus-a")
  message = str(error.value)
  assert "--config.moe.num_experts was 8 and is now 16" in message
  assert "--config.optimizer.learning_rate was 0.001 and is now 0.5" in message
  assert "log_every" not in message
  assert "another --workdir" in message and "--init_from" in message
  assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
  "fields",
  [
    {"mesh__data": 2, "mesh__expert": 4, "moe__exchange": "ring"},
    {"data__num_workers": 3, "data__prefetch": 9, "data__cache_dir": "/elsewhere"},
    {"train__log_every": 1, "train__eval_every": 7, "train__tensorboard": False},
    {"train__keep_last": 9, "train__keep_best": 0, "train__checkpoint_every": 5},
    {"train__num_steps": 2000},
  ],
)
def test_what_may_change_goes_on(tmp_path, fields):
  """Mesh, workers, logging, keeping and a larger num_steps; config.json follows."""
  begin(tmp_path)
  config = changed(**fields)
  found = workdir.prepare(tmp_path, config, "corpus-a")
  assert isinstance(found, workdir.Resume) and found.step is None
  assert {name.replace(".", "__") for name, _, _ in found.changed} == set(fields)
  assert workdir.read_config(tmp_path) == config


def test_a_smaller_num_steps_is_refused(tmp_path):
  """Steps already taken cannot be untaken."""
  begin(tmp_path)
  with pytest.raises(ConfigError, match=r"num_steps was 1000 .* may only grow"):
    workdir.prepare(tmp_path, changed(train__num_steps=10), "corpus-a")


def test_another_corpus_is_refused(tmp_path):
  """The same flags on changed files are another run."""
  begin(tmp_path)
  with pytest.raises(ConfigError, match=r"was corpus-a and is now corpus-b"):
    workdir.prepare(tmp_path, Config(), "corpus-b")


def test_a_run_that_never_began_binds_nobody(tmp_path):
  """After a refused or killed start the flags may be corrected and given again."""
  workdir.prepare(tmp_path, Config(), "corpus-a")
  other = changed(moe__num_experts=16)
  assert isinstance(workdir.prepare(tmp_path, other), workdir.New)
  assert not (tmp_path / "config.json").exists()
  workdir.prepare(tmp_path, other, "corpus-b")
  assert workdir.read_config(tmp_path) == other
  assert "corpus-b" in (tmp_path / "run.json").read_text()


def test_other_peoples_files_are_refused_and_left_alone(tmp_path):
  """A directory that is not ours and not empty is not written to."""
  (tmp_path / "thesis.tex").write_text("x")
  with pytest.raises(UserError, match=r"holds thesis\.tex\. Choose a new directory"):
    workdir.prepare(tmp_path, Config(), "corpus-a")
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
  ("text", "more", "words"),
  [
    ('{"model_type": "mixtral"}', "x", "holds a published model"),
    ("{}", "model.safetensors", "holds a published model"),
    ('{"schema_version": 3}', "model-1.safetensors", "holds a published model"),
    ('{"port": 80}', "x", "is not a run's"),
    ("[]", "x", "is not a run's"),
    ("port: 80", "x", "cannot be read"),
  ],
)
def test_another_projects_config_json_is_never_written_over(tmp_path, text, more, words):
  """A published model has one too, and nothing of a run stands beside it."""
  (tmp_path / "config.json").write_text(text)
  (tmp_path / more).write_text("")
  for fingerprint in (None, "corpus-a"):
    with pytest.raises(UserError, match=f"{words}.*Choose a new directory") as error:
      workdir.prepare(tmp_path, Config(), fingerprint)
    assert "\n" not in str(error.value)
  assert (tmp_path / "config.json").read_text() == text
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["config.json", more])


def test_checkpoints_without_a_config_are_not_trained_over(tmp_path):
  """Without config.json nobody knows what the checkpoints are of."""
  (tmp_path / "checkpoints" / "10").mkdir(parents=True)
  with pytest.raises(UserError, match=r"newest: step 10.*--init_from"):
    workdir.prepare(tmp_path, Config(), "corpus-a")


def test_what_the_tokenizer_and_a_launcher_left_is_ours(tmp_path):
  """The tokenizer may be stored, and a log opened, before the directory is taken."""
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "train.log").write_text("")
  assert isinstance(workdir.prepare(tmp_path, Config(), "corpus-a"), workdir.New)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  """A file in the way, and a file system that refuses (root ignores permissions)."""
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(UserError, match=r"--workdir=.* is not a directory"):
      workdir.prepare(path, Config(), "a")

  def refuse(**_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(claim.tempfile, "TemporaryFile", refuse)
  with pytest.raises(UserError, match=r"not writable \(Permission denied\)"):
    workdir.prepare(tmp_path, Config(), "a")


def test_an_older_config_resumes(tmp_path):
  """A config.json that lacks a field since added means that field's default."""
  begin(tmp_path)
  stored = json.loads((tmp_path / "config.json").read_text())
  del stored["moe"]["slot_numbering"]
  (tmp_path / "config.json").write_text(json.dumps(stored))
  assert isinstance(workdir.prepare(tmp_path, Config(), "corpus-a"), workdir.Resume)


_HOLD = """
import sys, time
from moejax.config import Config
from moejax.run import workdir
workdir.prepare(sys.argv[1], Config(), "corpus-a")
print("held", flush=True)
time.sleep(60)
"""


def test_two_live_runs_refuse_and_a_killed_one_does_not(tmp_path, monkeypatch):
  """The second is told; SIGKILL on the first frees the directory at once."""
  monkeypatch.setattr(claim, "LOCK_WAIT_SECONDS", 0.2)
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  holder = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment
  )
  with holder:
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="in use by another live run"):
      workdir.prepare(tmp_path, Config(), "corpus-a")
    holder.send_signal(signal.SIGKILL)
  assert isinstance(workdir.prepare(tmp_path, Config(), "corpus-a"), workdir.New)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
  """config.json is replaced whole or not at all, and no scrap stays behind."""
  path = tmp_path / "config.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    files.write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_bounded_exchange_makes_the_mesh_part_of_the_arithmetic(tmp_path):
  """What does not fit the buffer depends on the devices: the run goes on on the same
  mesh only. Without a buffer it goes on anywhere."""
  one, other = {"data": 1, "expert": 4}, {"data": 2, "expert": 2}
  bounded = changed(moe__exchange_buffer=1.25, moe__capacity_factor=None)
  begin(tmp_path / "bounded", bounded, mesh=one)
  assert isinstance(
    workdir.prepare(tmp_path / "bounded", bounded, "corpus-a", one), workdir.Resume
  )
  with pytest.raises(ConfigError, match="data 1 x expert 4 and would.*data 2 x expert 2"):
    workdir.prepare(tmp_path / "bounded", bounded, "corpus-a", other)
  ring = changed(
    moe__exchange_buffer=1.25, moe__capacity_factor=None, moe__exchange="ragged"
  )
  with pytest.raises(ConfigError, match="moe.exchange was 'auto' and is now 'ragged'"):
    workdir.prepare(tmp_path / "bounded", ring, "corpus-a", one)
  grouped = changed(
    moe__exchange_buffer=1.25, moe__capacity_factor=None, moe__dispatcher="grouped"
  )
  with pytest.raises(ConfigError, match="dispatcher was 'auto' and is now 'grouped'"):
    workdir.prepare(tmp_path / "bounded", grouped, "corpus-a", one)
  begin(tmp_path / "free", Config(), mesh=one)
  found = workdir.prepare(tmp_path / "free", Config(), "corpus-a", other)
  assert isinstance(found, workdir.Resume)


def test_a_run_whose_dispatcher_is_refused_now_can_go_on_under_another(tmp_path):
  """Dispatchers add in other orders and are the same layer: the remedy of a refused one
  must not be refused in turn."""
  begin(tmp_path, changed(moe__dispatcher="gather"))
  found = workdir.prepare(tmp_path, changed(moe__dispatcher="auto"), "corpus-a")
  assert isinstance(found, workdir.Resume)
  assert found.changed == [("moe.dispatcher", "gather", "auto")]


def test_a_directory_that_is_removed_under_its_run_is_one_line(tmp_path):
  """At the next look; and whatever error it causes first."""
  path = tmp_path / "run"
  begin(path)
  workdir.check_there(path)
  with pytest.raises(OSError, match="a disk"), workdir.still_there(path):
    raise OSError("a disk that is there")
  shutil.rmtree(path)
  with pytest.raises(UserError, match=f"^--workdir={path} was removed"):
    workdir.check_there(path)
  path.mkdir()  # as a save would, with its parents
  with pytest.raises(UserError, match="was removed"), workdir.still_there(path):
    (path / "metrics.jsonl").read_text()
