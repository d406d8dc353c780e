"""Every bad combination of attention fields is one error that names a way out."""

import pytest

from moejax.config import check as config_check
from tests.config.test_check import make, refusal

SIZES = dict(
  model__kv_rank=16,
  model__nope_head_dim=8,
  model__rope_head_dim=4,
  model__value_head_dim=6,
)
LATENT = dict(model__attention="latent", **SIZES)
YARN = dict(model__rope_scaling="yarn", model__rope_factor=4.0)

REFUSED = [
  (dict(model__attention="latnet"), "Did you mean latent?"),
  (dict(model__attention="latent"), "Set --config.model.kv_rank (DeepSeek-V2"),
  (LATENT | dict(model__value_head_dim=0), "--config.model.value_head_dim=0"),
  (LATENT | dict(model__rope_head_dim=5), "--config.model.rope_head_dim=5"),
  (LATENT | dict(model__num_kv_heads=2), "only multi_head attention reads it"),
  (LATENT | dict(model__head_dim=32), "--config.model.head_dim=32"),
  (LATENT | dict(model__qk_norm=True), "--config.model.qk_norm=true"),
  (LATENT | dict(model__clip_qkv=3.0), "--config.model.clip_qkv=3.0"),
  (LATENT | dict(model__rope_fraction=0.5), "--config.model.rope_fraction=0.5"),
  (SIZES, "or use --config.model.attention=latent"),
  (dict(model__q_rank=8), "only latent attention reads it"),
  (dict(model__qk_norm_scope="width"), "Add --config.model.qk_norm=true"),
  (dict(model__qk_norm_scope="all"), "Choose from head, width."),
  (dict(model__clip_qkv=0.0), "--config.model.clip_qkv=0.0"),
  (dict(model__attention_scale=-1.0), "--config.model.attention_scale=-1.0"),
  (dict(model__rope_fraction=0.0), "--config.model.rope_fraction=0.0"),
  (dict(model__rope_fraction=1.5), "--config.model.rope_fraction=1.5"),
  (dict(model__rope_fraction=0.1), "rotates 3 of a head's 32 entries"),
  (dict(model__rope_fraction=0.01), "rotates 0 of a head's 32 entries"),
  (dict(model__window_pattern="sliding,full"), "--config.model.sliding_window=0"),
  (dict(model__window_pattern="slide", model__sliding_window=4), "'slide' is neither"),
  (
    dict(model__window_pattern="full,full", model__sliding_window=4),
    "at least one of the model's layers must be sliding",
  ),
  (
    dict(model__window_pattern="full," * 4 + "sliding", model__sliding_window=4),
    "the pattern names 5 layers",
  ),
  (dict(model__rope_scaling="ntk"), "Choose from none, linear, llama3, yarn."),
  (dict(model__rope_scaling="linear"), "--config.model.rope_factor=1.0 changes nothing"),
  (dict(model__rope_factor=2.0), "rope_scaling=linear or llama3 or yarn"),
  (dict(model__rope_factor=0.5), "--config.model.rope_factor=0.5"),
  (YARN, "Set --config.model.rope_original"),
  (
    dict(model__rope_scaling="linear", model__rope_factor=2.0, model__rope_mscale=0.5),
    "or use --config.model.rope_scaling=yarn",
  ),
  (
    YARN | dict(model__rope_original=64, model__rope_beta_fast=0.5),
    "the first must be below the second",
  ),
  (
    dict(
      model__rope_scaling="llama3",
      model__rope_factor=8.0,
      model__rope_original=64,
      model__rope_high_factor=0.5,
    ),
    "--config.model.rope_high_factor=0.5",
  ),
]


@pytest.mark.parametrize(("fields", "part"), REFUSED, ids=lambda x: str(x)[:60])
def test_refused(fields, part):
  """The error names what was given, and says what to do."""
  message = refusal(make(**fields))
  assert part in message
  assert "--config." in message


ACCEPTED = [
  LATENT,
  LATENT | dict(model__width=130, model__q_rank=12, model__sliding_window=8),
  LATENT | YARN | dict(model__rope_original=64, model__rope_mscale_all_dim=1.0),
  YARN | dict(model__rope_original=64, model__rope_beta_fast=1.0),
  dict(model__head_dim=25, model__rope_fraction=0.5),
  dict(model__window_pattern="sliding, full,full", model__sliding_window=4),
  dict(model__rope_scaling="linear", model__rope_factor=2),
  dict(model__qk_norm=True, model__qk_norm_scope="width", model__clip_qkv=8.0),
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda x: str(x)[:60])
def test_accepted(fields):
  """The checks refuse what cannot work, and nothing beside it."""
  config_check.validate(make(**fields))
