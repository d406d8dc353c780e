"""A router of your own, in one file: top-k whose experts have learned temperatures.

  python -m experiments.train --config=examples/my_router.py --workdir=runs/tempered

docs/adding_a_router.md explains each part; tests/routing/test_adding_a_router.py runs it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from configs import default
from moejax.config import Config
from moejax.options import Range, option, weight
from moejax.routing import registry
from moejax.routing.base import RouterInputs, Routing, SlotPolicy
from moejax.routing.capacity import assign
from moejax.routing.router import Parameter, Router
from moejax.routing.scores import choose, pick, present, softmax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tempered(Router):
  """Top-k of logits times exp(t_e), with a boost for experts of little load."""

  name = "tempered"
  summary = "top-k, a learned temperature per expert, a boost where load is low"

  rate: float = option(0.001, "how far a step moves each boost", Range(0, 1))
  spread_weight: float = option(0.01, "weight of the temperatures' variance", weight())

  def parameters(self, sizes):
    each = Parameter(shape=(sizes.num_experts,), axes=("router_expert",))
    return {"temperature": each, "boost": dataclasses.replace(each, trained=False)}

  def __call__(self, inputs: RouterInputs, policy: SlotPolicy) -> Routing:
    temperature, boost = inputs.params["temperature"], inputs.params["boost"]
    probs = softmax(inputs.logits * jnp.exp(temperature)[None])
    by = present(inputs.logits, probs + jax.lax.stop_gradient(boost)[None])
    expert, valid, key = choose(by, policy.num_selected), inputs.valid, inputs.key
    gate = pick(probs, expert)
    routing = assign(expert, gate, valid, probs, policy, key, scores=by)
    return dataclasses.replace(routing, losses={"spread_loss": jnp.var(temperature)})

  def loss_weights(self):
    return {"spread_loss": self.spread_weight}

  def update(self, params, stats):
    error = jnp.mean(stats.chosen, axis=-1, keepdims=True) - stats.chosen
    return {"boost": params["boost"] + self.rate * jnp.sign(error)}


registry.ROUTERS["tempered"] = Tempered


def get_config() -> Config:
  config = default.get_config()
  config.moe.use_router("tempered", rate=0.002)
  return config
