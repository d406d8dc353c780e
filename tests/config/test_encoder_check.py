"""Every bad combination of an encoder-decoder's fields is one error with a way out."""

import pytest

from moejax.config import check as config_check
from moejax.config.encoder import encoder_config
from tests.config.test_check import make, refusal

BOTH = dict(model__kind="encoder_decoder", data__objective="span_corruption")
RELATIVE = dict(model__positions="relative")

REFUSED = [
  (dict(model__kind="encoder_decoder"), "Give --config.data.objective=span_corruption"),
  (dict(data__objective="span_corruption"), "--config.model.kind=encoder_decoder"),
  (dict(model__kind="t5"), "Choose from decoder, encoder_decoder."),
  (dict(model__encoder_layers=2), "a decoder has no encoder"),
  (dict(model__encoder_embedding=True), "a decoder has no encoder"),
  (dict(moe__encoder_every=2), "--config.moe.encoder_every=2"),
  (dict(moe__encoder_router="top_k"), "--config.moe.encoder_router=top_k"),
  (dict(data__noise_density=0.3), "--config.data.noise_density=0.3"),
  (BOTH | dict(moe__encoder_router="topk"), "Did you mean top_k"),
  (BOTH | dict(moe__router="expert_choice"), "--config.moe.encoder_router=expert_choice"),
  (BOTH | dict(moe__encoder_router="hash"), "a table by token id is shared by"),
  (BOTH | dict(model__sliding_window=8), "encoder-decoders have no windows"),
  (BOTH | dict(moe__group_size=-1), "--config.moe.group_size=-1"),
  (BOTH | dict(moe__group_size=4096), "tokens of the decoder in a microbatch"),
  (BOTH | dict(data__decoder_length=2), "has no room for a span"),
  (BOTH | dict(data__num_sentinels=3), "each needs a sentinel"),
  (BOTH | dict(data__noise_density=0.99), "--config.data.noise_density=0.99"),
  (BOTH | dict(model__vocab_size=300), "no room for the 364 ids"),
  (RELATIVE | dict(model__relative_buckets=6), "Use a multiple of 4"),
  (RELATIVE | dict(model__relative_distance=16), "--config.model.relative_distance=16"),
  (RELATIVE | dict(model__attention_sinks=True), "sinks have no distance"),
  (
    RELATIVE | dict(model__rope_scaling="linear", model__rope_factor=2.0),
    "nothing rotates",
  ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_each_is_refused_in_one_line(changes, message):
  """The line names the flag, its value and a remedy."""
  line = refusal(make(**changes))
  assert message in line
  assert "\n" not in line


@pytest.mark.parametrize(
  "changes",
  [
    BOTH,
    BOTH | RELATIVE | dict(model__head_dim=7),
    BOTH | dict(moe__encoder_router="expert_choice", moe__capacity_factor=None),
    BOTH | dict(moe__router="hash"),
    RELATIVE,
  ],
)
def test_what_can_be_run_is_accepted(changes):
  """Odd heads too, where nothing rotates; and the encoder is a valid decoder."""
  config = make(**changes)
  config_check.validate(config)
  if config.model.kind == "encoder_decoder":
    own = encoder_config(config)
    own.moe.encoder_every, own.moe.encoder_router = 0, ""
    own.moe.allow_future_leak = True
    config_check.validate(own)
