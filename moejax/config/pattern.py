"""The pattern of MoE layers, and its folding into a repeated unit."""

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
  """Returns the pattern of `num_layers` layers under this MoE configuration."""
  prefix = min(moe.dense_prefix, num_layers)
  unit = tuple(index == moe.offset % moe.every for index in range(moe.every))
  repeats, rest = divmod(num_layers - prefix, moe.every)
  regular = Pattern((False,) * prefix, unit if repeats else (), unit[:rest], repeats)
  dense = dense_layers(moe)
  if not dense:
    return regular
  kinds = [is_moe and i not in dense for i, is_moe in enumerate(regular.is_moe)]
  return fold(tuple(kinds))


def dense_layers(moe: MoEConfig) -> frozenset[int]:
  """Returns the layers that `dense_layers` lists.

  Raises:
    ValueError: it is not a list of numbers.
  """
  return frozenset(int(index) for index in moe.dense_layers.split(",") if index.strip())


def fold(kinds: tuple[bool, ...]) -> Pattern:
  """Folds layers so that as few blocks as possible are compiled.

  Ties go to the shortest prefix, then to the shortest unit. If no unit occurs twice, all
  layers are the prefix.
  """
  best = Pattern(kinds, (), (), 0)
  fewest = len(kinds)
  for prefix in range(len(kinds)):
    for size in range(1, (len(kinds) - prefix) // 2 + 1):
      unit, repeats = kinds[prefix : prefix + size], 1
      while kinds[prefix + repeats * size : prefix + (repeats + 1) * size] == unit:
        repeats += 1
      suffix = kinds[prefix + repeats * size :]
      blocks = prefix + size + len(suffix)
      if repeats > 1 and blocks < fewest:
        best, fewest = Pattern(kinds[:prefix], unit, suffix, repeats), blocks
  return best
