"""Loss curves: smoothing, and the cost at which they first reach a loss."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from moejax.errors import UserError
from moejax.sweep.laws.law import Floats

_RISES = 0.5
"""Fraction of the squared error that a turn must remove to count as one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """One run's loss over its cost."""

  cost: Floats
  """[points], increasing: steps, FLOPs or seconds, counted from the start."""
  loss: Floats
  """[points], nats per token."""


def smooth(loss: ArrayLike) -> Floats:
  """Returns a non-increasing sequence close to a loss curve: its best loss so far.

  This is isotonic regression, which needs no window and has no bias towards lucky
  batches, unlike a running minimum. A curve that turns and rises for good is fitted as
  falling and then rising (unimodal regression), and stays at the loss of its turn: in a
  fit that only falls, the end of the rise would pull the fall up.
  """
  values = np.asarray(loss, np.float64)
  falling, rising = _errors(values), _errors(values[::-1])[::-1]
  errors = falling + np.append(rising[1:], 0.0)
  # The last of equal ones, so that the turn itself still belongs to the fall.
  end = len(values) - int(np.argmin(errors[::-1]))
  if errors[end - 1] >= _RISES * falling[-1]:
    end = len(values)
  down = optimize.isotonic_regression(values[:end], increasing=False).x
  up = optimize.isotonic_regression(values[end:]).x if end < len(values) else []
  return np.minimum.accumulate(np.concatenate([down, up]))


def _errors(values: Floats) -> Floats:
  """Returns the squared error of the best non-increasing fit of each prefix.

  Pooling adjacent violators from left to right gives the fit of every prefix.
  """
  blocks: list[tuple[float, int, float]] = []  # Mean, size and squared error.
  out, total = [], 0.0
  for value in values:
    mean, size, error = float(value), 1, 0.0
    while blocks and blocks[-1][0] < mean:
      other, count, own = blocks.pop()
      total -= own
      gap = (mean - other) ** 2 * size * count / (size + count)
      error += own + gap
      mean = (mean * size + other * count) / (size + count)
      size += count
    blocks.append((mean, size, error))
    total += error
    out.append(max(total, 0.0))
  return np.array(out)


def cost_to(curve: Curve, target: float) -> float:
  """Returns the cost at which the smoothed curve first reaches a loss; inf if never.

  Interpolates linearly between points. For a curve that starts at or below the target,
  returns its first cost, which is then only an upper bound.
  """
  loss = smooth(curve.loss)
  reached = np.flatnonzero(loss <= target)
  if not len(reached):
    return math.inf
  i = int(reached[0])
  if i == 0:
    return float(curve.cost[0])
  part = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
  return float(curve.cost[i - 1] + part * (curve.cost[i] - curve.cost[i - 1]))


def is_early(curve: Curve, target: float) -> bool:
  """Returns whether a curve is below a loss before its first point."""
  return bool(smooth(curve.loss)[0] < target)


def table(curves: Sequence[Curve], side: str) -> tuple[Floats, Floats]:
  """Returns costs common to all seeds, and [seeds, points] losses there."""
  if not curves:
    raise UserError(f"The {side} has no loss curve.")
  for curve in curves:
    usable = np.isfinite(curve.cost).all() and np.isfinite(curve.loss).all()
    if curve.cost.shape != curve.loss.shape or curve.cost.ndim != 1 or not usable:
      raise UserError(f"The {side}: a curve needs finite costs and losses, in pairs.")
    if not len(curve.cost) or np.any(np.diff(curve.cost) <= 0):
      raise UserError(f"The {side}: the costs of a curve must increase.")
  start = max(curve.cost[0] for curve in curves)
  end = min(curve.cost[-1] for curve in curves)
  common = curves[0].cost[(curves[0].cost >= start) & (curves[0].cost <= end)]
  if not len(common):
    raise UserError(f"The {side}: its seeds' curves have no cost in common.")
  return common, np.stack([np.interp(common, c.cost, c.loss) for c in curves])
