"""A trained run on the devices, with a text to read: the starting point of an analysis.

Nothing here imports jax before the flags are checked.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.run import compilation_cache
from moejax.storage.paths import RunPath

EXPLORE_TOKENS = 20_000
"""Tokens of text on the page, which has 8 MB with 16 layers, 8 choices, 64 experts."""

ANALYSIS = "analysis"
"""Name of the directory of results inside the run's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """The request on the command line."""

  workdir: RunPath
  steps: str | None
  """all, or numbers separated by commas; None means the newest."""
  split: str
  text: str | None
  """A file or folder that is read instead of the run's dataset."""
  batch_size: int
  """Minimum batch size; 0 means a microbatch of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """The passes of an analysis, and their options."""

  out: pathlib.Path
  steps: str | None = None
  limit: int = 0
  """Maximum number of batches; 0 means all."""
  replay: dict[str, list[Any]] | None = None
  """Values of each option; None without a replay."""
  confirm: int = 0
  knockout: tuple[int, ...] | None = None
  """Layers; empty means all of them."""
  knockout_tokens: str = "next_best"
  knockout_pairs: int = 0
  trace: pathlib.Path | None = None
  trace_what: str = "choices"
  from_trace: pathlib.Path | None = None
  explore_tokens: int = EXPLORE_TOKENS
  """Most tokens shown on the page."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A model with its parameters, and a text."""

  config: Any
  model: Any
  params: Any
  """Sharded over the mesh."""
  dataset: Any
  split: str
  mesh: Any
  batch_size: int
  """Gives each device whole routing groups."""
  steps: tuple[int, ...]
  """The requested checkpoints; the parameters are those of the last one."""
  facts: dict[str, Any]
  """Which run, step and text."""
  tells: bool
  """Whether this process prints and writes."""

  def arguments(self) -> dict[str, Any]:
    """Returns the arguments that every pass over the text takes."""
    names = ("model", "params", "dataset", "split", "mesh", "batch_size")
    return {name: getattr(self, name) for name in names}

  def token_counts(self) -> Any:
    """Returns how often each id of the model occurs in the text: int64 [V]."""
    import numpy as np

    counts, size = self.dataset.token_counts(self.split), self.model.vocab_size
    # The model may have more ids than the tokenizer.
    return np.pad(counts, (0, max(size - len(counts), 0)))[:size]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
  """A run without its parameters, with this command line's changes."""

  workdir: RunPath
  config: Any
  model: Any
  dataset: Any
  mesh: Any
  step: int | None
  """The requested checkpoint; None means the newest."""
  meta: dict[str, Any]
  """The checkpoint's metadata."""
  changes: list[tuple[str, Any, Any]]
  """Fields that the command line changed: (name, the run's value, this one)."""

  @property
  def is_training_dataset(self) -> bool:
    """Whether the text is the one used for training.

    Documents are split by content: in a different text, such as another Python version's
    library, a "validation" document may have been trained on.
    """
    return self.dataset.fingerprint == self.meta.get("dataset_fingerprint")

  def params(self) -> tuple[Any, dict[str, Any]]:
    """Returns the parameters, sharded over the mesh, and their checkpoint's metadata."""
    from moejax.checkpoint.manager import restore_params
    from moejax.models.placement import param_shardings

    # Restored directly into shards, so that no device holds the whole model.
    shardings = param_shardings(self.model, self.mesh)
    params, _, meta = restore_params(self.workdir, self.step, shardings)
    return params, meta


def opened(
  workdir: RunPath,
  step: int | None,
  check: Callable[[Any, Any], None],
  text: str | None = None,
) -> Opened:
  """Opens a run; called in every process of a job.

  Args:
    workdir: of the run.
    step: of the checkpoint; None means the newest.
    check: takes the model and dataset; rejects a request that is impossible with them.
    text: a file or folder that is read instead of the run's dataset.

  Raises:
    UserError: no such checkpoint, no text, or flags that describe another model.
  """
  from moejax import data
  from moejax.checkpoint.manager import peek
  from moejax.evaluate import groups, perplexity
  from moejax.launch import host_memory
  from moejax.run import owner
  from moejax.run import workdir as workdir_lib
  from moejax.sharding.mesh import make_mesh

  host_memory.keep_freed_pages()
  shapes, trained, meta = peek(workdir, step)
  trained = owner.own_paths(trained, meta.get("owner"), cli.overrides(), workdir)
  config = cli.get_config(base=_over(trained, text))
  compilation_cache.enable(config.data.cache_dir)
  check_tokenizer(config.data.tokenizer, workdir)
  try:
    dataset = data.load(config.data, workdir=workdir, store=False)
  except UserError as error:
    if text:
      raise UserError(f"--text={text}: {error}") from error
    raise
  model = groups.make_model(config, dataset.tokenizer.vocab_size)
  check(model, dataset)
  perplexity.check_params(model, shapes)
  return Opened(
    workdir=workdir,
    config=config,
    model=model,
    dataset=dataset,
    mesh=make_mesh(perplexity.choose_mesh(config.mesh)),
    step=step,
    meta=meta,
    changes=workdir_lib.refused_changes(trained, config),
  )


