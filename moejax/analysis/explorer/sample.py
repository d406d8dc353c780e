"""A bounded sample of tokens with the routers' decisions for each, for the page.

The text is divided into stretches of equal length, and one whole sequence is drawn at
random from each. So each part of the text and each place in a routing group can be
sampled; equal distances could hit the same place of every group. The sample is taken in
the pass that collects sums. The host holds the sample, and at most the sequences that one
batch adds to it.

Letters: L MoE layers, B batch, S sequence, E experts, K choices shown per token, A
alternatives shown, n tokens of the sample.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moejax.layers.routes import Routes
from moejax.models.decoder import Decoder
from moejax.sharding import rules

ALTERNATIVES = 2
"""Experts shown in addition to the chosen ones: the most probable of the others."""

MOST_SHOWN = 8
"""K, if tokens do not choose: the most probable of the experts that compute a token."""

_MOST_PADDED = 4
"""Maximum ratio of sequences, with padding, to the full ones that their tokens fill."""

IDS = ("token", "document", "position", "domain")
_COLUMNS = {"token": "inputs", "document": "segment_ids", "position": "positions"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """Tokens in stored order, without padding."""

  token: Int[np.ndarray, "n"]
  sequence: Int[np.ndarray, "n"]
  """Number of the sequence in the text."""
  document: Int[np.ndarray, "n"]
  """Number of the document in its sequence, from 1."""
  position: Int[np.ndarray, "n"]
  domain: Int[np.ndarray, "n"]
  expert: Int[np.ndarray, "L n K"]
  """Best first; E where a token has fewer experts."""
  gate: Float[np.ndarray, "L n K"]
  """Weights without drops; probabilities, if tokens do not choose."""
  kept: Bool[np.ndarray, "L n K"]
  """Whether the training capacity keeps the choice."""
  other: Int[np.ndarray, "L n A"]
  """The most probable experts that were not chosen."""
  other_probability: Float[np.ndarray, "L n A"]

  @property
  def num_tokens(self) -> int:
    return len(self.token)


def choices_of(
  routes: Routes, kept: Bool[Array, "L B S K"] | None
) -> tuple[Array, Array, Array, Array, Array]:
  """Returns expert, gate, kept, and the alternatives with their probabilities.

  Args:
    routes: of a batch.
    kept: which choices the training capacity keeps; None if tokens do not choose.
  """
  num_experts = routes.probs.shape[-1]
  if routes.expert is not None:
    assert routes.gate is not None
    expert, gate = routes.expert.astype(jnp.int32), routes.gate
    kept = routes.kept if kept is None else kept
    assert kept is not None
    chosen = jnp.any(jax.nn.one_hot(expert, num_experts, dtype=jnp.bool_), axis=-2)
  else:
    computing = jnp.where(routes.served, routes.probs, -1.0)
    gate, expert = jax.lax.top_k(computing, min(MOST_SHOWN, num_experts))
    kept = gate >= 0
    expert, gate = jnp.where(kept, expert, num_experts), jnp.maximum(gate, 0.0)
    chosen = routes.served
  # At least one column, so that no array is empty where all experts are chosen.
  others = jnp.where(chosen, -1.0, routes.probs)
  probability, other = jax.lax.top_k(others, min(ALTERNATIVES, num_experts))
  other = jnp.where(probability < 0, num_experts, other)
  return expert, gate, kept, other, jnp.maximum(probability, 0.0)


class Sampler:
  """Collects tokens from each batch passed to it."""

  def __init__(self, mesh: Mesh, *, tokens: int, length: int, total: int):
    """Plans which sequences are taken.

    Args:
      mesh: of the batches.
      tokens: n, at most.
      length: S.
      total: tokens of the text that is read.
    """
    self._tokens, self._taken, self._seen = tokens, 0, 0
    rows = -(-total // length)
    self._stride = max(rows // max(-(-tokens // length), 1), 1)
    # With padding, there are more sequences than the tokens would fill.
    stretches = np.arange(_MOST_PADDED * -(-rows // self._stride) + 1)
    drawn = np.random.default_rng(0).integers(0, self._stride, len(stretches))
    self._rows = stretches * self._stride + drawn
    self._parts: list[dict[str, np.ndarray]] = []
    whole = rules.replicated(mesh)
    self._read = jax.jit(_read, out_shardings=whole)

  def see(self, routes: Routes, kept: Array | None, batch: Any) -> None:
    """Adds the tokens of a batch; all processes call it, and all get the tokens."""
    size = batch["inputs"].shape[0]
    first, self._seen = self._seen, self._seen + size
    here = (self._rows >= first) & (self._rows < self._seen)
    rows = self._rows[here] - first
    if self._taken >= self._tokens or not len(rows):
      return
    # The same length in all batches, so that one compiled function serves them all.
    index = np.resize(rows, -(-size // self._stride) + 1).astype(np.int32)
    found = jax.device_get(self._read(routes, kept, batch, index))
    found = jax.tree.map(np.asarray, found)
    valid = found["valid"][: len(rows)]
    sequence = np.broadcast_to((first + rows)[:, None], valid.shape)[valid]
    left = self._tokens - self._taken
    part = {"sequence": sequence[:left]}
    for name, values in found["ids"].items():
      part[name] = values[: len(rows)][valid][:left]
    for name, values in found["choices"].items():
      part[name] = values[:, : len(rows)][:, valid][:, :left]
    self._parts.append(part)
    self._taken += len(part["token"])

  def result(self) -> Sample | None:
    """Returns the sample; None if it has no token."""
    if not self._taken:
      return None
    names = [field.name for field in dataclasses.fields(Sample)]
    return Sample(
      **{
        name: np.concatenate(
          [part[name] for part in self._parts], axis=min(self._parts[0][name].ndim - 1, 1)
        )
        for name in names
      }
    )


def _read(
  routes: Routes, kept: Array | None, batch: Any, rows: Int[Array, "b"]
) -> dict[str, Any]:
  """Returns the shown data of some sequences of a batch."""
  taken = jax.tree.map(lambda leaf: leaf[:, rows], routes)
  kept = None if kept is None else kept[:, rows]
  names = ("expert", "gate", "kept", "other", "other_probability")
  ids = {name: batch[_COLUMNS.get(name, name)][rows] for name in IDS}
  return {
    "choices": dict(zip(names, choices_of(taken, kept), strict=True)),
    "ids": ids,
    "valid": batch["segment_ids"][rows] > 0,
  }


def selected(model: Decoder) -> int:
  """Returns K, the number of choices shown per token."""
  moe = model.moe
  if not model.router.token_choice:
    return min(MOST_SHOWN, moe.fine_experts)
  return model.router.selected(moe.fine_experts, moe.fine_selected)
