"""Runs `tools.surgery`, from a checked command line to a new run.

All checks are made before parameters are read: the operation, the config, the shapes, the
optimizer's state, the output directory.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moejax import data
from moejax.checkpoint.params import restore_params
from moejax.config import Config
from moejax.config import text as config_text
from moejax.cost.parameters import count_parameters
from moejax.errors import UserError, program
from moejax.evaluate import groups, perplexity
from moejax.models.make import make_model
from moejax.models.placement import param_shardings
from moejax.options import show
from moejax.run import compilation_cache, owner
from moejax.sharding.mesh import make_mesh
from moejax.surgery import lineage, state
from moejax.surgery import run as run_lib
from moejax.surgery.change import Change
from moejax.surgery.measured import Measured, Text
from moejax.surgery.operation import EQUAL, Choice, Operation
from moejax.surgery.source import Opened, open_run
from moejax.surgery.still_frozen import still_frozen

Say = Callable[[str], None]

_SAME_LOSS = 1e-4
"""Nats per token within which losses count as equal: float32 sums in another order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """What the command line asks for."""

  workdir: Path
  output: Path | None
  """None for a dry run."""
  operation: Operation
  options: dict[str, Any]
  optimizer: str = state.RESET
  step: int | None = None
  seed: int = 0
  dry_run: bool = False
  evaluate: bool = True
  split: str = "validation"
  measure_split: str = "train"
  max_batches: int = 16
  batch_size: int = 0
  given: tuple[str, ...] = ()
  """Fields of the config set on the command line."""


def run(
  asked: Asked, new_config: Callable[[Operation, Config], Config], say: Say
) -> lineage.Record | None:
  """Runs an operation, or prints what it would change.

  Args:
    asked: from the command line.
    new_config: (operation, old config) -> the validated config of the new run.
    say: prints one line.

  Returns:
    The record of the operation; None for a dry run.

  Raises:
    UserError: the operation is not possible; nothing is left half-written.
  """
  if asked.output is not None:
    run_lib.refuse_output(asked.output, [asked.workdir])
  source = open_run(asked.workdir, asked.step)
  asked = dataclasses.replace(asked, operation=asked.operation.of_run(source))
  change = _change(asked, source, new_config)
  if asked.output is not None:
    others = [workdir for workdir, _ in asked.operation.other_sources]
    run_lib.refuse_output(asked.output, others)
  state.check(change, source.slices, asked.optimizer)
  for line in change_lines(change, asked.optimizer):
    say(line)
  if asked.dry_run or asked.output is None:
    return None
  run_lib.verify(source, asked.optimizer != state.RESET)
  text = _text(asked, source, change.new) if _needs_text(asked) else None
  measured = _measured(asked, source, text)
  before = text.loss() if text is not None and asked.evaluate else None
  choices = run_lib.choose(change, source.slices, measured)
  expected = run_lib.expectation(change, source.slices, choices)
  del measured

  def finish(directory: Path) -> dict[str, Any]:
    if before is None:
      return {"expected": expected}
    after = _loss_of(asked, change, source, directory)
    loss = {"split": asked.split, "before": before, "after": after}
    return {"expected": expected, "loss": loss}

  record = run_lib.write(
    *(change, source, choices, asked.output),
    record=lineage.record(
      *(asked.operation.name, asked.options, source.workdir, source.step, asked.seed),
      others=asked.operation.other_sources,
    ),
    optimizer=asked.optimizer,
    finish=finish,
  )
  for line in result_lines(asked, change, choices, record):
    say(line)
  return record


