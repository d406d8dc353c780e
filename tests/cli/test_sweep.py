"""The command line of a sweep: what flags say, and one line for each mistake."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from configs import default
from moejax.cli import dotted, sweep, sweep_table
from moejax.cli import flags as cli
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.run import compilation_cache
from moejax.sweep.points import axes, stored
from moejax.sweep.points.expand import expand
from moejax.sweep.report import page
from moejax.sweep.spec import SPEC_FILE, Spec
from tests.sweep.report import report_cases

OWN: list[str] = []
"""Names of the program's flags."""


@pytest.fixture(autouse=True)
def _flags():
  """Flags as the program has them, gone afterwards: other programs define some too."""
  cli.define_config()
  before = set(flags.FLAGS)
  compilation_cache.define_flag()
  sweep.define_flags()
  OWN[:] = [*set(flags.FLAGS) - before, "config", "workdir", "list"]
  with flagsaver.flagsaver():
    yield
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    dotted.forget_prefixes()
    flags.FLAGS["config"].unparse()
    cli.parse(["program"])
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  """No product is timed."""
  monkeypatch.setattr("moejax.sweep.points.predict.product_speed", lambda: 1e11)


def parse(*words: str) -> None:
  """As a new process: no flag keeps the value of the line before."""
  for name in OWN:
    flags.FLAGS[name].unparse()
  cli.parse(["program", *words])


def main(*words: str) -> int:
  parse(*words)
  return sweep.main()


def spec_of(*words: str) -> Spec:
  parse(*words)
  return sweep.get_spec()


def refused(*words: str) -> str:
  with pytest.raises(UserError) as caught:
    main(*words)
  assert "\n" not in str(caught.value) and caught.value.exit_code == 2
  return str(caught.value)


def test_flags_make_the_specification():
  """Axes in the order of the line, the base with its overrides, N seeds from 0."""
  found = spec_of(
    "--sweep.moe.num_experts=8,16",
    "--zip.model.num_layers=2,4",
    "--config.model.qk_norm",
    "--sweep.moe.capacity_factor",
    "1,none",
    "--zip.model.hidden=64,128",
    "--seeds=2",
    "--match=active_flops",
    "--isoflop=1e13,3e13",
  )
  base = default.get_config()
  base.model.qk_norm = True
  assert found == Spec(
    base=base,
    axes=(
      axes.product("moe.num_experts", 8, 16),
      axes.together({"model.num_layers": [2, 4], "model.hidden": [64, 128]}),
      axes.product("moe.capacity_factor", 1.0, None),
    ),
    seeds=(0, 1),
    match="active_flops",
    isoflop=(1e13, 3e13),
  )


def test_without_seeds_there_is_the_one_of_the_config():
  assert spec_of("--config.train.seed=7").seeds == (7,)


def test_the_base_need_not_be_possible():
  """Only points are runs: here top2 needs the two choices that an axis gives."""
  code = main("--dry_run", "--config.moe.router=top2", "--sweep.moe.num_selected=2")
  assert code == 0


SPEC = '''"""Experts and depth.

What pays?
"""

from configs import default
from moejax.sweep.points import axes
from moejax.sweep.spec import Spec


def get_sweep():
  return Spec(
    base=default.get_config(),
    axes=(axes.product("moe.num_experts", 4, 8), axes.product("moe.jitter", 0.0, 0.1)),
    variants={"deep": {"model.num_layers": 8}, "flat": {"model.num_layers": 2}},
    conditions=(lambda c: c.moe.num_experts < 32,),
    seeds=(3, 4),
  )
'''


