"""A published model in its folder: config, weights and tokenizer, checked together."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax import files
from moejax.config import Config
from moejax.config.check import validate
from moejax.config.pattern import layer_pattern
from moejax.data.tokenizer import ImportedTokenizer
from moejax.errors import ConfigError, UserError
from moejax.interop import architecture as architectures
from moejax.interop import quantised
from moejax.interop.architecture import Architecture
from moejax.interop.keys import Keys
from moejax.interop.load import Loader, known_dtype
from moejax.interop.source import DTYPES, Source, has_weights
from moejax.models.decoder import Decoder
from moejax.models.make import make_model
from moejax.storage.paths import is_url, refuse_url

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TAKEN_ALONG = (
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "generation_config.json",
)
"""Files that only Transformers reads; kept with a run and written on export."""

_HUB = "hf:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """The content of a folder."""

  folder: Path
  values: dict[str, Any]
  """Its config.json."""
  architecture: Architecture
  config: Config
  model: Decoder
  loader: Loader
  tokenizer: ImportedTokenizer | None


def open_folder(folder: Path | str) -> Published:
  """Reads a model's config and headers, and checks that they fit; reads no weights.

  Raises:
    UserError: the folder is not a model's, or something in it is missing, unknown or
      contradictory; names it.
  """
  folder = _folder(str(folder))
  values = _config_json(folder)
  path = str(folder / CONFIG)
  kind = values.get("model_type")
  if kind is None:
    raise UserError(
      f"{path} has no model_type, which names the architecture. Known are "
      f"{', '.join(architectures.names())}."
    )
  architecture = architectures.get(str(kind), f"{path}: model_type")
  source = Source(folder, quantised.packing(values, path))
  values = _with_dtype(values, source, architecture.embedding)
  config = read_config(architecture, values, path)
  _refuse_dense(config, path)
  with _about(path):
    validate(config)
    model = make_model(config.model, config.moe, vocab_size=config.model.vocab_size)
  loader = Loader(
    architecture,
    model,
    source,
    dtype=known_dtype(str(values["dtype"]), path),
    left_out=architecture.left_out(values, source.tensors),
  )
  return Published(
    folder=folder,
    values=values,
    architecture=architecture,
    config=config,
    model=model,
    loader=loader,
    tokenizer=_tokenizer(folder, values, config),
  )


def read_config(architecture: Architecture, values: dict[str, Any], path: str) -> Config:
  """Returns the config of a config.json.

  Raises:
    UserError: a key is missing or not understood.
  """
  keys = Keys(values, path)
  config = architecture.read(keys)
  keys.skip("quantization_config")  # Read together with the weights.
  keys.done()
  moe = config.moe
  moe.allow_constant_gates = moe.num_selected == 1 and moe.renormalize != "none"
  return config


def _refuse_dense(config: Config, path: str) -> None:
  """Rejects a model without experts, in the terms of its config.json."""
  try:
    kinds = layer_pattern(config.model.num_layers, config.moe).is_moe
  except (ValueError, ZeroDivisionError):  # `validate` says what is wrong.
    return
  if not any(kinds):
    raise UserError(
      f"{path}: this model has no MoE layer, according to its number of layers and the "
      "keys that make some of them dense (such as first_k_dense_replace, "
      "mlp_only_layers or decoder_sparse_step). Only models with one are imported."
    )


def _with_dtype(values: dict[str, Any], source: Source, table: str) -> dict[str, Any]:
  """Adds the dtype of the embedding if config.json has none."""
  name = values.get("dtype") or values.get("torch_dtype")
  if name is None:
    embedding = source.tensors.get(table)
    name = (
      str(DTYPES[embedding.dtype]) if embedding and embedding.dtype in DTYPES else None
    )
  return values | {"dtype": name or "float32"}


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
  try:
    yield
  except ConfigError as e:
    raise ConfigError(f"{path} describes an invalid model: {e}") from e


def _folder(given: str) -> Path:
  if given.startswith(_HUB):
    return _download(given)
  if is_url(given):
    refuse_url(given, "--from_hf")
  folder = Path(given)
  if not folder.is_dir():
    what = "is a file" if folder.exists() else "does not exist"
    raise UserError(
      f"--from_hf={given} {what}. Give the folder of a published model, or hf://org/name."
    )
  return folder


def _config_json(folder: Path) -> dict[str, Any]:
  path = folder / CONFIG
  if not path.exists():
    if has_weights(folder):
      raise UserError(
        f"--from_hf={folder} has weights but no {CONFIG}, which describes them. Copy it "
        "there."
      )
    held = sorted(p.name for p in folder.iterdir())[:5]
    shown = f"it holds {', '.join(held)}" if held else "it is empty"
    raise UserError(
      f"--from_hf={folder} is not the folder of a published model: {shown}. Give one "
      f"with {CONFIG} and safetensors."
    )
  try:
    values = files.read_json(path)
  except (OSError, ValueError) as e:
    raise UserError(f"{path} cannot be read: {e}.") from e
  if not isinstance(values, dict):
    raise UserError(f"{path} is not a JSON object.")
  return values


def _tokenizer(
  folder: Path, values: dict[str, Any], config: Config
) -> ImportedTokenizer | None:
  path = folder / TOKENIZER
  if not path.exists():
    return None
  end, begin = (_first(values.get(f"{name}_token_id")) for name in ("eos", "bos"))
  if values.get("is_encoder_decoder") and "decoder_start_token_id" in values:
    begin = _first(values["decoder_start_token_id"])
  separator = begin if end is None else end
  if separator is None:
    raise UserError(
      f"{folder / CONFIG} has neither eos_token_id nor bos_token_id, so that nothing can "
      f"separate documents. Add one, or move {TOKENIZER} away."
    )
  try:
    with files.open_regular(path) as file:
      text = file.read().decode("utf-8")
    start = separator if begin is None else begin
    return ImportedTokenizer.make(
      text, config.model.vocab_size, separator=separator, start=start
    )
  except Exception as e:  # the library raises nothing narrower
    words = " ".join(str(e).split())[:200]
    raise UserError(
      f"{path} does not fit the model's vocabulary of {config.model.vocab_size}, or "
      f"cannot be read: {words}. Give the model's own, or move it away."
    ) from e


def _first(ids: Any) -> int | None:
  return ids[0] if isinstance(ids, list) and ids else ids if type(ids) is int else None


def _download(given: str) -> Path:
  name = given.removeprefix(_HUB).strip("/")
  try:
    from huggingface_hub import snapshot_download
  except ImportError as e:
    raise UserError(
      f"--from_hf={given} needs the huggingface_hub library. Install moejax[hf], or "
      "give a folder."
    ) from e
  try:
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    # Subfolders hold the same weights in other formats.
    return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
  except Exception as e:  # Network, permissions, names: no common class.
    words = " ".join(str(e).split())[:300]
    raise UserError(
      f"--from_hf={given} cannot be downloaded: {words}. Check the name and the network, "
      "or give a folder."
    ) from e
