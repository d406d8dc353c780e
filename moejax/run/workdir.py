"""A run's directory: which run owns it, its original settings, and its lock.

    config.json     the resolved config, sorted; rewritten at each start
    run.json        fingerprints, mesh, versions and git revision at the first start
    tokenizer/  metrics.jsonl  checkpoints/  tensorboard/  eval*.json
    step_time.json  report.png

A directory belongs to one run. It is refused if its run was started with another
config or corpus, if it holds unrelated files or another project's config.json, and
while another process trains in it. A run without any progress (no checkpoint, no
logged step) claims nothing: it may be started again with other flags.
"""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from moejax import files
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import ConfigError, UserError, program
from moejax.run import claim, foreign, provenance
from moejax.run.files import CONFIG_FILE, DIRECTORY, list_steps
from moejax.storage import errors as storage_errors
from moejax.storage import parts
from moejax.storage.paths import RunPath, in_bucket, resolved, run_path

RUN_FILE = "run.json"
RECORDS = "surgery"
"""In run.json: the operations on experts up to this run, the oldest first."""
EMERGENCY = "emergency_id"
"""In run.json: the value of `run` in the run's emergency checkpoints."""
METRICS_FILE = "metrics.jsonl"

OURS = (
  CONFIG_FILE,
  RUN_FILE,
  METRICS_FILE,
  DIRECTORY,
  "tokenizer*",
  "tensorboard",
  "eval*.json",
  "step_time.json",
  "report*",
  ".*",
  "*.log",
  "__pycache__",
)
"""Files allowed in a directory without a config.json: what a run writes, and logs
that a launcher opened there."""

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
  "train.init_from",
  "train.log_every",
  "train.eval_every",
  "train.eval_batches",
  "train.final_eval_tokens",
  "train.sample",
  "train.report",
  "train.trace_steps",
  "train.tensorboard",
  "train.checkpoint_every",
  "train.keep_last",
  "train.keep_best",
  "train.max_bad_steps",
  "alarms.*",
)
"""Fields that may differ when a run resumes: where it runs, what it was initialised from,
what it logs, how often it evaluates and saves, when it gives up. None of them affects the
arithmetic of a step, except that another mesh, exchange or dispatcher may sum in another
order. With moe.exchange_buffer, these three also decide which assignments are lost, so
they may not change. train.num_steps may grow."""

_ID = re.compile("[0-9a-f]{16}")

_BUFFERED = ("moe.exchange", "moe.exchange_chunks", "moe.dispatcher", "mesh.*")
"""The fields of MAY_CHANGE that may not change with moe.exchange_buffer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
  """A directory in which nothing has been trained yet."""

  path: RunPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
  """A directory with a run to resume."""

  path: RunPath
  changed: list[tuple[str, Any, Any]]
  """Allowed differences from its last start: (dotted field, before, now)."""
  step: int | None
  """Newest complete checkpoint; None if the run stopped before its first."""


def prepare(
  workdir: RunPath | str,
  config: Config,
  dataset_fingerprint: str | None = None,
  mesh: Mapping[str, int] | None = None,
  corpus_fingerprint: str | None = None,
  init_from: str = "",
) -> New | Resume:
  """Claims a directory for this run, or refuses before writing anything in it.

  Process 0 holds the lock until `release` or until it ends, however it ends.

  Args:
    workdir: --workdir; created if missing.
    config: resolved and validated.
    dataset_fingerprint: of the tokenized corpus. None only checks and locks, before
      the data are read; a second call with a fingerprint writes the files.
    mesh: devices along each axis; None skips the check of the mesh.
    corpus_fingerprint: of the text alone, for `check_corpus`.
    init_from: the run whose parameters a new run starts from; noted with the operations
      on experts that it records.

  Raises:
    ConfigError: the run there has another config (every differing field is named),
      corpus or, with moe.exchange_buffer, mesh.
    UserError: not writable, in use, or holding unrelated files.
  """
  path = run_path(workdir)
  claim.make_writable(path)
  if jax.process_index() == 0:
    claim.lock(path)
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
      files.write_json(path / RUN_FILE, run | _origin(init_from))
  return found


def _origin(init_from: str) -> dict[str, Any]:
  """Returns the entries of run.json about the run that a new one starts from."""
  if not init_from:
    return {}
  source = resolved(init_from)
  records = _begun_with(source).get(RECORDS)
  return {"init_from": str(source)} | ({RECORDS: records} if records else {})


def check_corpus(workdir: RunPath | str, fingerprint: str) -> None:
  """Refuses text other than the run's own, before it is tokenized.

  Args:
    workdir: a directory claimed by `prepare`.
    fingerprint: of the text alone.

  Raises:
    ConfigError: the run in the directory was started on another text.
  """
  path = run_path(workdir)
  if (path / CONFIG_FILE).exists():
    _refuse_data(path, "corpus_fingerprint", fingerprint)


def release(workdir: RunPath | str) -> None:
  """Unlocks the directory for other processes. No error if it was not locked."""
  claim.unlock(workdir)


def check_there(workdir: RunPath | str) -> None:
  """Refuses to go on in a directory that was removed while its run was training.

  Only process 0, which holds the lock, checks. A bucket that does not answer now does not
  count as removed.

  Raises:
    UserError: it was removed.
  """
  path = run_path(workdir)
  if not claim.is_held(path):
    return
  try:
    there = (path / CONFIG_FILE).exists()
  except Exception as error:
    if not (in_bucket(path) and storage_errors.is_theirs(error)):
      raise
    return
  if not there:
    raise _removed(path)


@contextlib.contextmanager
def still_there(workdir: RunPath | str) -> Iterator[None]:
  """Turns an error of the body into one line if the cause is a directory that is gone.

  Raises:
    UserError: an error, and the directory was removed since `prepare`.
  """
  path = run_path(workdir)
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if not claim.was_removed(path):
      raise
    raise _removed(path) from error


def _removed(path: RunPath) -> UserError:
  return UserError(
    f"--workdir={path} was removed, or is no longer reachable, while its run was "
    f"training: there is no {CONFIG_FILE} any more. Restore it to go on; otherwise the "
    "same command starts again from step 0."
  )


def read_config(workdir: RunPath | str) -> Config:
  """Returns the config of the run's last start, migrated to the current schema.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  path = run_path(workdir) / CONFIG_FILE
  try:
    return config_text.from_dict(files.read_json(path))
  except FileNotFoundError as e:
    raise UserError(
      f"--workdir={workdir} has no {CONFIG_FILE}: give the directory of a training run."
    ) from e
  except (ValueError, OSError) as e:
    raise UserError(
      f"{path} cannot be read ({e}). Every checkpoint holds the config too: "
      f"`{program('inspect-checkpoint', 'tools.inspect_checkpoint')} --workdir={workdir} "
      "--json` prints it."
    ) from e


