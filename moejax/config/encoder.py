"""The encoder's own settings in an encoder-decoder: depth, pattern and router.

An encoder is a stack of the same blocks as a decoder, made from a configuration in which
the encoder's fields replace the decoder's.
"""

import copy
import dataclasses

from moejax.config.router import make_router
from moejax.config.schema import Config, ModelConfig, MoEConfig


def encoder_model(model: ModelConfig) -> ModelConfig:
  """Returns the configuration of the encoder's stack."""
  return dataclasses.replace(model, num_layers=model.encoder_layers or model.num_layers)


def encoder_moe(moe: MoEConfig) -> MoEConfig:
  """Returns the configuration of the encoder's MoE layers.

  If the encoder has its own router and it needs slots in evaluation, it gets those of
  training, even where the decoder is evaluated dropless.
  """
  own = dataclasses.replace(moe, every=moe.encoder_every or moe.every)
  if moe.encoder_router and moe.encoder_router != moe.router:
    own.router, own.options = moe.encoder_router, {}
    if make_router(own).needs_capacity:
      own.capacity_factor = moe.capacity_factor or 1.0
      own.eval_capacity_factor = moe.eval_capacity_factor or own.capacity_factor
  return own


def encoder_config(config: Config) -> Config:
  """Returns a config whose decoder is the encoder of the given one."""
  own = copy.deepcopy(config)
  own.model, own.moe = encoder_model(config.model), encoder_moe(config.moe)
  own.model.kind, own.data.objective = "decoder", "causal"
  return own