def check_tokenizer(kind: str, workdir: RunPath) -> None:
  """Rejects a run that cannot read text.

  Args:
    kind: `config.data.tokenizer`.
    workdir: of the run.

  Raises:
    UserError: it was converted from a folder without a tokenizer.
  """
  from moejax.data.tokenizer import FILE

  if kind == "hf" and not (workdir / FILE).exists():
    raise UserError(
      f"--workdir={workdir} has no tokenizer, which is needed to read text. Convert the "
      "model to a new --workdir from a folder with a tokenizer.json."
    )


def restore(request: Request, prepare: Callable[[Run], Run]) -> Run:
  """Restores a run that can be analyzed; called in every process of a job.

  Args:
    request: the request on the command line.
    prepare: checks the request before parameters are read (`params` is None), and may
      change the batch size.

  Raises:
    UserError: no MoE layer, no text, or no such checkpoint.
  """
  import jax

  from moejax.evaluate import groups

  steps = _steps(request)
  split = "train" if request.text else request.split

  def check(model: Any, dataset: Any) -> None:
    _check(model, dataset, split, request)

  found = opened(request.workdir, steps[-1] if steps else None, check, request.text)
  config, model, dataset = found.config, found.model, found.dataset
  factors = (groups.least_factor(model), config.moe.capacity_factor)
  run = Run(
    config=config,
    model=model,
    params=None,
    dataset=dataset,
    split=split,
    mesh=found.mesh,
    batch_size=groups.batch_size(config, found.mesh, factors, request.batch_size),
    steps=steps,
    facts={
      "workdir": str(request.workdir),
      "step": found.meta["step"],
      "split": split,
      "text": request.text,
      "split_tokens": dataset.num_tokens(split),
      "dataset_fingerprint": dataset.fingerprint,
      "is_training_dataset": found.is_training_dataset,
      "changed": {field: now for field, _, now in found.changes},
    }
    | (_left_out(config.data) if request.text else {}),
    tells=jax.process_index() == 0,
  )
  run = prepare(run)
  params, meta = found.params()
  return dataclasses.replace(run, params=params, facts=run.facts | {"step": meta["step"]})


def _steps(request: Request) -> tuple[int, ...]:
  """Returns the requested checkpoints, ascending; empty means the newest.

  Raises:
    UserError: no such checkpoint, or not a number.
  """
  from moejax.checkpoint.params import checkpoint_directory
  from moejax.run.files import list_steps

  there = list_steps(checkpoint_directory(request.workdir))
  if not request.steps:
    return ()
  if request.steps == "all":
    return tuple(there)
  try:
    steps = sorted({int(word) for word in request.steps.split(",")})
  except ValueError:
    raise UserError(
      f"--steps={request.steps}: give numbers separated by commas, or all."
    ) from None
  if missing := [step for step in steps if step not in there]:
    known = ", ".join(map(str, there))
    raise UserError(
      f"--steps={request.steps}: there is no checkpoint {missing[0]}. There are {known}."
    )
  return tuple(steps)


def _over(trained: Any, text: str | None) -> Any:
  """Returns the run's config, with the text instead of its dataset."""
  if not text:
    return trained
  data = dataclasses.replace(
    trained.data,
    name="text",
    path=str(pathlib.Path(text).resolve()),
    domains="",
    max_documents=0,
    validation_fraction=0.0,
    test_fraction=0.0,
  )
  return dataclasses.replace(trained, data=data)


def _left_out(config: Any) -> dict[str, Any]:
  """Returns, as a fact, how much of a text is not read."""
  from moejax.data import cache
  from moejax.data.sources.local import LocalSource
  from moejax.data.sources.registry import make_source

  source = make_source(config, cache.cache_root(config.cache_dir))
  return {"left_out": source.left_out()} if isinstance(source, LocalSource) else {}


def _check(model: Any, dataset: Any, split: str, request: Request) -> None:
  """Rejects, before reading parameters, a run that cannot be analyzed."""
  if not model.moe_layers:
    raise UserError(
      f"--workdir={request.workdir}: this model has no MoE layer, so nothing is routed."
    )
  if not dataset.num_tokens(split):
    what = f"--text={request.text}" if request.text else f"--split={split}"
    raise UserError(f"{what} has no text. Give another one.")
