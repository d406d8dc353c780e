"""Writes a run as a folder that Transformers loads.

The architecture is the one that represents the model exactly: its config.json, read
back, must make the same model. Otherwise export is refused, and the error names the
fields that differ from the nearest architecture.

Files are written into a folder next to the target, which is renamed when it is complete.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from moejax.config import Config
from moejax.data.tokenizer import FILE as TOKENIZER_FILE
from moejax.data.tokenizer import ImportedTokenizer, Tokenizer
from moejax.errors import UserError
from moejax.interop import architecture as architectures
from moejax.interop.architecture import Architecture
from moejax.interop.canonical import canonical, differences, has_slots
from moejax.interop.keys import Keys
from moejax.interop.mapping import Row, flatten, rows
from moejax.interop.published import CONFIG, TAKEN_ALONG, TOKENIZER
from moejax.interop.source import DTYPES, INDEX, SINGLE
from moejax.models.decoder import Decoder
from moejax.models.make import make_model
from moejax.options import show
from moejax.types import Params
from moejax.version import __version__

SHARD_BYTES = 2_000_000_000
"""Maximum bytes of one file."""

_MOST_NAMED = 4


def choose(
  config: Config, name: str | None = None
) -> tuple[Architecture, dict[str, Any]]:
  """Returns the architecture that represents a model, and its config.json.

  Args:
    config: of the model, with its vocabulary's size.
    name: the architecture to use; None takes the first that fits.

  Raises:
    UserError: none represents it; names what the nearest one cannot represent.
  """
  if config.moe.dense_twin:
    raise UserError(
      "--config.moe.dense_twin=true: every layer is dense, and only MoE architectures "
      "are written."
    )
  if config.moe.eval_capacity_factor is not None and not has_slots(config.moe):
    raise UserError(
      f"--config.moe.eval_capacity_factor={config.moe.eval_capacity_factor}: "
      "Transformers drops no tokens by such a factor, so its logits would differ. Give "
      "--config.moe.eval_capacity_factor=none to export the dropless model."
    )
  nearest: tuple[list[tuple[str, Any, Any]], str] | None = None
  reasons = []
  own = canonical(config)
  for candidate in (name,) if name else architectures.known():
    found = architectures.get(candidate, "--architecture")
    if (found.encoder is None) != (config.model.kind == "decoder"):
      reasons.append(
        f"--config.model.kind={config.model.kind}, but {candidate} is "
        f"{'a decoder' if found.encoder is None else 'an encoder-decoder'}"
      )
      continue
    try:
      values = {"model_type": candidate} | found.write(own)
      back = found.read(Keys(values, f"{candidate}'s {CONFIG}"))
    except UserError as e:
      reasons.append(str(e).rstrip("."))
      continue
    # A table shared by both stacks is written under two names.
    back.model.encoder_embedding &= config.model.encoder_embedding
    lost = differences(config, back)
    if not lost:
      return found, values
    if nearest is None or len(lost) < len(nearest[0]):
      nearest = (lost, candidate)
  if nearest is None:
    raise UserError(
      f"--architecture={name or 'none'} cannot represent this model: {reasons[0]}. Leave "
      "the flag out to see the nearest one."
    )
  lost, candidate = nearest
  shown = "; ".join(
    f"--config.{field}={_shown(ours)} would become {_shown(theirs)}"
    for field, ours, theirs in lost[:_MOST_NAMED]
  )
  more = f" and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
  failed = (
    f"--architecture={name} does not represent this model:"
    if name
    else "No architecture of Transformers represents this model. The nearest is "
    f"{candidate}, where"
  )
  raise UserError(
    f"{failed} {shown}{more}. Only a model trained with such values can be exported."
  )


def _shown(value: Any) -> str:
  return show(value) or "empty"


def export(
  config: Config,
  model: Decoder,
  params: Params,
  folder: Path | str,
  *,
  tokenizer: Tokenizer | None = None,
  taken_along: Path | None = None,
  name: str | None = None,
  kept: Mapping[str, Any] | None = None,
) -> tuple[Architecture, dict[str, tuple[int, ...]]]:
  """Writes config.json, safetensors and the tokenizer.

  A tensor is written in model.param_dtype, or in float32 where that would lose digits
  (norms and routers of a bfloat16 model that was trained on).

  Args:
    config: of the model.
    model: its decoder.
    params: its parameters, on any devices of this process.
    folder: new or empty.
    tokenizer: of the run, if it has one.
    taken_along: directory with files that an import kept.
    name: the architecture; None takes the first that fits.
    kept: more keys of config.json, without effect on the model.

  Returns:
    The architecture, and the name and shape of each tensor written.

  Raises:
    UserError: Transformers has no such model, or the folder is not empty.
  """
  config = copy.deepcopy(config)
  config.model.vocab_size = model.vocab_size
  architecture, values = choose(config, name)
  if config.model.vocab_multiple > 1:
    config.model.vocab_multiple = 1
    model = make_model(config.model, config.moe, vocab_size=model.vocab_size)
    params = _without_padding(params, model.vocab_size)
  mapped = rows(architecture, model)
  if tokenizer is not None:
    values |= _special_ids(tokenizer, config.model.kind == "encoder_decoder")
  values |= kept or {}
  with _writing(Path(folder)) as temporary:
    _write_json(temporary / CONFIG, values | {"moejax_version": __version__})
    shapes = _write_tensors(
      *(temporary, mapped, flatten(params), config.model.param_dtype),
      {} if config.model.tie_embeddings else _copies(architecture, mapped),
    )
    if isinstance(tokenizer, ImportedTokenizer):
      (temporary / TOKENIZER).write_text(tokenizer.library_json, encoding="utf-8")
    for file in TAKEN_ALONG:
      stored = taken_along and (taken_along / TOKENIZER_FILE).parent / file
      if stored and stored.is_file():
        shutil.copyfile(stored, temporary / file)
  return architecture, shapes


def _copies(architecture: Architecture, mapped: list[Row]) -> dict[str, Sequence[str]]:
  """Returns the other names under which an untied embedding is written."""
  if not architecture.untied:
    return {}
  own, *others = architecture.untied
  written = {row.theirs for row in mapped}
  names = (architecture.embedding, *others)
  return {own: [name for name in names if name not in written]}


def _without_padding(params: Params, vocab_size: int) -> Params:
  embedding = dict(params["embedding"])
  embedding["table"] = embedding["table"][:vocab_size]
  if "head" in embedding:
    embedding["head"] = embedding["head"][:, :vocab_size]
  params = params | {"embedding": embedding}
  if "embedding" in params.get("encoder", {}):
    table = params["encoder"]["embedding"]["table"][:vocab_size]
    params["encoder"] = params["encoder"] | {"embedding": {"table": table}}
  return params


def _special_ids(tokenizer: Tokenizer, has_encoder: bool) -> dict[str, int]:
  ids = {"eos_token_id": tokenizer.separator}
  if has_encoder:
    return ids | {"decoder_start_token_id": tokenizer.start}
  if tokenizer.start != tokenizer.separator:
    ids["bos_token_id"] = tokenizer.start
  return ids


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[Path]:
  """Yields a new folder, which becomes `folder` unless the body raises."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--to_hf={folder} is a file. Give a new folder.")
  if folder.exists() and any(folder.iterdir()):
    raise UserError(f"--to_hf={folder} exists and is not empty. Choose a new folder.")
  folder = folder.resolve()  # "." has no name.
  temporary = folder.with_name(f".{folder.name}.partial")
  try:
    if temporary.exists():  # Left by an export that was killed.
      shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
  except OSError as e:
    raise UserError(f"--to_hf={folder} cannot be written ({e.strerror}).") from e
  try:
    yield temporary
    if folder.exists():
      folder.rmdir()
    temporary.rename(folder)
  except BaseException as e:
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(e, OSError):
      raise UserError(f"--to_hf={folder} cannot be written ({e.strerror}).") from e
    raise


