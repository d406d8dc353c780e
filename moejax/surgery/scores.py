"""Chooses experts by scores, layer by layer and group by group.

Letters: E experts.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from moejax.config import MoEConfig
from moejax.config.router import make_router
from moejax.errors import UserError


def summed(
  by_layer: Mapping[int, Float[np.ndarray, "..."]],
) -> dict[int, Float[np.ndarray, "..."]]:
  """Returns the sum over layers, for each layer, so that all choose the same."""
  total = np.sum(np.stack(list(by_layer.values())), axis=0)
  return {layer: np.asarray(total) for layer in by_layer}


def best(
  scores: Float[np.ndarray, "E"], count: int, num_groups: int = 1
) -> tuple[int, ...]:
  """Returns the experts with the highest scores, ascending; equally many of each group.

  Args:
    scores: ties go to the lower index.
    count: number of experts; a multiple of `num_groups`.
    num_groups: number of equal groups of consecutive experts.
  """
  size = len(scores) // num_groups
  found: list[int] = []
  for group in range(num_groups):
    order = np.argsort(-scores[group * size : (group + 1) * size], kind="stable")
    found += [group * size + int(e) for e in order[: count // num_groups]]
  return tuple(sorted(found))


def equal_groups(moe: MoEConfig, experts: int, flag: str) -> int:
  """Returns the number of groups of the router's experts; 1 if there are none.

  Raises:
    UserError: the groups would no longer be equal.
  """
  groups = make_router(moe).expert_groups
  if experts % groups:
    raise UserError(
      f"{flag}: the router has {groups} groups of experts, which must stay equal. Give "
      f"a multiple of {groups}."
    )
  return groups


def in_words(experts: int) -> str:
  """Returns "1 expert", "2 experts" and so on."""
  return f"{experts} expert" + "s" * (experts != 1)


def refuse_below(k: int, experts: int, flag: str) -> None:
  """Rejects fewer experts than a token chooses.

  Raises:
    UserError: there are too few; the message names the flag.
  """
  if experts < k:
    raise UserError(
      f"{flag}: a token chooses {in_words(k)}, and {experts} would be left. Keep at "
      f"least {k}, or lower K first (operation select)."
    )
