"""Train apart and join: dense runs of one seed model become the experts of one model.

Branch-Train-MiX (arXiv:2403.07816, section 2.2): the feed-forwards of the runs become the
experts of every layer that the new config makes MoE: expert 0 comes from --workdir, the
others from --runs in their order. All other parameters are averaged, with the weights in
--weights (uniform in the paper). A pattern such as --runs='SWEEP/runs/*' names all runs
of a sweep, sorted by name and without --workdir.

  router    random, zero, or means: mean inputs of the layer on each run's own text; see
            `moejax.surgery.domain_means`
  frozen    FlexOlmo (arXiv:2507.07024): the expert of --workdir, trained on public text,
            stays as it is; the new config freezes it (train.frozen)
  scale_out  as for upcycle: w_out is scaled to make up for gates that do not sum to 1

The runs must share the tokenizer and the model, and start from one run (--init_from); the
seed run itself may be among them. With copies of one run and gates that sum to the same
value for every token, the first logits are those of the run.

Letters: D width, R runs, m segments, E = R m experts, F = hidden / m.
"""

import collections
import copy
import dataclasses
import functools
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from absl import logging
from jaxtyping import Float, Shaped

from moejax import data, files
from moejax.checkpoint.params import restore_params
from moejax.checkpoint.read import DamagedCheckpointError
from moejax.config import Config
from moejax.config import text as config_text
from moejax.errors import UserError
from moejax.models.placement import param_shardings
from moejax.options import Range, option, show
from moejax.run import owner
from moejax.run.workdir import RUN_FILE
from moejax.surgery.change import layer_arrays
from moejax.surgery.domain_means import means, router_rows
from moejax.surgery.gates import Gates
from moejax.surgery.measured import Text
from moejax.surgery.operation import (
  DROP,
  EXPERTS,
  OUTPUTS,
  ROUTER,
  Choice,
  Layer,
  Operation,
  Source,
)
from moejax.surgery.source import Opened, damaged, open_run, tokenizer_of
from moejax.surgery.upcycle import DENSE, Upcycle, in_segments
from moejax.surgery.where import layers_of

