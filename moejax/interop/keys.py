"""Reads a config.json key by key, so that none is overlooked.

Every key is either taken by the architecture, known to be harmless, or an error: a key
that changes the computation and is not understood must not be dropped.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moejax.errors import UserError

HARMLESS = frozenset(
  [
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "dtype",
    "torch_dtype",
    "initializer_range",
    "initializer_factor",
    "model_type",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "attn_implementation",
    "gradient_checkpointing",
    "use_bfloat16",
    "torchscript",
    "pruned_heads",
    "is_encoder_decoder",
    "is_decoder",
    "tokenizer_class",
    "prefix",
    "problem_type",
    "finetuning_task",
    "id2label",
    "label2id",
    "num_labels",
    "task_specific_params",
    "chunk_size_feed_forward",
    "pretraining_tp",
    "experts_implementation",
    "moejax_version",
    "max_length",
    "min_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "repetition_penalty",
    "license",
    "name_or_path",
    "generation_config",
    "transformers.js_config",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "router_jitter_noise",
  ]
)
"""Keys without effect on the logits of a decoder: training (dropout, initialisation,
aux losses), tokens, generation, outputs, provenance."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
  "is_encoder_decoder": (False, None),
  "add_cross_attention": (False, None),
  "cross_attention_hidden_size": (None,),
  "tie_encoder_decoder": (False, None),
  "pruned_heads": ({}, None),
  "per_layer_config": (None, {}),
}
"""Keys of any model, with the values under which they change nothing."""

_MISSING: Any = object()


class Keys:
  """The keys of one config.json."""

  def __init__(self, values: Mapping[str, Any], path: str):
    """Starts without any key taken.

    Args:
      values: the parsed config.json.
      path: of the file, for errors.
    """
    self.values, self.path = values, path
    self._taken: set[str] = set()

  def has(self, name: str) -> bool:
    return name in self.values

  def with_values(self, **values: Any) -> "Keys":
    """Returns the same keys with more values; both share the marks of taken keys."""
    more = Keys({**self.values, **values}, self.path)
    more._taken = self._taken
    return more

  def take(
    self, name: str, kind: Any, default: Any = _MISSING, *, null: Any = _MISSING
  ) -> Any:
    """Takes a key's value.

    Args:
      name: of the key.
      kind: its type; int is accepted for float, and null where `default` is given.
      default: the value if the key is absent; without one the key is required.
      null: the value if the key is null; by default `default`.

    Raises:
      UserError: it is missing, or of another type.
    """
    self._taken.add(name)
    value = self.values.get(name)
    if value is None:
      if name in self.values and null is not _MISSING:
        return null
      if default is _MISSING:
        raise UserError(
          f"{self.path} has no {name}, which this architecture needs. Give the "
          "config.json that belongs to the weights."
        )
      return default
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind:
      raise UserError(f"{self.path}: {name}={value!r} is not of type {kind.__name__}.")
    return value

  def only(self, name: str, *allowed: Any) -> Any:
    """Takes a key that allows only some values; the first is the default.

    Raises:
      UserError: another value, which changes the computation in an unsupported way.
    """
    self._taken.add(name)
    value = self.values.get(name, allowed[0])
    # JSON may write a whole float as an int; a bool is not a number.
    kinds = (float, int) if type(value) is int else (type(value),)
    if not any(value == a and type(a) in kinds for a in allowed):
      shown = " or ".join(repr(a) for a in allowed)
      raise UserError(
        f"{self.path}: {name}={value!r} changes the computation and is not "
        f"supported; only {shown} is."
      )
    return value

  def skip(self, *names: str) -> None:
    """Marks keys as known and without effect in this architecture."""
    self._taken.update(names)

  def done(self) -> None:
    """Checks that nothing was overlooked.

    Raises:
      UserError: names the keys that are not understood.
    """
    for name, allowed in _MUST_BE.items():
      if name in self.values and name not in self._taken:
        self.only(name, *allowed)
    unknown = sorted(set(self.values) - self._taken - HARMLESS)
    if unknown:
      raise UserError(
        f"{self.path}: {_named(self.values, unknown)} is not understood for "
        f"model_type {self.values.get('model_type')!r} and may change the computation. "
        "Remove the key if it does not."
      )


def _named(values: Mapping[str, Any], names: Collection[str]) -> str:
  return ", ".join(f"{name}={values[name]!r}" for name in names)
