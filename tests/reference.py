"""The oracle: routing, the MoE layer and their gradients in plain numpy loops.

Everything here is float64, one group, one token and one expert at a time, with
backward passes written by hand. No jax and nothing of moejax: it shares no code
with what it judges, and it is meant to be read beside the papers. The routers are
in tests/reference_routing.py.

Letters: T tokens, D width, E experts, F expert hidden width, K choices, C slots.
`options` is anything with the fields of `moejax.routing.base.SlotPolicy`.
"""

import math
from typing import NamedTuple

import numpy as np

from tests.reference_routing import Reference, route, softmax, softmax_backward

Array = np.ndarray


def capacity_of(num_tokens, num_experts, num_selected, factor, *, per_token=False):
  """ceil(factor * K * T / E) in whole numbers: the factor is given in percent."""
  numerator = round(factor * 100) * num_tokens * (1 if per_token else num_selected)
  slots = 0
  while slots * num_experts * 100 < numerator:
    slots += 1
  return max(1, min(slots, num_tokens))


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
  assert gate is not None
  if name == "geglu":
    value, d_gate, _ = activation("gelu", gate, None)
    return value * hidden, value, d_gate * hidden
  if name == "clamped_swiglu":
    g, h = np.minimum(gate, 7.0), np.clip(hidden, -7.0, 7.0)
    sigmoid = 1 / (1 + np.exp(-1.702 * g))
    slope = sigmoid * (1 + 1.702 * g * (1 - sigmoid))
    d_hidden = g * sigmoid * (np.abs(hidden) < 7.0)
    return g * sigmoid * (h + 1), d_hidden, (h + 1) * slope * (gate < 7.0)
  assert name == "swiglu"
  sigmoid = 1 / (1 + np.exp(-gate))
  d_gate = hidden * sigmoid * (1 + gate * (1 - sigmoid))
  return hidden * gate * sigmoid, gate * sigmoid, d_gate


class Assigned(NamedTuple):
  """Assignments of one group, in any order: arrays [N]."""

  token: Array
  expert: Array
  gate: Array
  kept: Array


def assigned(routing: Reference) -> Assigned:
  """The assignments of a router where each token chooses K experts."""
  num_tokens, num_selected = routing.expert.shape
  token = np.repeat(np.arange(num_tokens), num_selected)
  flat = (value.reshape(-1) for value in (routing.expert, routing.gate, routing.kept))
  return Assigned(token, *flat)


def pre_activations(x, weights: dict[str, Array], e: int):
  """What the activation of expert e is given: hidden, and gate if it is gated."""
  hidden = x @ weights["w_in"][e]
  gate = x @ weights["w_gate"][e] if "w_gate" in weights else None
  if "in_bias" in weights:
    hidden = hidden + weights["in_bias"][e]
    gate = None if gate is None else gate + weights["gate_bias"][e]
  return hidden, gate


def output(hidden, weights: dict[str, Array], e: int):
  y = hidden @ weights["w_out"][e]
  return y + weights["out_bias"][e] if "out_bias" in weights else y


def experts_forward(x, to: Assigned, weights: dict[str, Array], act: str) -> Array:
  """Sum over each token's kept assignments of gate * expert(token); zero if none."""
  y = np.zeros(x.shape)
  for t, e, g, kept in zip(*to, strict=True):
    if kept:
      hidden, _, _ = activation(act, *pre_activations(x[t], weights, e))
      y[t] += g * output(hidden, weights, e)
  return y


def experts_backward(x, to: Assigned, weights: dict[str, Array], act: str, d_y):
  """Gradients by x (through the experts), by gate [N] and by each weight."""
  d_x, d_gates = np.zeros(x.shape), np.zeros(to.gate.shape)
  d_w = {name: np.zeros(value.shape) for name, value in weights.items()}
  for n, (t, e, g, kept) in enumerate(zip(*to, strict=True)):
    if not kept:
      continue
    pre, gate = pre_activations(x[t], weights, e)
    hidden, by_hidden, by_gate = activation(act, pre, gate)
    d_gates[n] = d_y[t] @ output(hidden, weights, e)
    d_w["w_out"][e] += g * np.outer(hidden, d_y[t])
    d_act = g * (weights["w_out"][e] @ d_y[t])
    d_w["w_in"][e] += np.outer(x[t], d_act * by_hidden)
    d_x[t] += weights["w_in"][e] @ (d_act * by_hidden)
    if "out_bias" in weights:
      d_w["out_bias"][e] += g * d_y[t]
      d_w["in_bias"][e] += d_act * by_hidden
      if gate is not None:
        d_w["gate_bias"][e] += d_act * by_gate
    if gate is not None:
      d_w["w_gate"][e] += np.outer(x[t], d_act * by_gate)
      d_x[t] += weights["w_gate"][e] @ (d_act * by_gate)
  return d_x, d_gates, d_w


def moe_layer(name, x, valid, router, weights, options, act="gelu", **draws):
  """The whole layer of one group, without shared experts and residual.

  Args:
    router: [D,E] router weight, logits = x @ router.
    weights: w_in [E,D,F], w_out [E,F,D] and, if gated, w_gate [E,D,F]; with biases
      in_bias and gate_bias [E,F], out_bias [E,D].

  Returns:
    y [T,D], the Reference, and a function from d loss / d y to a dict of
    gradients: x, router and every weight.
  """
  x = x.astype(np.float64)
  routing = route(name, x @ router, valid, options, **draws)
  to = assigned(routing)
  y = experts_forward(x, to, weights, act)

  def backward(d_y):
    d_x, d_gate, d_w = experts_backward(x, to, weights, act, d_y)
    d_logits = routing.backward(d_gate.reshape(routing.gate.shape))
    return {"x": d_x + d_logits @ router.T, "router": x.T @ d_logits, **d_w}

  return y, routing, backward


def balance_loss(probs, chosen, valid) -> float:
  """E * sum_e (share of assignments) * (mean probability), padding left out."""
  num_experts = probs.shape[1]
  rows = [probs[t] for t in range(len(valid)) if valid[t]]
  if not rows or not sum(chosen):
    return 0.0
  mean = np.mean(rows, axis=0)
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
