"""A sweep's runs: started once, each on its own cores, resumed, named when they fail.

Most tests put a stand-in in the place of `moejax train`, which leaves the same files in
no time; one sweep is real.
"""

import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from moejax.errors import UserError
from moejax.sweep.execution import directory, evaluations, local, schedule, shapes, states
from moejax.sweep.execution.states import State
from moejax.sweep.points.expand import digest
from moejax.sweep.spec import Point
from tests.sweep.execution import runs

ROOT = pathlib.Path(__file__).parents[3]
FIRST = "num_experts=2,seed=0"

needs_two_cores = pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
  reason="two runs at once need two cores",
)


@pytest.fixture
def behaviours(tmp_path, monkeypatch):
  """Puts the stand-in in; the file says how the runs behave."""
  path = tmp_path / "behaviours.json"
  path.write_text("{}")
  monkeypatch.setattr(local, "command", runs.stand_in_command(tmp_path, path))
  monkeypatch.setattr(local, "visible_gpus", list)
  return path


def sweep(workdir, points=None, **options) -> tuple[int, str]:
  """Runs a sweep; the exit code and what it printed."""
  said = io.StringIO()
  points = runs.points() if points is None else points
  options = schedule.Options(**options)
  return schedule.run(workdir, points, options=options, stream=said), said.getvalue()


def trace(workdir) -> list[list]:
  """Name, cores and GPUs of each child, in the order of their starts."""
  path = workdir / "runs" / "trace.log"
  return [json.loads(line) for line in path.read_text().splitlines()]


def found(workdir) -> dict[str, State]:
  paths = directory.run_directories(workdir)
  return {s.name: s.state for s in map(states.examine, paths)}


def started(workdir) -> list[str]:
  return [name for name, _, _ in trace(workdir)]


def test_every_point_runs_once_and_a_finished_sweep_starts_nothing(behaviours, tmp_path):
  names = [p.name for p in runs.points()]
  code, said = sweep(tmp_path / "s")
  assert code == 0
  assert sorted(started(tmp_path / "s")) == names
  assert found(tmp_path / "s") == dict.fromkeys(names, State.DONE)
  for name in names:
    assert f"{name}: running" in said and f"{name}: done  step 6/6" in said
  assert said.endswith("4 runs: 4 done\n")
  begin = time.monotonic()
  assert sweep(tmp_path / "s")[0] == 0
  assert time.monotonic() - begin < 1
  assert len(trace(tmp_path / "s")) == 4


@needs_two_cores
def test_runs_beside_each_other_have_cores_of_their_own(behaviours, tmp_path):
  """Two at once, on halves of this process's cores; no more than two."""
  behaviours.write_text(json.dumps({p.name: "slow" for p in runs.points()}))
  code, said = sweep(tmp_path / "s", jobs=2)
  assert code == 0
  assert "2 running" in said and "3 running" not in said
  halves = {tuple(cores) for _, cores, _ in trace(tmp_path / "s")}
  assert len(halves) == 2
  one, other = map(set, halves)
  assert not one & other and one | other == os.sched_getaffinity(0)


@needs_two_cores
def test_programs_that_are_being_compiled_are_not_started_twice(behaviours, tmp_path):
  """Seeds of one shape compile the same: the other shape goes first."""
  behaviours.write_text(json.dumps({p.name: "slow" for p in runs.points()}))
  points = runs.points()
  assert len({shapes.program_digest(p.config) for p in points}) == 2
  sweep(tmp_path / "s", jobs=2)
  assert set(started(tmp_path / "s")[:2]) == {FIRST, "num_experts=4,seed=0"}


def test_one_failure_does_not_end_the_sweep_and_is_named_with_its_log(
  behaviours, tmp_path, capsys
):
  """Without --retry_failed it is left; with it, it runs again, and only it."""
  behaviours.write_text(json.dumps({FIRST: "fail"}))
  workdir = tmp_path / "s"
  assert sweep(workdir)[0] == 1
  assert list(found(workdir).values()) == [State.FAILED, *[State.DONE] * 3]
  said = capsys.readouterr().err
  assert f"{FIRST} failed (exit code 1)" in said and "error: it went wrong" in said
  assert "--retry_failed" in said

  behaviours.write_text("{}")
  assert sweep(workdir)[0] == 1
  assert len(trace(workdir)) == 4
  assert sweep(workdir, retry_failed=True)[0] == 0
  assert started(workdir)[4:] == [FIRST]
  [run] = [p for p in directory.run_directories(workdir) if p.name.startswith(FIRST)]
  assert states.num_attempts(run) == 2
  assert (
    len(re.findall("^=== attempt [12], ", (run / "train.log").read_text(), re.M)) == 2
  )


