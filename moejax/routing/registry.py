"""The registry: every router by its name on the command line."""

import dataclasses

from moejax.routing import token_choice
from moejax.routing.base import RouterFn


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSpec:
  """A router, and what whoever calls it must know about it.

  The layer makes `RouterInputs` of one group, maps `fn` over groups, and adds
  what the fields below ask for.
  """

  fn: RouterFn
  summary: str
  """One line, for --list=routers."""
  causal: bool = True
  """Whether a token's routing is independent of later tokens, under arrival priority."""
  num_selected: int | None = None
  """K where the router fixes it, whatever the flag says."""
  needs_token_ids: bool = False
  """Whether RouterInputs.token_ids must be given."""


ROUTERS: dict[str, RouterSpec] = {
  "switch": RouterSpec(
    fn=token_choice.switch,
    num_selected=1,
    summary="top-1, gate = probability (Switch)",
  ),
  "top2": RouterSpec(
    fn=token_choice.top2,
    num_selected=2,
    summary="best expert and a second one: always, at random or sampled (GShard)",
  ),
  "top_k": RouterSpec(
    fn=token_choice.top_k,
    summary="K most probable experts, gates raw or renormalised (Mixtral, OLMoE)",
  ),
}
