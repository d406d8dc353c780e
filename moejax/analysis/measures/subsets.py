"""Chance where a token has K distinct experts: sets drawn at random, with given loads.

A token's set S of K experts has probability proportional to the product of weights w_e
over S. Of all distributions of K experts with given loads, this one has the largest
entropy, so it assumes nothing else (conditional Poisson sampling; Chen, Dempster and Liu
1994, Biometrika 81, p. 457).

Letters: E experts, K choices per token, N tokens, J columns (words, domains, segments).
"""

import numpy as np
from jaxtyping import Float, Int

_MOST_ROUNDS = 1_000
_CLOSE = 1e-9
"""Tolerance for a share of tokens."""


def per_token(load: Int[np.ndarray, "E"], tokens: int) -> int | None:
  """Returns K if the loads are those of K experts for each token, else None."""
  choices = round(int(load.sum()) / max(tokens, 1))
  exact = int(load.sum()) == choices * tokens and int(load.max(initial=0)) <= tokens
  return choices if exact and choices else None


def weights(
  load: Int[np.ndarray, "E"], tokens: int, choices: int
) -> Float[np.ndarray, "E"]:
  """Returns w, which sums to 1, so that expert e is in a token's set load_e / N times.

  Args:
    load: tokens of each expert, below N; K N in all.
    tokens: N.
    choices: K.
  """
  share = load / max(tokens, 1)
  odds, found = share / (1 - share), share / share.sum()
  if choices == 1:
    return found
  for _ in range(_MOST_ROUNDS):
    without = _leave_one_out(found, choices)
    ratio = without[:, choices] / without[:, choices - 1]
    wanted = odds * ratio
    error = np.abs(found / (found + ratio) - share).max()
    found = wanted / wanted.sum()
    if error < _CLOSE:
      break
  return found


def together(
  load: Int[np.ndarray, "E"], tokens: int, choices: int
) -> Float[np.ndarray, "E E"]:
  """Returns how many tokens each two experts share by chance; the diagonal is the load.

  Args:
    load: tokens of each expert; K N in all.
    tokens: N.
    choices: K.
  """
  free, left = _free(load, tokens, choices)
  shared = np.minimum(load[:, None], load[None, :]).astype(np.float64)
  if left == 1:
    shared[np.ix_(free, free)] = 0
  elif left > 1:
    own = weights(load[free], tokens, left)
    both = own[:, None] * own[None, :] * _leave_two_out(own, left - 2)
    shared[np.ix_(free, free)] = tokens * both / _sums(own, left)[left]
  np.fill_diagonal(shared, load)
  return shared


def dealt(
  load: Int[np.ndarray, "E"],
  columns: Int[np.ndarray, "J"],
  choices: int,
  rng: np.random.Generator,
) -> Int[np.ndarray, "E J"]:
  """Draws a table in which every token of a column has its own set of distinct experts.

  Columns have exactly K times their tokens; experts have their loads on average.

  Args:
    load: of the experts.
    columns: tokens of each column.
    choices: K.
    rng: randomness.
  """
  out = np.zeros((len(load), len(columns)), np.int64)
  total = int(load.sum()) // choices
  active, needed = _free(load, total, choices)
  out[load >= total] = columns
  if not needed:
    return out
  own = weights(load[active], total, needed)
  # left[k]: tokens of each column that still need k experts, one expert after another.
  left = np.zeros((needed + 1, len(columns)), np.int64)
  left[needed] = columns
  later = np.zeros((len(active) + 1, needed + 1))
  later[len(active), 0] = 1
  for t in range(len(active) - 1, -1, -1):
    later[t] = later[t + 1]
    later[t, 1:] += own[t] * later[t + 1, :-1]
  for t, e in enumerate(active):
    for k in range(1, needed + 1):
      taken = own[t] * later[t + 1, k - 1]
      chance = taken / later[t, k] if later[t, k] > 0 else 0.0
      drawn = rng.binomial(left[k], min(chance, 1.0))
      out[e] += drawn
      left[k] -= drawn
      left[k - 1] += drawn
  return out


def _free(
  load: Int[np.ndarray, "E"], tokens: int, choices: int
) -> tuple[Int[np.ndarray, "F"], int]:
  """Returns the experts that only some tokens have, and K minus the number of others."""
  always = load >= tokens
  return np.flatnonzero((load > 0) & ~always), choices - int(always.sum())


def _sums(own: Float[np.ndarray, "E"], most: int) -> Float[np.ndarray, "n"]:
  """Returns the elementary symmetric polynomials of degrees 0 to `most`."""
  found = np.zeros(most + 1)
  found[0] = 1
  for weight in own:
    found[1:] += weight * found[:-1]
  return found


def _leave_one_out(own: Float[np.ndarray, "E"], most: int) -> Float[np.ndarray, "E n"]:
  """Returns `_sums` without each of the weights in turn.

  Uses sums of positive terms only: dividing a weight out loses digits where it is large.
  """
  size = len(own)
  found = np.zeros((size, most + 1))
  found[:, 0] = 1
  for e, weight in enumerate(own):
    others = np.arange(size) != e
    found[others, 1:] += weight * found[others, :-1]
  return found


def _leave_two_out(own: Float[np.ndarray, "E"], degree: int) -> Float[np.ndarray, "E E"]:
  """Returns the polynomial of one degree without each pair of weights.

  A small weight is divided out of `_leave_one_out`; each large one gets its own sums.
  """
  size, heavy = len(own), np.zeros(len(own), bool)
  while (more := own > own[~heavy].sum() / (4 * degree + 4)).sum() > heavy.sum():
    heavy = more
  without, found = _leave_one_out(own, degree), np.ones((size, size))
  for m in range(1, degree + 1):
    found = without[:, m, None] - own[None, :] * found
  for e in np.flatnonzero(heavy):
    rest = np.arange(size) != e
    found[e, rest] = found[rest, e] = _leave_one_out(own[rest], degree)[:, degree]
  return found
