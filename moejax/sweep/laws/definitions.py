"""A law's inputs, counted from a config by that law's definitions.

    laws.Abnar().predict(**definitions.inputs_of(laws.Abnar, config))

All counts come from the exact ones of moejax/cost. The laws assume models that differ
from a config in ways that no number shows (Clark and Krajewski: every second or every
layer MoE; all: their data, tokenizer and schedule). So the result places a config among
their models, and does not predict its loss.
"""

from collections.abc import Callable, Mapping

from moejax.config import Config, MoEConfig
from moejax.cost import flops, parameters
from moejax.errors import ConfigError
from moejax.sweep.laws import published as laws
from moejax.sweep.laws.law import Law

_BLOCK_MATRICES = ("attention", "dense", "experts", "shared_experts")


def training_tokens(config: Config) -> int:
  """Returns D: steps times the tokens of a batch, padding included."""
  return config.train.num_steps * flops.tokens_per_step(config)


def training_flops(config: Config, vocab_size: int | None = None) -> float:
  """Returns C of a run: exact training FLOPs per token, head included, times D."""
  vocab = vocab_size or parameters.resolve_vocab_size(config)
  per_token = flops.flops_per_token(config, vocab)["total"]
  return per_token * training_tokens(config)


def inputs_of(
  law: type[Law], config: Config, *, vocab_size: int | None = None
) -> dict[str, float]:
  """Returns the inputs that a law's `predict` takes, for one run.

  Args:
    law: a class of moejax.sweep.laws.published.
    config: validated.
    vocab_size: V; None is `resolve_vocab_size`.

  Raises:
    ConfigError: the law's definitions do not cover the config.
  """
  vocab = vocab_size or parameters.resolve_vocab_size(config)
  return _INPUTS[law](config, vocab)


def _power(config: Config, vocab: int) -> dict[str, float]:
  return {"C": training_flops(config, vocab)}


def _chinchilla(config: Config, vocab: int) -> dict[str, float]:
  _, active = parameters.count_parameters(config, vocab)
  return {"N": float(active["total"]), "D": float(training_tokens(config))}


def _clark(config: Config, vocab: int) -> dict[str, float]:
  """N leaves out the router, which the dense base model does not have."""
  moe = _sparse(config, "clark")
  d = parameters.dimensions(config, vocab)
  if d.num_selected != 1 or d.shared_hidden:
    raise ConfigError(
      f"--config.moe.num_selected={moe.num_selected}, segments={moe.segments}, "
      f"num_shared={moe.num_shared}: Clark's law assumes one chosen expert and no shared "
      "one. Use ludziejewski or abnar."
    )
  _, active = parameters.count_parameters(config, vocab)
  return {"N": float(active["total"] - active["router"]), "E": float(d.num_experts)}


def _krajewski(config: Config, vocab: int) -> dict[str, float]:
  """d_ff is model.hidden, the paper's dense layer; N counts the blocks' matrices."""
  moe = _sparse(config, "krajewski")
  total, _ = parameters.count_parameters(config, vocab)
  return {
    "N": float(sum(total[part] for part in _BLOCK_MATRICES)),
    "D": float(training_tokens(config)),
    "G": config.model.hidden / moe.fine_hidden,
  }


def expansion(config: Config) -> float:
  """Returns Krajewski's E: parameters of all experts over those of a dense layer."""
  moe = config.moe
  return moe.fine_experts * moe.fine_hidden / config.model.hidden


def _abnar(config: Config, vocab: int) -> dict[str, float]:
  d = parameters.dimensions(config, vocab)
  total, _ = parameters.count_parameters(config, vocab)
  sparsity = 0.0 if d.is_twin else 1 - d.num_selected / d.num_experts
  tokens = float(training_tokens(config))
  return {"N": float(total["total"]), "D": tokens, "S": sparsity}


def _ludziejewski(config: Config, vocab: int) -> dict[str, float]:
  """E is E/K, which keeps the law's ratio of total to active expert parameters."""
  d = parameters.dimensions(config, vocab)
  experts = 1.0 if d.is_twin else d.num_experts / d.num_selected
  return _chinchilla(config, vocab) | {"E": experts}


def _ling(config: Config, vocab: int) -> dict[str, float]:
  """C leaves out the head; a shared expert counts in units of a routed expert's width."""
  moe = _sparse(config, "ling")
  d = parameters.dimensions(config, vocab)
  shared = moe.shared_width / moe.fine_hidden
  cost = flops.flops_per_token(config, vocab)
  return {
    "C": (cost["total"] - cost["head"]) * training_tokens(config),
    "A": (d.num_selected + shared) / (d.num_experts + shared),
    "G": 2 * config.model.width / moe.fine_hidden,
  }


def _sparse(config: Config, law: str) -> MoEConfig:
  if config.moe.dense_twin:
    raise ConfigError(
      f"--config.moe.dense_twin: the law {law} has no value for a dense model. "
      "Leave it out, or use ludziejewski, abnar or chinchilla."
    )
  return config.moe


_INPUTS: Mapping[type[Law], Callable[[Config, int], dict[str, float]]] = {
  laws.PowerLaw: _power,
  laws.Chinchilla: _chinchilla,
  laws.Clark: _clark,
  laws.Krajewski: _krajewski,
  laws.Abnar: _abnar,
  laws.Ludziejewski: _ludziejewski,
  laws.Ling: _ling,
}
