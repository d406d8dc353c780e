"""Reads a model's parameters from a folder, each straight into its sharding.

A parameter is assembled shard by shard. For the layers and experts of a device's part,
tensors are read from disk one at a time. So the host holds only the part being assembled
and one more tensor, for any size of the model.
"""

from collections import defaultdict
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Shaped

from moejax.checkpoint.lazy import LazyArray
from moejax.errors import UserError
from moejax.interop.architecture import Architecture
from moejax.interop.mapping import Row, flatten, nest, rows
from moejax.interop.source import DTYPES, Source
from moejax.models.decoder import Decoder
from moejax.types import Params

_MOST_NAMED = 5


class Loader:
  """The parameters of a model in a folder, checked and ready to be read."""

  def __init__(
    self,
    architecture: Architecture,
    model: Decoder,
    source: Source,
    *,
    dtype: str,
    left_out: Mapping[str, str] | None = None,
  ):
    """Checks names, shapes and dtypes of all tensors; reads no data.

    Args:
      architecture: of the folder.
      model: the model that its config describes.
      source: the folder's tensors.
      dtype: of its weights by its config, in safetensors' names: F32, BF16 or F16.
      left_out: prefixes of tensors that are left out, with the reason.

    Raises:
      UserError: a tensor is missing, unexpected, or of another shape or dtype, or a
        second copy of the embedding has other values.
    """
    self.model, self.source = model, source
    self.rows = rows(architecture, model)
    self.left_out = {
      name: reason
      for name in source.tensors
      for prefix, reason in (left_out or {}).items()
      if name.startswith(prefix) or name.endswith(f".{prefix}")
    }
    """Names of the tensors that are left out, with the reason."""
    for name, tensor in source.tensors.items():
      if 0 in tensor.shape:  # Shared experts of width 0.
        self.left_out[name] = "without any numbers"
    self._leave_out_copies(architecture)
    self._shapes = flatten(model.shapes())
    self._by_leaf: dict[str, list[tuple[Row, int]]] = defaultdict(list)
    for row in self.rows:
      for number, part in enumerate(row.parts):
        self._by_leaf[part.leaf].append((row, number))
    self._check_names()
    self._check_tensors(dtype)

  @property
  def leaves(self) -> tuple[str, ...]:
    """Dotted names of the parameters, in the model's order."""
    return tuple(self._shapes)

  def params(self, shardings: Params | None = None) -> Params:
    """Reads all parameters.

    Args:
      shardings: tree like the parameters; None means the first local device.

    Raises:
      UserError: a tensor cannot be read or is not finite; names it.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = {} if shardings is None else flatten(shardings)
    flat = {name: self.leaf(name, where.get(name, device)) for name in self._shapes}
    return nest(flat, self.model.shapes())

  def lazy_params(self) -> Params:
    """Returns all parameters as arrays that are read only when they are written."""

    def lazy(name: str) -> LazyArray:
      leaf = self._shapes[name]
      row, number = self._by_leaf[name][0]
      stacked = int(row.parts[number].repeat is not None) + int(row.entry.per_expert)
      return LazyArray(
        shape=tuple(leaf.shape),
        dtype=np.dtype(leaf.dtype),
        read=lambda index: self.part(name, index),
        stacked=stacked,
      )

    return nest({name: lazy(name) for name in self._shapes}, self.model.shapes())

  def leaf(self, name: str, sharding: jax.sharding.Sharding) -> Array:
    """Reads one parameter into its sharding.

    Raises:
      UserError: as `params`.
    """
    shape = tuple(self._shapes[name].shape)

    def part(index: tuple[slice, ...] | None) -> Shaped[np.ndarray, "..."]:
      return self.part(name, index or tuple(slice(None) for _ in shape))

    array = jax.make_array_from_callback(shape, sharding, part)
    self.source.close()
    return array

  def part(self, name: str, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
    """Reads the part of a parameter at an index.

    Args:
      name: dotted name of the parameter.
      index: a slice for each axis.

    Raises:
      UserError: as `params`.
    """
    leaf = self._shapes[name]
    index = tuple(slice(*s.indices(n)) for s, n in zip(index, leaf.shape))
    result = np.empty([s.stop - s.start for s in index], leaf.dtype)
    own = self._by_leaf[name]
    if own[0][0].parts[own[0][1]].repeat is None:
      self._fill(result, *own[0], index)
      return result
    for row, number in own:
      repeat = row.parts[number].repeat
      assert repeat is not None
      if index[0].start <= repeat < index[0].stop:
        self._fill(result[repeat - index[0].start], row, number, index[1:])
    return result

  def _fill(
    self,
    result: Shaped[np.ndarray, "..."],
    row: Row,
    number: int,
    index: tuple[slice, ...],
  ) -> None:
    """Writes the part of one layer in place, expert by expert."""
    form, shapes = row.entry.form, row.own_shapes
    if not row.entry.per_expert:
      result[...] = form.load(self.source.read(row.theirs), shapes)[number][index]
      return
    for slot, expert in enumerate(range(index[0].start, index[0].stop)):
      if row.entry.stacked:
        theirs = self.source.read(row.theirs, expert)
      else:
        theirs = self.source.read(row.theirs.format(expert=expert))
      result[slot] = form.load(theirs, shapes)[number][index[1:]]

  def _leave_out_copies(self, architecture: Architecture) -> None:
    """Leaves out copies of the embedding, after comparing their values."""
    table, tied = architecture.embedding, self.model.config.tie_embeddings
    if architecture.untied and not tied:
      self._untie(architecture)
      return
    names = [*architecture.copies, *([architecture.head] if tied else [])]
    for name in names:
      if not {name, table} <= set(self.source.tensors):
        continue
      if not np.array_equal(self.source.read(name), self.source.read(table)):
        why = (
          "tie_word_embeddings of config.json makes them the same"
          if name == architecture.head
          else "tied tables must be the same"
        )
        raise UserError(
          f"{self.source.folder}: {name} and {table} hold different numbers, but {why}. "
          "Correct tie_word_embeddings, or give the model's own files."
        )
      self.left_out[name] = f"the same numbers as {table}"

  def _untie(self, architecture: Architecture) -> None:
    """Gives stacks without their own table the shared one, which is otherwise unused."""
    tensors, shared = self.source.tensors, architecture.embedding
    if shared not in tensors:
      return
    missing = [name for name in architecture.untied if name not in tensors]
    for name in missing:
      tensors[name] = tensors[shared]
    self.left_out[shared] = (
      f"read as {' and '.join(missing)}" if missing else "unread where nothing is tied"
    )

  def _check_names(self) -> None:
    wanted = {name for row in self.rows for name, _ in row.tensors()}
    there = set(self.source.tensors)
    self._refuse(sorted(wanted - there), "missing", "Copy the files of the whole model.")
    surplus = sorted(there - wanted - set(self.left_out))
    self._refuse(
      surplus,
      "not used by this architecture and config",
      "A tensor that is not used would be lost: check that config.json belongs to it.",
    )

  def _refuse(self, names: list[str], what: str, remedy: str) -> None:
    if not names:
      return
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    verb = "are" if len(names) > 1 else "is"
    raise UserError(
      f"{self.source.folder}: {', '.join(names[:_MOST_NAMED])}{more} {verb} {what}. "
      f"{remedy}"
    )

  def _check_tensors(self, dtype: str) -> None:
    for row in self.rows:
      kept = [str(self._shapes[part.leaf].dtype) for part in row.parts]
      allowed = {dtype} | ({"F32"} if set(kept) == {"float32"} else set())
      for name, shape in row.tensors():
        tensor = self.source.tensors[name]
        if tensor.shape != shape:
          raise UserError(
            f"{tensor.parts[0].file}: {name} has shape {list(tensor.shape)}, but "
            f"config.json makes it {list(shape)}. Give the config.json of these weights."
          )
        if tensor.dtype not in allowed:
          raise UserError(
            f"{tensor.parts[0].file}: {name} is {tensor.dtype}, but the model is "
            f"{dtype} (the dtype of config.json). Convert the tensor, or correct dtype."
          )


def known_dtype(name: str, path: str) -> str:
  """Returns the safetensors name of config.json's dtype.

  Raises:
    UserError: parameters cannot have this dtype.
  """
  names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
  if name not in names:
    raise UserError(
      f"{path}: dtype={name!r} is not supported for parameters. Convert the model to "
      f"{', '.join(names)} first."
    )
  assert names[name] in DTYPES
  return names[name]