def _change(
  asked: Asked, source: Opened, new_config: Callable[[Operation, Config], Config]
) -> Change:
  operation, old = asked.operation, source.config
  has_experts = bool(source.model.moe_layers)
  if operation.needs_moe and not has_experts:
    raise UserError(
      f"--workdir={asked.workdir}: this model has no MoE layer. Operation upcycle makes "
      "experts from a dense model."
    )
  operation.check(old)
  # These fields belong to the old run: what is frozen, and what it was initialised from.
  old = copy.deepcopy(old)
  old.train.frozen = old.train.init_from = ""
  new = new_config(operation, old)
  refuse_shapes(operation, old, new, asked.given)
  change = run_lib.make_change(source, operation, new, asked.seed)
  if new.train.frozen or "train.frozen" in asked.given:
    return change
  if frozen := still_frozen(change):
    new = copy.deepcopy(new)
    new.train.frozen = frozen
    return run_lib.make_change(source, operation, new, asked.seed)
  return change


def refuse_shapes(
  operation: Operation, old: Config, new: Config, given: tuple[str, ...]
) -> None:
  """Rejects flags that would change shapes that the operation does not change.

  Raises:
    UserError: there are such flags; the message names the first.
  """
  for field in given:
    if not field.startswith(("model.", "moe.")) or operation.may_set(field):
      continue
    if config_text.is_router_option(field):
      continue
    one = config_text.from_dict(config_text.to_dict(new))
    config_text.set_field(one, field, config_text.get_field(old, field))
    if _shapes(one) != _shapes(new):
      value = show(config_text.get_field(new, field))
      raise UserError(
        f"--config.{field}={value} changes the shapes of parameters, and the operation "
        f"{operation.name} does not. Leave it out."
      )


def _shapes(config: Config) -> Any:
  try:
    model = make_model(config.model, config.moe, vocab_size=config.model.vocab_size or 8)
    return str(model.shapes())
  except (ValueError, ZeroDivisionError, UserError):
    return None  # Not a valid model: other fields would have to change too.


def _needs_text(asked: Asked) -> bool:
  return asked.evaluate or asked.operation.reads_text


def _measured(asked: Asked, source: Opened, text: Text | None) -> Measured:
  if not asked.operation.reads_text:
    return Measured()
  assert text is not None
  if not text.dataset.num_tokens(asked.measure_split):
    raise UserError(
      f"--measure_split={asked.measure_split} has no text in this dataset. Choose "
      "another split."
    )
  return Measured(dataclasses.replace(text, split=asked.measure_split))


def _text(asked: Asked, source: Opened, new: Config) -> Text:
  """Returns the source's model, and the text that is read before and after."""
  split = asked.split
  config = owner.own_paths(
    copy.deepcopy(source.config),
    source.slices.meta.get("owner"),
    asked.given,
    asked.workdir,
  )
  config.data.domains = new.data.domains
  compilation_cache.enable(config.data.cache_dir)
  dataset = data.load(config.data, workdir=asked.workdir, store=False)
  if not dataset.num_tokens(split):
    raise UserError(
      f"--split={split} has no text in this dataset. Choose another split, or "
      "--evaluate=false."
    )
  return _restored(asked, config, source.model, dataset, asked.workdir, source.step)


def _loss_of(asked: Asked, change: Change, source: Opened, directory: Path) -> float:
  config = owner.own_paths(
    change.new, source.slices.meta.get("owner"), asked.given, asked.workdir
  )
  dataset = data.load(config.data, workdir=directory, store=False)
  return _restored(asked, config, change.new_model, dataset, directory, None).loss()


def _restored(
  asked: Asked,
  config: Config,
  model: Any,
  dataset: Any,
  workdir: Path,
  step: int | None,
) -> Text:
  mesh = make_mesh(perplexity.choose_mesh(config.mesh))
  factors = (groups.least_factor(model), config.moe.eval_capacity_factor)
  # Restored directly into shards, so that no device holds the whole model.
  params, _, _ = restore_params(workdir, step, param_shardings(model, mesh))
  return Text(
    model=model,
    params=params,
    dataset=dataset,
    split=asked.split,
    mesh=mesh,
    batch_size=groups.batch_size(config, mesh, factors, asked.batch_size),
    limit=asked.max_batches,
  )


