"""Every registered dispatcher passes the one suite."""

import pytest

from moejax.dispatch.registry import DISPATCHERS, SUMMARIES, resolve
from moejax.errors import ConfigError
from tests.dispatch.suite import DispatcherSuite


class TestEinsum(DispatcherSuite):
  name = "einsum"


class TestGather(DispatcherSuite):
  name = "gather"


class TestGrouped(DispatcherSuite):
  name = "grouped"


def test_every_dispatcher_is_tested_and_described():
  """A new dispatcher without a suite, or without a line of help, fails here."""
  tested = {cls.name for cls in DispatcherSuite.__subclasses__()}
  assert tested == set(DISPATCHERS) == set(SUMMARIES)


@pytest.mark.parametrize(
  "platform, capacity, name",
  [
    ("cpu", None, "grouped"),
    ("cpu", 8, "grouped"),
    ("gpu", None, "grouped"),
    ("tpu", 8, "gather"),
  ],
)
def test_auto_follows_the_written_rule(platform, capacity, name):
  """The rule in the docstring of `resolve`, line by line."""
  assert resolve("auto", platform=platform, capacity=capacity) is DISPATCHERS[name]


def test_an_unknown_dispatcher_is_named_with_the_known_ones():
  """The error says the flag, the value and the way out."""
  with pytest.raises(ConfigError, match=r"dispatcher=magic .* einsum, gather, grouped"):
    resolve("magic")
