"""Counts the parameters that a config freezes, by part of `moejax.cost.parameters`."""

from moejax.config import Config
from moejax.cost.parameters import PARTS, resolve_vocab_size
from moejax.models.frozen import frozen_numbers
from moejax.models.make import make_model

_WORDS = (
  ("norm", "norms"),
  ("embedding.head", "head"),
  ("embedding", "embedding"),
  (".experts.", "experts"),
  (".router.", "router"),
  (".moe.shared", "shared_experts"),
  ("attention", "attention"),
  ("relative_bias", "attention"),
)
"""The first of these words in a parameter's name gives its part; without any, `dense`."""


def count_frozen(config: Config) -> dict[str, int]:
  """Returns the frozen numbers of each part and their sum, `total`; {} if none are.

  Builds the model without arrays, if anything is frozen. The routing table is data, not
  parameters, and not counted.

  Args:
    config: validated.

  Raises:
    ConfigError: a selector of `train.frozen` does not fit the model.
  """
  if not config.train.frozen:
    return {}
  vocab_size = resolve_vocab_size(config)
  model = make_model(
    config.model, config.moe, vocab_size=vocab_size, frozen=config.train.frozen
  )
  if model.frozen is None:
    return {}
  found: dict[str, int] = dict.fromkeys(PARTS, 0)
  for name, number in frozen_numbers(model.frozen, model.shapes()).items():
    if name != "hash_table":
      found[part_of(name)] += number
  return found | {"total": sum(found.values())}


def part_of(name: str) -> str:
  """Returns the part of a parameter by its dotted name."""
  return next((part for word, part in _WORDS if word in name), "dense")
