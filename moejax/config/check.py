"""Rejects a bad configuration with one clear error, before compiling or writing.

`validate` needs neither data nor devices; moejax/config/devices.py needs the number of
devices. Checks that need the data itself (a corpus smaller than a batch) are made where
it is loaded.

Letters: B sequences of a batch, S sequence, T tokens of a routing group, D width,
E experts, K choices per token, F expert hidden width.
"""

from collections.abc import Callable, Iterable

from moejax.config.attention_check import ATTENTION_RULES
from moejax.config.encoder_check import ENCODER_RULES
from moejax.config.pattern import dense_layers, layer_pattern
from moejax.config.ranges import CHOICES, RANGES
from moejax.config.schema import SCHEMA_VERSION, Config
from moejax.config.selectors import parse
from moejax.config.text import (
  expected,
  field_types,
  get_field,
  is_router_option,
  named,
)
from moejax.errors import ConfigError
from moejax.options import check_choice, check_range, check_type


def validate(config: Config) -> None:
  """Rejects a config that cannot train, at the first error found.

  Raises:
    ConfigError: names the flag, its value and the remedy.
  """
  validate_fields(config)
  # Last, because routers import jax and the checks above should be fast.
  from moejax.config.router_check import check_router

  check_router(config)


def validate_fields(config: Config) -> None:
  """Runs the fast part of `validate`, which does not import jax.

  Raises:
    ConfigError: as `validate`.
  """
  validate_values(config)
  for rule in RULES:
    error = rule(config)
    if error:
      raise ConfigError(error)


def validate_values(config: Config) -> None:
  """Checks each field on its own: types, names and ranges, not rules between fields.

  Raises:
    ConfigError: as `validate`.
  """
  for check in (_types, _choices, _ranges):
    check(config)


def refuse_unread(config: Config, given: Iterable[str]) -> None:
  """Rejects explicitly given options that the chosen router does not read.

  Not part of `validate`: a stored config is never rejected for fields its run ignored.

  Args:
    config: validated.
    given: dotted names of the fields set on the command line or in a config file.

  Raises:
    ConfigError: names the flag and the routers that read it.
  """
  from moejax.routing.registry import ROUTERS, readers

  if config.moe.dense_twin:
    return  # It has no routers, but keeps the config of its sparse counterpart.
  router = config.moe.router
  for name in given:
    section, _, field = name.rpartition(".")
    if section == "moe" and not ROUTERS[router].reads_field(field):
      remedy = f"or use --config.moe.router={' or '.join(readers(field))}"
    elif is_router_option(name) and section != f"moe.{router}":
      remedy = f"or use --config.moe.router={section.removeprefix('moe.')}"
    else:
      continue
    raise ConfigError(
      f"{named(config, name, 'moe.router')}: this router does not read it. Leave it out, "
      f"{remedy}."
    )


def _types(config: Config) -> None:
  """Checks types: a config file, unlike a flag, can set a field to anything."""
  for name, (kind, optional) in field_types().items():
    value = get_field(config, name)
    if optional and value is None:
      continue
    check_type(f"--config.{name}", value, kind, expected(name))


def _choices(config: Config) -> None:
  for name, choices in CHOICES.items():
    check_choice(f"--config.{name}", get_field(config, name), choices)


def _ranges(config: Config) -> None:
  for name, allowed in RANGES.items():
    value = get_field(config, name)
    if value is not None:
      check_range(f"--config.{name}", value, allowed)


# Each rule returns an error or None. Types, names and ranges are already checked.


def _schema(c: Config) -> str | None:
  if c.schema_version != SCHEMA_VERSION:
    return (
      f"schema_version={c.schema_version} is not the {SCHEMA_VERSION} of this moejax. It "
      "is not a setting: leave it out of config files."
    )


def _splits_leave_training_text(c: Config) -> str | None:
  if c.data.validation_fraction + c.data.test_fraction >= 1:
    names = ("data.validation_fraction", "data.test_fraction")
    return f"{named(c, *names)} leaves nothing to train on: their sum must be below 1."


