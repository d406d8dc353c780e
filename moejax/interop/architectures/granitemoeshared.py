"""Granite MoE with a shared expert, whose gate and up are one matrix on disk."""

from typing import Any

from moejax.config import Config
from moejax.interop.architecture import Architecture
from moejax.interop.architectures import granitemoe
from moejax.interop.keys import Keys
from moejax.interop.table import LINEAR, Halves, entry

_CLASS = "GraniteMoeSharedForCausalLM"

LAYER = (
  *granitemoe.LAYER,
  entry("moe.shared.w_gate moe.shared.w_in", "shared_mlp.input_linear.weight", Halves()),
  entry("moe.shared.w_out", "shared_mlp.output_linear.weight", LINEAR),
)


def read(keys: Keys) -> Config:
  config = granitemoe.read(keys)
  config.moe.shared_hidden = keys.take("shared_intermediate_size", int, 0)
  return config


def write(config: Config) -> dict[str, Any]:
  return granitemoe.write_as(config, _CLASS) | {
    "shared_intermediate_size": config.moe.shared_hidden
  }


ARCHITECTURE = Architecture(
  name="granitemoeshared", class_name=_CLASS, layer=LAYER, read=read, write=write
)
