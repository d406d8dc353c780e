"""Where the layers of a model are in its parameters."""

import dataclasses

from moejax.models.decoder import Decoder
from moejax.models.stack import LayerPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
  """Where a layer's arrays are in a model."""

  stack: str
  """Name of the stack in the parameters; empty is the decoder."""
  path: LayerPath

  @property
  def block(self) -> str:
    """The dotted name of its block."""
    parts = (self.stack, self.path.part, self.path.name)
    return ".".join(part for part in parts if part)

  @property
  def repeat(self) -> int | None:
    """Index along the first axis of its arrays; None if they are not stacked."""
    return self.path.repeat if self.path.part == "unit" else None


def layers_of(model: Decoder) -> list[Where]:
  """Returns where each layer is, in the order of their numbers."""
  return [
    Where(stack=name, path=path)
    for name, stack in model.stacks.items()
    for path in stack.paths
  ]
