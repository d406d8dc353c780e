"""The layouts, by the names of `--config.moe.dispatcher`."""

from collections.abc import Mapping

from moejax.dispatch.base import Layout
from moejax.dispatch.mix import Mix
from moejax.dispatch.rows import Rows
from moejax.dispatch.slots import Slots

DISPATCHERS: Mapping[str, type[Layout]] = {
  "einsum": Mix,
  "gather": Slots,
  "grouped": Rows,
}
SUMMARIES: Mapping[str, str] = {
  "einsum": "dense weights; slow, readable, and the only one for Soft MoE",
  "gather": "slots by index; batched experts, empty slots cost as much as full ones",
  "grouped": "sorted rows; only kept assignments cost; capacity and dropless",
}
"""One line each, for --list=dispatchers."""
