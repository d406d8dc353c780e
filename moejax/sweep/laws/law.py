"""The base of scaling laws: constants, inputs, a formula, and the range of the fit.

A law is a frozen dataclass. Its float fields are the constants, with the published values
as defaults; a fit makes another instance of the same class. Inputs are passed by the
paper's letters, and may be arrays that broadcast against each other.

Letters mean different things in different laws, so each class lists its own in
`definitions`; moejax/sweep/laws/definitions.py computes them from a config.
"""

import dataclasses
import math
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from moejax.errors import UserError, did_you_mean

Floats = NDArray[np.float64]
Span = tuple[float, float]


def spans(**inputs: Span) -> Any:
  """Declares the default of a law's `ranges`."""
  return dataclasses.field(default_factory=lambda: dict(inputs), compare=False)


class OutsideFittedRange(UserWarning):
  """A law was used for a prediction outside the range of its fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
  """The best split of a training budget under a law."""

  N: float
  """Parameters, as the law defines N."""
  D: float
  """Training tokens."""
  loss: float
  """Nats per token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
  """Base class; a subclass declares constants as float fields and `formula`."""

  ranges: Mapping[str, Span] = dataclasses.field(default_factory=dict, compare=False)
  """Range of the fit: least and greatest value of each input."""

  source: ClassVar[str] = ""
  """arXiv number, equation and table."""
  definitions: ClassVar[Mapping[str, str]] = {}
  """The letter of each input, and what it counts."""
  output: ClassVar[str] = "loss"
  """The predicted quantity: `loss`, nats per token, or `leverage`, a ratio of FLOPs."""
  positive: ClassVar[frozenset[str]] = frozenset()
  """Constants that are fitted by their logarithm."""
  starts: ClassVar[Mapping[str, tuple[float, ...]]] = {}
  """Grid of a fit's starting points: the values to try for each constant."""

  # `*args` only tells the type checker that a subclass chooses its own letters.
  def formula(self, *args: Any, **inputs: Any) -> Any:
    """Returns the prediction, without a check of the range.

    It must be analytic in the constants, since a fit differentiates it by a complex step.
    """
    raise NotImplementedError

  @classmethod
  def evaluate(cls, constants: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
    """Returns `formula` for constants of any number type: complex, or arrays of many."""
    # A law's fields are floats; the formula only reads attributes.
    return cls.formula(cast(Any, types.SimpleNamespace(**constants)), **inputs)

  @classmethod
  def constant_names(cls) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls) if f.type in (float, "float"))

  @property
  def constants(self) -> dict[str, float]:
    """The constants by name."""
    return {name: getattr(self, name) for name in self.constant_names()}

  @classmethod
  def inputs(cls) -> tuple[str, ...]:
    """Returns the letters that `predict` takes."""
    return tuple(cls.definitions)

  @classmethod
  def checked(cls, **inputs: ArrayLike) -> dict[str, Floats]:
    """Returns inputs as float64 arrays.

    Raises:
      UserError: a letter is unknown or missing, or a value is not a finite number.
    """
    names = cls.inputs()
    for name in inputs:
      if name not in names:
        raise UserError(f"{cls.__name__}: no input {name}. {did_you_mean(name, names)}")
    if missing := [name for name in names if name not in inputs]:
      what = "; ".join(f"{name}: {cls.definitions[name]}" for name in missing)
      raise UserError(f"{cls.__name__} also needs {what}.")
    arrays = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    for name, array in arrays.items():
      if not np.all(np.isfinite(array)):
        raise UserError(f"{cls.__name__}: {name} must be finite, and has {array}.")
    return arrays

  def outside(self, **inputs: ArrayLike) -> list[str]:
    """Returns one sentence for each input outside the fitted range."""
    notes = []
    for name, (low, high) in self.ranges.items():
      if name not in inputs:
        continue
      values = np.asarray(inputs[name], np.float64)
      # Recomputed inputs differ from the fitted ones by rounding.
      if values.min() < low * (1 - 1e-9) or values.max() > high * (1 + 1e-9):
        given = " to ".join(f"{v:.4g}" for v in sorted({values.min(), values.max()}))
        notes.append(f"{name} = {given} is outside the fitted {low:.4g} to {high:.4g}")
    return notes

  def predict(self, **inputs: ArrayLike) -> Floats:
    """Returns the prediction for inputs that broadcast against each other.

    Warns:
      OutsideFittedRange: an input is outside; one warning per call names all of them.

    Raises:
      UserError: an unknown, missing or non-finite input.
    """
    arrays = self.checked(**inputs)
    if notes := self.outside(**arrays):
      name = type(self).__name__
      warnings.warn(f"{name}: {'; '.join(notes)}.", OutsideFittedRange, stacklevel=2)
    return np.asarray(self.formula(**arrays))

  def flops_per_token(self, n: float, **others: float) -> float:
    """Returns training FLOPs per token of a model with N = n; 6 N if not overridden."""
    del others
    return 6.0 * n

  def optimum(
    self,
    budget: float,
    *,
    flops_per_token: Callable[[float], float] | None = None,
    **others: float,
  ) -> Optimum:
    """Returns N and D that minimise the loss at `budget` = D * FLOPs per token.

    Args:
      budget: C, training FLOPs.
      flops_per_token: training FLOPs of a token as a function of N, growing with N;
        None is the paper's own count.
      **others: the law's other inputs, such as E.

    Raises:
      UserError: the law has no N and D, or the budget is not positive.
    """
    if self.output != "loss" or not {"N", "D"} <= set(self.inputs()):
      raise UserError(f"{type(self).__name__} has no optimum: it does not trade N for D.")
    if not (budget > 0 and math.isfinite(budget)):
      raise UserError(f"budget={budget:g}: it must be a positive number of FLOPs.")
    cost = flops_per_token or (lambda n: self.flops_per_token(n, **others))

    def loss(log_n: float) -> float:
      n = math.exp(log_n)
      return float(self.formula(N=n, D=budget / cost(n), **others))

    self.checked(N=1.0, D=1.0, **others)
    # From one parameter to one token.
    high = math.log(budget)
    while cost(math.exp(high)) > budget:
      high -= 1.0
    found = optimize.minimize_scalar(
      loss, bounds=(0.0, high), method="bounded", options={"xatol": 1e-9}
    )
    n = math.exp(float(found.x))
    return Optimum(N=n, D=budget / cost(n), loss=float(found.fun))


def effective_experts(experts: Any, start: Any, most: Any) -> Any:
  """Returns E^, which saturates: 1/E^ = 1/(E - 1 + (1/Estart - 1/Emax)^-1) + 1/Emax.

  Clark et al., arXiv:2202.01169, equation 1. E = 1 gives Estart, and E without bound
  gives Emax.
  """
  return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
