"""Rules between the fields of attention; each returns an error, or None.

Types, names and ranges are already checked; see `config/check`.
"""

from collections.abc import Callable

from moejax.config.attention import WINDOW_WORDS, head_widths, layer_windows
from moejax.config.schema import Config, ModelConfig
from moejax.config.text import get_field, named

_LATENT = ("kv_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
_MULTI_HEAD = (
  "num_kv_heads",
  "head_dim",
  "qk_norm",
  "qk_norm_scope",
  "clip_qkv",
  "rope_fraction",
)
_READ = {
  "none": (),
  "linear": ("factor",),
  "llama3": ("factor", "original", "low_factor", "high_factor"),
  "yarn": (
    "factor",
    "original",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
  ),
}
"""The fields `rope_*` that each kind of scaling reads."""


def _latent_has_sizes(c: Config) -> str | None:
  if c.model.attention != "latent":
    return None
  for field in _LATENT:
    if not getattr(c.model, field):
      return (
        f"{named(c, 'model.attention', f'model.{field}')}: latent attention derives no "
        f"size from the width. Set --config.model.{field} (DeepSeek-V2: kv_rank 512, "
        "nope_head_dim 128, rope_head_dim 64, value_head_dim 128)."
      )


def _each_kind_has_its_own_fields(c: Config) -> str | None:
  latent = c.model.attention == "latent"
  others = _MULTI_HEAD if latent else ("q_rank", *_LATENT)
  for field in others:
    if _is_set(c.model, field):
      kind = "multi_head" if latent else "latent"
      return (
        f"{named(c, f'model.{field}', 'model.attention')}: only {kind} attention reads "
        f"it. Leave it out, or use --config.model.attention={kind}."
      )


def _rotated_entries_are_pairs(c: Config) -> str | None:
  model, sizes = c.model, head_widths(c.model)
  if model.positions != "rotary":
    return None
  if sizes.rotated and sizes.rotated % 2 == 0:
    return None
  if model.attention == "latent":
    return (
      f"{named(c, 'model.rope_head_dim')}: rotary positions rotate pairs of entries. Use "
      "an even number."
    )
  names = ("model.head_dim",) if model.head_dim else ("model.width", "model.num_heads")
  if model.rope_fraction == 1:
    return (
      f"{named(c, *names)} makes heads of width {sizes.query}: rotary positions "
      "rotate pairs of entries, so it must be even."
    )
  return (
    f"{named(c, 'model.rope_fraction', *names)} rotates {sizes.rotated} of a head's "
    f"{sizes.query} entries, in pairs: this number must be even and not 0."
  )


def _a_scope_is_of_a_norm(c: Config) -> str | None:
  if c.model.qk_norm_scope != "head" and not c.model.qk_norm:
    return (
      f"{named(c, 'model.qk_norm_scope', 'model.qk_norm')}: there is no norm. Add "
      "--config.model.qk_norm=true, or leave the scope out."
    )


def _window_pattern_names_layers(c: Config) -> str | None:
  model = c.model
  if not model.window_pattern:
    return None
  pattern = named(c, "model.window_pattern")
  words = [word.strip() for word in model.window_pattern.split(",")]
  wrong = next((word for word in words if word not in WINDOW_WORDS), None)
  if wrong is not None:
    return (
      f"{pattern}: {wrong!r} is neither sliding nor full. Give, for example, "
      "sliding,full."
    )
  if not model.sliding_window:
    return (
      f"{named(c, 'model.window_pattern', 'model.sliding_window')}: there is no window. "
      "Set --config.model.sliding_window, or leave the pattern out."
    )
  if len(words) > model.num_layers or not any(layer_windows(model)):
    return (
      f"{named(c, 'model.window_pattern', 'model.num_layers')}: the pattern names "
      f"{len(words)} layers. It must not be longer than the model, and at least one of "
      "the model's layers must be sliding. Change the pattern, or add layers."
    )


def _scaling_reads_its_fields(c: Config) -> str | None:
  kind = c.model.rope_scaling
  for field in _READ["llama3"] + _READ["yarn"]:
    if field not in _READ[kind] and _is_set(c.model, f"rope_{field}"):
      readers = " or ".join(k for k, read in _READ.items() if field in read)
      return (
        f"{named(c, f'model.rope_{field}', 'model.rope_scaling')}: this scaling does not "
        f"read it. Leave it out, or use --config.model.rope_scaling={readers}."
      )


def _scaling_scales(c: Config) -> str | None:
  model, kind = c.model, c.model.rope_scaling
  hotter = kind == "yarn" and model.rope_attention_factor not in (None, 1.0)
  if kind != "none" and model.rope_factor == 1 and not hotter:
    return (
      f"{named(c, 'model.rope_scaling', 'model.rope_factor')} changes nothing. Raise the "
      "factor, or leave the scaling out."
    )
  if "original" in _READ[kind] and not model.rope_original:
    return (
      f"{named(c, 'model.rope_scaling', 'model.rope_original')}: which frequencies to "
      "divide depends on the context before the extension. Set "
      "--config.model.rope_original, in tokens."
    )
  ends = {"llama3": ("rope_low_factor", "rope_high_factor")}
  ends["yarn"] = ("rope_beta_slow", "rope_beta_fast")
  if kind in ends:
    low, high = (f"model.{field}" for field in ends[kind])
    # YaRN's ramp is over whole indices, so that it has a width even if both are equal
    # (Kimi K2).
    gap = get_field(c, high) - get_field(c, low)
    if gap < 0 or (gap == 0 and kind == "llama3"):
      return (
        f"{named(c, low, high)}: frequencies between them are blended, so the first must "
        "be below the second."
      )


def _is_set(model: ModelConfig, field: str) -> bool:
  return getattr(model, field) != getattr(ModelConfig(), field)


ATTENTION_RULES: tuple[Callable[[Config], str | None], ...] = (
  _latent_has_sizes,
  _each_kind_has_its_own_fields,
  _rotated_entries_are_pairs,
  _a_scope_is_of_a_norm,
  _window_pattern_names_layers,
  _scaling_reads_its_fields,
  _scaling_scales,
)
