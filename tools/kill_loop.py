"""Proof that a run resumes exactly: kill -9 again and again, then compare every bit.

  python -m tools.kill_loop [--kills=12] [--seed=0] [--workdir=DIR] [--nosmall]
    [--config=FILE] [--config.SECTION.FIELD=VALUE ...]

Trains once undisturbed. Then trains the same config in another directory, kills
the process with SIGKILL and starts it again until it is done. Kills come in turn:
at any moment of the start-up, some moments after a new checkpoint, and while a
checkpoint is being written. At the end parameters, optimizer state, random key and
counters of the two runs must have the same SHA-256, and every logged step the same
loss. Exit code 1 if not, or if the run ended before it was killed often enough.

Unless --nosmall is given, a small model is trained on a small generated text; fields set
on the command line take precedence. --workdir keeps both runs for a closer look.
"""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.run import writers
from moejax.storage.paths import RunPath

SMALL = {
  "data.name": "text",
  "data.sequence_length": 32,
  "model.num_layers": 2,
  "model.width": 32,
  "model.num_heads": 2,
  "model.hidden": 64,
  "moe.hidden": 64,
  "moe.num_experts": 4,
  "moe.group_size": 0,
  "train.num_steps": 120,
  "train.batch_size": 4,
  "train.checkpoint_every": 5,
  "train.eval_every": 40,
  "train.eval_batches": 1,
  "train.log_every": 1,
  "train.tensorboard": False,
  "optimizer.warmup_steps": 10,
}
_POLL_SECONDS = 0.001


@dataclasses.dataclass(kw_only=True)
class Trainer:
  """Starts experiments.train in a directory, and looks at what it has done."""

  workdir: Path
  arguments: list[str]
  cache: Path
  process: subprocess.Popen | None = None

  def start(self) -> None:
    log = self.workdir.parent / f"{self.workdir.name}.log"
    # The same compiled code for every start: faster, and one variable less.
    environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(self.cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "experiments.train", f"--workdir={self.workdir}"]
    with open(log, "ab") as out:
      self.process = subprocess.Popen(
        command + self.arguments, stdout=out, stderr=subprocess.STDOUT, env=environment
      )

  def kill(self) -> None:
    assert self.process is not None
    self.process.kill()
    self.process.wait()

  def ended(self) -> bool:
    assert self.process is not None
    code = self.process.poll()
    if code not in (None, 0):
      log = self.workdir.parent / f"{self.workdir.name}.log"
      tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
      raise UserError(f"experiments.train ended with exit code {code}:\n{tail}")
    return code == 0

  def wait_until(self, condition: Callable[[], bool]) -> bool:
    """Whether the condition came true before the run ended."""
    while not condition():
      if self.ended():
        return False
      time.sleep(_POLL_SECONDS)
    return True

  def names(self) -> list[str]:
    try:
      return os.listdir(self.workdir / "checkpoints")
    except FileNotFoundError:
      return []

  def newest(self) -> int:
    return max((int(n) for n in self.names() if n.isdigit()), default=0)

  def saving(self) -> bool:
    return any("orbax-checkpoint-tmp" in n for n in self.names())


def disturb(trainer: Trainer, kills: int, rng: random.Random, start_up: float) -> int:
  """Kills a run up to `kills` times and lets it finish. Returns how often it was killed.

  Args:
    trainer: not started.
    start_up: seconds from a start to its first checkpoint, at most.
  """
  done = 0
  while done < kills:
    before = trainer.newest()
    trainer.start()
    began = time.monotonic()
    match done % 3:
      case 0:
        what = "after a checkpoint"
        running = trainer.wait_until(lambda: trainer.newest() > before)
        # Starts with compiled code at hand are quicker than the first one.
        start_up = min(start_up, time.monotonic() - began)
        delay = rng.uniform(0, 0.5)
      case 1:
        what = "during a save"
        running = trainer.wait_until(trainer.saving)
        delay = rng.uniform(0, 0.1)
      case _:
        what = "in the start-up"
        moment, delay = began + rng.uniform(0, start_up), 0.0
        running = trainer.wait_until(
          lambda: time.monotonic() > moment or trainer.newest() > before
        )
    time.sleep(delay)
    if not running or trainer.ended():
      return done
    was_saving = trainer.saving()
    trainer.kill()
    done += 1
    left = " while a save was unfinished" if was_saving and trainer.saving() else ""
    print(
      f"kill {done:3d}  {what}, {delay:.3f} s later{left}; newest whole checkpoint: "
      f"{trainer.newest()}",
      flush=True,
    )
  trainer.start()
  trainer.wait_until(lambda: False)
  return done


