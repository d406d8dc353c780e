"""The state of a run follows from its directory, whatever ended its processes."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from moejax.config import text as config_text
from moejax.sweep.execution import directory, states
from moejax.sweep.execution.states import State
from moejax.sweep.points.expand import digest
from tests.sweep.execution import runs

CONFIG = runs.config()
WORKLOAD = states.Workload(
  name="a=1",
  digest=digest(CONFIG),
  num_steps=6,
  tokens_per_step=64,
  flops_per_token=10.0,
)


@pytest.fixture
def run(tmp_path):
  """A run's directory as the scheduler prepares it."""
  path = tmp_path / f"a=1-{WORKLOAD.digest}"
  path.mkdir()
  states.write_workload(path, WORKLOAD)
  return path


def log(path, *entries):
  (path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def finish(path, step=6):
  (path / "checkpoints" / str(step)).mkdir(parents=True)
  (path / "eval.json").write_text(json.dumps({"step": step, "loss": 2.25}))


def attempt(path, exit_code, pid=1 << 22):
  """An attempt of a process that is gone: no process has so large a number."""
  states.begin(path, pid)
  if exit_code is not None:
    states.end(path, exit_code)


def test_a_run_without_anything_waits(run, tmp_path):
  assert states.examine(run).state is State.WAITING
  assert states.examine(tmp_path / "missing").state is State.WAITING


def test_done_is_checkpointed_and_evaluated_at_the_last_step(run):
  """Whatever was recorded, and only if both files agree."""
  attempt(run, 1)
  finish(run)
  log(run, {"step": 6, "loss": 2.5})
  found = states.examine(run)
  assert (found.state, found.step, found.loss) == (State.DONE, 6, 2.5)
  assert found.validation_loss == 2.25
  (run / "checkpoints" / "6").rmdir()
  assert states.examine(run).state is State.FAILED
  (run / "checkpoints" / "4").mkdir()
  assert states.examine(run).state is State.FAILED


def test_a_finished_run_with_more_steps_to_take_is_not_done(run):
  finish(run, step=4)
  assert states.examine(run).state is State.INTERRUPTED


def test_a_locked_directory_is_running_and_probing_does_not_unlock_it(run):
  """Asked again and again, also for a run without a record."""
  (run / states.RECORD_FILE).unlink()
  (run / "config.json").write_text(json.dumps(config_text.to_dict(CONFIG)))
  descriptor = os.open(run, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    found = [states.examine(run) for _ in range(3)]
    assert [(s.state, s.num_steps) for s in found] == [(State.RUNNING, 6)] * 3
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 6)"
    probe = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True)
    assert b"BlockingIOError" in probe.stderr
  finally:
    os.close(descriptor)
  assert states.examine(run).state is State.INTERRUPTED


