"""Hash routing: experts are determined by the token id; nothing is learned.

Letters: T tokens of one group, E experts, K choices per token, V vocabulary.
Source: Roller et al. 2021, arXiv:2106.04426, section 3 (random and balanced hash).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np

from moejax.errors import ConfigError
from moejax.options import option
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.router import Router
from moejax.routing.scores import softmax


def hash_table(
  vocab_size: int,
  num_experts: int,
  num_selected: int = 1,
  *,
  seed: int = 0,
  counts: np.ndarray | None = None,
) -> np.ndarray:
  """Returns the experts of every vocabulary id, int32 [V, K], distinct within a row.

  Args:
    counts: how often each id occurs in the corpus: ids go, most frequent first, to
      the least loaded expert so far (balanced hash). None means a random hash with
      equally many ids per expert.
  """
  rng = np.random.default_rng(seed)
  if counts is None:
    first = rng.permutation(np.arange(vocab_size) % num_experts)
  else:
    first, filled = np.zeros(vocab_size, int), np.zeros(num_experts)
    for token in np.argsort(-counts, kind="stable"):
      first[token] = np.argmin(filled)
      filled[first[token]] += counts[token]
  # Further choices are cyclic shifts of the first, by different amounts per id, so that
  # two ids that share one expert seldom share all.
  shifts = np.stack([rng.permutation(num_experts - 1) for _ in range(vocab_size)])
  rest = (first[:, None] + 1 + shifts[:, : num_selected - 1]) % num_experts
  return np.concatenate([first[:, None], rest], axis=1).astype(np.int32)


def table_damage(table: np.ndarray, num_experts: int) -> str | None:
  """Returns what is wrong with a stored table, in a sentence; None if nothing is.

  Versions before 0.2 applied weight decay to the table: after one step every entry was
  slightly below an integer and was read as the expert below it.
  """
  wrong = (table != np.floor(table)) | (table < 0) | (table >= num_experts)
  if not wrong.any():
    return None
  token, choice = np.argwhere(wrong)[0]
  return (
    f"its hash table is damaged: {np.count_nonzero(wrong.any(axis=1))} of {len(table)} "
    f"token ids have no expert (id {token}: {table[token, choice]:.6g}, experts are 0 to "
    f"{num_experts - 1}). Earlier versions let weight decay move the table, so the run "
    "was trained with experts other than those of its table. Train it again"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hash(Router):
  """Sends each token to the experts of its id, each with gate 1/K."""

  name = "hash"
  summary = "experts fixed per vocabulary id, nothing learned (Hash layers)"
  by_logits = False
  learned = False
  has_table = True

  spread: Literal["random", "balanced"] = option(
    "random", "vocabulary ids spread at random, or balanced by corpus frequency"
  )

  def table(
    self,
    vocab_size: int,
    num_experts: int,
    num_selected: int,
    token_counts: Callable[[], np.ndarray] | None,
  ) -> np.ndarray:
    counts = None
    if self.spread == "balanced" and token_counts is not None:
      counts = token_counts()
      counts = np.pad(counts, (0, vocab_size - len(counts)))
    return hash_table(vocab_size, num_experts, num_selected, counts=counts)

  def table_damage(self, table: np.ndarray, num_experts: int) -> str | None:
    return table_damage(table, num_experts)

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    if inputs.assigned is None:
      raise ConfigError(
        "--config.moe.router=hash looks up experts by token id, but no token ids reached "
        "the layer. Use another router for inputs that are not tokens."
      )
    # Probabilities are only reported (and have a gradient); they decide nothing.
    probs = softmax(inputs.logits)
    gate = jnp.full(inputs.assigned.shape, 1.0 / policy.num_selected, jnp.float32)
    return assign(inputs.assigned, gate, inputs.valid, probs, policy, inputs.key)
