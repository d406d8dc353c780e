"""An architecture for the converter: a table of names, and its config both ways."""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moejax.config import Config
from moejax.errors import UserError, did_you_mean
from moejax.interop.keys import Keys
from moejax.interop.table import MODEL, Entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """One `model_type` of Hugging Face Transformers.

  Attributes:
    name: the model_type.
    class_name: its class for language modelling, in config.json's `architectures`.
    layer: the table of a layer; names below `layer_prefix`.
    encoder: for a model with an encoder, the table of the encoder's layers, whose names
      are below `encoder_prefix`; None means a decoder only.
    read: from the keys of config.json to fields of a Config; see `fields.read`.
    write: from a Config to the keys of config.json, without `model_type`.
    model: the table outside the layers.
    layer_prefix: prefix of the names of a layer; `{layer}` is its number.
    embedding: name on disk of the decoder's token table.
    head: name on disk of the output projection, if it is not the embedding.
    copies: names under which the class stores a tied embedding again.
    untied: names of the decoder's and the encoder's table if the head is not tied, when
      nothing reads `embedding`. Empty if the embedding always has that name.
    left_out: (config.json, tensors on disk) -> prefixes of tensors that are left out, and
      why.
    remarks: (config.json) -> what else is lost on import, in sentences.
  """

  name: str
  class_name: str
  layer: tuple[Entry, ...]
  read: Callable[[Keys], Config]
  write: Callable[[Config], dict[str, Any]]
  model: tuple[Entry, ...] = MODEL
  layer_prefix: str = "model.layers.{layer}."
  encoder: tuple[Entry, ...] | None = None
  encoder_prefix: str = ""
  embedding: str = "model.embed_tokens.weight"
  head: str = "lm_head.weight"
  copies: tuple[str, ...] = ()
  untied: tuple[str, ...] = ()
  left_out: Callable[[Mapping[str, Any], Collection[str]], dict[str, str]] = (
    lambda config, names: {}
  )
  remarks: Callable[[Mapping[str, Any]], list[str]] = lambda config: []

  def outside(self, tied: bool) -> tuple[Entry, ...]:
    """Returns the table outside the layers, for a head that is tied or not."""
    if tied or not self.untied:
      return self.model
    own = {self.embedding: self.untied[0]}
    return tuple(
      dataclasses.replace(e, theirs=own.get(e.theirs, e.theirs)) for e in self.model
    )

  def table(self, stack: str) -> tuple[str, tuple[Entry, ...]]:
    """Returns the prefix and the table of a stack's layers; see `Decoder.stacks`."""
    if stack == "encoder":
      return self.encoder_prefix, self.encoder or ()
    return self.layer_prefix, self.layer


_KNOWN = (
  "mixtral",
  "olmoe",
  "flex_olmo",
  "qwen2_moe",
  "qwen3_moe",
  "deepseek_v2",
  "deepseek_v3",
  "glm4_moe",
  "gpt_oss",
  "granitemoe",
  "granitemoeshared",
  "switch_transformers",
)
"""Modules below moejax.interop.architectures, each with ARCHITECTURE."""

_ALIASES = {"kimi_k2": "deepseek_v3"}
"""Other names of the same model_type."""


def known() -> tuple[str, ...]:
  """Returns the names of all architectures."""
  return _KNOWN


def names() -> tuple[str, ...]:
  """Returns each supported model_type: `known`, and other names of these."""
  return (*_KNOWN, *_ALIASES)


def get(name: str, path: str) -> Architecture:
  """Returns an architecture by its model_type.

  Args:
    name: the model_type.
    path: where the name was given, for errors: a config.json and its key, or a flag.

  Raises:
    UserError: there is none of that name.
  """
  name = _ALIASES.get(name, name)
  if name not in _KNOWN:
    all_names = names()
    hint = did_you_mean(str(name), all_names)
    more = "" if all_names[-1] in hint else f" Known are {', '.join(all_names)}."
    raise UserError(f"{path}={name} is unknown. {hint}{more}")
  module = importlib.import_module(f"moejax.interop.architectures.{name}")
  return module.ARCHITECTURE
