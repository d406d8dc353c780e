"""Tables of names and transposes: which tensor on disk is which of our parameters.

A table is data, used in both directions: import calls each form's `load`, export its
`store`. What a form does follows from the entry alone, never from the sizes of an array:
where 2F == D or F == D, a guess by shape would be silently wrong.

"Theirs" is a tensor on disk, "ours" a parameter of `moejax.models.decoder`. Letters: D
width, F expert hidden width, E experts, H heads, A head width.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

Shape = tuple[int, ...]
Arrays = Sequence[Shaped[np.ndarray, "..."]]


class Form(abc.ABC):
  """The form in which one tensor of theirs holds one or several of our parameters."""

  @abc.abstractmethod
  def shape(self, ours: Sequence[Shape]) -> Shape:
    """Returns the shape of theirs, given the shapes of ours."""

  @abc.abstractmethod
  def load(
    self, theirs: Shaped[np.ndarray, "..."], ours: Sequence[Shape]
  ) -> list[Shaped[np.ndarray, "..."]]:
    """Cuts theirs into ours, of the given shapes."""

  @abc.abstractmethod
  def store(self, ours: Arrays) -> Shaped[np.ndarray, "..."]:
    """Inverts `load`."""


@dataclasses.dataclass(frozen=True)
class Flat(Form):
  """The same numbers in the same order, with all axes of ours in one: biases, norms."""

  def shape(self, ours: Sequence[Shape]) -> Shape:
    return (math.prod(ours[0]),)

  def load(
    self, theirs: Shaped[np.ndarray, "..."], ours: Sequence[Shape]
  ) -> list[Shaped[np.ndarray, "..."]]:
    return [theirs.reshape(ours[0])]

  def store(self, ours: Arrays) -> Shaped[np.ndarray, "..."]:
    return ours[0].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Same(Form):
  """The same array: embeddings, whose rows are ids in both."""

  def shape(self, ours: Sequence[Shape]) -> Shape:
    return ours[0]

  def load(
    self, theirs: Shaped[np.ndarray, "..."], ours: Sequence[Shape]
  ) -> list[Shaped[np.ndarray, "..."]]:
    return [theirs]

  def store(self, ours: Arrays) -> Shaped[np.ndarray, "..."]:
    return ours[0]


@dataclasses.dataclass(frozen=True)
class Linear(Form):
  """A torch Linear: theirs is [outputs, inputs], ours [*inputs, *outputs].

  Attributes:
    inputs: leading axes of ours that are inputs: 1 of [D, H, A], 2 of [H, A, D].
  """

  inputs: int = 1

  def shape(self, ours: Sequence[Shape]) -> Shape:
    return (math.prod(ours[0][self.inputs :]), math.prod(ours[0][: self.inputs]))

  def load(
    self, theirs: Shaped[np.ndarray, "..."], ours: Sequence[Shape]
  ) -> list[Shaped[np.ndarray, "..."]]:
    return [theirs.T.reshape(ours[0])]

  def store(self, ours: Arrays) -> Shaped[np.ndarray, "..."]:
    return ours[0].reshape(math.prod(ours[0].shape[: self.inputs]), -1).T


@dataclasses.dataclass(frozen=True)
class Halves(Form):
  """Two of ours side by side in theirs: gate first, then up, in all of 2F outputs.

  Attributes:
    transposed: theirs is [2F, D], as a torch Linear; else [D, 2F]. A bias is [2F] in
      both.
    interleaved: gate and up alternate (GPT-OSS), instead of one after the other.
  """

  transposed: bool = True
  interleaved: bool = False

  def shape(self, ours: Sequence[Shape]) -> Shape:
    joined = (*ours[0][:-1], 2 * ours[0][-1])
    return joined[::-1] if self.transposed else joined

  def load(
    self, theirs: Shaped[np.ndarray, "..."], ours: Sequence[Shape]
  ) -> list[Shaped[np.ndarray, "..."]]:
    whole = theirs.T if self.transposed else theirs
    if self.interleaved:
      return [whole[..., ::2], whole[..., 1::2]]
    return np.split(whole, 2, axis=-1)

  def store(self, ours: Arrays) -> Shaped[np.ndarray, "..."]:
    if self.interleaved:
      pairs = np.stack(ours, axis=-1)
      whole = pairs.reshape(*pairs.shape[:-2], -1)
    else:
      whole = np.concatenate(ours, axis=-1)
    return whole.T if self.transposed else whole


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of a table.

  A line applies to each layer that has all its parameters, so options that add some
  (biases, norms) need no condition.

  Attributes:
    ours: dotted names below the block (or below the model), one or several.
    theirs: name below the layer (or whole); `{expert}` where each expert has its own.
    form: how theirs holds ours; without the axis of experts.
    stacked: theirs stacks all experts along its first axis.
  """

  ours: tuple[str, ...]
  theirs: str
  form: Form
  stacked: bool = False

  @property
  def per_expert(self) -> bool:
    return self.stacked or "{expert}" in self.theirs


def entry(ours: str, theirs: str, form: Form, *, stacked: bool = False) -> Entry:
  """Returns an entry; names in `ours` are separated by spaces."""
  return Entry(tuple(ours.split()), theirs, form, stacked)


LINEAR, FLAT, SAME = Linear(), Flat(), Same()

MODEL = (
  entry("embedding.table", "model.embed_tokens.weight", SAME),
  entry("embedding.norm.scale", "model.norm.weight", FLAT),
  entry("embedding.head", "lm_head.weight", LINEAR),
)
"""Entries outside the layers; the same in all architectures so far."""

ATTENTION = (
  entry("attention.query", "self_attn.q_proj.weight", LINEAR),
  entry("attention.key", "self_attn.k_proj.weight", LINEAR),
  entry("attention.value", "self_attn.v_proj.weight", LINEAR),
  entry("attention.out", "self_attn.o_proj.weight", Linear(inputs=2)),
)

ATTENTION_BIASES = (
  entry("attention.query_bias", "self_attn.q_proj.bias", FLAT),
  entry("attention.key_bias", "self_attn.k_proj.bias", FLAT),
  entry("attention.value_bias", "self_attn.v_proj.bias", FLAT),
)

OUT_BIAS = (entry("attention.out_bias", "self_attn.o_proj.bias", FLAT),)

QK_NORMS = (
  entry("attention.query_norm.scale", "self_attn.q_norm.weight", FLAT),
  entry("attention.key_norm.scale", "self_attn.k_norm.weight", FLAT),
)

PRE_NORMS = (
  entry("attention_norm.scale", "input_layernorm.weight", FLAT),
  entry("feed_forward_norm.scale", "post_attention_layernorm.weight", FLAT),
)


def feed_forward(ours: str, theirs: str) -> tuple[Entry, ...]:
  """Returns the three matrices of a gated feed-forward layer."""
  return (
    entry(f"{ours}.w_gate", f"{theirs}.gate_proj.weight", LINEAR),
    entry(f"{ours}.w_in", f"{theirs}.up_proj.weight", LINEAR),
    entry(f"{ours}.w_out", f"{theirs}.down_proj.weight", LINEAR),
  )


DENSE = feed_forward("feed_forward", "mlp")
ROUTER = (entry("moe.router.weight", "mlp.gate.weight", LINEAR),)
EXPERTS = feed_forward("moe.experts", "mlp.experts.{expert}")
"""Each expert's matrices separately, as most architectures store them."""
