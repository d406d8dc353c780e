"""Names that a config may have are those of what there is."""

from moejax.config.ranges import CHOICES
from moejax.dispatch.registry import DISPATCHERS


def test_every_dispatcher_can_be_chosen():
  """The config, which is below the dispatchers, spells the names of all, and auto."""
  assert set(CHOICES["moe.dispatcher"]) == {"auto", *DISPATCHERS}
