"""Rules of encoder-decoders and span corruption; each returns an error, or None.

Types, names and ranges are already checked; see `config/check`.
"""

from collections.abc import Callable

from moejax.config.schema import Config
from moejax.config.spans import spans_of
from moejax.config.text import get_field, named
from moejax.errors import did_you_mean
from moejax.routing.registry import ROUTERS

_ENCODER_FIELDS = (
  "model.encoder_layers",
  "model.encoder_embedding",
  "moe.encoder_every",
  "moe.encoder_router",
)
_SPAN_FIELDS = ("noise_density", "mean_span_length", "decoder_length", "num_sentinels")


def _objective_fits_the_model(c: Config) -> str | None:
  kind, objective = c.model.kind, c.data.objective
  if (kind == "encoder_decoder") == (objective == "span_corruption"):
    return None
  remedy = (
    "Give --config.data.objective=span_corruption"
    if kind == "encoder_decoder"
    else "Give --config.model.kind=encoder_decoder"
  )
  return (
    f"{named(c, 'model.kind', 'data.objective')}: an encoder-decoder is trained to "
    f"restore corrupted spans, and a decoder to predict the next token. {remedy}."
  )


def _fields_of_an_encoder(c: Config) -> str | None:
  if c.model.kind == "encoder_decoder":
    return None
  plain = Config()
  names = [*_ENCODER_FIELDS, *(f"data.{field}" for field in _SPAN_FIELDS)]
  for name in names:
    if get_field(c, name) != get_field(plain, name):
      return (
        f"{named(c, name, 'model.kind')}: a decoder has no encoder, and does not read "
        "it. Leave it out, or use --config.model.kind=encoder_decoder."
      )


def _encoder_router_is_known(c: Config) -> str | None:
  name = c.moe.encoder_router
  if name and name not in ROUTERS:
    return f"--config.moe.encoder_router={name} is unknown. {did_you_mean(name, ROUTERS)}"


def _encoder_attends_to_all(c: Config) -> str | None:
  if c.model.kind != "encoder_decoder":
    return None
  for name in ("model.sliding_window", "model.window_pattern"):
    if get_field(c, name):
      return (
        f"{named(c, name, 'model.kind')}: encoder-decoders have no windows. Leave it out."
      )
  if c.model.attention != "multi_head":
    return (
      f"{named(c, 'model.attention', 'model.kind')}: cross-attention has no latent form. "
      "Use --config.model.attention=multi_head."
    )


def _relative_positions_are_biases(c: Config) -> str | None:
  model = c.model
  if model.positions == "rotary":
    return None
  if model.attention != "multi_head" or model.rope_scaling != "none":
    other = "model.attention" if model.attention != "multi_head" else "model.rope_scaling"
    return (
      f"{named(c, 'model.positions', other)}: relative positions are a bias of "
      "multi-head attention, and nothing rotates. Leave the second out."
    )
  if model.attention_sinks:
    return (
      f"{named(c, 'model.positions', 'model.attention_sinks')}: sinks have no distance. "
      "Leave them out, or use rotary positions."
    )
  if model.relative_buckets % 4 or model.relative_distance <= model.relative_buckets // 2:
    names = ("model.relative_buckets", "model.relative_distance")
    return (
      f"{named(c, *names)}: in each direction, half of the buckets hold single distances "
      "and half growing ranges up to relative_distance. Use a multiple of 4 buckets, and "
      "a distance of more than half their number."
    )


def _rows_hold_a_span(c: Config) -> str | None:
  if c.data.objective != "span_corruption":
    return None
  spans = spans_of(c.data)
  if spans.longest < 2:
    return (
      f"{named(c, 'data.sequence_length', 'data.decoder_length')} has no room for a span "
      "and its sentinel. Raise it, or use decoder_length=0."
    )
  if spans.most_spans > c.data.num_sentinels:
    return (
      f"{named(c, 'data.num_sentinels', 'data.sequence_length')}: a text of "
      f"{spans.longest} tokens has {spans.most_spans} spans, and each needs a sentinel. "
      "Raise the first, or --config.data.mean_span_length."
    )


def _groups_divide_decoder_rows(c: Config) -> str | None:
  if c.data.objective != "span_corruption" or not c.moe.group_size:
    return None
  if c.moe.group_size < 0:
    return (
      f"{named(c, 'moe.group_size', 'model.kind')}: the batches of encoder and decoder "
      "have different sizes. Give a number of tokens, or 0 for one group per sequence."
    )
  micro = c.train.batch_size // c.train.accumulation
  length = spans_of(c.data).decoder_length
  if micro * length % c.moe.group_size:
    return (
      f"--config.moe.group_size={c.moe.group_size} does not divide the {micro * length} "
      f"tokens of the decoder in a microbatch ({micro} sequences of {length}). Choose a "
      "divisor, 0 for one group per sequence, or another --config.data.decoder_length."
    )


ENCODER_RULES: tuple[Callable[[Config], str | None], ...] = (
  _objective_fits_the_model,
  _fields_of_an_encoder,
  _encoder_router_is_known,
  _encoder_attends_to_all,
  _relative_positions_are_biases,
  _rows_hold_a_span,
  _groups_divide_decoder_rows,
)