@pytest.mark.parametrize("behaviour", ["kill", "unsaved"])
def test_a_run_that_is_not_done_is_told_and_is_started_once_per_call(
  behaviours, tmp_path, capsys, behaviour
):
  """Killed by a signal it is interrupted; leaving with 0 but unfinished, it failed."""
  behaviours.write_text(json.dumps({FIRST: behaviour}))
  assert sweep(tmp_path / "s")[0] == 1
  assert started(tmp_path / "s").count(FIRST) == 1
  said = capsys.readouterr().err
  if behaviour == "kill":
    assert f"{FIRST} was interrupted (exit code -9) at step 2" in said
    behaviours.write_text("{}")
    assert sweep(tmp_path / "s")[0] == 0
  else:
    assert f"{FIRST} failed (without its last checkpoint)" in said


def test_a_log_that_cannot_be_opened_and_a_lost_record_end_no_other_run(
  behaviours, tmp_path
):
  """A folder in the log's place, and a record that is damaged while the run goes on."""
  sweep(tmp_path / "s", executor="print")
  first, second = directory.run_directories(tmp_path / "s")[:2]
  (first / states.LOG_FILE).mkdir()
  behaviours.write_text(json.dumps({"num_experts=2,seed=1": "damage"}))
  code, said = sweep(tmp_path / "s")
  assert code == 1 and "4 runs: 1 waiting, 3 done" in said
  assert f"{FIRST} cannot be started: " in said
  assert "The record of num_experts=2,seed=1 cannot be written: " in said
  assert (second / states.RECORD_FILE).read_text() == "{"


def test_printed_commands_are_those_that_the_local_executor_starts(tmp_path):
  """For what is not done, one line each; nothing is started."""
  code, said = sweep(tmp_path, executor="print")
  lines = said.splitlines()
  assert code == 0 and len(lines) == 4
  assert set(found(tmp_path).values()) == {State.WAITING}
  run = directory.run_directories(tmp_path)[0]
  assert lines[0].startswith(f"{sys.executable} -m moejax.cli.main train ")
  assert f"--workdir={run}" in lines[0].replace("'", "")
  (run / "checkpoints" / "6").mkdir(parents=True)
  (run / "eval.json").write_text('{"step": 6}')
  assert sweep(tmp_path, executor="print")[1].splitlines() == lines[1:]


@pytest.mark.parametrize(
  ("options", "part"),
  [
    ({"jobs": 0}, "--jobs=0: at least 1"),
    ({"jobs": 10_000}, "each run needs one of its own. Give at most"),
    ({"executor": "cloud"}, "--executor=cloud: choose from local, slurm, print"),
    ({"devices_per_run": 0}, "--devices_per_run=0: at least 1"),
    ({"time_steps": -1}, "--time_steps=-1"),
    ({"evaluate": True, "eval_capacity_factor": "x"}, "--eval_capacity_factor=x"),
  ],
)
def test_a_wrong_option_is_one_line_and_leaves_no_directory(
  behaviours, tmp_path, options, part
):
  with pytest.raises(UserError, match=part) as error:
    sweep(tmp_path / "s", **options)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "s").exists()


def test_an_evaluation_leaves_out_unfinished_runs_and_names_those_that_fail(
  behaviours, tmp_path, capsys
):
  """Each finished run is evaluated, whatever became of the others; no run trains."""
  behaviours.write_text(json.dumps({FIRST: "kill"}))
  sweep(tmp_path / "s")
  behaviours.write_text(json.dumps({"num_experts=2,seed=1": "fail"}))
  code, said = sweep(tmp_path / "s", evaluate=True, split="test")
  assert code == 1
  assert started(tmp_path / "s")[4:] == [p.name for p in runs.points()[1:]]
  assert f"{FIRST}: interrupted  step 2/6  loss 2.8000  dropped 12.5%: left out" in said
  assert "num_experts=4,seed=1: evaluated (3 of 3)" in said
  err = capsys.readouterr().err
  assert "Evaluating num_experts=2,seed=1 failed (exit code 1)" in err
  assert "error: no such text" in err


@pytest.mark.parametrize("name", ["eval.json", ".sweep.json"])
def test_a_damaged_file_of_a_run_starts_nothing(behaviours, tmp_path, name):
  behaviours.write_text(json.dumps({FIRST: "fail"}))
  sweep(tmp_path / "s")
  damaged = directory.run_directories(tmp_path / "s")[1] / name
  damaged.write_text("{")
  with pytest.raises(UserError, match="cannot be read .*Delete it"):
    sweep(tmp_path / "s", retry_failed=True)
  said = io.StringIO()
  schedule.status(tmp_path / "s", stream=said)
  assert f"{damaged} cannot be read" in said.getvalue()
  assert len(trace(tmp_path / "s")) == 4


