"""DeepSeek-V3 (arXiv:2412.19437), Kimi K2, Moonlight: sigmoid scores, a choice bias.

The weights of layers for multi-token prediction are left out.
"""

from typing import Any

from moejax.config import Config
from moejax.interop import fields
from moejax.interop.architecture import Architecture
from moejax.interop.architectures import deepseek_v2
from moejax.interop.keys import Keys
from moejax.interop.table import FLAT, PRE_NORMS, entry

_CLASS = "DeepseekV3ForCausalLM"

FEED_FORWARD = (
  *deepseek_v2.FEED_FORWARD,
  entry("moe.router.bias", "mlp.gate.e_score_correction_bias", FLAT),
)

LAYER = (*PRE_NORMS, *deepseek_v2.LATENT_ATTENTION, *FEED_FORWARD)


def read(keys: Keys) -> Config:
  config = fields.read_decoder(keys, latent=True)
  deepseek_v2.read_latent(keys, config)
  # With another value, the class would rotate differently.
  keys.only("head_dim", config.model.rope_head_dim, None)
  config.model.rope_interleaved = keys.take("rope_interleave", bool, True, null=False)
  keys.only("mlp_bias", False)
  read_experts(keys, config, dense=3, scale=2.5, groups=8, selected=4)
  return config


def read_experts(
  keys: Keys, config: Config, *, dense: int, scale: float, groups: int, selected: int
) -> None:
  """Reads the keys of the experts and their router; other arguments are defaults."""
  deepseek_v2.read_sizes(keys, config, shared=1, dense=dense, scale=scale)
  keys.only("topk_method", "noaux_tc")
  keys.only("scoring_func", "sigmoid")
  # The layers they name are left out.
  keys.skip("num_nextn_predict_layers", "num_mtp_layers")
  config.moe.router = "sigmoid_bias"
  fields.read_groups(keys, config, best=2, groups=groups, selected=selected)
  fields.renormalize(keys, config, True)


def write_experts(config: Config) -> dict[str, Any]:
  """Inverts `read_experts`."""
  return (
    deepseek_v2.write_sizes(config)
    | fields.write_groups(config)
    | {
      "norm_topk_prob": config.moe.renormalize != "none",
      "num_nextn_predict_layers": 0,
    }
  )


def write(config: Config) -> dict[str, Any]:
  return (
    fields.write_decoder(config, class_name=_CLASS)
    | deepseek_v2.write_latent(config)
    | write_experts(config)
    | {"rope_interleave": config.model.rope_interleaved}
  )


ARCHITECTURE = Architecture(
  name="deepseek_v3",
  class_name=_CLASS,
  layer=LAYER,
  read=read,
  write=write,
  left_out=fields.further_layers,
)
