"""The registry of operations, by name on the command line.

An operation's file is imported on first use, so that listing names does not import jax.
"""

import importlib
from typing import TYPE_CHECKING

from moejax.errors import UserError, did_you_mean

if TYPE_CHECKING:
  from moejax.surgery.operation import Operation

_SHIPPED = {
  "upcycle": "upcycle.Upcycle",
  "btx": "btx.Btx",
  "clone": "clone.Clone",
  "split": "split.Split",
  "join": "join.Join",
  "merge": "merge.Merge",
  "prune": "prune.Prune",
  "add": "add.Add",
  "share": "share.Share",
  "select": "select.Select",
  "reroute": "reroute.Reroute",
  "permute": "permute.Permute",
}
"""File and class below moejax.surgery, in the order of --help."""

OPERATIONS: "dict[str, str | type[Operation]]" = dict(_SHIPPED)
"""Add your own by assignment."""


def operation(name: str) -> "type[Operation]":
  """Returns the class of an operation.

  Raises:
    UserError: there is no operation of this name.
  """
  if name not in OPERATIONS:
    raise UserError(f"{name}: no such operation. {did_you_mean(name, OPERATIONS)}")
  found = OPERATIONS[name]
  if isinstance(found, str):
    file, _, cls = found.partition(".")
    module = importlib.import_module(f"moejax.surgery.{file}")
    found = OPERATIONS[name] = vars(module)[cls]
  return found