def test_the_status_of_another_shell_takes_no_lock(behaviours, tmp_path, capsys):
  """Also while a scheduler holds the directory; the failed run's log is shown."""
  behaviours.write_text(json.dumps({FIRST: "fail"}))
  workdir = tmp_path / "s"
  sweep(workdir)
  said = io.StringIO()
  with directory.opened(workdir, schedule.plain_spec(runs.points())):
    assert schedule.status(workdir, stream=said) == 1
  lines = said.getvalue().splitlines()
  assert lines[0].split() == [
    "run",
    "state",
    "step",
    "loss",
    "validation",
    "dropped",
    "left",
  ]
  assert f"{FIRST}  failed (exit code 1)   2/6  2.8000" in lines[1]
  assert "3 done, 1 failed" in said.getvalue()
  assert "error: it went wrong" in said.getvalue()
  with pytest.raises(UserError, match="holds no sweep"):
    schedule.status(tmp_path / "nowhere")


def test_the_run_of_another_point_is_refused_and_kept(behaviours, tmp_path):
  """Contents of one directory in another, hidden files and all: no row, no new start."""
  workdir = tmp_path / "s"
  sweep(workdir)
  first, _, third, _ = (workdir / "runs" / p.directory for p in runs.points())
  shutil.rmtree(third)
  shutil.copytree(first, third)
  before = {p: p.read_bytes() for p in third.rglob("*") if p.is_file()}
  with pytest.raises(
    UserError, match=r"belongs to another run.* that of num_experts=2,seed=0"
  ):
    sweep(workdir)
  said = io.StringIO()
  assert schedule.status(workdir, stream=said) == 1
  assert "4 runs: 3 done, 1 damaged" in said.getvalue()
  assert "num_experts=4,seed=0  damaged" in said.getvalue()
  assert f"{third / 'config.json'} belongs to another run" in said.getvalue()
  assert before == {p: p.read_bytes() for p in third.rglob("*") if p.is_file()}
  assert len(trace(workdir)) == 4
  third.rename(tmp_path / "away")
  assert sweep(workdir)[0] == 0 and started(workdir)[4:] == ["num_experts=4,seed=0"]


def test_status_is_in_the_points_order_and_says_what_is_not_done(behaviours, tmp_path):
  """By name, 16 experts would come before 2; the code is 0 only if every run is done."""
  workdir = tmp_path / "s"
  points = []
  for experts in (2, 16):
    config = runs.config()
    config.moe.num_experts, name = experts, f"num_experts={experts},seed=0"
    settings = {"moe.num_experts": experts}
    own = Point(name=name, settings=settings, config=config, digest=digest(config))
    points.append(own)
  spec = {"points": [{"name": p.name, "digest": p.digest} for p in points]}
  behaviours.write_text(json.dumps({points[1].name: "kill"}))
  schedule.run(workdir, points, options=schedule.Options(), spec=spec)
  said = io.StringIO()
  assert schedule.status(workdir, stream=said) == 1
  names = [line.split()[0] for line in said.getvalue().splitlines()[1:3]]
  assert names == ["num_experts=2,seed=0", "num_experts=16,seed=0"]
  behaviours.write_text("{}")
  schedule.run(workdir, points, options=schedule.Options(), spec=spec)
  assert schedule.status(workdir, stream=said) == 0


def test_a_damaged_specification_is_named_by_status(behaviours, tmp_path, capsys):
  workdir = tmp_path / "s"
  sweep(workdir)
  (workdir / "spec.json").write_text("{")
  said = io.StringIO()
  assert schedule.status(workdir, stream=said) == 1
  assert "4 runs: 4 done" in said.getvalue()
  assert f"{workdir / 'spec.json'} cannot be read" in capsys.readouterr().err


def test_gpus_are_divided_among_the_jobs(monkeypatch):
  """Each sees only its own, and more than there are is refused."""
  monkeypatch.setattr(local, "visible_gpus", lambda: ["4", "5", "6", "7"])
  [slot] = local.make_slots(1, 2)
  assert slot.variables == {"CUDA_VISIBLE_DEVICES": "4,5"}
  assert local.make_slots(1)[0].variables == {"CUDA_VISIBLE_DEVICES": "4"}
  with pytest.raises(UserError, match="needs 5, and this process sees 4"):
    local.make_slots(1, 5)
  monkeypatch.setattr(local, "visible_gpus", list)
  assert local.make_slots(1, 8)[0].variables == {"JAX_NUM_CPU_DEVICES": "8"}


