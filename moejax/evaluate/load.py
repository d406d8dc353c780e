"""Loads a trained model from its run directory, for scripts and notebooks."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.checkpoint.params import restore_params
from moejax.config import Config
from moejax.config.ranges import CHOICES
from moejax.data.sentinels import with_sentinels
from moejax.data.tokenizer import FILE as TOKENIZER_FILE
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import UserError
from moejax.evaluate import groups
from moejax.evaluate.generation import context_length
from moejax.models.decoder import Decoder
from moejax.storage.paths import RunPath, run_path
from moejax.types import Params

Tokens = Int[np.ndarray | Array, "..."] | Sequence[Sequence[int]]
"""Rows of vocabulary ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
  """A run's model at one of its checkpoints."""

  config: Config
  model: Decoder
  params: Params
  """Parameters, on the first local device."""
  tokenizer: Tokenizer | None
  """The run's tokenizer; None if the directory has none."""
  step: int
  """Number of optimizer steps taken."""

  def logits(
    self,
    tokens: Tokens,
    *,
    decoder_tokens: Tokens | None = None,
  ) -> Float[Array, "B S V"]:
    """Returns next-token logits at every position, at the run's eval_capacity_factor.

    Each row is one document from its start. For a decoder it is no longer than the
    context; raise `config.model.max_position` to see how it extrapolates. With a finite
    capacity, B*S must be a multiple of the training size of routing groups.

    Args:
      tokens: vocabulary ids; for an encoder-decoder, those of the encoder.
      decoder_tokens: for an encoder-decoder, the start token and the targets so far, at
        which logits are returned.

    Raises:
      UserError: ids are not integers [B, S] or not in the vocabulary, rows exceed the
        context, groups do not fit, or decoder_tokens are given to a decoder or missing
        for an encoder-decoder.
    """
    has_encoder = self.model.config.kind == "encoder_decoder"
    if has_encoder != (decoder_tokens is not None):
      what = "needs decoder_tokens too" if has_encoder else "takes no decoder_tokens"
      raise UserError(f"--config.model.kind={self.model.config.kind} {what}.")
    if decoder_tokens is None:
      ids, most = self._checked(tokens), context_length(self.config)
      if ids.shape[1] > most:
        raise UserError(
          f"Rows of {ids.shape[1]} tokens: the context of this run holds {most}. To "
          f"extrapolate, first set run.config.model.max_position={ids.shape[1]}."
        )
      return self._apply(self.params, ids)
    read, ids = self._checked(tokens), self._checked(decoder_tokens)
    if len(read) != len(ids):
      raise UserError(
        f"{len(read)} rows of tokens and {len(ids)} of decoder_tokens: give one of each "
        "per sequence."
      )
    return self._apply(self.params, ids, encoder_tokens=read)

  def _checked(self, tokens: Any) -> Int[Array, "B S"]:
    """Returns ids as an array; raises as `logits`."""
    try:
      given = np.asarray(tokens)
    except ValueError as e:
      raise UserError("tokens: rows of different lengths; cut or pad them.") from e
    if given.ndim != 2 or not given.size or given.dtype.kind not in "iu":
      raise UserError(
        f"tokens of type {given.dtype} and shape {list(given.shape)}: give integers "
        "[B, S], such as [[5, 6, 7]]."
      )
    tokens = jnp.asarray(given.astype(np.int64).clip(-1, 2**31 - 1), jnp.int32)
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= self.model.vocab_size:
      raise UserError(
        f"tokens from {least} to {most}: this run's vocabulary has ids from 0 to "
        f"{self.model.vocab_size - 1}."
      )
    moe = self.model.moe
    grouped = bool(self.model.moe_layers) and moe.eval_capacity_factor is not None
    if grouped and moe.group_size and tokens.size % moe.group_size:
      raise UserError(
        f"{tokens.shape[0]}x{tokens.shape[1]} tokens do not fill routing groups of "
        f"{moe.group_size}, under --config.moe.eval_capacity_factor="
        f"{moe.eval_capacity_factor}. Give a multiple of {moe.group_size} tokens."
      )
    return tokens

  @functools.cached_property
  def _apply(self) -> Any:
    size = self.model.vocab_size
    return jax.jit(
      lambda params, tokens, **read: self.model(params, tokens, **read).logits[..., :size]
    )


def load_run(
  workdir: RunPath | str, step: int | None = None, *, dtype: str | None = None
) -> LoadedRun:
  """Restores a run's model from its directory alone.

  Args:
    workdir: of a training run.
    step: which checkpoint; None means the newest intact one.
    dtype: to compute in, instead of the run's `model.dtype`. Parameters stay as stored.

  Raises:
    UserError: no directory, no checkpoint in it (the message lists what is there), no
      such step or dtype, or all checkpoints are damaged.
  """
  if not os.fspath(workdir):
    raise UserError("load_run: the directory is empty text: give a training run's.")
  if dtype not in (None, *CHOICES["model.dtype"]):
    known = " or ".join(CHOICES["model.dtype"])
    raise UserError(f"load_run: dtype={dtype}: give {known}, or none for the run's own.")
  if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
    raise UserError(f"load_run: step={step!r}: give a whole number, or None.")
  params, config, meta = restore_params(workdir, step)
  config.model.dtype = dtype or config.model.dtype
  tokenizer = None
  if (run_path(workdir) / TOKENIZER_FILE).exists():
    tokenizer = with_sentinels(load_tokenizer(workdir), config.data)
  # The stored embedding has a row for every id, regardless of the tokenizer.
  vocab_size = int(params["embedding"]["table"].shape[0])
  if config.model.vocab_multiple > 1 and tokenizer is not None:
    vocab_size = tokenizer.vocab_size  # Further rows are padding.
  model = groups.make_model(config, vocab_size)
  return LoadedRun(
    config=config, model=model, params=params, tokenizer=tokenizer, step=int(meta["step"])
  )
