"""The parts of a train step, as named scopes of the compiled program.

Each operation carries the innermost part it was traced under, in its metadata alone: no
value and no instruction depends on it. `moejax.hlo.parts` reads them, and a profiler
(Perfetto, XProf) shows them.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_F = TypeVar("_F", bound=Callable[..., Any])

EMBEDDING = "embedding"
NORM = "norm"
"""Norms, and what adds to the residual stream."""
ATTENTION = "attention"
FEED_FORWARD = "feed_forward"
"""Dense layers, and shared experts."""
ROUTER = "router"
"""Scores, choices, slots, and the router's own losses and statistics."""
DISPATCH = "dispatch"
"""Tokens into experts' rows."""
EXCHANGE = "exchange"
"""Rows, tokens or weights between devices."""
EXPERTS = "experts"
COMBINE = "combine"
"""Experts' rows into tokens, weighted."""
HEAD = "head"
LOSS = "loss"
OPTIMIZER = "optimizer"
"""Clipping, moments, the update, and biases that a step moves."""

PARTS = (
  EMBEDDING,
  NORM,
  ATTENTION,
  FEED_FORWARD,
  ROUTER,
  DISPATCH,
  EXCHANGE,
  EXPERTS,
  COMBINE,
  HEAD,
  LOSS,
  OPTIMIZER,
)
"""In the order of a step."""

PREFIX = "moejax_"
"""Before a part in the name of its scope, so that no function of another name is one."""


def scope(part: str) -> Any:
  """Returns the named scope of a part, a context manager."""
  return jax.named_scope(PREFIX + part)


def of_part(part: str) -> Callable[[_F], _F]:
  """Returns a decorator: a call of the function is in the part's scope."""

  def decorate(function: _F) -> _F:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      with scope(part):
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]

  return decorate
