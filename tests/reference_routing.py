"""The oracle's routers: who goes where, in plain numpy loops.

Part of tests/reference.py, which says what the oracle is. One group, float64, one
token at a time; backward passes by hand.

Letters: T tokens, E experts, K choices, C slots.
"""

import dataclasses
import math
import types
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass
class Reference:
  """What the oracle decided for one group; [T,K] arrays unless said otherwise."""

  expert: Array
  slot: Array
  kept: Array
  gate: Array
  probs: Array
  """[T,E]"""
  chosen: Array
  """[E] assignments asked for."""
  load: Array
  """[E] assignments kept."""
  valid: Array
  """[T]"""
  backward: Any
  """Maps d loss / d gate [T,K] to d loss / d logits [T,E]."""

  @property
  def dropped(self) -> set[tuple[int, int]]:
    """(token, choice) of assignments that are not computed, padding's left out."""
    kept, valid = self.kept, self.valid
    return {(t, k) for t, k in np.ndindex(kept.shape) if valid[t] and not kept[t, k]}

  def stats(self) -> dict[str, Any]:
    """The fields of `RouterStats`."""
    num_experts = self.probs.shape[1]
    importance, entropy, dropped_tokens = np.zeros(num_experts), 0.0, 0
    for t in range(len(self.valid)):
      if self.valid[t]:
        importance += self.probs[t]
        entropy -= sum(p * math.log(p) for p in self.probs[t] if p > 0)
        dropped_tokens += not any(self.kept[t])
    return {
      "num_valid": float(sum(self.valid)),
      "chosen": self.chosen,
      "load": self.load,
      "importance": importance,
      "entropy": entropy,
      "dropped_tokens": dropped_tokens,
    }


def softmax(row: Array) -> Array:
  e = [math.exp(v - max(row)) for v in row]
  return np.array([v / sum(e) for v in e])


def softmax_backward(p: Array, d_p: Array) -> Array:
  inner = sum(a * b for a, b in zip(p, d_p, strict=True))
  return np.array([a * (b - inner) for a, b in zip(p, d_p, strict=True)])


def choose(row: Array, k: int) -> list[int]:
  """The k largest, best first; of equals the first."""
  picked: list[int] = []
  for _ in range(k):
    best = None
    for e, value in enumerate(row):
      if e not in picked and (best is None or value > row[best]):
        best = e
    assert best is not None
    picked.append(best)
  return picked


def queue(gate: Array, final: Array, options: Any, token_order=None) -> list:
  """(token, choice) pairs in the order they are served.

  Args:
    gate: [T,K] what the router said; zero for padding.
    final: [T,K] the same, normalised where that comes before drops.
  """
  tokens, choices = list(range(len(gate))), list(range(gate.shape[1]))
  plain = [(t, c) for c in choices for t in tokens]
  if options.slot_order == "by_gate":
    return sorted(plain, key=lambda pair: -final[pair])
  if options.priority == "gate" or options.slot_order == "batch_priority":
    tokens.sort(key=lambda t: -max(gate[t]))
  if options.priority == "random" and token_order is not None:
    tokens = list(token_order)
  if options.slot_order == "token_major":
    return [(t, c) for t in tokens for c in choices]
  return [(t, c) for c in choices for t in tokens]


def serve(expert, asked, pairs, num_experts, capacity):
  """Walks the queue and gives each assignment the next slot of its expert."""
  limit = len(expert) if capacity is None else capacity
  slot, kept = np.full(expert.shape, limit), np.zeros(expert.shape, bool)
  chosen, load = np.zeros(num_experts, int), np.zeros(num_experts, int)
  for t, c in pairs:
    if not asked[t, c]:
      continue
    e = expert[t, c]
    chosen[e] += 1
    if load[e] < limit:
      slot[t, c], kept[t, c] = load[e], True
      load[e] += 1
  return slot, kept, chosen, load


