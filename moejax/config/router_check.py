"""Checks the chosen router's requirements on the rest of the config.

A module separate from `config.check`, because a router's class imports jax.
"""

import dataclasses
from collections.abc import Callable

from moejax.config.encoder import encoder_config, encoder_moe
from moejax.config.exchange_rule import unmixable
from moejax.config.router import make_router, slot_policy
from moejax.config.schema import Config
from moejax.config.text import named
from moejax.errors import ConfigError
from moejax.routing.router import Router


def check_router(config: Config) -> None:
  """Rejects settings that the chosen router, or its kind, does not support.

  Raises:
    ConfigError: names the flag, its value and the remedy.
  """
  if config.model.kind == "encoder_decoder":
    _check_encoder(config)
  _check_stack(config)


def _check_encoder(config: Config) -> None:
  """Checks the encoder's router, and that the decoder's can decode."""
  moe, router = config.moe, make_router(config.moe)
  if not router.causal and not moe.dense_twin:
    raise ConfigError(
      f"--config.moe.router={moe.router} looks at later tokens, which a decoder must not "
      "see. Choose another, and give it to the encoder by "
      f"--config.moe.encoder_router={moe.router}."
    )
  encoder = make_router(encoder_moe(moe))
  if encoder.has_table != router.has_table:
    raise ConfigError(
      f"{named(config, 'moe.encoder_router', 'moe.router')}: a table by token id is "
      "shared by the whole model. Use the same router in both."
    )
  _check_stack(encoder_config(config))


def _check_stack(config: Config) -> None:
  router = make_router(config.moe)
  if not config.moe.dense_twin:
    for rule in ROUTER_RULES:
      error = rule(config, router)
      if error:
        raise ConfigError(error)
  _router_policy(config, router)


def _fixed_choices(c: Config, router: Router) -> str | None:
  fixed, chosen = router.fixed_selected, c.moe.fine_selected
  if fixed is not None and chosen != fixed:
    return (
      f"{named(c, 'moe.router', 'moe.num_selected', 'moe.segments')}: this router "
      f"chooses {fixed} per token, but num_selected * segments is {chosen}. Change them, "
      "or use --config.moe.router=top_k."
    )


def _dropped_experts_are_in_the_logits(c: Config, router: Router) -> str | None:
  if c.moe.expert_dropout and not router.by_logits:
    return (
      f"{named(c, 'moe.expert_dropout', 'moe.router')}: this router does not choose "
      "by the logits, where experts are dropped. Use --config.moe.expert_dropout=0, or "
      "another router."
    )


def _biases_are_in_the_logits(c: Config, router: Router) -> str | None:
  if c.moe.router_bias and not router.by_logits:
    return (
      f"{named(c, 'moe.router_bias', 'moe.router')}: this router does not choose by "
      "the logits, to which the bias is added. Leave it out, or use another router."
    )


def _pruned_rows_take_a_part(c: Config, router: Router) -> str | None:
  if not c.moe.pruned_rows:
    return None
  if not router.gates_are_probabilities:
    return (
      f"{named(c, 'moe.pruned_rows', 'moe.router')}: the gates of this router are not "
      "a softmax, so rows without an expert change nothing. Leave it out."
    )
  if c.moe.renormalize != "none":
    return (
      f"{named(c, 'moe.pruned_rows', 'moe.renormalize')}: renormalised gates do not "
      "depend on rows that are not chosen. Leave it out."
    )


def _first_choices_are_made(c: Config, router: Router) -> str | None:
  if c.moe.balance_counts == "first" and not router.token_choice:
    return (
      f"{named(c, 'moe.balance_counts', 'moe.router')}: tokens make no first "
      "choice under this router. Use --config.moe.balance_counts=all."
    )


def _slots_stay(c: Config, router: Router) -> str | None:
  moe = c.moe
  if not router.fixed_slots:
    return None
  if moe.capacity_factor != moe.eval_capacity_factor:
    return (
      f"{named(c, 'moe.capacity_factor', 'moe.eval_capacity_factor')}: the slots of "
      f"router {moe.router} are learned, so both must be the same number."
    )
  if moe.group_size <= 0 or c.data.sequence_length % moe.group_size:
    return (
      f"{named(c, 'moe.group_size', 'data.sequence_length')}: the slots of router "
      f"{moe.router} belong to a group of fixed size. Give group_size a divisor of the "
      "sequence."
    )


def _mixtures_are_weighted(c: Config, router: Router) -> str | None:
  return unmixable(c.moe.dispatcher, router.mixes)


ROUTER_RULES: tuple[Callable[[Config, Router], str | None], ...] = (
  _fixed_choices,
  _dropped_experts_are_in_the_logits,
  _biases_are_in_the_logits,
  _pruned_rows_take_a_part,
  _first_choices_are_made,
  _slots_stay,
  _mixtures_are_weighted,
)
"""Requirements of a router's kind on the rest of the config."""


def _router_policy(config: Config, router: Router) -> None:
  """Runs the router's own check, for training and for evaluation capacity."""
  moe = config.moe
  if router.needs_capacity and moe.eval_capacity_factor is None:
    raise ConfigError(
      f"--config.moe.router={moe.router} needs slots in evaluation too, but "
      "--config.moe.eval_capacity_factor=none sets no number of them. Set it to "
      + (
        f"{moe.capacity_factor}, as in training."
        if moe.capacity_factor
        else "1.0, and --config.moe.capacity_factor too."
      )
    )
  # 1 stands for any capacity: the rules do not depend on the number.
  slots = None if moe.capacity_factor is None else 1
  router.check(slot_policy(moe, slots))
  if moe.eval_capacity_factor is None:
    # Dropless evaluation of a model trained with an overflow policy is valid.
    router.check(dataclasses.replace(slot_policy(moe, None), overflow="drop"))