def _text_has_a_path(c: Config) -> str | None:
  if c.data.name == "text" and not c.data.path:
    return (
      "--config.data.name=text needs --config.data.path: a folder, a file or .jsonl. "
      "Or leave the name out and train on the embedded python_stdlib."
    )
  if c.data.name in ("python_stdlib", "python_packages") and c.data.path:
    return (
      f"--config.data.path={c.data.path} is not read by {c.data.name}. For your own text "
      "add --config.data.name=text."
    )
  if not c.data.name:
    return "--config.data.name is empty. --list=datasets shows the choices."
  local = c.data.name in ("text", "python_stdlib", "python_packages")
  if c.data.domains and not local:
    return (
      f"{named(c, 'data.domains', 'data.name')}: a TFDS dataset has no domains. Leave "
      "them out."
    )


def _heads_divide_width(c: Config) -> str | None:
  derived = c.model.attention == "multi_head" and not c.model.head_dim
  if derived and c.model.width % c.model.num_heads:
    return (
      f"{named(c, 'model.width', 'model.num_heads')}: the width must be divisible by "
      "the number of heads. Change either, or set --config.model.head_dim."
    )


def _kv_heads_divide_heads(c: Config) -> str | None:
  if c.model.num_kv_heads and c.model.num_heads % c.model.num_kv_heads:
    return (
      f"{named(c, 'model.num_kv_heads', 'model.num_heads')}: each key/value head serves "
      "the same number of query heads, so the first must divide the second."
    )


def _vocabulary_holds_the_tokenizer(c: Config) -> str | None:
  if c.data.tokenizer == "hf":  # Its size is checked where the model is imported.
    return None
  need = c.data.vocab_size if c.data.tokenizer == "bpe" else 257
  if c.data.objective == "span_corruption":
    # The sentinels come after all ids of the tokenizer, used or not.
    need = c.data.num_sentinels + (need if c.data.tokenizer == "bpe" else 264)
  if c.model.vocab_size and c.model.vocab_size < need:
    return (
      f"--config.model.vocab_size={c.model.vocab_size} has no room for the {need} ids of "
      f"--config.data.tokenizer={c.data.tokenizer}. Raise it, or use 0."
    )


def _context_holds_a_sequence(c: Config) -> str | None:
  if 0 < c.model.max_position < c.data.sequence_length:
    return (
      f"{named(c, 'model.max_position', 'data.sequence_length')}: the context of "
      "generation must hold a training sequence. Raise the first, or use 0."
    )


def _no_more_choices_than_experts(c: Config) -> str | None:
  if c.moe.num_selected > c.moe.num_experts:
    return (
      f"--config.moe.num_selected={c.moe.num_selected} is more than "
      f"--config.moe.num_experts={c.moe.num_experts}: a token cannot choose an expert "
      "twice. Lower the first or raise the second."
    )


def _segments_divide_hidden(c: Config) -> str | None:
  if c.moe.hidden % c.moe.segments:
    return (
      f"{named(c, 'moe.segments', 'moe.hidden')}: each expert is cut into equal "
      "segments, so the first must divide the second."
    )


def _a_norm_is_of_something(c: Config) -> str | None:
  if c.moe.renormalize_norm != 1 and c.moe.renormalize == "none":
    return (
      f"{named(c, 'moe.renormalize_norm', 'moe.renormalize')}: gates that are not "
      "renormalised have no norm. Give --config.moe.renormalize=before_drop or "
      "after_drop, or leave the norm out."
    )
  if c.moe.shared_gate and not c.moe.shared_width:
    return (
      "--config.moe.shared_gate=true weights shared experts, but "
      "--config.moe.num_shared=0 means that there are none. Raise it, or leave the gate "
      "out."
    )


def _some_layer_is_moe(c: Config) -> str | None:
  # A dense twin replaces the MoE layers of this pattern, so it needs one too.
  if not any(layer_pattern(c.model.num_layers, c.moe).is_moe):
    names = ["moe.every", "moe.offset", "moe.dense_prefix", "model.num_layers"]
    if c.moe.dense_layers:
      names.append("moe.dense_layers")
    return (
      f"{named(c, *names)} makes no layer an MoE layer. Lower the first three, or add "
      "layers."
    )


