"""A trace: the routers' decisions for every token, in one Parquet file.

It has one row per token, in stored order, without padding. Columns, for each MoE layer n
of the model:

  sequence, index, document, position, token, target, domain
  expert_n    the K experts, best first    uint16 [K]
  gate_n      their weights, without drops float32 [K]
  kept_n      whether each was computed    bool [K], always True: the pass is dropless
  logits_n    of all experts               float32 [E], if asked for

The file's metadata identifies the model and the text, under the key `moejax`. Any Parquet
reader can open it (pandas, polars, DuckDB); `read` returns what `replay` needs.

Letters: L MoE layers, B batch, S sequence, E experts, K choices per token.
"""

import contextlib
import hashlib
import importlib.util
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax import files
from moejax.analysis import decide
from moejax.errors import UserError
from moejax.layers.routes import Routes
from moejax.models.decoder import Decoder
from moejax.models.per_layer import PARTS
from moejax.sharding import rules
from moejax.types import Params

FORMAT = 1

_PLAIN = ("sequence", "index", "document", "position", "token", "target", "domain")
_KEY = b"moejax"


def num_bytes(model: Decoder, tokens: int, what: str) -> int:
  """Returns the size of a trace before compression."""
  moe = model.moe
  selected = model.router.selected(moe.fine_experts, moe.fine_selected)
  layer = selected * (2 + 4 + 1) + (4 * moe.fine_experts if what == "logits" else 0)
  return tokens * (4 * len(_PLAIN) + layer * len(model.moe_layers))


def check(model: Decoder, path: pathlib.Path, tokens: int, what: str) -> None:
  """Rejects, before anything runs, a trace that cannot be written.

  Raises:
    UserError: tokens do not choose, or there is no pyarrow, no directory, or no space.
  """
  if not model.router.token_choice:
    reason = decide.undecidable(model)
    raise UserError(f"--trace={path}: {reason}. Leave it out.")
  require()
  if not path.parent.is_dir():
    raise UserError(f"--trace={path}: {path.parent} is not a directory. Create it first.")
  try:
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise UserError(
      f"--trace={path} cannot be written ({error.strerror}). Give another place."
    ) from error
  free, size = shutil.disk_usage(path.parent).free, num_bytes(model, tokens, what)
  if size > free:
    raise UserError(
      f"--trace={path} needs up to {size / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB "
      "are free. Give another place, --trace_what=choices, or a smaller --max_batches."
    )


def require() -> None:
  """Raises UserError if pyarrow is not installed."""
  if importlib.util.find_spec("pyarrow") is None:
    raise UserError(
      "--trace needs pyarrow, which is not installed. Install moejax[trace]."
    )


def identity(model: Decoder, params: Params, mesh: Mesh) -> str:
  """Returns a digest of the routers' weights, which identifies the checkpoint."""
  weights = {}
  for part in PARTS:
    for name, block in params[part].items():
      if "moe" in block:
        weights[f"{part}.{name}"] = block["moe"]["router"]
  gather = jax.jit(lambda tree: tree, out_shardings=rules.replicated(mesh))
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(gather(weights)):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf.addressable_data(0)).tobytes())
  return digest.hexdigest()[:16]


