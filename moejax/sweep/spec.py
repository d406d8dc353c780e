"""A sweep's specification, and its points.

A `Spec` is a user's request: a base config, axes, variants, seeds and a budget. Its
points are ordinary configs, each checked by the rules of a single run, each with its own
directory:

    WORKDIR/spec.json                the specification, its points and the code revision
    WORKDIR/runs/NAME-HASH/          one ordinary run directory per point
    WORKDIR/results.csv, report.html, figures/, tables/
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moejax.config import Config

SPEC_FILE = "spec.json"
RUNS = "runs"
TOKENS_FIELD = "train.num_steps"
"""The field that is solved for to meet a training budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """Fields that vary together: one field of a product, or several of a zip."""

  fields: tuple[str, ...]
  """Dotted names, such as `moe.num_experts` or `moe.top2.second_policy`."""
  values: tuple[tuple[Any, ...], ...]
  """One entry per position on the axis: a value for each field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """The specification of a sweep."""

  base: Config
  title: str = ""
  notes: str = ""
  """The docstring of a spec file."""
  axes: tuple[Axis, ...] = ()
  """Axes, all multiplied with each other."""
  variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  """Named settings, as one more axis: name to (dotted field to value)."""
  conditions: tuple[Callable[[Config], bool], ...] = ()
  """A point is kept if all of them return True for its config."""
  seeds: tuple[int, ...] = (0,)
  match: str = ""
  """active_flops: every point costs as much per token as the base config."""
  match_by: str = "moe.hidden"
  """The field that is solved for to meet `match`."""
  isoflop: tuple[float, ...] = ()
  """Training budgets in FLOPs, as one more axis; each solves for `TOKENS_FIELD`."""
  skip_impossible: bool = False
  """Leave out points that a single run would refuse, instead of refusing the sweep."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """One run of a sweep."""

  name: str
  """Readable: `num_experts=16,capacity_factor=1.25,seed=0`."""
  settings: Mapping[str, Any]
  """What distinguishes it: dotted field (or `variant`, `isoflop`) to value, in the order
  of the axes, the seed (`train.seed`) last."""
  config: Config
  """Resolved and checked."""
  digest: str
  """First 8 hex digits of the SHA-256 of the resolved config."""

  @property
  def directory(self) -> str:
    """Name of its run's directory below `runs/`."""
    return f"{self.name}-{self.digest}"
