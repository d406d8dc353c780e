"""experiments.analyze as a user calls it: results, and one line for every mistake."""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from moejax.analysis.explorer import pack
from moejax.cli import analysis_passes, restored, train
from moejax.config import Config
from moejax.errors import UserError
from tests.experiments.test_command_lines import QUICK, call
from tests.models.test_encoder_decoder import small

ROOT = pathlib.Path(__file__).parents[2]

_MISTAKES = r"""
import json, sys
from moejax.cli import analyze, flags as cli
from moejax.errors import UserError
from absl import flags
cli.define_config(default=None)
said = []
for args in json.loads(sys.argv[1]):
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  try:
    cli.parse(["analyze", *args], "moejax.cli.analyze")
    analyze._asked(cli.run_directory())
    said.append("")
  except UserError as error:
    said.append(str(error))
print(json.dumps(said))
"""


def test_flags_that_do_nothing_or_contradict_are_refused(tmp_path):
  """Before jax is imported: each names the flag, its value and the remedy."""
  (tmp_path / "file").write_text("")
  cases = {
    ("--text=x", "--split=test"): "--split: --text has no splits",
    ("--confirm=1",): "--confirm does nothing without --replay",
    ("--overflow=drop",): "--overflow does nothing without --replay",
    ("--knockout_pairs=2",): "--knockout_pairs does nothing without --knockout",
    ("--trace_what=logits",): "--trace_what does nothing without --trace=FILE",
    ("--replay",): "no option is given",
    ("--replay", "--capacity_factor=1,x"): "--capacity_factor=x: expected",
    ("--replay", "--group_size=1.5"): "--group_size=1.5: expected",
    ("--knockout=a",): "--knockout",
    (f"--out={tmp_path}/file/x",): "is a file",
    ("--out=/proc/nope/x",): "--out=/proc/nope/x cannot be written (",
    (f"--out={tmp_path}/{'x' * 300}",): "cannot be written (File name too long)",
    ("--replay", "--overflow=drop", "--from_trace=x", "--trace=y"): "--from_trace",
    ("--replay", "--overflow=drop", "--from_trace=x", "--explore_tokens=5"): "no page",
    ("--explore_tokens=-1",): "--explore_tokens",
    ("--knockout",): "",
    ("--knockout=3,1",): "",
  }
  where = f"--workdir={tmp_path}"
  args = json.dumps([[where, *case] for case in cases])
  command = [sys.executable, "-c", _MISTAKES, args]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
  assert done.returncode == 0, done.stderr
  for said, (case, words) in zip(json.loads(done.stdout), cases.items(), strict=True):
    assert words in said and bool(words) == bool(said), (case, said)
    assert "\n" not in said
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_training_refuses_at_once_what_cannot_be_analyzed_after_it():
  """A dense model, before a step is taken; not one with experts, of either kind."""
  config = Config()
  train._check_analysis(config)
  config.moe.dense_twin = True
  with pytest.raises(UserError, match="--analyze: .*Leave it out"):
    train._check_analysis(config)
  train._check_analysis(small())


@pytest.mark.parametrize(("read", "limit"), [(100, 2), (64, 1), (1000, 0)])
def test_training_analyzes_about_as_much_as_it_evaluated(monkeypatch, read, limit):
  """In batches of 8 rows of 8 targets, of 1000: the encoder's 16 tokens a row count
  nothing. 0 is all."""
  asked = []
  monkeypatch.setattr(analysis_passes, "analyze", lambda _, asked_: asked.append(asked_))
  result = {"tokens": read, "split_tokens": 1000}
  train._analyze(small(), pathlib.Path("run"), result)
  assert [each.limit for each in asked] == [limit]