def _write_tensors(
  folder: Path,
  mapped: list[Row],
  params: Mapping[str, Any],
  dtype: str,
  copies: Mapping[str, Sequence[str]],
) -> dict[str, tuple[int, ...]]:
  """Writes all tensors, with at most one file of `SHARD_BYTES` in memory at a time."""
  from safetensors.numpy import save_file

  names: list[list[str]] = []
  shapes: dict[str, tuple[int, ...]] = {}
  shard: dict[str, Shaped[np.ndarray, "..."]] = {}
  size = total = 0

  def flush() -> None:
    nonlocal size
    path = folder / _part(len(names))
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod((folder / CONFIG).stat().st_mode)  # The library makes private files.
    names.append(list(shard))
    shard.clear()
    size = 0

  for row in mapped:
    for name, array in _tensors(row, params):
      array = _narrowed(array, dtype)
      for each in (name, *copies.get(name, ())):
        if shard and size + array.nbytes > SHARD_BYTES:
          flush()
        shard[each], shapes[each] = array if each == name else array.copy(), array.shape
        size, total = size + array.nbytes, total + array.nbytes
  flush()
  if len(names) == 1:
    (folder / _part(0)).rename(folder / SINGLE)
    return shapes
  weight_map = {}
  for number, held in enumerate(names):
    final = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
    (folder / _part(number)).rename(folder / final)
    weight_map |= dict.fromkeys(held, final)
  _write_json(
    folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
  )
  return shapes


def _part(number: int) -> str:
  return f"part-{number}.safetensors"


def _tensors(
  row: Row, params: Mapping[str, Any]
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
  """Yields the tensors of a row, made from our parameters."""
  ours = []
  for part in row.parts:
    leaf = params[part.leaf]
    ours.append(np.asarray(leaf if part.repeat is None else leaf[part.repeat]))
  form = row.entry.form
  if row.entry.stacked:
    yield row.theirs, np.stack([form.store(each) for each in zip(*ours)])
  elif row.entry.per_expert:
    for expert, each in enumerate(zip(*ours)):
      yield row.theirs.format(expert=expert), form.store(each)
  else:
    yield row.theirs, form.store(ours)


def _narrowed(array: Shaped[np.ndarray, "..."], dtype: str) -> Shaped[np.ndarray, "..."]:
  wanted = DTYPES["BF16" if dtype == "bfloat16" else "F32"]
  narrow = array.astype(wanted)
  if not np.array_equal(narrow.astype(array.dtype), array, equal_nan=True):
    narrow = array
  return np.ascontiguousarray(narrow)


def _write_json(path: Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