def gates_of(raw, counted, kept, renormalize):
  """Gates [T,K] from raw ones, and the function that carries a gradient back.

  Args:
    counted: [T,K] choices that enter the sum of renormalize=before_drop.
  """
  mask = {"none": None, "before_drop": counted, "after_drop": kept}[renormalize]
  gate = np.zeros(raw.shape)
  total = np.ones(len(raw))
  for t, c in np.ndindex(raw.shape):
    if mask is not None and any(mask[t]):
      total[t] = sum(raw[t, j] for j in range(raw.shape[1]) if mask[t, j])
    if kept[t, c]:
      gate[t, c] = raw[t, c] / total[t]

  def backward(d_gate):
    d_raw = np.zeros(raw.shape)
    for t, c in np.ndindex(raw.shape):
      if not kept[t, c]:
        continue
      d_raw[t, c] += d_gate[t, c] / total[t]
      if mask is not None:
        for j in range(raw.shape[1]):
          if mask[t, j]:
            d_raw[t, j] -= d_gate[t, c] * raw[t, c] / total[t] ** 2
    return d_raw

  return gate, backward


def place_overflow(expert, kept, asked, pairs, scores, load, capacity):
  """next_best, one assignment after the other; changes expert in place.

  Returns:
    The pairs that were moved, in the order they were placed.
  """
  room = [capacity - n for n in load]
  moved = []
  serves = [
    {expert[t, c] for c in range(kept.shape[1]) if kept[t, c]} for t in range(len(kept))
  ]
  for t, c in pairs:
    if not asked[t, c] or kept[t, c]:
      continue
    for e in choose(scores[t], scores.shape[1]):
      if room[e] > 0 and e not in serves[t] and scores[t, e] > -math.inf:
        room[e] -= 1
        serves[t].add(e)
        expert[t, c] = e
        moved.append((t, c))
        break
  return moved


def assign(expert, asked, values, scores, probs, valid, options, to_logits, **draws):
  """Slots, overflow, gates and their backward, for any token-choice router.

  Args:
    values: [T,E] what a gate is before renormalisation.
    scores: [T,E] what next-best goes by.
    to_logits: maps (token, d loss / d values[token]) to d loss / d logits[token].
  """
  num_experts = probs.shape[1]
  counted = np.broadcast_to(valid[:, None], expert.shape)
  before = options.renormalize == "before_drop"

  def raw_gates():
    return np.array([[values[t, e] for e in row] for t, row in enumerate(expert)])

  asked_gate = np.where(counted, raw_gates(), 0.0)
  total = asked_gate.sum(axis=1, keepdims=True)
  final = asked_gate / np.where(total > 0, total, 1) if before else asked_gate
  pairs = queue(asked_gate, final, options, draws.get("token_order"))
  slot, kept, chosen, load = serve(expert, asked, pairs, num_experts, options.capacity)
  if options.overflow == "next_best" and options.capacity is not None:
    expert = expert.copy()
    moved = place_overflow(expert, kept, asked, pairs, scores, load, options.capacity)
    stay = [pair for pair in pairs if kept[pair]]
    asked = kept.copy()
    for pair in moved:
      asked[pair] = True
    slot, kept, _, load = serve(
      expert, asked, stay + moved, num_experts, options.capacity
    )
  if options.slot_numbering == "arrival":
    tokens = [(t, c) for t in range(len(kept)) for c in range(len(kept[0]))]
    slot, kept, _, load = serve(expert, kept, tokens, num_experts, options.capacity)
  gate, gate_backward = gates_of(raw_gates(), counted, kept, options.renormalize)

  def backward(d_gate):
    d_raw = gate_backward(d_gate * options.gate_scale)
    d_logits = np.zeros(probs.shape)
    for t in range(len(valid)):
      d_values = np.zeros(num_experts)
      for c, e in enumerate(expert[t]):
        d_values[e] += d_raw[t, c]
      d_logits[t] = to_logits(t, d_values)
    return d_logits

  gate = gate * options.gate_scale
  return Reference(expert, slot, kept, gate, probs, chosen, load, valid, backward)


