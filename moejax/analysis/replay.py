"""Replay: the effect of other router options, without running the experts again.

The decisions under each setting are computed from the logits of one pass, by the
library's own routing functions (`decide`). At the first MoE layer they are exactly those
of the model. At later ones the logits would have changed with the drops of earlier
layers, so the result is marked as approximate.

Letters: L MoE layers, E experts, K choices per token.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from moejax.analysis import decide
from moejax.analysis.sums import add
from moejax.config import Config, MoEConfig
from moejax.config.check import validate
from moejax.errors import ConfigError, UserError, program
from moejax.evaluate import groups, perplexity
from moejax.layers.routes import Routes
from moejax.models.decoder import Decoder
from moejax.models.placement import param_shardings
from moejax.sharding import rules
from moejax.types import Params

OPTIONS = (
  "capacity_factor",
  "overflow",
  "priority",
  "slot_order",
  "group_size",
  "num_selected",
  "renormalize",
)
"""Fields of `MoEConfig` whose effect can be computed from the logits alone."""

Setting = Mapping[str, Any]
"""Values of some of `OPTIONS`; the others keep the run's values."""


def settings(asked: Mapping[str, Sequence[Any]]) -> list[Setting]:
  """Returns all combinations of the values of each option, the last varying fastest."""
  names = [name for name in OPTIONS if name in asked]
  return [
    dict(zip(names, values, strict=True))
    for values in itertools.product(*(asked[name] for name in names))
  ]


def configured(config: Config, setting: Setting) -> Config:
  """Returns the run's config under a setting, which also applies to evaluation.

  Raises:
    UserError: the combination makes no sense.
  """
  config = copy.deepcopy(config)
  for name, value in setting.items():
    setattr(config.moe, name, value)
  config.moe.eval_capacity_factor = config.moe.capacity_factor
  try:
    validate(config)
  except ConfigError as error:
    raise UserError(f"--replay with {show(setting)}: {error}") from error
  if config.moe.group_size == -1:
    config.moe.group_size = groups.group_tokens(config)
  return config


def show(setting: Setting) -> str:
  """Returns a setting as flags."""
  words = (f"{n}={'none' if v is None else v}" for n, v in setting.items())
  return " ".join(words) or "the run's options"


def table(found: Sequence[Mapping[str, Any]]) -> str:
  """Returns the effect of each setting as text, with a line for each layer.

  Args:
    found: from `Replay.result`.
  """
  head = ("setting", "layer", "dropped", "lost", "busiest")
  rows = [
    (
      show(entry["setting"]),
      str(layer["layer"]),
      f"{layer['drop_fraction']:.2%}",
      f"{layer['dropped_tokens']:.2%}",
      f"{layer['max_load_ratio']:.2f}x",
    )
    for entry in found
    for layer in entry["layers"]
  ]
  wide = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  return "\n".join(
    f"{first:<{wide[0]}}  "
    + "  ".join(f"{cell:>{n}}" for cell, n in zip(rest, wide[1:], strict=True))
    for first, *rest in (head, *rows)
  )


def check(model: Decoder) -> None:
  """Raises UserError for a model whose routing does not follow from the logits."""
  if reason := decide.undecidable(model):
    raise UserError(
      f"--replay: {reason}. Run {program('evaluate', 'experiments.evaluate')} under each "
      "option instead."
    )
  if rows := model.moe.pruned_rows:
    raise UserError(
      f"--replay: this run's gates also depend on {rows} router rows without an expert "
      "(moe.pruned_rows), which logits do not show. Run "
      f"{program('evaluate', 'experiments.evaluate')} under each option instead."
    )


def batch_multiple(
  config: Config, mesh: Mesh, asked: Sequence[Setting], wanted: int = 0
) -> int:
  """Returns the sequences per batch for which the groups of every setting are whole."""
  sizes = []
  for setting in asked:
    own = configured(config, setting)
    sizes.append(groups.batch_size(own, mesh, (own.moe.capacity_factor,), wanted))
  return math.lcm(*sizes)


def make_decider(
  moe: MoEConfig, mesh: Mesh
) -> Callable[[decide.Recorded, dict[str, Array]], dict[str, Array]]:
  """Returns a jitted (recorded, router parameters) -> sums by layer."""

  def sums(recorded: decide.Recorded, own: dict[str, Array]) -> dict[str, Array]:
    routes = decide.decide(moe, recorded, own, moe.capacity_factor)
    return count(routes, recorded.valid)

  return jax.jit(sums, out_shardings=rules.replicated(mesh))


