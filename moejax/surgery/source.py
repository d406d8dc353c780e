"""The source of an operation: one complete checkpoint of a run, read part by part."""

import dataclasses
import functools
from pathlib import Path

from moejax.checkpoint.params import checkpoint_directory
from moejax.checkpoint.read import DamagedCheckpointError
from moejax.checkpoint.slices import Slices
from moejax.config import Config
from moejax.config import text as config_text
from moejax.data.sentinels import with_sentinels
from moejax.data.tokenizer import FILE as TOKENIZER_FILE
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.models.decoder import Decoder
from moejax.run.files import list_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """One complete checkpoint of a run."""

  workdir: Path
  step: int
  slices: Slices
  config: Config
  vocab_size: int

  @functools.cached_property
  def model(self) -> Decoder:
    return groups.make_model(self.config, self.vocab_size)


def open_run(workdir: Path | str, step: int | None = None, flag: str = "") -> Opened:
  """Opens a checkpoint of a run, and reads only its meta.

  Args:
    workdir: of the run.
    step: which checkpoint; None is the newest.
    flag: the flag that names the run, for errors; by default --workdir.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  flag = flag or f"--workdir={workdir}"
  directory = checkpoint_directory(workdir)
  steps = list_steps(directory)
  if step is not None and step not in steps:
    known = ", ".join(map(str, steps))
    name = _step_flag(flag) or "step"
    raise UserError(f"{name}={step} is not in {directory}: there are {known}.")
  step = steps[-1] if step is None else step
  try:
    slices = Slices(Path(directory) / str(step))
    config = config_text.from_dict(slices.meta["config"])
    rows = slices.shape("params.embedding.table")[0]
  except (DamagedCheckpointError, KeyError) as e:
    raise damaged(flag, step, e) from e
  return Opened(
    workdir=Path(workdir),
    step=step,
    slices=slices,
    config=config,
    vocab_size=_vocab_size(Path(workdir), config, rows),
  )


def tokenizer_of(workdir: Path | str) -> str | None:
  """Returns the fingerprint of a run's tokenizer; None if it has stored none."""
  if not (Path(workdir) / TOKENIZER_FILE).exists():
    return None
  return load_tokenizer(workdir).fingerprint


def damaged(flag: str, step: int, error: Exception) -> UserError:
  """Returns the error for a checkpoint that has changed since it was written."""
  name = _step_flag(flag)
  remedy = f"Choose another {name}, or restore" if name else "Restore"
  return UserError(
    f"{flag}: checkpoint {step} is damaged ({error}). {remedy} the files from a copy."
  )


def _step_flag(flag: str) -> str:
  """Returns the flag that chooses a checkpoint of a flag's run; empty if none does."""
  steps = {"--workdir": "--step", "--from_run": "--from_step"}
  return steps.get(flag.partition("=")[0], "")


def _vocab_size(workdir: Path, config: Config, rows: int) -> int:
  if config.model.vocab_size:
    return config.model.vocab_size
  if config.model.vocab_multiple > 1 and (workdir / TOKENIZER_FILE).exists():
    # Further rows are padding.
    return with_sentinels(load_tokenizer(workdir), config.data).vocab_size
  return rows
