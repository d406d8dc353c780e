"""Makes the model that a configuration describes."""

from typing import Any

from moejax.config import ModelConfig, MoEConfig
from moejax.models.decoder import Decoder
from moejax.models.encoder_decoder import EncoderDecoder


def make_model(model: ModelConfig, moe: MoEConfig, **others: Any) -> Decoder:
  """Returns a decoder, or a decoder with an encoder; arguments as for `Decoder`."""
  kind = EncoderDecoder if model.kind == "encoder_decoder" else Decoder
  return kind(model, moe, **others)