def count(routes: Routes, valid: Array) -> dict[str, Array]:
  """Returns sums of one batch by layer: assignments, drops, gates and loads."""
  assert routes.kept is not None and routes.gate is not None
  lost = valid[None] & ~jnp.any(routes.kept, axis=-1)
  dropped = valid[None, ..., None] & ~routes.kept
  return {
    "tokens": jnp.sum(valid, dtype=jnp.int32),
    "dropped": jnp.sum(dropped, axis=(1, 2, 3), dtype=jnp.int32),
    "lost": jnp.sum(lost, axis=(1, 2), dtype=jnp.int32),
    "gate": jnp.sum(routes.gate, axis=(1, 2, 3)),
    "load": jnp.sum(routes.served, axis=(1, 2), dtype=jnp.int32),
  }


class Replay:
  """Computes the decisions of every setting on each batch, and adds them up."""

  def __init__(
    self, config: Config, model: Decoder, mesh: Mesh, asked: Sequence[Setting]
  ):
    """Prepares the settings.

    Args:
      config: of the run.
      model: its model.
      mesh: of the evaluation.
      asked: from `settings`; batches must hold whole groups of each.

    Raises:
      UserError: as `check` and `configured`.
    """
    check(model)
    if model.router.has_table and any("num_selected" in setting for setting in asked):
      raise UserError(
        f"--num_selected: the table of router {model.moe.router} has no further experts "
        "for a word. Leave it out."
      )
    self.settings = list(asked)
    self._moes = [configured(config, setting).moe for setting in asked]
    self._deciders = [make_decider(moe, mesh) for moe in self._moes]
    self._sums: list[dict[str, np.ndarray]] = [{} for _ in asked]
    self._pending: list[dict[str, Array]] = []
    self._layers = model.moe_layers

  def see(self, recorded: decide.Recorded, own: dict[str, Array]) -> None:
    """Runs all settings on one batch; sums are fetched while the next batch runs."""
    found = [decider(recorded, own) for decider in self._deciders]
    self._fetch()
    self._pending = found

  def _fetch(self) -> None:
    for total, sums in zip(self._sums, jax.device_get(self._pending), strict=False):
      add(total, sums)
    self._pending = []

  def result(self) -> list[dict[str, Any]]:
    """Returns each setting's rates by layer, JSON-ready."""
    self._fetch()
    return [
      {"setting": dict(setting), "layers": self._rates(sums, moe)}
      for setting, sums, moe in zip(self.settings, self._sums, self._moes, strict=True)
    ]

  def _rates(self, sums: dict[str, np.ndarray], moe: MoEConfig) -> list[dict[str, Any]]:
    tokens = max(int(sums["tokens"]), 1)
    chosen = int(sums["load"][0].sum() + sums["dropped"][0])
    return [
      {
        "layer": layer,
        "exact": index == 0,
        "drop_fraction": float(sums["dropped"][index] / max(chosen, 1)),
        "dropped_tokens": float(sums["lost"][index] / tokens),
        "gate_per_token": float(sums["gate"][index] / tokens),
        "max_load_ratio": float(
          sums["load"][index].max()
          * moe.fine_experts
          / max(int(sums["load"][index].sum()), 1)
        ),
      }
      for index, layer in enumerate(self._layers)
    ]


def make_recorder(
  model: Decoder, mesh: Mesh
) -> Callable[[Params, Routes, Any], tuple[decide.Recorded, dict[str, Array]]]:
  """Returns a jitted (params, routes, batch) -> arguments of `Replay.see`."""

  def record(params: Params, routes: Routes, batch: Any) -> Any:
    recorded = decide.recorded(model, params, routes, batch)
    return recorded, decide.router_params(model, params)

  shardings = (param_shardings(model, mesh), None, rules.batch_sharding(mesh))
  return jax.jit(record, in_shardings=shardings)


def confirm(
  config: Config,
  params: Params,
  dataset: Any,
  replayed: dict[str, Any],
  *,
  split: str,
  mesh: Mesh,
  batch_size: int,
  limit: int = 0,
) -> dict[str, Any]:
  """Evaluates the model under a setting and compares its drops with the replay.

  Args:
    config: of the run.
    params: of its model.
    dataset: the text that was replayed.
    replayed: an entry of `Replay.result`.
    split: of the text.
    mesh: of the evaluation.
    batch_size: sequences per step.
    limit: maximum number of batches; 0 means all.

  Returns:
    loss in nats per token, and by layer `drop_fraction` and its `difference`: replayed
    minus evaluated.
  """
  own = configured(config, replayed["setting"])
  model = groups.make_model(own, dataset.tokenizer.vocab_size)
  found = perplexity.evaluate(
    model,
    params,
    dataset,
    split=split,
    mesh=mesh,
    batch_size=batch_size,
    capacity_factors=(own.moe.capacity_factor,),
    limit=limit,
  )["results"][0]
  drops = [layer["drop_fraction"] for layer in found["layers"]]
  return {
    "loss": found["loss"],
    "drop_fraction": drops,
    "difference": [
      layer["drop_fraction"] - real
      for layer, real in zip(replayed["layers"], drops, strict=True)
    ],
  }
