"""The oracle: routing, the MoE layer and their gradients in plain numpy loops.

Everything here is float64, one group, one token and one expert at a time, with
backward passes written by hand. No jax and nothing of moejax: it shares no code
with what it judges, and it is meant to be read beside the papers.

Letters: T tokens, D width, E experts, F expert hidden width, K choices, C slots.
`options` is anything with the fields of `moejax.routing.base.RouterOptions`.
"""

import dataclasses
import math
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


def capacity_of(num_tokens, num_experts, num_selected, factor, *, per_token=False):
  """ceil(factor * K * T / E) in whole numbers: the factor is given in percent."""
  numerator = round(factor * 100) * num_tokens * (1 if per_token else num_selected)
  slots = 0
  while slots * num_experts * 100 < numerator:
    slots += 1
  return max(1, min(slots, num_tokens))


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


def queue(top_gate: Array, k: int, priority: str, token_order=None) -> list:
  """(token, choice) pairs in the order they are served."""
  tokens = list(range(len(top_gate)))
  if priority == "gate":
    tokens.sort(key=lambda t: -top_gate[t])
  if priority == "random" and token_order is not None:
    tokens = list(token_order)
  return [(t, c) for c in range(k) for t in tokens]


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


def route(
  name: str,
  logits: Array,
  valid: Array,
  options: Any,
  *,
  uniform: Array | None = None,
  gumbel: Array | None = None,
  token_order: Array | None = None,
) -> Reference:
  """One group through router `name`: switch, top2 or top_k.

  Args:
    uniform: [T] draws of top2's random policy; None is evaluation.
    gumbel: [T,E] draws of top2's sample policy; None is evaluation.
    token_order: [T] tokens in the order of priority=random; None is evaluation.
  """
  logits = logits.astype(np.float64)
  num_tokens, num_experts = logits.shape
  k = {"switch": 1, "top2": 2}.get(name, options.num_selected)
  renormalize = "none" if name == "switch" else options.renormalize
  probs = np.stack([softmax(row) for row in logits])
  expert = np.array([choose(row, k) for row in logits])
  if gumbel is not None:
    for t in range(num_tokens):
      noisy = logits[t] + gumbel[t]
      noisy[expert[t, 0]] = -math.inf
      expert[t, 1] = choose(noisy, 1)[0]
  raw = np.array([[probs[t, e] for e in expert[t]] for t in range(num_tokens)])
  counted = np.repeat(valid[:, None], k, axis=1)
  asked = counted.copy()
  if uniform is not None:
    for t in range(num_tokens):
      asked[t, 1] &= uniform[t] < 2 * raw[t, 1] / (raw[t, 0] + raw[t, 1])
  # Padding sorts last among equals whatever it looks like, since its gate is zero.
  pairs = queue(np.where(valid, raw[:, 0], 0.0), k, options.priority, token_order)
  slot, kept, chosen, load = serve(expert, asked, pairs, num_experts, options.capacity)
  gate, gate_backward = gates_of(raw, counted, kept, renormalize)

  def backward(d_gate):
    d_raw = gate_backward(d_gate)
    d_logits = np.zeros(logits.shape)
    for t in range(num_tokens):
      d_probs = np.zeros(num_experts)
      for c in range(k):
        d_probs[expert[t, c]] += d_raw[t, c]
      d_logits[t] = softmax_backward(probs[t], d_probs)
    return d_logits

  return Reference(expert, slot, kept, gate, probs, chosen, load, valid, backward)


def activation(name: str, hidden: Array, gate: Array | None):
  """The activation of one row and its derivatives by hidden and by gate."""
  if name == "relu":
    return np.maximum(hidden, 0), (hidden > 0).astype(float), None
  if name == "gelu":
    c = math.sqrt(2 / math.pi)
    tanh = np.tanh(c * (hidden + 0.044715 * hidden**3))
    slope = c * (1 + 3 * 0.044715 * hidden**2)
    derivative = 0.5 * (1 + tanh) + 0.5 * hidden * (1 - tanh**2) * slope
    return 0.5 * hidden * (1 + tanh), derivative, None
  assert name == "swiglu" and gate is not None
  sigmoid = 1 / (1 + np.exp(-gate))
  d_gate = hidden * sigmoid * (1 + gate * (1 - sigmoid))
  return hidden * gate * sigmoid, gate * sigmoid, d_gate