def test_what_an_encoder_decoder_has_not_is_refused_by_the_flag():
  """Each by its name, with what there is instead; loads and checkpoints pass."""

  def check(steps: int = 0, **asked: Any) -> None:
    given = restored.Asked(out=pathlib.Path("out"), **asked)
    analysis_passes._check_encoder(given, steps)

  check()
  check(steps=1)
  for name, value in {"replay": {}, "knockout": (), "trace": pathlib.Path("x")}.items():
    with pytest.raises(UserError, match=f"--{name}: .*encoder-decoder. Leave it out"):
      check(**{name: value})
  with pytest.raises(UserError, match="--steps: more than one"):
    check(steps=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> str:
  """A finished run of four steps with two checkpoints, analyzed at its end."""
  directory = tmp_path_factory.mktemp("run")
  call(
    "experiments.train",
    f"--workdir={directory}",
    "--analyze",
    f"--config.data.cache_dir={tmp_path_factory.mktemp('cache')}",
    *(f"--config.{setting}" for setting in QUICK),
  )
  return str(directory)


@pytest.mark.slow
def test_training_ends_with_an_analysis(workdir):
  """Of the last checkpoint, on the text of the final evaluation, with a page of text."""
  directory = pathlib.Path(workdir)
  found = json.loads((directory / "analysis" / "analysis.json").read_text())
  own = json.loads((directory / "eval.json").read_text())
  assert (found["step"], found["tokens"]) == (4, own["tokens"])
  assert _page(directory / "analysis", "text")["token"].size == own["tokens"]


def _page(out: pathlib.Path, name: str) -> dict:
  """The columns of a block of a page."""
  text = (out / "index.html").read_text()
  (packed,) = re.findall(rf'id="data-{name}">([^<]*)</script>', text)
  return pack.unpack(packed)


@pytest.mark.slow
def test_one_call_measures_everything(workdir, tmp_path):
  """All checkpoints, replay with a real evaluation, knock-out, and a trace replayed."""
  trace = tmp_path / "trace.parquet"
  replay = ("--replay", "--capacity_factor=0.5,2", "--overflow=drop,next_best")
  printed = call(
    "experiments.analyze",
    f"--workdir={workdir}",
    f"--out={tmp_path / 'out'}",
    "--steps=all",
    *replay,
    "--confirm=1",
    "--knockout",
    "--knockout_pairs=1",
    f"--trace={trace}",
    "--trace_what=logits",
  )
  assert "MiB before compression" in printed
  found = json.loads((tmp_path / "out" / "analysis.json").read_text())
  assert [row["step"] for row in found["saturation"]] == [2, 4]
  assert {layer["saturation"] for layer in found["saturation"][1]["layers"]} == {1}
  assert found["replay"][0]["confirmed"]["difference"][0] == pytest.approx(0, abs=1e-9)
  layers = [layer["layer"] for layer in found["layers"]]
  assert [row["layer"] for row in found["knockout"]] == layers
  assert len(found["knockout_pairs"]) == len(layers)
  assert (tmp_path / "out" / "index.html").stat().st_size > 1000
  call(
    "experiments.analyze",
    f"--workdir={workdir}",
    f"--out={tmp_path / 'again'}",
    f"--from_trace={trace}",
    *replay,
  )
  again = json.loads((tmp_path / "again" / "replay.json").read_text())["replay"]
  for ours, theirs in zip(again, found["replay"], strict=True):
    assert ours["setting"] == theirs["setting"] and ours["layers"] == theirs["layers"]
  where = (
    "--steps=2",
    f"--out={tmp_path / 'one'}",
    f"--trace={tmp_path / 'one.parquet'}",
  )
  call("experiments.analyze", f"--workdir={workdir}", *where, "--trace_what=logits")
  where = (f"--out={tmp_path / 'none'}", f"--from_trace={tmp_path / 'one.parquet'}")
  error = call("experiments.analyze", f"--workdir={workdir}", *where, *replay, code=2)
  assert "another model: its step is 2" in error and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_two_processes_count_the_same_and_one_writes(workdir, tmp_path):
  """Counts are equal, and floats but for rounding."""
  flags = (f"--workdir={workdir}", "--batch_size=8", "--replay", "--capacity_factor=0.5")
  call("experiments.analyze", *flags, f"--out={tmp_path / 'one'}")
  command = ["--processes=2", "--devices_per_process=1", f"--logs={tmp_path / 'logs'}"]
  command += ["--", sys.executable, "-m", "experiments.analyze"]
  call("tools.launch_local", *command, *flags, f"--out={tmp_path / 'two'}")
  one, two = (
    json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("one", "two")
  )
  assert one["tokens"] == two["tokens"]
  assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
  for ours, theirs in zip(one["layers"], two["layers"], strict=True):
    assert ours["load"]["share"] == pytest.approx(theirs["load"]["share"], abs=2e-3)
  for name, shown in (("text", "token"), ("text", "sequence"), ("layer0", "expert")):
    ours, theirs = (_page(tmp_path / out, name)[shown] for out in ("one", "two"))
    assert ours.shape == theirs.shape and (ours == theirs).mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
  ("args", "names"),
  [
    (["--steps=3"], ["--steps=3", "2, 4"]),
    (["--knockout=7"], ["--knockout=7", "MoE layer"]),
    (["--text=/nowhere"], ["/nowhere"]),
    (["--replay", "--num_selected=99"], ["num_selected=99"]),
    (["--replay", "--capacity_factor=1", "--confirm=2"], ["--confirm=2"]),
    (["--config.moe.dense_twin=true"], ["no MoE layer"]),
  ],
)
def test_mistakes_about_the_run_are_one_line(workdir, tmp_path, args, names):
  """Nothing is written."""
  out = tmp_path / "out"
  error = call(
    "experiments.analyze", f"--workdir={workdir}", f"--out={out}", *args, code=2
  )
  assert "Traceback" not in error and not out.exists()
  for name in names:
    assert name in error.splitlines()[-1]