def scheduler(workdir, behaviours) -> subprocess.Popen[str]:
  """A scheduler in a process of its own, with its first run under way."""
  arguments = [str(workdir), str(behaviours), "1"]
  command = [sys.executable, "-m", "tests.sweep.execution.runs", *arguments]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    command,
    env=environment,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for(lambda: list((workdir / "runs").glob("*/metrics.jsonl")), process)
  return process


def wait_for(condition, process=None):
  deadline = time.monotonic() + 100
  while not condition():
    assert time.monotonic() < deadline
    assert process is None or process.poll() is None, process.communicate()
    time.sleep(0.05)


def test_ctrl_c_stops_and_saves_the_runs_and_the_same_call_goes_on(behaviours, tmp_path):
  """Exit code 130; the child is asked to save, and no other is started."""
  behaviours.write_text(json.dumps({FIRST: "hang"}))
  with scheduler(tmp_path / "s", behaviours) as process:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  assert "saving every run" in err and "The same command continues the sweep" in err
  assert started(tmp_path / "s") == [FIRST]
  assert found(tmp_path / "s")[FIRST] is State.INTERRUPTED
  assert f"{FIRST}: interrupted" in out
  behaviours.write_text("{}")
  assert sweep(tmp_path / "s")[0] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the child")
def test_kill_9_of_the_scheduler_stops_and_saves_the_runs(behaviours, tmp_path):
  """The kernel tells the child, which saves; nobody is left behind."""
  behaviours.write_text(json.dumps({FIRST: "hang"}))
  with scheduler(tmp_path / "s", behaviours) as process:
    process.kill()
  [run] = [
    p for p in directory.run_directories(tmp_path / "s") if p.name.startswith(FIRST)
  ]
  wait_for(lambda: states.examine(run).state is State.INTERRUPTED)
  assert (run / "train.log").read_text().endswith("saved\n")
  behaviours.write_text("{}")
  assert sweep(tmp_path / "s")[0] == 0
  assert started(tmp_path / "s").count(FIRST) == 2


def test_a_run_of_another_process_is_waited_for(behaviours, tmp_path):
  """Its directory is locked by a run that somebody started by hand."""
  workdir = tmp_path / "s"
  sweep(workdir, executor="print")
  run = directory.run_directories(workdir)[0]
  code = (
    "import fcntl, os, sys, time\n"
    "fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX)\n"
    "print('held', flush=True)\n"
    "time.sleep(2)\n"
  )
  command = [sys.executable, "-c", code, str(run)]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    exit_code, said = sweep(workdir)
  assert exit_code == 0
  assert "is run by another process" in said
  assert started(workdir)[-1] == FIRST


@pytest.fixture(scope="module")
def real(tmp_path_factory):
  """A sweep of four real runs: its directory and points."""
  workdir = tmp_path_factory.mktemp("real") / "sweep"
  cache = tmp_path_factory.mktemp("cache")
  points = runs.points(str(cache / "data"))
  variables = {
    "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in variables.items():
      patch.setenv(name, value)
    code, said = sweep(workdir, points, jobs=min(2, os.cpu_count() or 1))
    assert code == 0, said
    yield workdir, points


@pytest.mark.slow
def test_a_real_sweep_of_four_runs_ends_in_four_finished_runs(real):
  """Each an ordinary run directory with losses of its own."""
  workdir, points = real
  assert set(found(workdir).values()) == {State.DONE}
  losses = set()
  for point in points:
    run = workdir / "runs" / point.directory
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 7)]
    losses.add(json.loads((run / "eval.json").read_text())["loss"])
  assert len(losses) == 4


@pytest.mark.slow
def test_finished_runs_are_evaluated_once_for_each_setting(real):
  """Without training; an evaluation that exists is not made again."""
  workdir, points = real
  some = points[:1]
  spec = directory.read_spec(workdir)
  options = schedule.Options(evaluate=True, eval_capacity_factor="1,none")
  run = workdir / "runs" / some[0].directory
  before = (run / "metrics.jsonl").read_text()
  for already in (False, True):
    said = io.StringIO()
    code = schedule.run(workdir, some, options=options, spec=spec, stream=said)
    assert code == 0, (run / "evaluate.log").read_text()
    assert ("evaluated (1 of 1)" in said.getvalue()) is not already
    assert ("1 of 1 runs have this evaluation already" in said.getvalue()) is already
  file = evaluations.result_file(run, some[0].config, "validation", "1,none")
  results = json.loads(file.read_text())["results"]
  assert [r["eval_capacity_factor"] for r in results] == [1.0, "dropless"]
  assert (run / "metrics.jsonl").read_text() == before
