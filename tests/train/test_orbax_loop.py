"""Event loops for Orbax: what they keep quiet about, and what they pass on."""

import asyncio
import gc

import pytest

from moejax.checkpoint import orbax_loop


class Extension:
  """An awaitable that fails without a frame of Python, as TensorStore's do."""

  def __await__(self):
    return iter(map(int, ["not a number"]))


async def failing() -> None:
  raise OSError("of somebody else")


def reported(awaitable) -> list[str]:
  """Messages of a loop in which a task fails and nobody asks for its result."""
  loop, messages = orbax_loop._Loop(), []
  loop.default_exception_handler = lambda context: messages.append(context["message"])  # pyright: ignore[reportAttributeAccessIssue]

  async def run() -> None:
    task = asyncio.ensure_future(awaitable)
    await asyncio.wait([task])

  loop.run_until_complete(run())
  gc.collect()
  loop.close()
  return messages


@pytest.mark.parametrize(("awaitable", "count"), [(Extension, 0), (failing, 1)])
def test_failures_of_tensorstore_are_kept_quiet_and_others_are_not(awaitable, count):
  """Of several arrays that cannot be read, one error is raised; the rest is noise."""
  assert len(reported(awaitable())) == count