def emergency_id(workdir: RunPath | str) -> str | None:
  """Returns the id of the run's emergency checkpoints; None before the first."""
  found = _begun_with(run_path(workdir)).get(EMERGENCY)
  return found if isinstance(found, str) and _ID.fullmatch(found) else None


def note_emergency(workdir: RunPath | str, found: str) -> None:
  """Stores the id of the run's emergency checkpoints; the run then counts as begun."""
  path = run_path(workdir)
  if emergency_id(path) != found:
    files.write_json(path / RUN_FILE, _begun_with(path) | {EMERGENCY: found})


def refused_changes(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
  """Returns the changes that a run may not resume with: (dotted field, old, new)."""
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
  path: RunPath,
  config: Config,
  fingerprint: str | None,
  mesh: Mapping[str, int] | None,
) -> New | Resume:
  if not (path / CONFIG_FILE).exists():
    _refuse_foreign(path)
    return New(path=path)
  steps = list_steps(path / DIRECTORY)
  begun = bool(steps) or _has_metrics(path / METRICS_FILE) or bool(emergency_id(path))
  if not begun:
    foreign.refuse(path)
    # Refused or killed before its first step. Its files do not bind a later run, and a
    # tokenizer next to a config.json would be taken for a run's.
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


def _has_metrics(path: RunPath) -> bool:
  if in_bucket(path):
    return bool(parts.parts(path))
  return path.exists() and path.stat().st_size > 0  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_foreign(path: RunPath) -> None:
  try:
    names = sorted(p.name for p in path.iterdir())
  except FileNotFoundError:  # A bucket has no empty folders.
    names = []
  ours = (*OURS, parts.folder(path / METRICS_FILE).name) if in_bucket(path) else OURS
  others = [n for n in names if not any(fnmatch.fnmatch(n, p) for p in ours)]
  if others:
    more = f" and {len(others) - 5} more" if len(others) > 5 else ""
    raise UserError(
      f"--workdir={path} is not a run's directory (it has no {CONFIG_FILE}) and is not "
      f"empty: it holds {', '.join(others[:5])}{more}. Choose a new directory."
    )
  steps = list_steps(path / DIRECTORY)
  if steps:
    raise UserError(
      f"--workdir={path} holds checkpoints (newest: step {steps[-1]}) but no "
      f"{CONFIG_FILE} that describes them. Restore it, or choose a new directory and "
      f"--init_from={path}."
    )


def _refuse_config(path: RunPath, old: Config, new: Config) -> None:
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


def _begun_with(path: RunPath) -> dict[str, Any]:
  """Returns the content of run.json; empty if unreadable, since none of it is vital."""
  try:
    found = files.read_json(path / RUN_FILE)
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _refuse_mesh(path: RunPath, config: Config, mesh: Mapping[str, int] | None) -> None:
  """Refuses another mesh with a bounded exchange: it changes which tokens are lost."""
  begun_with = _begun_with(path).get("mesh")
  if config.moe.exchange_buffer is None or mesh is None or begun_with is None:
    return
  if begun_with != dict(mesh):
    was, now = (
      " x ".join(f"{axis} {size}" for axis, size in shape.items())
      for shape in (begun_with, mesh)
    )
    raise ConfigError(
      f"--workdir={path} was begun on the mesh {was} and would continue on {now}: with "
      f"--config.moe.exchange_buffer={config.moe.exchange_buffer} different tokens would "
      "be dropped. Give the same devices and mesh, or another --workdir."
    )


def _refuse_data(path: RunPath, name: str, fingerprint: str | None) -> None:
  begun_with = _begun_with(path).get(name)
  if fingerprint is not None and begun_with not in (None, fingerprint):
    raise ConfigError(
      f"--workdir={path} was begun on other data: the {name.replace('_', ' ')} was "
      f"{begun_with} and is now {fingerprint}, with the same --config.data. Restore the "
      "files as they were (python_stdlib varies with the Python version, python_packages "
      "with the installed packages), or choose another --workdir."
    )