def experts_forward(x, routing: Reference, weights: dict[str, Array], act: str) -> Array:
  """Sum over each token's kept assignments of gate * expert(token); zero if none."""
  y = np.zeros(x.shape)
  for t, c in np.ndindex(routing.kept.shape):
    if routing.kept[t, c]:
      e = routing.expert[t, c]
      gate = x[t] @ weights["w_gate"][e] if "w_gate" in weights else None
      hidden, _, _ = activation(act, x[t] @ weights["w_in"][e], gate)
      y[t] += routing.gate[t, c] * (hidden @ weights["w_out"][e])
  return y


def experts_backward(x, routing: Reference, weights: dict[str, Array], act: str, d_y):
  """Gradients by x (through the experts), by gate [T,K] and by each weight."""
  d_x, d_gates = np.zeros(x.shape), np.zeros(routing.gate.shape)
  d_w = {name: np.zeros(value.shape) for name, value in weights.items()}
  for t, c in np.ndindex(routing.kept.shape):
    if not routing.kept[t, c]:
      continue
    e, g = routing.expert[t, c], routing.gate[t, c]
    gate = x[t] @ weights["w_gate"][e] if "w_gate" in weights else None
    hidden, by_hidden, by_gate = activation(act, x[t] @ weights["w_in"][e], gate)
    d_gates[t, c] = d_y[t] @ (hidden @ weights["w_out"][e])
    d_w["w_out"][e] += g * np.outer(hidden, d_y[t])
    d_act = g * (weights["w_out"][e] @ d_y[t])
    d_w["w_in"][e] += np.outer(x[t], d_act * by_hidden)
    d_x[t] += weights["w_in"][e] @ (d_act * by_hidden)
    if gate is not None:
      d_w["w_gate"][e] += np.outer(x[t], d_act * by_gate)
      d_x[t] += weights["w_gate"][e] @ (d_act * by_gate)
  return d_x, d_gates, d_w


def moe_layer(name, x, valid, router, weights, options, act="gelu", **draws):
  """The whole layer of one group, without shared experts and residual.

  Args:
    router: [D,E] router weight, logits = x @ router.
    weights: w_in [E,D,F], w_out [E,F,D] and for swiglu w_gate [E,D,F].

  Returns:
    y [T,D], the Reference, and a function from d loss / d y to a dict of
    gradients: x, router and every weight.
  """
  x = x.astype(np.float64)
  routing = route(name, x @ router, valid, options, **draws)
  y = experts_forward(x, routing, weights, act)

  def backward(d_y):
    d_x, d_gate, d_w = experts_backward(x, routing, weights, act, d_y)
    d_logits = routing.backward(d_gate)
    return {"x": d_x + d_logits @ router.T, "router": x.T @ d_logits, **d_w}

  return y, routing, backward


def balance_loss(probs, chosen, valid) -> float:
  """E * sum_e (share of assignments) * (mean probability), padding left out."""
  num_experts = probs.shape[1]
  rows = [probs[t] for t in range(len(valid)) if valid[t]]
  if not rows or not sum(chosen):
    return 0.0
  mean = sum(rows) / len(rows)
  return num_experts * sum(chosen[e] / sum(chosen) * mean[e] for e in range(num_experts))


def balance_loss_backward(probs, chosen, valid) -> Array:
  """Gradient of `balance_loss` by the logits, with softmax probabilities."""
  d_logits, count = np.zeros(probs.shape), sum(valid)
  for t in range(len(valid)):
    if valid[t]:
      d_probs = probs.shape[1] * np.asarray(chosen) / sum(chosen) / count
      d_logits[t] = softmax_backward(probs[t], d_probs)
  return d_logits


def z_loss(logits, valid) -> float:
  """Mean over valid tokens of the squared log of the sum of exponentials."""
  values = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits[valid]]
  return sum(values) / max(len(values), 1)


def z_loss_backward(logits, valid) -> Array:
  d_logits = np.zeros(logits.shape)
  for t in range(len(valid)):
    if valid[t]:
      log_partition = math.log(sum(math.exp(v) for v in logits[t]))
      d_logits[t] = 2 * log_partition * softmax(logits[t]) / sum(valid)
  return d_logits
