"""Every registered dispatcher passes the one suite."""

from moejax.dispatch.registry import DISPATCHERS, SUMMARIES
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
