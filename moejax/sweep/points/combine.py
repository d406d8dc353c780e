"""Every combination of a specification's variants, axes and budgets.

An option of a router multiplies only the combinations that have that router. So the
router of a combination is decided first, by everything that is not such an option.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from moejax.config import text as config_text
from moejax.errors import ConfigError
from moejax.sweep.points import axes as axes_lib
from moejax.sweep.points import budget
from moejax.sweep.spec import Axis, Spec

VARIANT = "variant"
ISOFLOP = "isoflop"

_ABSENT = -1
"""Position on an axis that does not apply to a point; sorts before the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """One position on one axis."""

  settings: Mapping[str, Any]
  """Settings that name the point."""
  fields: Mapping[str, Any]
  """Fields to set in the config."""
  flops: float | None = None
  """Training budget to solve for."""
  size: budget.Size | None = None
  """Size to scale the config to."""

  @property
  def only_routers(self) -> set[str]:
    """Routers whose options are set; empty if anything else is set too."""
    routers = {_router_named(field) for field in self.fields}
    return routers if self.fields and "" not in routers else set()

  def of_router(self, router: str) -> "Choice":
    """Returns the choice without options of other routers."""

    def own(values: Mapping[str, Any]) -> dict[str, Any]:
      return {k: v for k, v in values.items() if _router_named(k) in ("", router)}

    return dataclasses.replace(self, settings=own(self.settings), fields=own(self.fields))


def combinations(spec: Spec) -> list[list[Choice]]:
  """Returns the choices of each point, in the order of points, without seeds."""
  axes = [_variants(spec), *map(_positions, spec.axes), *_budgets(spec)]
  # A router's option is an axis only if that router is chosen, so it is decided second.
  routers = [set().union(*(c.only_routers for c in axis)) for axis in axes]
  rows: list[tuple[int, ...]] = []
  plain = ([_ABSENT] if own else range(len(axis)) for axis, own in zip(axes, routers))
  for partial in itertools.product(*plain):
    router = router_of(spec, _chosen(axes, partial))
    rows += itertools.product(
      *(
        range(len(axis)) if router in own else [index]
        for axis, own, index in zip(axes, routers, partial)
      )
    )
  found = []
  for row in sorted(rows):
    chosen = _chosen(axes, row)
    router = router_of(spec, chosen)
    found.append([choice.of_router(router) for choice in chosen])
  _refuse_unreached(spec, found)
  return found


def router_of(spec: Spec, choices: Iterable[Choice]) -> str:
  """Returns the router of a combination."""
  router = spec.base.moe.router
  for choice in choices:
    router = choice.fields.get("moe.router", router)
  return router


def _chosen(axes: list[list[Choice]], row: tuple[int, ...]) -> list[Choice]:
  return [axis[index] for axis, index in zip(axes, row) if index != _ABSENT]


def _refuse_unreached(spec: Spec, found: list[list[Choice]]) -> None:
  """Rejects options of a router that no point has."""
  reached = {field for choices in found for choice in choices for field in choice.fields}
  for field in sorted(varied(spec) - reached):
    router = _router_named(field)
    raise ConfigError(
      f"--{axes_lib.SWEEP}.{field}: no point has --config.moe.router={router}. Set it, "
      f"or add {router} to --{axes_lib.SWEEP}.moe.router."
    )


def _router_named(field: str) -> str:
  return field.split(".")[1] if config_text.is_router_option(field) else ""


def _positions(axis: Axis) -> list[Choice]:
  rows = [dict(zip(axis.fields, values)) for values in axis.values]
  return [Choice(settings=row, fields=row) for row in rows]


def _variants(spec: Spec) -> list[Choice]:
  if not spec.variants:
    return [Choice(settings={}, fields={})]
  return [
    Choice(settings={VARIANT: name}, fields=dict(fields))
    for name, fields in spec.variants.items()
  ]


def _budgets(spec: Spec) -> list[list[Choice]]:
  """Returns the axis of budgets, each with its sizes unless the spec has an axis of them.

  It is at most one axis, since budgets differ in the sizes that can spend them.
  """
  if not spec.isoflop:
    return []
  if varied(spec) & set(budget.SIZE_FIELDS):
    return [[Choice(settings={ISOFLOP: c}, fields={}, flops=c) for c in spec.isoflop]]
  return [
    [
      Choice(
        settings={ISOFLOP: flops} | size.shown(),
        fields={},
        flops=flops,
        size=size,
      )
      for flops in spec.isoflop
      for size in budget.ladder(spec.base, flops)
    ]
  ]


def varied(spec: Spec) -> set[str]:
  """Returns the fields that axes and variants set."""
  fields = {field for axis in spec.axes for field in axis.fields}
  return fields | {f for settings in spec.variants.values() for f in settings}