def losses(workdir: RunPath) -> dict[int, float]:
  """Loss by logged step; a step logged twice must not differ from itself."""
  found: dict[int, float] = {}
  for record in writers.read(workdir / writers.METRICS_FILE):
    if "loss" in record:
      step, loss = record["step"], record["loss"]
      if found.setdefault(step, loss) != loss:
        raise UserError(f"{workdir}: step {step} is logged with two losses.")
  return found


def compare(calm: RunPath, disturbed: RunPath) -> list[str]:
  """What differs between two finished runs; empty if they are the same, bit for bit."""
  from moejax.checkpoint.inspect import inspect

  a, b = inspect(calm), inspect(disturbed)
  print(f"undisturbed  step {a['step']}  sha256 {a['sha256']}")
  print(f"killed       step {b['step']}  sha256 {b['sha256']}")
  problems = [
    f"{key} differs" for key in ("step", "sha256", "sha256_all") if a[key] != b[key]
  ]
  problems += a["damage"] + b["damage"]
  if a["meta"]["position"] != b["meta"]["position"]:
    problems.append("the data position differs")
  first, second = losses(calm), losses(disturbed)
  different = [s for s in first | second if first.get(s) != second.get(s)]
  if different:
    problems.append(f"the logged loss differs at {len(different)} steps: {different[:5]}")
  else:
    print(f"the loss of all {len(first)} logged steps is the same")
  return problems


def write_corpus(directory: Path, rng: random.Random) -> None:
  """A few dozen short documents, enough for batches of the small model."""
  directory.mkdir(parents=True, exist_ok=True)
  words = ("router", "token", "expert", "gate", "slot", "drop", "late")
  for number in range(60):
    text = " ".join(rng.choice(words) + str(rng.randrange(50)) for _ in range(400))
    (directory / f"{number}.txt").write_text(text)


def train_arguments(root: Path) -> list[str]:
  """The command line of both runs: small values first, then the user's."""
  values = {}
  if flags.FLAGS["small"].value:
    values = SMALL | {"data.path": root / "corpus", "data.cache_dir": root / "data"}
    write_corpus(root / "corpus", random.Random(0))
  values |= cli.overrides()
  config = flags.FLAGS["config"].value
  as_text = {k: "none" if v is None else str(v) for k, v in values.items()}
  return [f"--config={config}", *(f"--config.{k}={v}" for k, v in as_text.items())]


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_integer(
    "kills", 12, "Number of kills.", lower_bound=1, upper_bound=100_000
  )
  flags.DEFINE_integer(
    "seed", 0, "Random seed of the moments.", lower_bound=0, upper_bound=2**31 - 1
  )
  flags.DEFINE_bool("small", True, "Use a small model on a small generated text.")


def main() -> int:
  cli.get_config()  # a mistake in the flags is said here, not in a log
  given = flags.FLAGS["workdir"].value
  root = Path(given).resolve() if given else Path(tempfile.mkdtemp(prefix="kill_loop"))
  if root.is_dir() and any(root.iterdir()):
    raise UserError(f"--workdir={root} is not empty. Choose a new directory.")
  root.mkdir(parents=True, exist_ok=True)
  try:
    return _prove(root)
  finally:
    if not given:
      shutil.rmtree(root, ignore_errors=True)


def _prove(root: Path) -> int:
  arguments = train_arguments(root)
  calm = Trainer(workdir=root / "calm", arguments=arguments, cache=root / "jax")
  start = time.monotonic()
  calm.start()
  calm.wait_until(lambda: calm.newest() > 0)
  start_up = time.monotonic() - start
  calm.wait_until(lambda: False)
  print(f"undisturbed run: {time.monotonic() - start:.1f} s", flush=True)
  disturbed = Trainer(workdir=root / "killed", arguments=arguments, cache=root / "jax")
  kills = int(flags.FLAGS.flag_values_dict()["kills"])
  done = disturb(disturbed, kills, random.Random(flags.FLAGS["seed"].value), start_up)
  problems = compare(calm.workdir, disturbed.workdir)
  if done < kills:
    problems.append(
      f"the run was done after {done} kills of {kills}: raise --config.train.num_steps"
    )
  for problem in problems:
    print(f"DIFFERENT: {problem}" if done == kills else f"FAILED: {problem}")
  if not problems:
    print(f"identical after {done} kills")
  return 1 if problems else 0


if __name__ == "__main__":
  define_flags()
  cli.run(main)
