"""Per-layer values, grouped by block like the decoder's parameters."""

from typing import Any

import jax

from moejax.config.pattern import Pattern

PARTS = ("prefix", "unit", "suffix")


def by_part(values: Any, pattern: Pattern) -> dict[str, dict[str, Any]]:
  """Splits a tree with a leading axis of MoE layers into one tree per MoE block.

  Args:
    values: leaves [L, ...], the MoE layers in order.

  Returns:
    Trees by part and block name, MoE blocks only: leaves [...], or [R, ...] in the
    repeated unit.
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
