"""The ways `tools.mutation_check` breaks the routing code: one edit each."""

from typing import NamedTuple


class Mutant(NamedTuple):
  """One edit that changes what routing does."""

  name: str
  file: str
  """Under moejax/routing."""
  old: str
  """Stands exactly once in the file."""
  new: str


def _in(file: str, *edits: tuple[str, str, str]) -> tuple[Mutant, ...]:
  return tuple(Mutant(name, file, old, new) for name, old, new in edits)


MUTANTS = (
  *_in(
    "queueing.py",
    (
      "second choices before first ones",
      "position = choice[None, :] * num_tokens + rank[:, None]",
      "position = (num_selected - 1 - choice)[None, :] * num_tokens + rank[:, None]",
    ),
    ("smallest gate first", "(-best, rank)", "(best, rank)"),
    ("random priority ignored", "jax.random.permutation(key, rank)", "rank"),
    ("counting includes oneself", "until - 1 + start", "until + start"),
    ("counting sees empty places", "jnp.where(here, asking, num_experts + 1)", "asking"),
  ),
  *_in(
    "capacity.py",
    ("capacity rounded down", "math.ceil(slots)", "math.floor(slots)"),
    (
      "capacity above the tokens",
      "min(num_tokens, max(min_capacity, math.ceil(slots)))",
      "max(min_capacity, math.ceil(slots))",
    ),
    (
      "K left out of the capacity",
      "Fraction(num_selected * num_tokens, num_experts)",
      "Fraction(num_tokens, num_experts)",
    ),
    ("one slot too many", "asked & (rank < capacity)", "asked & (rank <= capacity)"),
    ("load not capped", "load = jnp.minimum(chosen, capacity)", "load = chosen"),
    (
      "padding takes slots",
      "asked = jnp.broadcast_to(valid[:, None], expert.shape)",
      "asked = jnp.ones(expert.shape, bool)",
    ),
    ("dropped keep their gate", "gate = jnp.where(kept, gate, 0.0)", "gate = gate + 0.0"),
    ("never renormalised before drops", "if before_drop:", "if False:"),
    (
      "never renormalised after drops",
      'if policy.renormalize == "after_drop":',
      "if False:",
    ),
    (
      "a choice given up takes a slot",
      "asked = asked & wanted",
      "asked = asked | wanted",
    ),
    ("gate scale forgotten", "gate = gate * policy.gate_scale", "gate = gate * 1.0"),
    ("padding in the entropy", "jnp.sum(counted * entropy", "jnp.sum(entropy"),
    ("padding counted as dropped", "(valid & ~served)", "(~served)"),
    ("balance from kept ones", "chosen = slots.chosen", "chosen = slots.load"),
    (
      "moved keep their old gate",
      "gate = jnp.where(moved, taken, gate)",
      "gate = jnp.where(moved, gate, gate)",
    ),
    (
      "moved push others out",
      "behind = jnp.where(moved, position + position.size, position)",
      "behind = jnp.where(moved, position, position + position.size)",
    ),
  ),
  *_in(
    "overflow.py",
    (
      "an expert serves a token twice",
      "allowed &= ~taken",
      "allowed &= ~(taken & False)",
    ),
    (
      "room not used up",
      "room = room - jnp.sum(",
      "room = room - 0 * jnp.sum(",
    ),
    (
      "an expert takes one more than it has room for",
      "jnp.searchsorted(experts, bounds).astype(jnp.int32) + room",
      "jnp.searchsorted(experts, bounds).astype(jnp.int32) + room + 1",
    ),
  ),
  *_in(
    "scores.py",
    (
      "ties to the highest expert",
      "jnp.min(jnp.where(scores == top, index, num_experts - 1), axis=-1)",
      "jnp.max(jnp.where(scores == top, index, 0), axis=-1)",
    ),
    (
      "every gate's gradient to the first choice",
      "g[:, k : k + 1], 0.0)",
      "g[:, :1], 0.0)",
    ),
    (
      "group score is a sum",
      "group_score = jnp.max(grouped, axis=-1)",
      "group_score = jnp.sum(grouped, axis=-1)",
    ),
    (
      "absent experts are there",
      "jnp.where(logits > ABSENT, jax.lax.stop_gradient(scores), -jnp.inf)",
      "jax.lax.stop_gradient(scores)",
    ),
    ("groups not limited", "jnp.repeat(allowed, size, axis=-1), scores", "True, scores"),
  ),
  *_in(
    "losses.py",
    (
      "balance loss not normalised",
      "return num_experts * jnp.sum(fraction * _mean",
      "return jnp.sum(fraction * _mean",
    ),
    ("z-loss not squared", "jnp.square(log_partition)", "jnp.abs(log_partition)"),
    (
      "padding in every mean",
      "weight = valid.astype(jnp.float32)",
      "weight = jnp.ones(valid.shape, jnp.float32)",
    ),
    ("bias moves the wrong way", "bias + rate * jnp.sign", "bias - rate * jnp.sign"),
    (
      "load threshold counts the expert itself",
      "jnp.where(noisy >= inside, best[:, num_selected:], inside)",
      "jnp.broadcast_to(inside, noisy.shape)",
    ),
    ("variance by the wrong count", "max(values.shape[0] - ddof, 1)", "values.shape[0]"),
  ),
  *_in(
    "token_choice.py",
    ("second kept half as often", "< 2.0 * second", "< second"),
    ("gate of switch is 1", 'num_selected=1, renormalize="none"', "num_selected=1"),
  ),
  *_in(
    "noisy.py",
    ("noise does not choose", "choose(noisy, policy", "choose(logits, policy"),
    ("softplus forgotten", "jax.nn.softplus(", "jnp.abs("),
  ),
  *_in(
    "expert_choice.py",
    (
      "experts pick padding",
      "jnp.where(inputs.valid[:, None], probs, -1.0)",
      "probs",
    ),
  ),
  *_in(
    "bias.py",
    (
      "quantile step away from balance",
      "quantile(target) - quantile(share)",
      "quantile(share) - quantile(target)",
    ),
    ("spread ignored", "rate * spread", "rate"),
    ("bias in the gate", "pick(scores, expert),", "pick(biased, expert),"),
    ("padding in the scores' spread", "counted @ seen", "counted.size * seen[0]"),
    (
      "absent experts' biases move",
      "moved = jnp.where(present, moved, bias)",
      "moved = moved + 0.0",
    ),
  ),
  *_in("hashing.py", ("hash gates sum to K", "1.0 / policy.num_selected", "1.0")),
  *_in(
    "soft.py",
    ("slots do not mix tokens", "-1e30), axis=0)", "-1e30), axis=1)"),
    (
      "padding gets something back",
      "jnp.where(valid, combine.reshape",
      "(combine.reshape",
    ),
  ),
  *_in(
    "assignment.py",
    (
      "Sinkhorn sees padding",
      "jnp.where(valid[:, None], jnp.exp(logits), 0.0)",
      "jnp.exp(logits)",
    ),
    (
      "base chooses without the plan",
      "expert = choose(scores,",
      "expert = choose(logits,",
    ),
  ),
  *_in(
    "losses.py",
    (
      "first choices counted after overflow moved them",
      "first = routing.first\n",
      "first = routing.assignments.expert.reshape(valid.shape[0], -1)[:, 0]\n",
    ),
    (
      "absent experts count in the balance loss",
      "num_experts = num_present or probs.shape[-1]",
      "num_experts = probs.shape[-1]",
    ),
  ),
  *_in(
    "expert_groups.py",
    (
      "an absent expert takes tokens",
      "inputs.present[expert]",
      "inputs.present[expert] | True",
    ),
  ),
  *_in(
    "baselines.py",
    (
      "generation counts from zero",
      "return inputs.positions",
      "return jnp.zeros_like(inputs.positions)",
    ),
  ),
  *_in(
    "token_choice.py",
    (
      "the raw second gate is normalised",
      "gate if raw else normalize(gate)",
      "normalize(gate)",
    ),
  ),
  *_in(
    "quantile_balancing.py",
    ("the threshold is the K-th score", "[0][:, order:]", "[0][:, order - 1 : order]"),
    (
      "padding counts in margins",
      "counted = jnp.broadcast_to(valid.astype(jnp.float32)[:, None], index.shape)",
      "counted = jnp.ones(index.shape, jnp.float32)",
    ),
  ),
  *_in(
    "queueing.py",
    ("every norm is the sum", "if norm == 1.0:", "if True:"),
  ),
)
