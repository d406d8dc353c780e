"""The parts of a train step, as named scopes of the compiled program.

The metadata of each operation names the innermost part it was traced under; values and
instructions do not depend on it. `moejax.hlo.parts` reads these names, and a profiler
(Perfetto, XProf) shows them.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_F = TypeVar("_F", bound=Callable[..., Any])

EMBEDDING = "embedding"
NORM = "norm"
"""Norms, and additions to the residual stream."""
ATTENTION = "attention"
FEED_FORWARD = "feed_forward"
"""Dense layers, and shared experts."""
ROUTER = "router"
"""Scores, choices, slots, and the router's own losses and statistics."""
DISPATCH = "dispatch"
"""Copying tokens to the experts' rows."""
EXCHANGE = "exchange"
"""Sending rows, tokens or weights between devices."""
EXPERTS = "experts"
COMBINE = "combine"
"""Adding up each token's weighted rows."""
HEAD = "head"
LOSS = "loss"
OPTIMIZER = "optimizer"
"""Clipping, moments, the update, and biases that a step updates by a rule."""

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
"""All parts, in the order of a step."""

PREFIX = "moejax_"
"""Prefix of a part's scope name, so that no function's name is mistaken for a part."""


def scope(part: str) -> Any:
  """Returns the named scope of a part, a context manager."""
  return jax.named_scope(PREFIX + part)


def of_part(part: str) -> Callable[[_F], _F]:
  """Returns a decorator that runs a function in the part's scope."""

  def decorate(function: _F) -> _F:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
      with scope(part):
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]

  return decorate
