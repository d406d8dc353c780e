"""Points of tiny runs, and a stand-in for `moejax train` that only leaves its files.

  python -m tests.sweep.execution.runs WORKDIR BEHAVIOURS.json JOBS
  python -m tests.sweep.execution.runs WORKDIR DATA_CACHE JOBS

runs four points in WORKDIR, with the stand-in or really, for tests that kill the
scheduler.
"""

import pathlib
import sys

from moejax.config import (
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TrainConfig,
)
from moejax.sweep.execution import local, schedule
from moejax.sweep.points.expand import digest
from moejax.sweep.spec import Point

CORPUS = pathlib.Path(__file__).parents[2] / "data" / "corpus"
STEPS = 6
LONG = 400

STAND_IN = """
import ast, json, os, pathlib, signal, sys, time

given = dict(a.split("=", 1) for a in sys.argv[2:] if "=" in a)
workdir = pathlib.Path(given["--workdir"])
behaviours = json.loads(pathlib.Path(sys.argv[1]).read_text())
name = workdir.name.rpartition("-")[0]
behaviour = behaviours.get(name, "train")
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
with open(workdir.parent / "trace.log", "a") as trace:
  trace.write(json.dumps([name, cores, os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\\n")
print("standing in:", behaviour, flush=True)
if sys.argv[2] == "evaluate":
  sys.exit("error: no such text" if behaviour == "fail" else 0)
text = (workdir / ".config.py").read_text()
values = ast.literal_eval(text.partition("VALUES = ")[2].partition("\\ndef ")[0])
(workdir / "config.json").write_text(json.dumps(values))

def log(step):
  line = {"step": step, "loss": 3.0 - step / 10, "dropped_fraction": 0.125}
  line |= {"tokens_per_second": 128.0, "model_flops_per_second": 1e6}
  with open(workdir / "metrics.jsonl", "a") as file:
    file.write(json.dumps(line) + "\\n")

def stop(*_):
  (workdir / "checkpoints" / "2").mkdir(parents=True, exist_ok=True)
  print("saved", flush=True)
  sys.exit(143)

signal.signal(signal.SIGTERM, stop)
log(2)
if behaviour == "fail":
  print("error: it went wrong", file=sys.stderr)
  sys.exit(1)
if behaviour == "kill":
  os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "hang":
  time.sleep(120)
if behaviour == "damage":
  time.sleep(0.3)
  (workdir / ".sweep.json").write_text("{")
if behaviour == "slow":
  time.sleep(0.5)
log(6)
(workdir / "checkpoints" / "6").mkdir(parents=True, exist_ok=True)
if behaviour != "unsaved":
  (workdir / "eval.json").write_text(json.dumps({"step": 6, "loss": 2.5}))
"""


def config(cache_dir: str = "", **train) -> Config:
  """Two layers, the second sparse, 32 wide; one device."""
  settings = {
    "num_steps": STEPS,
    "batch_size": 2,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 0,
    "tensorboard": False,
    "sample": False,
    "report": False,
  }
  return Config(
    data=DataConfig(
      name="text",
      path=str(CORPUS),
      sequence_length=32,
      prefetch=1,
      cache_dir=cache_dir,
    ),
    model=ModelConfig(num_layers=2, width=32, num_heads=2, hidden=64),
    moe=MoEConfig(num_experts=4, hidden=64, every=2, dispatcher="gather"),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(**(settings | train)),
    mesh=MeshConfig(data=1),
  )


def points(cache_dir: str = "", **train) -> list[Point]:
  """Two numbers of experts, two seeds each."""
  out = []
  for num_experts in (2, 4):
    for seed in (0, 1):
      made = config(cache_dir, **train)
      made.moe.num_experts, made.train.seed = num_experts, seed
      out.append(
        Point(
          name=f"num_experts={num_experts},seed={seed}",
          settings={"moe.num_experts": num_experts, "train.seed": seed},
          config=made,
          digest=digest(made),
        )
      )
  return out


def stand_in_command(directory: pathlib.Path, behaviours: pathlib.Path):
  """Returns what replaces `local.command`: children that take no time."""
  script = directory / "stand_in.py"
  script.write_text(STAND_IN)

  def command(program: str, *flags: str) -> tuple[str, ...]:
    start = (sys.executable, "-I", "-S", str(script), str(behaviours))
    return (*start, program, *flags)

  return command


def main() -> None:
  workdir, other, jobs = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
  made = points()
  if other.endswith(".json"):
    local.command = stand_in_command(pathlib.Path(other).parent, pathlib.Path(other))
  else:
    made = points(other, num_steps=LONG, checkpoint_every=20, log_every=1)
  sys.exit(schedule.run(workdir, made, options=schedule.Options(jobs=jobs)))


if __name__ == "__main__":
  main()