def _dense_layers_are_layers(c: Config) -> str | None:
  try:
    indices = dense_layers(c.moe)
  except ValueError:
    return (
      f"--config.moe.dense_layers={c.moe.dense_layers} is not a list of layers. Give "
      "their numbers from 0, separated by commas, such as 0,3."
    )
  outside = [i for i in indices if not 0 <= i < c.model.num_layers]
  if outside:
    names = ("moe.dense_layers", "model.num_layers")
    return (
      f"{named(c, *names)}: there is no layer {min(outside)}. Layers are counted from 0."
    )


def _accumulation_divides_batch(c: Config) -> str | None:
  if c.train.batch_size % c.train.accumulation:
    return (
      f"{named(c, 'train.batch_size', 'train.accumulation')}: microbatches are equal, "
      "so the second must divide the first."
    )


def _frozen_is_a_list_of_selectors(c: Config) -> str | None:
  try:
    parse(c.train.frozen)
  except ValueError as e:
    return f"--config.train.frozen={c.train.frozen}: {e}."


def _slots_travel_with_a_capacity(c: Config) -> str | None:
  if c.moe.exchange == "all_to_all" and c.moe.capacity_factor is None:
    return (
      f"{named(c, 'moe.exchange', 'moe.capacity_factor')}: all_to_all sends slots, but "
      "dropless has none. Use exchange=auto, or give a capacity factor."
    )
  if c.moe.exchange_buffer is not None and c.moe.exchange not in ("auto", "ragged"):
    return (
      f"{named(c, 'moe.exchange_buffer', 'moe.exchange')}: only ragged has a buffer that "
      "can be too small. Leave it out, or use --config.moe.exchange=ragged."
    )


def _first_choices_are_not_kept(c: Config) -> str | None:
  moe = c.moe
  if c.train.accumulation == 1 or moe.balance_scope == "group":
    return None
  if moe.balance_counts == "first":
    names = ("moe.balance_counts", "moe.balance_scope", "train.accumulation")
    return (
      f"{named(c, *names)}: before the last microbatch of a batch, only its loads over "
      "all choices are known. Use balance_counts=all, balance_scope=group or "
      "accumulation=1."
    )


def _groups_divide_microbatch(c: Config) -> str | None:
  micro = c.train.batch_size // c.train.accumulation
  tokens = micro * c.data.sequence_length
  if c.moe.group_size and tokens % c.moe.group_size:
    return (
      f"--config.moe.group_size={c.moe.group_size} does not divide the {tokens} tokens "
      f"of a microbatch ({micro} sequences of {c.data.sequence_length}). Choose a "
      "divisor, or 0 for one group per sequence."
    )


def _one_mesh_axis_is_free(c: Config) -> str | None:
  sizes = {a: getattr(c.mesh, a) for a in ("data", "fsdp", "expert", "tensor")}
  zero = [f"--config.mesh.{a}=0" for a, size in sizes.items() if size == 0]
  if zero:
    return f"{zero[0]}: an axis has at least 1 device; 1 leaves it unused."
  free = [f"--config.mesh.{a}=-1" for a, size in sizes.items() if size == -1]
  if len(free) > 1:
    return f"{' '.join(free)}: only one axis can take what the others leave."


RULES: tuple[Callable[[Config], str | None], ...] = (
  _schema,
  _splits_leave_training_text,
  _text_has_a_path,
  _heads_divide_width,
  _kv_heads_divide_heads,
  *ATTENTION_RULES,
  *ENCODER_RULES,
  _vocabulary_holds_the_tokenizer,
  _context_holds_a_sequence,
  _no_more_choices_than_experts,
  _segments_divide_hidden,
  _a_norm_is_of_something,
  _dense_layers_are_layers,
  _some_layer_is_moe,
  _accumulation_divides_batch,
  _frozen_is_a_list_of_selectors,
  _slots_travel_with_a_capacity,
  _first_choices_are_not_kept,
  _groups_divide_microbatch,
  _one_mesh_axis_is_free,
)
