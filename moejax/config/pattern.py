"""Which layers are MoE, and how the layers fold into a repeated unit."""

import dataclasses

from moejax.config.schema import MoEConfig


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Which layers are MoE, and how they fold into prefix, repeated unit and suffix."""

  prefix: tuple[bool, ...]
  unit: tuple[bool, ...]
  suffix: tuple[bool, ...]
  repeats: int

  @property
  def is_moe(self) -> tuple[bool, ...]:
    return self.prefix + self.unit * self.repeats + self.suffix


def layer_pattern(num_layers: int, moe: MoEConfig) -> Pattern:
  """The pattern of `num_layers` layers under this MoE configuration."""
  prefix = min(moe.dense_prefix, num_layers)
  unit = tuple(index == moe.offset % moe.every for index in range(moe.every))
  repeats, rest = divmod(num_layers - prefix, moe.every)
  return Pattern((False,) * prefix, unit if repeats else (), unit[:rest], repeats)