_FREE = ("dtype", "remat", "scan_layers", "max_position", "param_dtype")
"""Fields of the model that do not change its function."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Btx(Operation):
  """Makes experts from the feed-forwards of several dense runs."""

  name = "btx"
  summary = "dense runs from one seed model become the experts of one model"
  reads = ("moe.*",)
  needs_moe = False
  keeps_moments = False

  runs: str = option(
    "", "directories of the other dense runs, or patterns of them, separated by commas"
  )
  weights: str = option(
    "",
    "weights of the runs in the average of all other parameters, --workdir's first: "
    "2,1,1; empty is equal",
  )
  router: Literal["random", "zero", "means"] = option(
    "random", "router rows: initialised anew, zero, or mean inputs of each run's text"
  )
  router_scale: float = option(
    1.0, "router=means: norm of a row", Range(0, 1e4, "0 is a zero router")
  )
  scale_out: bool = option(
    True, "scale outputs so that equal experts compute what one of them did"
  )
  frozen: bool = option(
    False, "record in the config that the expert of --workdir is not trained"
  )
  first: Opened | None = None
  """The run of --workdir."""

  @property
  def reads_text(self) -> bool:
    return self.router == "means"

  @property
  def other_sources(self) -> Sequence[tuple[Path, int]]:
    return [(run.workdir, run.step) for run in self._others]

  @functools.cached_property
  def _others(self) -> list[Opened]:
    first = None if self.first is None else self.first.workdir
    words = _directories(self.runs, first)
    if not words:
      raise UserError("--runs=RUN_B,RUN_C is missing: give the other dense runs.")
    return [open_run(word, flag=f"--runs={word}") for word in words]

  @functools.cached_property
  def _parts(self) -> Float[np.ndarray, "R"]:
    """Weights of the average, which sum to 1."""
    number = 1 + len(self._others)
    if not self.weights:
      return np.full(number, 1.0 / number)
    try:
      found = np.array([float(word) for word in self.weights.split(",")])
    except ValueError:
      found = np.zeros(0)
    if len(found) != number or not (found >= 0).all() or not 0 < found.sum() < np.inf:
      raise UserError(
        f"--weights={self.weights}: give {number} numbers of at least 0 with a sum above "
        "0, separated by commas."
      )
    return found / found.sum()

  @property
  def _upcycle(self) -> Upcycle:
    """The operation that makes sizes, scales and random router rows."""
    drawn = "zero" if self.router == "zero" else "random"
    return Upcycle(router=drawn, scale_out=self.scale_out)

  # ------------------------------------------------------------------------- checks

  def of_run(self, run: Opened) -> "Btx":
    return dataclasses.replace(self, first=run)

  def check(self, old: Config) -> None:
    self._upcycle.check(old)
    assert len(self._parts)
    for run in self._others:
      flag = f"--runs={run.workdir}"
      if run.model.moe_layers:
        raise UserError(f"{flag} has MoE layers already. Give dense runs.")
      for name, was, now in config_text.difference(old, run.config):
        section, _, field = name.partition(".")
        if section == "model" and field not in _FREE:
          raise UserError(
            f"{flag}: --config.{name} is {show(now)} there and {show(was)} in --workdir. "
            "Give runs of one model."
          )
    if self.first is not None:
      self._check_directories(self.first)

  def _check_directories(self, run: Opened) -> None:
    """Rejects runs with another tokenizer, other shapes or another seed run."""
    seeds = {}
    for other in self._others:
      flag = f"--runs={other.workdir}"
      if tokenizer_of(other.workdir) != tokenizer_of(run.workdir):
        raise UserError(
          f"{flag} has another tokenizer than --workdir, so its parameters have learned "
          "other ids. Give runs with the same one."
        )
      for name in run.slices.names("params."):
        mine = run.slices.shape(name)
        if name not in other.slices.leaves or other.slices.shape(name) != mine:
          theirs = other.slices.leaves.get(name, {}).get("shape", "not there")
          raise UserError(
            f"{flag}: {name} is {theirs}, and {list(mine)} in --workdir. Give runs of "
            "one model."
          )
    _warn_of_repeats([one.workdir for one in (run, *self._others)])
    for one in (run, *self._others):
      seeds[one.workdir.resolve()] = _seed(one.workdir)
    _refuse_seeds(seeds)

  # ------------------------------------------------------------------------- config

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    new.moe.num_experts = 1 + len(self._others)
    new = self._upcycle.new_config(old, new)
    if asked.data.domains == old.data.domains:
      new.data.domains = _union([old, *(run.config for run in self._others)])
    if self.frozen:
      new.train.frozen = f"*.moe.experts.*[0:{new.moe.segments}]"
    return new

  # ------------------------------------------------------------------------- arrays

  def choose(self, source: Source) -> dict[int, Choice]:
    runs, is_copy = list(self._others), False
    for run in self._others:
      try:
        run.slices.verify("params.")
      except DamagedCheckpointError as e:
        raise damaged(f"--runs={run.workdir}", run.step, e) from e
    if self.first is not None:
      runs.insert(0, self.first)
      is_copy = all(_same(self.first, run) for run in self._others)
    rows = self._rows(source, runs) if self.router == "means" else {}
    found = {}
    for number, layer in source.layers.items():
      words = [f"feed-forward of {r.workdir.resolve()}, step {r.step}" for r in runs]
      made = [word for word in words for _ in range(layer.new.segments)]
      found[number] = Choice(
        parents=[()] * len(made), made=made, rows=rows.get(number), exact=is_copy
      )
    return found

  def _rows(
    self, source: Source, runs: Sequence[Opened]
  ) -> dict[int, Float[np.ndarray, "D R"]]:
    """Returns router rows made from each run's own text."""
    like = source.measured.text
    found = [means(_own_text(run, like), tuple(source.layers)) for run in runs]
    return router_rows(found, self.router_scale)

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    rows = layer.choice.rows
    if name == f"{ROUTER}weight" and rows is not None:
      return np.repeat(rows, layer.new.segments, axis=1).astype(np.float32)
    if not name.startswith(EXPERTS):
      return self._upcycle.leaf(name, layer)
    below = name.removeprefix(EXPERTS)
    if below.endswith("bias"):
      return layer.zeros(name)
    matrices = [layer.arrays[DENSE + below]]
    for run in self._others:
      where = layers_of(run.model)[layer.number]
      matrices.append(layer_arrays(run.slices, "params.", where)[DENSE + below])
    out = in_segments(np.stack(matrices), below, layer.new.segments)
    return layer.scaled(out, layer.choice.scale) if name in OUTPUTS else out

  def copied(
    self, name: str, index: tuple[int, ...], x: Shaped[np.ndarray, "..."]
  ) -> Shaped[np.ndarray, "..."]:
    total = self._parts[0] * np.asarray(x, np.float64)
    for part, run in zip(self._parts[1:], self._others, strict=True):
      total = total + part * np.asarray(run.slices.read(name, index), np.float64)
    return total

  def scale(self, gates: Gates, choice: Choice) -> float:
    return self._upcycle.scale(gates, choice)

  def expected(self, gates: Gates, choice: Choice) -> str:
    return self._upcycle.expected(gates, choice) if choice.exact else DROP