def limit_to_groups(row: Array, options: Any) -> Array:
  """-inf outside the best groups of experts of one token."""
  size = len(row) // options.num_expert_groups
  groups = [row[i : i + size] for i in range(0, len(row), size)]
  score = [sum(sorted(g, reverse=True)[: options.group_best]) for g in groups]
  best = choose(np.array(score), options.num_selected_groups)
  return np.array([v if e // size in best else -math.inf for e, v in enumerate(row)])


def sigmoid(x: Array) -> Array:
  return 1 / (1 + np.exp(-x))


def sinkhorn(logits: Array, valid: Array, tolerance: float, iterations: int) -> Array:
  """Rows to 1/T, columns to 1/E, by turns."""
  kernel = np.exp(logits) * valid[:, None]
  columns = np.ones(kernel.shape[1])
  rows = np.ones(len(kernel))
  for _ in range(iterations):
    rows = valid / (sum(valid) * (kernel @ columns + 1e-8))
    new = 1 / (kernel.shape[1] * (rows @ kernel + 1e-8))
    error = np.abs(columns - new).mean()
    columns = new
    if error <= tolerance:
      break
  return rows[:, None] * kernel * columns[None, :]


def route(
  name: str,
  logits: Array,
  valid: Array,
  options: Any,
  *,
  train: bool = False,
  uniform: Array | None = None,
  gumbel: Array | None = None,
  noise: Array | None = None,
  token_order: Array | None = None,
  bias: Array | None = None,
  assigned: Array | None = None,
  scores: Array | None = None,
) -> Reference:
  """One group through a token-choice router.

  Args:
    train: base only: balance by Sinkhorn.
    uniform: [T] draws of top2's random policy; None is evaluation.
    gumbel: [T,E] draws of top2's sample policy; None is evaluation.
    noise: [T,E] what noisy_top_k adds to the logits; None is evaluation.
    token_order: [T] tokens in the order of priority=random; None is evaluation.
    bias: [E] of sigmoid_bias.
    assigned: [T,K] experts of hash.
    scores: [T,E] draws of random.
  """
  logits = logits.astype(np.float64)
  num_tokens, num_experts = logits.shape
  if name == "switch":
    options = types.SimpleNamespace(**{**vars(options), "renormalize": "none"})
  k: int = {"switch": 1, "top2": 2, "dense": num_experts}.get(name, options.num_selected)
  noisy = logits if noise is None else logits + noise
  probs = np.stack([softmax(row) for row in noisy])
  values, goes_by = probs, probs

  def to_logits(t, d):
    return softmax_backward(probs[t], d)

  if name == "group_limited":
    goes_by = np.stack([limit_to_groups(row, options) for row in probs])
  elif name in ("sigmoid_bias", "quantile_bias"):
    values = sigmoid(logits)
    probs = values / values.sum(axis=1, keepdims=True)
    biased = values if bias is None else values + bias[None, :]
    goes_by = np.stack([limit_to_groups(row, options) for row in biased])
  elif name == "base":
    values, goes_by = sigmoid(logits), logits
    if train:
      limits = options.sinkhorn_tolerance, options.sinkhorn_iterations
      goes_by = sinkhorn(logits - logits.max(axis=1, keepdims=True), valid, *limits)
  elif name == "random":
    assert scores is not None
    goes_by = scores.astype(np.float64)
  elif name == "noisy_top_k":
    goes_by = noisy
  if name in ("sigmoid_bias", "quantile_bias", "base"):
    to_logits = lambda t, d: d * values[t] * (1 - values[t])  # noqa: E731

  expert = np.array([choose(row, k) for row in goes_by])
  if name == "hash":
    assert assigned is not None
    expert, values = assigned, np.full(probs.shape, 1 / k)
    to_logits = lambda t, d: np.zeros(num_experts)  # noqa: E731
  if name == "forced_balance":
    expert = np.array(
      [[(t * k + c) % num_experts for c in range(k)] for t in range(num_tokens)]
    )
  if gumbel is not None:
    for t in range(num_tokens):
      drawn = logits[t] + gumbel[t]
      drawn[expert[t, 0]] = -math.inf
      expert[t, 1] = choose(drawn, 1)[0]
  asked = np.repeat(valid[:, None], k, axis=1)
  if uniform is not None:
    for t in range(num_tokens):
      first, second = values[t, expert[t, 0]], values[t, expert[t, 1]]
      asked[t, 1] &= uniform[t] < 2 * second / (first + second)
  order = {"token_order": token_order}
  return assign(expert, asked, values, goes_by, probs, valid, options, to_logits, **order)


def expert_choice(logits: Array, valid: Array, capacity: int):
  """For each expert its best tokens and their gates, best first, padding left out."""
  probs = np.stack([softmax(row) for row in logits.astype(np.float64)])
  picks = []
  for e in range(logits.shape[1]):
    column = np.where(valid, probs[:, e], -math.inf)
    tokens = [t for t in choose(column, capacity) if valid[t]]
    picks.append([(t, probs[t, e]) for t in tokens])
  return picks
