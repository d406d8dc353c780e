"""A run's directory: whose it is, what it was begun with, who works in it now.

    config.json     the resolved config, sorted; rewritten when an allowed field changes
    run.json        corpus fingerprint, mesh, versions and git revision at the beginning
    tokenizer/  metrics.jsonl  checkpoints/  tensorboard/  eval*.json  report.png

A directory belongs to one run. It is refused when it was begun with another
config or corpus, when it holds other people's files, and while another process
trains in it. A run that was never begun (no checkpoint, no logged step) claims
nothing: its flags may be changed and given again.
"""

import dataclasses
import errno
import fcntl
import fnmatch
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from moejax import files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError
from moejax.run import provenance
from moejax.run.files import CONFIG_FILE, DIRECTORY, list_steps

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

OURS = (
  CONFIG_FILE,
  RUN_FILE,
  METRICS_FILE,
  DIRECTORY,
  "tokenizer*",
  "tensorboard",
  "eval*.json",
  "report*",
  ".*",
  "*.log",
)
"""What may lie in a directory that has no config.json yet: logs that a launcher
opened there, and what a run writes."""

MAY_CHANGE = (
  "schema_version",
  "mesh.*",
  "moe.dispatcher",
  "moe.exchange",
  "moe.exchange_chunks",
  "moe.expert_chunks",
  "data.cache_dir",
  "data.num_workers",
  "data.prefetch",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.final_eval_tokens",
  "train.sample",
  "train.report",
  "train.tensorboard",
  "train.checkpoint_every",
  "train.keep_last",
  "train.keep_best",
  "train.max_bad_steps",
)
"""Fields that may differ when a run goes on: where it runs, what it logs, how often
it looks and saves, when it gives up. None of them enters the arithmetic of a step,
except that another mesh, exchange or dispatcher may sum in another order; with
moe.exchange_buffer they also decide what is lost on the way, and may not change.
train.num_steps may grow."""

_BUFFERED = ("moe.exchange", "mesh.*")
"""Of those, what may not change under moe.exchange_buffer."""

_LOCK_WAIT_SECONDS = 5.0
"""A killed run's worker processes may hold its lock for a moment longer."""

_locks: dict[str, int] = {}
"""Directories this process works in, and the descriptor that holds each lock."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
  """A directory in which nothing was trained yet."""

  path: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
  """A directory with a run that goes on."""

  path: Path
  changed: list[tuple[str, Any, Any]]
  """Allowed differences to how it was begun: (dotted field, before, now)."""
  step: int | None
  """Newest complete checkpoint; None if it was stopped before the first."""


def prepare(
  workdir: Path | str,
  config: Config,
  dataset_fingerprint: str | None = None,
  mesh: Mapping[str, int] | None = None,
  corpus_fingerprint: str | None = None,
) -> New | Resume:
  """Takes a directory for this run, or refuses before anything is written in it.

  The lock is held until `release` or the process ends, however it ends.

  Args:
    workdir: --workdir; made if missing.
    config: resolved and validated.
    dataset_fingerprint: of the tokenized corpus. None checks and locks only, for
      use before the data are read, and a second call with it writes the files.
    mesh: devices along each axis; None does not look at them.
    corpus_fingerprint: of the text alone, for `begun_with_corpus`.

  Raises:
    ConfigError: begun with another config (every differing field is named) or corpus.
    UserError: not writable, in use, or full of something else.
  """
  path = Path(workdir)
  _make_writable(path)
  if jax.process_index() == 0:
    _lock(path)
  try:
    found = _examine(path, config, dataset_fingerprint, mesh)
  except UserError:
    release(path)
    raise
  if jax.process_index() == 0 and dataset_fingerprint is not None:
    files.write_json(path / CONFIG_FILE, config_text.to_dict(config))
    if not (path / RUN_FILE).exists():
      run = {
        "dataset_fingerprint": dataset_fingerprint,
        "corpus_fingerprint": corpus_fingerprint,
        "mesh": None if mesh is None else dict(mesh),
        "versions": provenance.versions(),
        "revision": provenance.revision(),
      }
      files.write_json(path / RUN_FILE, run)
  return found


def check_corpus(workdir: Path | str, fingerprint: str) -> None:
  """Refuses a text that a run was not begun on, before it is tokenized.

  Args:
    workdir: one that `prepare` took.
    fingerprint: of the text alone.

  Raises:
    ConfigError: a run that has begun there had another text.
  """
  path = Path(workdir)
  if (path / CONFIG_FILE).exists():
    _refuse_data(path, "corpus_fingerprint", fingerprint)


def release(workdir: Path | str) -> None:
  """Lets another process have the directory. No error if it was not held."""
  descriptor = _locks.pop(str(Path(workdir).resolve()), None)
  if descriptor is not None:
    os.close(descriptor)


def read_config(workdir: Path | str) -> Config:
  """The config a directory's run was last started with, migrated to this schema.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  path = Path(workdir) / CONFIG_FILE
  try:
    return config_text.from_dict(files.read_json(path))
  except FileNotFoundError as e:
    raise UserError(
      f"--workdir={workdir} has no {CONFIG_FILE}: give the directory of a training run."
    ) from e
  except (ValueError, OSError) as e:
    raise UserError(
      f"{path} cannot be read ({e}). Every checkpoint holds the config too: "
      f"`python -m tools.inspect_checkpoint --workdir={workdir} --json` prints it."
    ) from e