@pytest.fixture
def spec_file(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(SPEC)
  return file


def test_a_file_says_what_flags_say_and_more(spec_file):
  """Its docstring becomes title and notes; variants and conditions are kept."""
  found = spec_of(f"--spec={spec_file}")
  assert (found.title, found.notes) == (
    "Experts and depth",
    "Experts and depth.\n\nWhat pays?",
  )
  assert found.seeds == (3, 4) and list(found.variants) == ["deep", "flat"]
  assert len(expand(found).points) == 2 * 2 * 2 * 2


def test_flags_beside_a_file_win(spec_file):
  """They replace its axis of the same field, add others, and change its base."""
  found = spec_of(
    f"--spec={spec_file}",
    "--sweep.moe.num_experts=16,64",
    "--sweep.moe.capacity_factor=1,2",
    "--config.train.batch_size=8",
    "--seeds=1",
  )
  assert found.axes == (
    axes.product("moe.num_experts", 16, 64),
    axes.product("moe.jitter", 0.0, 0.1),
    axes.product("moe.capacity_factor", 1.0, 2.0),
  )
  assert found.base.train.batch_size == 8 and found.seeds == (0,)
  assert len(found.conditions) == 1


ZIPPED = SPEC.replace(
  'axes.product("moe.jitter", 0.0, 0.1)',
  'axes.together({"train.batch_size": [4, 8], "optimizer.learning_rate": [1e-3, 2e-3]})',
)


def test_flags_replace_the_axes_of_all_their_fields(tmp_path):
  """A zip takes the place of the axes whose fields it has, single or together."""
  file = tmp_path / "mine.py"
  file.write_text(ZIPPED)
  found = spec_of(
    f"--spec={file}",
    "--zip.moe.num_experts=16,64",
    "--zip.train.batch_size=2,8",
    "--zip.optimizer.learning_rate=3e-3,4e-3",
  )
  assert [axis.fields for axis in found.axes] == [
    ("moe.num_experts", "train.batch_size", "optimizer.learning_rate")
  ]


@pytest.mark.parametrize("prefix", ["sweep", "zip"])
def test_a_part_of_a_files_zip_is_refused_by_the_flag_that_was_typed(prefix, tmp_path):
  """The field that it varies with would be lost."""
  file = tmp_path / "mine.py"
  file.write_text(ZIPPED)
  words = refused(f"--spec={file}", "--dry_run", f"--{prefix}.train.batch_size=2,8")
  assert words.startswith(f"--{prefix}.train.batch_size: in the file of --spec this")
  assert "varies together with optimizer.learning_rate" in words
  assert "--zip.train.batch_size=... --zip.optimizer.learning_rate=..." in words


@pytest.mark.parametrize(
  ("line", "part"),
  [
    ("--config.moe.jitter=0.5", "changes nothing: an axis of this sweep sets the field"),
    ("--config.model.num_layers=3", "changes nothing: every variant of this sweep sets"),
  ],
)
def test_a_base_that_no_point_keeps_is_refused(spec_file, line, part):
  """Unless points are matched to it."""
  assert part in refused(f"--spec={spec_file}", "--dry_run", line)
  spec_of(f"--spec={spec_file}", line, "--match=active_flops")


def test_steps_beside_a_budget_are_refused():
  """The budget sets them, so the flag would be lost without a word."""
  words = refused(AXIS, "--isoflop=1e12", "--dry_run", "--config.train.num_steps=20")
  assert words.startswith("--config.train.num_steps=20 changes nothing: --isoflop")


def test_status_beside_flags_of_another_sweep_is_refused(tmp_path, capsys):
  """Beside its own flags it prints the table, whatever the code's revision."""
  spec = spec_of(AXIS)
  values = stored.to_json(spec, expand(spec).points) | {"revision": "older"}
  (tmp_path / SPEC_FILE).write_text(json.dumps(values))
  (tmp_path / "runs").mkdir()
  where = f"--workdir={tmp_path}"
  assert main(where, "--status", AXIS) == 1
  assert "2 runs: 2 waiting" in capsys.readouterr().out
  words = refused(where, "--status", AXIS, "--config.train.num_steps=7")
  assert "holds a different sweep from these flags" in words
  assert "--config.train.num_steps was" in words


def test_a_config_beside_a_file_replaces_its_base(spec_file, tmp_path):
  other = tmp_path / "other.py"
  other.write_text(
    "from moejax.config import Config, TrainConfig\n\n"
    "def get_config():\n  return Config(train=TrainConfig(batch_size=2))\n"
  )
  found = spec_of(f"--spec={spec_file}", f"--config={other}")
  assert found.base.train.batch_size == 2


def test_the_file_in_the_docs_is_a_sweep(tmp_path):
  """Ten settings, of which the dense twins are two, with three seeds."""
  page = (pathlib.Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()
  (text,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
  (tmp_path / "docs.py").write_text(text)
  found = expand(spec_of(f"--spec={tmp_path / 'docs.py'}")).points
  assert len(found) == 30
  assert sum(p.config.moe.dense_twin for p in found) == 6


def test_a_dry_run_prints_every_run_and_writes_nothing(tmp_path, capsys):
  """Also into a directory that is not there; totals below, and what time rests on."""
  workdir = tmp_path / "new"
  code = main(
    "--dry_run",
    f"--workdir={workdir}",
    "--seeds=2",
    "--jobs=2",
    "--sweep.moe.num_experts=8,16",
  )
  out = capsys.readouterr().out
  assert code == 0 and not workdir.exists() and not list(tmp_path.iterdir())
  for experts in (8, 16):
    for seed in (0, 1):
      assert f" num_experts={experts},seed={seed} " in out
  # 4,730,880 FLOPs of 2,048 tokens in 900 steps, at 30 GFLOP/s: 291 s.
  assert "4,730,880" in out and "4 min 51 s" in out and "8.72e+12" in out
  assert "--jobs=2: 4 runs in 19 min 24 s" in out
  assert "30% of a float32 matrix product" in out


def test_the_docs_dry_run_is_of_the_default_config(capsys):
  """All but the times, which are of a machine and a moment."""
  page = pathlib.Path(__file__).parents[2] / "docs" / "sweeps.md"
  main("--dry_run", "--sweep.moe.num_experts=8,32", "--sweep.moe.capacity_factor=1,none")
  said = {line.split()[0]: line.split()[1:8] for line in _rows(capsys.readouterr().out)}
  shown = [line.replace(",seed=2", ",seed=0") for line in _rows(page.read_text())]
  assert len(shown) == 2
  for line in shown:
    name, *cells = line.split()
    assert cells[:7] == said[name]


def _rows(text: str) -> list[str]:
  return [line for line in text.splitlines() if line.startswith("  num_experts=")]


def test_a_dry_run_lists_what_it_leaves_out(capsys):
  main(
    "--dry_run",
    "--skip_impossible",
    "--config.moe.router=top_k",
    "--sweep.moe.num_selected=1,16",
  )
  out = capsys.readouterr().out
  assert "Left out, 1 impossible:" in out and "  num_selected=16: --config.moe" in out


def test_a_dry_run_says_which_starts_are_missing(tmp_path):
  """Once however many runs have it; a bucket is not looked for."""
  there, bucket = str(tmp_path), "gs://bucket/run"
  assert not sweep_table.missing_starts(["", there, bucket])
  (line,) = sweep_table.missing_starts(["", there, "no/a", "no/a", "no/b", bucket])
  assert line.startswith("3 of the runs start from directories that do not exist yet")
  assert "(--config.train.init_from=no/a and 1 more)" in line


def test_seeds_are_a_number_or_a_list():
  assert spec_of(AXIS, "--seeds=3").seeds == (0, 1, 2)
  assert spec_of(AXIS, "--seeds=7,0,5").seeds == (7, 0, 5)


def test_a_directory_alone_means_the_sweep_in_it(tmp_path, capsys):
  """So that --dry_run, --status and going on need no flags again."""
  spec = spec_of("--sweep.moe.num_experts=8,16", "--seeds=2")
  values = stored.to_json(spec, expand(spec).points)
  (tmp_path / SPEC_FILE).write_text(json.dumps(values))
  assert main(f"--workdir={tmp_path}", "--dry_run") == 0
  assert "num_experts=16,seed=1" in capsys.readouterr().out
  assert "holds no sweep" in refused(f"--workdir={tmp_path / 'other'}", "--dry_run")


AXIS = "--sweep.moe.num_experts=8,16"


@pytest.mark.parametrize(
  ("line", "part"),
  [
    ("--sweep.moe.num_expert=8", "Did you mean --sweep.moe.num_experts?"),
    ("--swep.moe.num_experts=8", "Did you mean --sweep.moe.num_experts?"),
    ("--zipp.moe.num_experts=8", "Did you mean --zip.moe.num_experts?"),
    ("--sweep.moe.num_experts=", "the list is empty"),
    ("--sweep.moe.num_experts", "no value given; expected a whole number"),
    ("--nosweep.model.qk_norm", "write --sweep.model.qk_norm=VALUE"),
    ("--sweep.moe.num_experts=8,8", "the same point twice"),
    ("--sweep.moe.num_experts=8,x", "--sweep.moe.num_experts=x: expected a whole number"),
    ("--sweep.data.cache_dir=a,b", "this field may not vary within a sweep"),
    ("--zip.moe.num_experts=8,16 --zip.moe.hidden=64", "has 2 values and"),
    ("--sweep.moe.num_selected=1,16", "point num_selected=16: --config.moe"),
    (f"{AXIS} --seeds=0", "--seeds"),
    (f"{AXIS} --seeds=x", "--seeds=x: give a number of seeds"),
    (f"{AXIS} --seeds=0,x", "--seeds=0,x: give a number of seeds"),
    (f"{AXIS} --seeds=5,", "A single seed is given by --config.train.seed=5"),
    (f"{AXIS} --seeds=1,1", "one of them is given twice"),
    (f"{AXIS} --match=flops", "--match=flops is unknown. Choose from active_flops."),
    (f"{AXIS} --match_by=moe.hidden", "nothing is matched. Add --match=active_flops."),
    ("--sweep.moe.num_experts=9999 --match=active_flops", "The nearest reachable is 1"),
    (f"{AXIS} --isoflop=1e5", "The nearest reachable budget is "),
    (f"{AXIS} --isoflop=much", "expected numbers of FLOPs"),
    (f"{AXIS} --isoflop=", "expected numbers of FLOPs"),
    (f"{AXIS} --isoflop=-1e13", "a budget is a number of FLOPs above 0"),
    (f"{AXIS} --spec=nowhere.py", "--spec=nowhere.py: no such file"),
    (f"{AXIS} --spec=configs/default.py", "needs a function get_sweep() that returns a"),
    (f"{AXIS} --executor=slrm", "--executor=slrm"),
    (f"{AXIS} --executor=slurm", "there is no sbatch on the PATH"),
    (f"{AXIS} --isoflop=-1e13", "--isoflop=-1e13: a budget"),
    (f"{AXIS} --jobs=0", "--jobs"),
    (f"{AXIS} --dry_run --jobs=4000", "this process has"),
    (f"{AXIS} --split=test", "--split=test is only read with --evaluate."),
    (
      f"{AXIS} --eval_capacity_factor=1,2",
      "--eval_capacity_factor=1,2 is only read with --evaluate.",
    ),
    ("--sweep.workdir=a,b", "--sweep.workdir: a run's directory is not a setting."),
    ("--zip.schema_versio=1,2", "Write SECTION.FIELD, such as --zip.moe.num_experts."),
    (f"{AXIS} --devices_per_run=0", "--devices_per_run"),
    ("--config.moe.num_experts=0", "--config.moe.num_experts=0 must be at least 1"),
    ("--config=nowhere", "no such file"),
    (f"{AXIS} --image=I", "--image is only read with --executor=print --target="),
  ],
)
def test_a_mistake_is_one_line_and_starts_nothing(line, part, tmp_path, monkeypatch):
  """Exit code 2, and the directory of the sweep is not even made."""
  monkeypatch.setenv("PATH", "")
  assert part in refused(f"--workdir={tmp_path / 'new'}", *line.split())
  assert not list(tmp_path.iterdir())


def test_no_field_that_may_not_vary_is_suggested():
  """Typed as suggested, it would be refused as well."""
  assert "Did you mean --config.train.seed?" in refused("--config.train.sed=1")
  words = refused("--sweep.train.sed=1,2")
  assert "there is no such field" in words and "--sweep.train.seed" not in words


@pytest.mark.parametrize("what", ["", "--status", "--evaluate"])
def test_a_directory_is_needed_unless_nothing_is_written(what):
  assert "--workdir=DIR is missing" in refused(AXIS, *what.split())


def test_a_file_that_fails_names_its_line(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("def get_sweep():\n  return 1 / 0\n")
  assert f"fails at {file}:2: ZeroDivisionError" in refused(f"--spec={file}", "--dry_run")


def test_other_programs_do_not_take_an_axis():
  """A prefix belongs to the program that defined it."""
  dotted.forget_prefixes()
  with pytest.raises(UserError, match="--sweep.moe.num_experts: there is no such flag"):
    cli.parse(["program", AXIS])


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.5, "0.5 s"), (59.4, "59 s"), (61, "1 min 01 s"), (7500, "2 h 05 min")],
)
def test_times_are_read_at_a_glance(value, text):
  assert sweep_table.duration(value) == text


@pytest.mark.parametrize(
  ("value", "text"), [(999, "999"), (999_600, "1M"), (1.5e6, "1.5M"), (2e12, "2T")]
)
def test_counts_have_three_digits(value, text):
  assert sweep_table.short(value) == text


def test_a_wrong_axis_is_refused_before_jax_is_imported():
  """Its name, its values and its length are known at once."""
  code = (
    "import sys\nfrom absl import flags\nfrom moejax.cli import flags as cli, sweep\n"
    "cli.define_config()\nsweep.define_flags()\n"
    "for axis in ('num_expert=4', 'num_experts=4,x', 'num_experts='):\n"
    "  try:\n"
    "    cli.parse(['p', '--dry_run', '--sweep.moe.' + axis])\n    sweep.main()\n"
    "  except cli.ConfigError:\n    print('jax' in sys.modules)\n"
  )
  command = [sys.executable, "-c", code]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert result.stdout == "False\n" * 3, result.stderr


def test_scripts_are_files_and_manifests_follow_each_other(tmp_path, capsys):
  """Two Slurm scripts in one text would be one job; kubectl reads many in one."""
  words = (f"--workdir={tmp_path}", "--executor=print", AXIS)
  fits = ("--config.mesh.data=-1", "--config.moe.group_size=0")
  assert main(*words, *fits, "--target=slurm", "--topology=cpu:2") == 0
  said = capsys.readouterr()
  lines = said.out.splitlines()
  assert len(lines) == 2
  for line in lines:
    program, _, path = line.partition(" ")
    text = pathlib.Path(path).read_text()
    assert program == "sbatch" and text.startswith("#!") and path.endswith(".sbatch")
    assert text.count("#SBATCH --job-name") == 1 and pathlib.Path(path).stem in text
  assert f"written to {tmp_path}/runs, at the same path" in said.err
  pods = ("--target=gke-gpu", "--topology=h100:1x2", "--image=IMAGE")
  assert main(*words, *fits, *pods) == 0
  said = capsys.readouterr()
  assert said.out.count("---\n") == 2 and said.err.count("Note: ") == 1
  assert f"at /{tmp_path.parts[1]}, or copy" in said.err
  assert said.out.count("--config.data.cache_dir=/cache\n") == 2  # The pod's own disk.


def test_the_report_has_the_states_of_the_table(tmp_path, monkeypatch):
  """A run that failed is not merely unfinished."""
  parse(f"--workdir={tmp_path}", AXIS)
  points, _, values = sweep._points()
  run = report_cases.write_run(tmp_path / "runs" / points[0].directory, done=False)
  (run / "config.json").write_text(json.dumps(config_text.to_dict(points[0].config)))
  attempt = {"host": "a", "pid": 1, "born": "1", "exit_code": 1}
  (run / ".sweep.json").write_text(json.dumps({"attempts": [attempt]}))
  found = {}

  def write(*args, states, **rest):
    del args, rest
    found.update(states)
    raise page.MissingExtraError("not installed")

  monkeypatch.setattr(page, "write", write)
  sweep._report(points, values)
  assert found == {points[0].directory: "failed (exit code 1)"}
