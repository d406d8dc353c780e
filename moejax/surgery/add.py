"""Add: new experts in addition to the existing ones.

  random   matrices drawn from a normal distribution with the mean and standard deviation
           of the layer's experts
  copy     copies of experts of the same layer: those in --of, or else the least used
  run      copies of another run's experts in the same layer: those in --of

Their router rows are newly initialised, zero, or those of their originals. The old
experts keep theirs.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from moejax.checkpoint.read import DamagedCheckpointError
from moejax.config import Config
from moejax.config.router import make_router
from moejax.errors import UserError
from moejax.options import count, option
from moejax.surgery import lineage
from moejax.surgery.change import layer_arrays
from moejax.surgery.operation import (
  EXPERTS,
  ROUTER,
  Choice,
  Kind,
  Layer,
  Operation,
  Source,
  flat,
  taken,
)
from moejax.surgery.scores import equal_groups
from moejax.surgery.source import Opened, damaged, open_run, tokenizer_of
from moejax.surgery.where import layers_of

_SIZES = (
  "model.width",
  "width of an expert (moe.hidden)",
  "moe.expert_bias",
  "the activation of experts",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Add(Operation):
  """Adds experts to every layer, after the existing ones."""

  name = "add"
  summary = "more experts: random ones, copies, or those of another run"

  number: int = option(0, "how many", count(1, 65_536, "they must fit into memory"))
  init: Literal["random", "copy", "run"] = option(
    "random", "drawn at random, copies of existing experts, or of another run's"
  )
  of: str = option("", "init=copy or run: indices of their originals: 0,3")
  from_run: str = option("", "init=run: directory of the other run")
  from_step: int = option(
    -1, "init=run: which checkpoint; -1 is the newest", count(-1, 2**31, "a step")
  )
  row: Literal["random", "copy", "zero"] = option(
    "random", "their router rows: newly initialised, of their originals, or zero"
  )
  first: Opened | None = None
  """The run of --workdir."""

  @property
  def other_sources(self) -> Sequence[tuple[Path, int]]:
    if self.init != "run":
      return ()
    return [(self._other.workdir, self._other.step)]

  def of_run(self, run: Opened) -> "Add":
    return dataclasses.replace(self, first=run)

  def check(self, old: Config) -> None:
    if not self.number:
      raise UserError("--number=N is missing: give the number of new experts.")
    router = make_router(old.moe)
    if router.fixed_slots:
      raise UserError(
        f"--config.moe.router={old.moe.router} has learned slots for these experts only. "
        "Change the router first (operation reroute)."
      )
    if router.expert_groups > 1:
      equal_groups(old.moe, self.number, f"--number={self.number}")
      raise UserError(
        f"--config.moe.router={old.moe.router} has groups of experts, and experts are "
        "added after the last. Use operation clone."
      )
    if self.row == "copy" and self.init == "random":
      raise UserError("--row=copy: random experts have no original. Use --row=random.")
    if bool(self.from_run) != (self.init == "run"):
      raise UserError(
        f"--from_run={self.from_run}: give it with --init=run, and only then."
      )
    if self.of and self.init == "random":
      raise UserError(f"--of={self.of}: random experts have no original. Leave it out.")
    if self.init != "random":
      self._originals(old.moe.fine_experts if self.init == "copy" else None)
    if self.init == "run":
      self._check_other(old)

  def _originals(self, experts: int | None) -> list[int]:
    """Returns the original of each new expert.

    Raises:
      UserError: there is no such expert.
    """
    words = self.of.split(",") if self.of else [str(i) for i in range(self.number)]
    try:
      found = [int(word) for word in words]
    except ValueError:
      raise UserError(f"--of={self.of}: give numbers separated by commas.") from None
    if len(found) != self.number:
      raise UserError(
        f"--of={self.of} names {len(found)} experts, --number={self.number}."
      )
    if experts is not None and not all(0 <= e < experts for e in found):
      raise UserError(f"--of={','.join(words)}: there are experts 0 to {experts - 1}.")
    return found

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe = flat(new.moe)
    new.moe.num_experts += self.number
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    found: dict[int, Choice] = {}
    prints = self._verified() if self.init == "run" else {}
    for number, layer in source.layers.items():
      parents: list[tuple[int, ...]] = [(e,) for e in range(layer.old.fine_experts)]
      made = ["old"] * len(parents) + ["random"] * self.number
      if self.init == "copy":
        parents += [(e,) for e in self._originals(layer.old.fine_experts)]
      else:
        parents += [()] * self.number
      if self.init == "run":
        other = f"of {self._other.workdir.resolve()}, step {self._other.step}"
        theirs = prints[number]
        own = [f"expert {e} ({theirs[e]}) {other}" for e in self._originals(None)]
        made = made[: -self.number] + own
      found[number] = Choice(parents=parents, made=made)
    return found

  @functools.cached_property
  def _other(self) -> Opened:
    step = None if self.from_step < 0 else self.from_step
    return open_run(self.from_run, step, flag=f"--from_run={self.from_run}")

  def _verified(self) -> dict[int, list[str]]:
    """Returns the fingerprints of the other run's experts, by the number of their layer.

    Raises:
      UserError: an array of it does not match its checksum.
    """
    other = self._other
    try:
      other.slices.verify("params.")
    except DamagedCheckpointError as e:
      raise damaged(f"--from_run={self.from_run}", other.step, e) from e
    return lineage.fingerprints(other.slices.leaves, layers_of(other.model))

  def _check_other(self, old: Config) -> None:
    """Rejects a run whose experts do not fit.

    Raises:
      UserError: they do not fit; the message names what differs.
    """
    other, flag = self._other, f"--from_run={self.from_run}"
    self._originals(other.config.moe.fine_experts)
    both = zip(_SIZES, _sizes(other.config), _sizes(old), strict=True)
    differing = [
      f"{name} is {was} there and {now} here" for name, was, now in both if was != now
    ]
    if differing:
      raise UserError(f"{flag}: {'; '.join(differing)}. Give a run of the same sizes.")
    if (run := self.first) is None:
      return
    if other.step != run.step:
      raise UserError(
        f"{flag} is at step {other.step} and --workdir at {run.step}. Give the same with "
        "--from_step and --step."
      )
    missing = [n for n in run.model.moe_layers if n not in other.model.moe_layers]
    if missing:
      raise UserError(f"{flag} has no MoE layer {missing[0]}, as --workdir has.")
    if tokenizer_of(self.from_run) != tokenizer_of(run.workdir):
      raise UserError(
        f"{flag} has another tokenizer, so its experts have learned other ids. Give a "
        "run with the same one."
      )

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    axis = layer.axis(name)
    if axis is None:
      return layer.arrays[name]
    num_old = layer.old.fine_experts
    if name.startswith(ROUTER) and self.row != "copy":
      old = layer.arrays[name]
      new = layer.fresh(name) if self.row == "random" else layer.zeros(name)
      new = np.take(new, np.arange(num_old, num_old + self.number), axis)
      return np.concatenate([old, new.astype(old.dtype)], axis)
    if self.init == "copy":
      return taken(name, layer)
    old = layer.arrays[name]
    if layer.kind is not Kind.VALUE:
      new = np.zeros_like(np.take(old, [0] * self.number, axis))
    elif self.init == "run":
      theirs = self._other
      where = layers_of(theirs.model)[layer.number]
      arrays = layer_arrays(theirs.slices, "params.", where)
      new = np.take(arrays[name], self._originals(None), axis)
    else:
      new = self._drawn(name, layer, old)
    return np.concatenate([old, new.astype(old.dtype)], axis)

  def _drawn(self, name: str, layer: Layer, old: np.ndarray) -> np.ndarray:
    assert name.startswith(EXPERTS)
    exact = np.asarray(old, np.float64)
    random = layer.random(sorted(layer.arrays).index(name))
    shape: Sequence[int] = (self.number, *old.shape[1:])
    return random.normal(exact.mean(), exact.std(), shape)


def _sizes(config: Config) -> tuple[int | bool | str, ...]:
  """Returns the values that must be equal in both runs, in the order of `_SIZES`."""
  moe, model = config.moe, config.model
  activation = moe.activation or model.activation
  return model.width, moe.fine_hidden, moe.expert_bias, activation
