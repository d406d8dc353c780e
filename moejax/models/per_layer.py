"""Values of each MoE layer, folded as the decoder folds its parameters."""

from typing import Any

import jax

from moejax.config.pattern import Pattern

PARTS = ("prefix", "unit", "suffix")


def by_part(values: Any, pattern: Pattern) -> dict[str, dict[str, Any]]:
  """Cuts a tree with a leading axis of MoE layers into the blocks' own.

  Args:
    values: leaves [L, ...], the MoE layers in order.

  Returns:
    By part and by name of the block in it, MoE blocks only: leaves [...], or
    [R, ...] in the repeated unit.
  """
  result, used = {}, 0
  for part in PARTS:
    kinds = getattr(pattern, part)
    names = [str(index) for index, is_moe in enumerate(kinds) if is_moe]
    repeats = pattern.repeats if part == "unit" else 1
    here = slice(used, used + repeats * len(names))
    used += repeats * len(names)
    result[part] = {}
    for number, name in enumerate(names):

      def pick(
        leaf: Any,
        part: str = part,
        here: slice = here,
        step: int = len(names),
        number: int = number,
      ) -> Any:
        own = leaf[here][number::step]
        return own if part == "unit" else own[0]

      result[part][name] = jax.tree.map(pick, values)
  return result