def _directories(text: str, first: Path | None) -> list[str]:
  """Returns the directories that a list of names and patterns refers to.

  Names of a sweep's runs contain commas, so they must be given by a pattern.

  Args:
    text: names and patterns, separated by commas; or one name.
    first: left out of the matches of a pattern.

  Raises:
    UserError: a name is not a directory, or a pattern matches none.
  """
  if Path(text).is_dir() and text:
    return [text]
  found: list[str] = []
  for word in (word.strip() for word in text.split(",") if word.strip()):
    if not set(word) & set("*?["):
      if not Path(word).is_dir():
        raise UserError(
          f"--runs={word} is not a directory. If the name of a run has commas, write ? "
          "for each of them."
        )
      found.append(word)
      continue
    paths = [path for path in sorted(glob.glob(word)) if Path(path).is_dir()]
    if first is not None:
      paths = [path for path in paths if Path(path).resolve() != first.resolve()]
    if not paths:
      raise UserError(f"--runs={word} matches no other directory. Check the spelling.")
    found += paths
  return found


def _warn_of_repeats(directories: Sequence[Path]) -> None:
  """Warns of a run that is joined more than once, which may be a mistake."""
  times = collections.Counter(path.resolve() for path in directories)
  if repeated := [f"{path} {n} times" for path, n in times.items() if n > 1]:
    logging.warning(
      "--workdir and --runs name %s: each time makes an expert and counts in the "
      "average. Name a run once if that is not intended.",
      ", ".join(repeated),
    )


def _same(one: Opened, other: Opened) -> bool:
  """Returns whether two runs have equal parameters, by their checksums."""
  names = one.slices.names("params.")
  return all(one.slices.leaves[n]["sum"] == other.slices.leaves[n]["sum"] for n in names)


def _union(configs: Sequence[Config]) -> str:
  """Returns the domains of all runs; empty, meaning all, if one of them read all."""
  lists = [config.data.domains for config in configs]
  if not all(lists):
    return ""
  names = [name.strip() for domains in lists for name in domains.split(",")]
  return ",".join(dict.fromkeys(names))


def _own_text(run: Opened, like: Text) -> Text:
  """Returns a run's model and its own text, limited to the same part as `like`."""
  config = owner.own_paths(run.config, run.slices.meta.get("owner"), (), run.workdir)
  dataset = data.load(config.data, workdir=run.workdir, store=False)
  shardings = param_shardings(run.model, like.mesh)
  params, _, _ = restore_params(run.workdir, run.step, shardings)
  return dataclasses.replace(like, model=run.model, params=params, dataset=dataset)


def _seed(workdir: Path) -> Path | None:
  """Returns the run that a run started from; None if it is not recorded."""
  try:
    found = files.read_json(workdir / RUN_FILE)
  except (OSError, ValueError):
    return None
  origin = found.get("init_from") if isinstance(found, dict) else None
  return Path(origin) if isinstance(origin, str) else None


def _refuse_seeds(seeds: dict[Path, Path | None]) -> None:
  """Rejects runs that started from different runs, and warns if this is not known.

  Args:
    seeds: for each run's directory, the run that it started from.

  Raises:
    UserError: two of them differ.
  """
  known = {run: seed for run, seed in seeds.items() if seed is not None}
  if len(set(known.values())) > 1:
    (one, first), *rest = known.items()
    other, second = next(item for item in rest if item[1] != first)
    raise UserError(
      f"{one} started from {first} and {other} from {second}: an average of parameters "
      "is then meaningless. Give runs that started from one with --init_from."
    )
  unknown = [run for run in seeds if run not in known and run not in known.values()]
  if unknown and len(seeds) > 1:
    logging.warning(
      "%s does not record that it started from the same run as the others: an average of "
      "parameters then means little.",
      unknown[0],
    )