def refused_changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """The differences that make it another run: (dotted field, old, new)."""
  refused = []
  for name, before, now in config_text.difference(old, new):
    buffered = old.moe.exchange_buffer is not None and _matches(name, _BUFFERED)
    if _matches(name, MAY_CHANGE) and not buffered:
      continue
    if name == "train.num_steps" and now > before:
      continue
    refused.append((name, before, now))
  return refused


def _examine(
  path: Path,
  config: Config,
  fingerprint: str | None,
  mesh: Mapping[str, int] | None,
) -> New | Resume:
  if not (path / CONFIG_FILE).exists():
    _refuse_foreign(path)
    return New(path=path)
  steps = list_steps(path / DIRECTORY)
  metrics = path / METRICS_FILE
  begun = bool(steps) or (metrics.exists() and metrics.stat().st_size > 0)
  if not begun:
    # Refused or killed before its first step. What it wrote binds nobody, and the
    # tokenizer beside a config.json would be taken for that of a run.
    if jax.process_index() == 0:
      for name in (CONFIG_FILE, RUN_FILE):
        (path / name).unlink(missing_ok=True)
    return New(path=path)
  old = read_config(path)
  _refuse_config(path, old, config)
  _refuse_data(path, "dataset_fingerprint", fingerprint)
  _refuse_mesh(path, config, mesh)
  return Resume(
    path=path,
    changed=config_text.difference(old, config),
    step=steps[-1] if steps else None,
  )


def _make_writable(path: Path) -> None:
  """Makes the directory, and finds out by writing whether one can write there."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except (FileExistsError, NotADirectoryError) as e:
    raise UserError(
      f"--workdir={path} is not a directory, or lies below a file. Choose another."
    ) from e
  except OSError as e:
    raise UserError(
      f"--workdir={path} is not writable ({e.strerror}). Choose another, or change "
      "its permissions."
    ) from e


def _lock(path: Path) -> None:
  """Locks the directory itself: no lock file to leave behind, and kill -9 unlocks."""
  key = str(path.resolve())
  if key in _locks:
    return
  descriptor = os.open(path, os.O_RDONLY)
  deadline = time.monotonic() + _LOCK_WAIT_SECONDS
  while True:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      break
    except OSError as e:
      if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
        # Some network file systems have no such locks: better a run than none.
        logging.warning("%s cannot be locked (%s): start one run in it only.", path, e)
        break
      if time.monotonic() > deadline:
        os.close(descriptor)
        raise UserError(
          f"--workdir={path} is in use by another live run. Wait until it ends, stop "
          "it, or choose another --workdir."
        ) from e
      time.sleep(0.1)
  _locks[key] = descriptor


def _refuse_foreign(path: Path) -> None:
  names = sorted(p.name for p in path.iterdir())
  foreign = [n for n in names if not any(fnmatch.fnmatch(n, p) for p in OURS)]
  if foreign:
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    raise UserError(
      f"--workdir={path} is no run's directory (it has no {CONFIG_FILE}) and is not "
      f"empty: it holds {', '.join(foreign[:5])}{more}. Choose a new directory."
    )
  steps = list_steps(path / DIRECTORY)
  if steps:
    raise UserError(
      f"--workdir={path} holds checkpoints (newest: step {steps[-1]}) but no "
      f"{CONFIG_FILE} that says of what. Put it back, or choose a new directory and "
      f"--init_from={path}."
    )


def _refuse_config(path: Path, old: Config, new: Config) -> None:
  refused = refused_changes(old, new)
  if not refused:
    return
  fields = "; ".join(
    f"--config.{name} was {before!r} and is now {now!r}" for name, before, now in refused
  )
  hint = ""
  if any(name == "train.num_steps" for name, _, _ in refused):
    hint = " (train.num_steps may only grow)"
  raise ConfigError(
    f"--workdir={path} was begun with another config: {fields}{hint}. Give the same "
    "values to go on, or another --workdir for a new run (--init_from="
    f"{path} starts it from this one's parameters)."
  )


def _matches(name: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _begun_with(path: Path) -> dict[str, Any]:
  """What run.json says; empty where it cannot be read, for nothing in it is vital."""
  try:
    found = files.read_json(path / RUN_FILE)
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _refuse_mesh(path: Path, config: Config, mesh: Mapping[str, int] | None) -> None:
  """Under a bounded exchange the devices decide what is lost: arithmetic, not place."""
  begun_with = _begun_with(path).get("mesh")
  if config.moe.exchange_buffer is None or mesh is None or begun_with is None:
    return
  if begun_with != dict(mesh):
    was, now = (
      " x ".join(f"{axis} {size}" for axis, size in shape.items())
      for shape in (begun_with, mesh)
    )
    raise ConfigError(
      f"--workdir={path} was begun on the mesh {was} and would go on on {now}: with "
      f"--config.moe.exchange_buffer={config.moe.exchange_buffer} other tokens would be "
      "lost on the way. Give the same devices and mesh, or another --workdir."
    )


def _refuse_data(path: Path, name: str, fingerprint: str | None) -> None:
  begun_with = _begun_with(path).get(name)
  if fingerprint is not None and begun_with not in (None, fingerprint):
    raise ConfigError(
      f"--workdir={path} was begun on other data: the {name.replace('_', ' ')} was "
      f"{begun_with} and is now {fingerprint}, with the same --config.data. Restore the "
      "files as they were (the standard library's text differs between Python "
      "versions), or choose another --workdir."
    )