class Writer:
  """Writes the routes of each batch passed to it, as one row group."""

  def __init__(self, path: pathlib.Path, model: Decoder, meta: dict[str, Any], what: str):
    import pyarrow
    from pyarrow import parquet

    moe = model.moe
    selected = model.router.selected(moe.fine_experts, moe.fine_selected)
    self._layers, self._what, self._seen = model.moe_layers, what, 0
    fields = [(name, pyarrow.int32()) for name in _PLAIN]
    for layer in self._layers:
      kinds = {
        "expert": pyarrow.list_(pyarrow.uint16(), selected),
        "gate": pyarrow.list_(pyarrow.float32(), selected),
        "kept": pyarrow.list_(pyarrow.bool_(), selected),
      }
      if what == "logits":
        kinds["logits"] = pyarrow.list_(pyarrow.float32(), moe.fine_experts)
      fields += [(f"{name}_{layer}", kind) for name, kind in kinds.items()]
    text = json.dumps({"format": FORMAT, "what": what} | meta)
    self._schema = pyarrow.schema(fields).with_metadata({_KEY: text.encode()})
    self._file = parquet.ParquetWriter(path, self._schema, compression="zstd")

  def write(self, routes: Routes, batch: Any) -> None:
    """Writes one batch, from arrays on the host."""
    import pyarrow

    valid = batch["segment_ids"] > 0
    sequence, index = np.nonzero(valid)
    columns = {
      "sequence": sequence + self._seen,
      "index": index,
      "document": batch["segment_ids"][valid],
      "position": batch["positions"][valid],
      "token": batch["inputs"][valid],
      "target": batch["targets"][valid],
      "domain": batch["domain"][valid],
    }
    self._seen += len(valid)
    names = ("expert", "gate", "kept") + (("logits",) if self._what == "logits" else ())
    for number, layer in enumerate(self._layers):
      for name in names:
        columns[f"{name}_{layer}"] = getattr(routes, name)[number][valid]
    arrays = []
    for field in self._schema:
      values = np.asarray(columns[field.name])
      if values.ndim == 1:
        arrays.append(pyarrow.array(values, field.type))
      else:
        flat = pyarrow.array(values.reshape(-1), field.type.value_type)
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1]))
    self._file.write_table(pyarrow.Table.from_arrays(arrays, schema=self._schema))

  def close(self) -> None:
    self._file.close()


@contextlib.contextmanager
def writing(
  path: pathlib.Path, model: Decoder, meta: dict[str, Any], what: str
) -> Iterator[Writer]:
  """Writes a trace, atomically."""
  with files.replacing(path) as temporary:
    writer = Writer(temporary, model, meta, what)
    try:
      yield writer
    finally:
      writer.close()


def read_meta(path: pathlib.Path) -> dict[str, Any]:
  """Returns the metadata of a trace.

  Raises:
    UserError: the file is not a trace.
  """
  require()
  from pyarrow import parquet

  try:
    with files.open_regular(path) as file:
      found = parquet.read_schema(file).metadata or {}
    meta = json.loads(found[_KEY])
  except (OSError, ValueError, KeyError) as error:
    words = " ".join(str(error).split())[:120]
    raise UserError(
      f"--from_trace={path} is not a trace ({words}). Give a file that --trace wrote."
    ) from None
  return meta


def num_tokens(path: pathlib.Path) -> int:
  """Returns the number of tokens in a trace."""
  from pyarrow import parquet

  return parquet.read_metadata(path).num_rows


def check_meta(path: pathlib.Path, meta: dict[str, Any], run: dict[str, Any]) -> None:
  """Rejects a trace of another model, or one without logits.

  Args:
    path: of the trace.
    meta: from `read_meta`.
    run: the metadata that the run's own trace would have.

  Raises:
    UserError: names the difference.
  """
  if meta.get("what") != "logits":
    raise UserError(
      f"--from_trace={path} has only choices, but a replay needs logits. Record it with "
      "--trace_what=logits."
    )
  names = ("router", "layers", "num_experts", "step", "routers")
  for name in names:
    if meta.get(name) != run[name]:
      raise UserError(
        f"--from_trace={path} belongs to another model: its {name} is {meta.get(name)}, "
        f"and that of this run is {run[name]}. Record it again with --trace."
      )


def read(
  path: pathlib.Path, model: Decoder, *, batch_size: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields batches of whole sequences, the last one padded.

  Args:
    path: of a trace with logits.
    model: the model that it was recorded with.
    batch_size: B, sequences of a batch.
    length: S.

  Yields:
    logits [L, B, S, E], and valid, token_ids and positions [B, S].
  """
  from pyarrow import parquet

  names = [f"logits_{layer}" for layer in model.moe_layers]
  whole = batch_size * length
  with parquet.ParquetFile(path) as file:
    rows = file.iter_batches(batch_size=whole, columns=["token", "position", *names])
    for part in rows:
      count = part.num_rows

      def padded(values: np.ndarray, count: int = count) -> np.ndarray:
        rest = ((0, whole - count),) + ((0, 0),) * (values.ndim - 1)
        values = np.pad(values, rest)
        return values.reshape(batch_size, length, *values.shape[1:])

      logits = [
        part.column(name).flatten().to_numpy().reshape(count, -1) for name in names
      ]
      yield {
        "logits": np.stack([padded(values) for values in logits]),
        "valid": padded(np.ones(count, bool)),
        "token_ids": padded(part.column("token").to_numpy()),
        "positions": padded(part.column("position").to_numpy()),
      }
