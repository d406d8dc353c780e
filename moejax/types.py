"""The axis letters, and the decorator that makes this project's pytrees.

Letters, the same in every signature, einsum and document:

  B  batch                      E  experts
  S  sequence                   K  choices per token
  T  tokens of a routing group  C  slots per expert (capacity) in one group
  G  routing groups             N  assignments (T*K, or E*C for expert choice)
  D  model width                H  attention heads
  F  expert hidden width        L  layers
                                V  vocabulary

`T` is the number of tokens of ONE routing group, padding included; a batch of
B*S tokens is cut into G groups of T.
"""

import dataclasses
from typing import Any, Generic, TypeVar, dataclass_transform

import jax

Params = dict[str, Any]
"""Parameters: a plain nested dict of arrays, never a module."""

_T = TypeVar("_T")


class Constant(Generic[_T]):
  """A static value held by a module, opaque to transformations; equal only to itself.

  A config itself cannot be a key of jax's caches, since it is mutable.
  """

  def __init__(self, value: _T):
    self.value = value


def static_field(**kwargs: Any) -> Any:
  """Returns a dataclass field that is part of the tree's structure, not a leaf."""
  return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(
  frozen_default=True, kw_only_default=True, field_specifiers=(static_field,)
)
def pytree(cls: type[_T]) -> type[_T]:
  """Makes a frozen, keyword-only dataclass that jax transformations accept.

  Fields made with `static_field` are compared by value when jax compares tree
  structures; all others are children.
  """
  cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
  static = tuple(f.name for f in fields if f.metadata.get("static"))
  leaves = tuple(f.name for f in fields if not f.metadata.get("static"))

  def flatten_with_keys(value: Any):
    keys = ((jax.tree_util.GetAttrKey(n), getattr(value, n)) for n in leaves)
    return tuple(keys), tuple(getattr(value, n) for n in static)

  def flatten(value: Any):
    children = tuple(getattr(value, n) for n in leaves)
    return children, tuple(getattr(value, n) for n in static)

  def unflatten(aux: tuple[Any, ...], children: Any):
    # Bypasses __init__: jax builds trees of None, shapes and specs, which the
    # tests' runtime type checker would reject.
    value = object.__new__(cls)
    for name, child in zip(leaves, children, strict=True):
      object.__setattr__(value, name, child)
    for name, item in zip(static, aux, strict=True):
      object.__setattr__(value, name, item)
    return value

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
  return cls
