"""The places of a model's layers in its parameters."""

import dataclasses

from moejax.models.decoder import Decoder
from moejax.models.stack import LayerPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Where:
  """The place of a layer's arrays in a model."""

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
  """Returns the place of each layer, in the order of their numbers."""
  return [
    Where(stack=name, path=path)
    for name, stack in model.stacks.items()
    for path in stack.paths
  ]