def change_lines(change: Change, optimizer: str) -> list[str]:
  """Returns lines that describe what an operation would change."""
  lines = [f"{change.operation.name}: {change.operation.summary}"]
  fields = config_text.difference(change.old, change.new)
  lines += [f"  --config.{n}: {show(old)} -> {show(new)}" for n, old, new in fields]
  for number in change.made:
    lines.append(f"  layer {number}: {_sizes(change, number)}")
  counts = [
    count_parameters(config, model.vocab_size)
    for config, model in ((change.old, change.old_model), (change.new, change.new_model))
  ]
  (total, active), (new_total, new_active) = counts
  lines.append(
    f"  parameters: {total['total']:,} -> {new_total['total']:,}; active for a token: "
    f"{active['total']:,} -> {new_active['total']:,}"
  )
  lines.append(f"  optimizer: {optimizer}")
  return lines


def _sizes(change: Change, number: int) -> str:
  """Returns E, K and F of a layer before and after."""
  where = change.new_layers[number]
  new = change.new_model.stacks[where.stack].moe
  after = f"E {new.fine_experts}, K {new.fine_selected}, F {new.fine_hidden}"
  if new.shared_width:
    after += f", shared {new.shared_width}"
  if number not in change.old_model.moe_layers:
    return f"dense -> {after}"
  old = change.old_model.stacks[change.old_layers[number].stack].moe
  before = f"E {old.fine_experts}, K {old.fine_selected}, F {old.fine_hidden}"
  if old.shared_width:
    before += f", shared {old.shared_width}"
  return f"{before} -> {after}"


def result_lines(
  asked: Asked, change: Change, choices: Mapping[int, Choice], record: lineage.Record
) -> list[str]:
  """Returns lines that describe what was done in each layer, and the loss."""
  lines = []
  for number, choice in choices.items():
    words = [_made(choice, index) for index in range(len(choice.parents))]
    scale = f"; outputs x {choice.scale:.4g}" if choice.scale != 1 else ""
    if choice.shared:
      gates = ", ".join(f"{gate:.4g}" for gate in choice.shared_gates)
      scale += f"; shared: {', '.join(map(str, choice.shared))} x {gates}"
    lines.append(f"layer {number}: experts from {_folded(words)}{scale}")
  expected = record["expected"]
  if "loss" in record:
    before, after = record["loss"]["before"], record["loss"]["after"]
    lines.append(
      f"{asked.split} loss {before:.5f} -> {after:.5f} ({after - before:+.5f} nats per "
      f"token); expected: {expected}"
    )
    if expected == EQUAL and abs(after - before) > _SAME_LOSS:
      lines.append(
        "Note: the loss should be equal and is not. Gates on this text may differ from "
        "those on random tokens, or a capacity drops other tokens."
      )
  else:
    lines.append(f"expected loss: {expected}")
  lines.append(str(asked.output))
  train = program("train", "experiments.train")
  if asked.optimizer == state.RESET:
    lines.append(
      f"Train it with {train} --config={asked.output}/config.json --init_from="
      f"{asked.output} --workdir=NEXT."
    )
  else:
    lines.append(
      f"Train it with {train} --config={asked.output}/config.json "
      f"--workdir={asked.output} --config.train.num_steps=N."
    )
  return lines


def _made(choice: Choice, index: int) -> str:
  parents = choice.parents[index]
  if parents:
    return "+".join(map(str, parents))
  return (choice.made or ["new"] * (index + 1))[index]


def _folded(words: list[str]) -> str:
  """Returns words separated by commas, equal neighbours once with their count."""
  out: list[list[Any]] = []
  for word in words:
    if out and out[-1][0] == word:
      out[-1][1] += 1
    else:
      out.append([word, 1])
  return ", ".join(w if n == 1 else f"{w} (x{n})" for w, n in out)
