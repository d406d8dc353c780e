"""A trained run on the devices, with a text to read: what an analysis begins with.

Nothing here imports jax before the flags are checked.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.run import compilation_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What the command line asks for."""

  workdir: pathlib.Path
  steps: str | None
  """all, or numbers separated by commas; None is the newest."""
  split: str
  text: str | None
  """A file or folder that is read whole in place of the run's dataset."""
  batch_size: int
  """At least; 0 is a microbatch of training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """Which passes an analysis makes."""

  out: pathlib.Path
  steps: str | None
  limit: int
  replay: dict[str, list[Any]] | None
  """Values of each option; None without a replay."""
  confirm: int
  knockout: tuple[int, ...] | None
  """Layers; empty is all of them."""
  knockout_tokens: str
  knockout_pairs: int
  trace: pathlib.Path | None
  trace_what: str
  from_trace: pathlib.Path | None
  explore_tokens: int
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
  """Whole routing groups on each device."""
  steps: tuple[int, ...]
  """The checkpoints asked for; the parameters are those of the last one."""
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


def restore(request: Request, prepare: Callable[[Run], Run]) -> Run:
  """Restores a run; called in every process of a job.

  Args:
    request: what is asked for.
    prepare: checks what is asked for, before parameters are read (`params` is None), and
      may change the batch size.

  Raises:
    UserError: no MoE layer, an encoder, no text, or no such checkpoint.
  """
  import jax

  from moejax import data
  from moejax.checkpoint.manager import peek, restore_params
  from moejax.evaluate import groups, perplexity
  from moejax.launch import host_memory
  from moejax.models.placement import param_shardings
  from moejax.run import owner
  from moejax.run import workdir as workdir_lib
  from moejax.sharding.mesh import make_mesh

  host_memory.keep_freed_pages()
  workdir, steps = request.workdir, _steps(request)
  shapes, trained, meta = peek(workdir, steps[-1] if steps else None)
  trained = owner.own_paths(trained, meta.get("owner"), cli.overrides(), workdir)
  config, split = cli.get_config(base=_over(trained, request)), request.split
  if request.text:
    split = "train"
  compilation_cache.enable(config.data.cache_dir)
  try:
    dataset = data.load(config.data, workdir=workdir, store=False)
  except UserError as error:
    if request.text:
      raise UserError(f"--text={request.text}: {error}") from error
    raise
  model = groups.make_model(config, dataset.tokenizer.vocab_size)
  _check(model, dataset, split, request)
  perplexity.check_params(model, shapes)
  mesh = make_mesh(perplexity.choose_mesh(config.mesh))
  factors = (groups.least_factor(model), config.moe.capacity_factor)
  batch_size = groups.batch_size(config, mesh, factors, request.batch_size)
  changes = workdir_lib.refused_changes(trained, config)
  run = Run(
    config=config,
    model=model,
    params=None,
    dataset=dataset,
    split=split,
    mesh=mesh,
    batch_size=batch_size,
    steps=steps,
    facts={
      "workdir": str(workdir),
      "step": meta["step"],
      "split": split,
      "text": request.text,
      "split_tokens": dataset.num_tokens(split),
      "dataset_fingerprint": dataset.fingerprint,
      "is_training_dataset": dataset.fingerprint == meta.get("dataset_fingerprint"),
      "changed": {field: now for field, _, now in changes},
    },
    tells=jax.process_index() == 0,
  )
  run = prepare(run)
  # Restored directly into shards, so that no device holds the whole model.
  shardings = param_shardings(model, mesh)
  params, _, meta = restore_params(workdir, steps[-1] if steps else None, shardings)
  return dataclasses.replace(run, params=params, facts=run.facts | {"step": meta["step"]})


def _steps(request: Request) -> tuple[int, ...]:
  """Returns the checkpoints asked for, ascending; empty is the newest.

  Raises:
    UserError: no such checkpoint, or no number.
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


def _over(trained: Any, request: Request) -> Any:
  """Returns the run's config, with the text in place of its dataset."""
  if not request.text:
    return trained
  data = dataclasses.replace(
    trained.data,
    name="text",
    path=str(pathlib.Path(request.text).resolve()),
    validation_fraction=0.0,
    test_fraction=0.0,
  )
  return dataclasses.replace(trained, data=data)


def _check(model: Any, dataset: Any, split: str, request: Request) -> None:
  """Rejects, before reading parameters, what cannot be analyzed."""
  if not model.moe_layers:
    raise UserError(
      f"--workdir={request.workdir}: this model has no MoE layer, so nothing is routed."
    )
  if model.config.kind == "encoder_decoder":
    raise UserError(
      f"--workdir={request.workdir} is an encoder-decoder, which routes two texts, and "
      "only a decoder can be analyzed yet. The loads of all its layers are in what "
      "experiments.evaluate writes."
    )
  if not dataset.num_tokens(split):
    what = f"--text={request.text}" if request.text else f"--split={split}"
    raise UserError(f"{what} has no text. Give another one.")