def test_a_started_process_is_running_before_it_locks_and_interrupted_once_killed(run):
  """Between its start and its lock a run imports jax for seconds."""
  with subprocess.Popen(
    [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
  ) as child:
    states.begin(run, child.pid)
    assert states.examine(run).state is State.RUNNING
    child.kill()
    # Not yet waited for: what is left of the process is no run.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert states.examine(run).state is State.INTERRUPTED


def test_another_process_with_the_same_number_is_not_the_run(run):
  """A number is used again: the record of a killed run may name a living stranger."""
  states.begin(run, os.getpid())
  assert states.examine(run).state is State.RUNNING
  record = states.read_record(run)
  record["attempts"][0]["born"] = "1"
  (run / states.RECORD_FILE).write_text(json.dumps(record))
  assert states.examine(run).state is State.INTERRUPTED


@pytest.mark.parametrize(
  ("code", "state"),
  [
    (1, State.FAILED),
    (2, State.FAILED),
    (0, State.FAILED),
    (-signal.SIGSEGV, State.FAILED),
    (143, State.INTERRUPTED),
    (130, State.INTERRUPTED),
    (-signal.SIGKILL, State.INTERRUPTED),
    (None, State.INTERRUPTED),
  ],
)
def test_an_exit_code_decides_between_failed_and_interrupted(run, code, state):
  """None: nobody lived to record it."""
  attempt(run, code)
  found = states.examine(run)
  assert (found.state, found.exit_code) == (state, code)


def test_the_tail_of_a_failed_run_is_that_of_its_last_attempt(run):
  attempt(run, 1)
  lines = "".join(f"line {i}\n" for i in range(40))
  first = states.log_header(1, "train") + "error: the first\n"
  (run / states.LOG_FILE).write_text(first + states.log_header(2, "train") + lines)
  tail = states.examine(run).tail
  assert tail == tuple(f"line {i}" for i in range(40 - states.TAIL_LINES, 40))
  (run / states.LOG_FILE).write_text(lines + states.log_header(2, "train") + "error: x\n")
  assert states.examine(run).tail == ("error: x",)


def test_numbers_come_from_the_last_lines_even_if_the_last_is_torn(run):
  """At 32 tokens/s and 64 tokens a step, the two steps left take 4 s."""
  finish(run, step=4)
  (run / "eval.json").unlink()
  entries = [
    {"step": 2, "loss": 4.0, "validation_loss": 3.5},
    {"step": 4, "loss": 3.0, "dropped_fraction": 0.25, "tokens_per_second": 32.0},
  ]
  log(run, *entries)
  with open(run / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "loss"')
  states.begin(run, os.getpid())
  found = states.examine(run)
  assert (found.step, found.loss, found.dropped) == (4, 3.0, 0.25)
  assert found.validation_loss == 3.5
  assert found.seconds_left == pytest.approx(4.0)
  assert found.flops_left == pytest.approx(2 * 64 * 10.0)


def test_only_the_end_of_a_long_log_is_read(run):
  log(run, *({"step": i, "loss": 1.0, "pad": "x" * 1000} for i in range(2000)))
  assert states.examine(run).step == 6
  assert len(list(states._last_metrics(run / "metrics.jsonl"))) < 300


@pytest.mark.parametrize(
  ("name", "content"),
  [
    (states.RECORD_FILE, "{"),
    (states.RECORD_FILE, "[]"),
    (states.RECORD_FILE, '{"attempts": [1]}'),
    (states.RECORD_FILE, '{"plan": {"num_steps": "many"}}'),
    (states.RECORD_FILE, '{"attempts": [{"exit_code": "x"}]}'),
    ("eval.json", "not json"),
    ("eval.json", '{"step": "six"}'),
  ],
)
def test_a_damaged_file_is_one_line_that_names_it_and_the_remedy(run, name, content):
  (run / name).write_text(content)
  found = states.examine(run)
  assert str(run / name) in found.damage and "Delete it" in found.damage
  assert "\n" not in found.damage


def test_an_evaluation_that_cannot_be_read_is_damage_and_no_failure(run):
  """The checkpoint is there, and code 0 was recorded: nothing failed."""
  attempt(run, 0)
  finish(run)
  (run / "eval.json").write_text('{"step": 6, "lo')
  found = states.examine(run)
  assert found.state is State.DAMAGED and str(run / "eval.json") in found.damage


def test_a_finished_run_whose_log_was_cut_says_so(run):
  """It is done by its checkpoint and evaluation; its curve is not whole."""
  finish(run)
  log(run, {"step": 2, "loss": 4.0}, {"step": 4, "loss": 3.0})
  found = states.examine(run)
  assert found.state is State.DONE and not found.damage
  assert f"{run / 'metrics.jsonl'} ends at step 4 of 6" in found.note
  log(run, {"step": 6, "loss": 2.5})
  assert not states.examine(run).note


def changed(**fields):
  config = runs.config()
  for name, value in fields.items():
    config_text.set_field(config, name.replace("__", "."), value)
  return config


@pytest.mark.parametrize("has_own", [True, False])
def test_another_configs_run_is_not_done(run, has_own):
  """Whole as it is: it would be a row of results under the point's name.

  With the config that the sweep wrote for the point, the fields are named; without it,
  the point whose digest it is.
  """
  finish(run)
  log(run, {"step": 6, "loss": 2.5})
  other = changed(moe__num_experts=8, train__seed=3)
  (run.parent / f"a=2-{digest(other)}").mkdir()
  (run / "config.json").write_text(json.dumps(config_text.to_dict(other)))
  if has_own:
    directory.write_config(run, "a=1", CONFIG)
  found = states.examine(run)
  assert found.state is State.DAMAGED and "\n" not in found.damage
  assert f"{run / 'config.json'} belongs to another run: " in found.damage
  assert f"Move {run} away" in found.damage
  named = (
    "its moe.num_experts is 8 and the point's 4; its train.seed is 3 and the point's"
  )
  assert (named if has_own else f"{digest(other)}, which is that of a=2,") in found.damage


def test_a_run_from_before_a_default_changed_is_still_the_points(run):
  """Its digest was of other defaults: the record has it, and the configs are equal."""
  finish(run)
  log(run, {"step": 6, "loss": 2.5})
  directory.write_config(run, "a=1", CONFIG)
  (run / "config.json").write_text(json.dumps(config_text.to_dict(CONFIG)))
  old = run.rename(run.with_name("a=1-01234567"))
  assert states.examine(old).state is State.DAMAGED
  states.write_workload(old, states.Workload(**{**vars(WORKLOAD), "digest": "01234567"}))
  assert states.examine(old).state is State.DONE


def test_a_run_may_resume_with_other_logging_but_not_end_later(run):
  """The fields that a resume may change leave it the point's run."""
  finish(run)
  log(run, {"step": 6, "loss": 2.5})
  directory.write_config(run, "a=1", CONFIG)
  for fields, state in [
    ({"train__log_every": 3, "mesh__data": 2}, State.DONE),
    ({"train__num_steps": 12}, State.DAMAGED),
    ({"train__num_steps": 3}, State.DAMAGED),
  ]:
    values = config_text.to_dict(changed(**fields))
    (run / "config.json").write_text(json.dumps(values))
    assert states.examine(run).state is state, fields
  (run / "config.json").write_text("{")
  assert f"{run / 'config.json'} cannot be read" in states.examine(run).damage


def test_attempts_are_kept_when_the_workload_changes(run):
  attempt(run, 1)
  states.write_workload(run, states.Workload(**{**vars(WORKLOAD), "num_steps": 12}))
  assert states.num_attempts(run) == 1
  assert states.examine(run).num_steps == 12
  [stored] = states.read_record(run)["attempts"]
  assert stored["host"] == socket.gethostname() and stored["end"] >= stored["start"]
