"""Budgets: equal FLOPs per token (`match`) and equal training FLOPs (`isoflop`).

FLOPs are the exact counts of moejax/cost/flops.py: training (3 times the forward pass) of
attention with its scores over the full square, dense layers, the K experts of a token,
shared experts, the router and the output head. So a router that scores more experts gets
narrower experts.

Letters: C a budget in FLOPs, F an expert's hidden width, D width, L layers.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable

from moejax.config import Config
from moejax.config import text as config_text
from moejax.config.check import validate_fields
from moejax.config.ranges import RANGES
from moejax.cost.flops import flops_per_token, tokens_per_step
from moejax.cost.parameters import resolve_vocab_size
from moejax.errors import ConfigError, did_you_mean
from moejax.options import show
from moejax.sweep.points.axes import number
from moejax.sweep.spec import TOKENS_FIELD

TOLERANCE = 0.01
"""Relative distance from a target up to which it counts as met."""

MATCHES = ("active_flops",)
SIZE_FIELDS = ("model.width", "model.num_layers")
"""Fields whose axis, if there is one, replaces the ladder of sizes."""

SCALED_FIELDS = (
  "model.num_heads",
  "model.num_kv_heads",
  "model.head_dim",
  "model.hidden",
  "moe.hidden",
  "moe.shared_hidden",
)
"""Fields that the ladder scales in proportion, or keeps."""

_SHAPES = ("model", "moe", "data")
"""Sections whose fields can change the FLOPs of a token."""
_NO_GROWTH = (
  "--match_by={field}: FLOPs per token do not grow with it, so it cannot be solved for. "
  "Choose another, such as moe.hidden."
)

_LEAST_SIZES, _MOST_SIZES = 5, 7
_APART = 1.3
"""Least ratio of FLOPs per token between two sizes of the ladder."""
_OFF_SHAPE = 2.0
"""Largest factor between their ratio of width to depth and the base's."""
_LEAST_STEPS = 100
"""Steps of the shortest run on the ladder. Whole steps then meet a budget within 0.5%,
and runs of other axes may cost up to twice as much per token."""

_WIDE = 8
"""Scaled widths are a multiple of this, which suits vector units."""

_SEARCHED = 32
"""Number of a solution's neighbours to try if a rule of the config refuses it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """One size of the ladder."""

  width: int
  num_layers: int
  num_heads: int

  def shown(self) -> dict[str, int]:
    """Returns the fields that are part of its name."""
    return {"model.width": self.width, "model.num_layers": self.num_layers}


def token_flops(config: Config) -> float:
  """Returns the total training FLOPs per token."""
  return flops_per_token(config, resolve_vocab_size(config))["total"]


def num_tokens(config: Config) -> int:
  """Returns the number of tokens that a run trains on."""
  return config.train.num_steps * tokens_per_step(config)


def training_flops(config: Config) -> float:
  """Returns C, the FLOPs of a whole run."""
  return token_flops(config) * num_tokens(config)


def is_within(flops: float, target: float) -> bool:
  """Returns whether FLOPs are within 1% of a target."""
  return abs(flops - target) <= TOLERANCE * target


# ------------------------------------------------------------------------------- match


def check_match(match: str, field: str) -> None:
  """Rejects an unknown kind of match, and a field that cannot be solved.

  Raises:
    ConfigError: names the flag, its value and the remedy.
  """
  if match not in MATCHES:
    raise ConfigError(f"--match={match} is unknown. {did_you_mean(match, MATCHES)}")
  types = config_text.field_types()
  counts = [name for name, (kind, _) in types.items() if kind is int and name in RANGES]
  if field not in counts:
    near = did_you_mean(field, counts) if field not in types else "It is not a size."
    raise ConfigError(
      f"--match_by={field}: not a field that can be solved for. {near} The default is "
      "moe.hidden."
    )
  if field.partition(".")[0] not in _SHAPES:
    raise ConfigError(_NO_GROWTH.format(field=field))


def match(config: Config, reference: Config, field: str) -> None:
  """Sets a field so that FLOPs per token are within 1% of a reference's.

  A config that is already within 1% is left unchanged.

  Args:
    config: changed in place.
    reference: the config to match.
    field: dotted name of an integer with which FLOPs grow.

  Raises:
    ConfigError: no value of the field matches; the message names the nearest.
  """
  target = token_flops(reference)
  if is_within(token_flops(config), target):
    return
  config_text.set_field(config, field, _solve(config, field, target))
  reached = token_flops(config)
  if not is_within(reached, target):
    raise ConfigError(
      f"--match=active_flops: no --config.{field} brings FLOPs per token within 1% of "
      f"the base config's {target:,.0f}. The nearest reachable is "
      f"{config_text.get_field(config, field)}, with {reached:,.0f} "
      f"({reached / target - 1:+.1%}). Choose another --match_by, or change the axes."
    )


def _solve(config: Config, field: str, target: float) -> int:
  """Returns the value of a field whose FLOPs per token are nearest to a target."""
  step = _step(config, field)
  allowed = RANGES[field]
  low, high = max(1, -(-int(allowed.low) // step)), int(allowed.high) // step
  trial = copy.deepcopy(config)

  def flops(count: int) -> float:
    config_text.set_field(trial, field, count * step)
    return token_flops(trial)

  if flops(low) >= flops(high):
    raise ConfigError(_NO_GROWTH.format(field=field))
  least, most = low, high
  while least < most:  # The smallest count that costs at least the target.
    middle = (least + most) // 2
    if flops(middle) < target:
      least = middle + 1
    else:
      most = middle
  # The two neighbours of the target first, then outwards, past those that a rule refuses.
  for away in range(_SEARCHED):
    pair = [c for c in (least - 1 - away, least + away) if low <= c <= high]
    for count in sorted(pair, key=lambda count: abs(flops(count) - target)):
      if _is_valid(config, field, count * step):
        return count * step
  return least * step


def _step(config: Config, field: str) -> int:
  """Returns the number that must divide a field by the rules of a config."""
  if field == "moe.hidden":
    return config.moe.segments
  if field == "model.width" and not config.model.head_dim:
    return 2 * config.model.num_heads
  return 1


def _is_valid(config: Config, field: str, value: int) -> bool:
  trial = copy.deepcopy(config)
  config_text.set_field(trial, field, value)
  try:
    validate_fields(trial)
  except ConfigError:
    return False
  return True


# ----------------------------------------------------------------------------- isoflop


def check_budget(flops: float) -> None:
  """Rejects a budget that is not a positive number.

  Raises:
    ConfigError: names the flag and its value.
  """
  if not (isinstance(flops, int | float) and 0 < flops < math.inf):
    said = number(flops) if isinstance(flops, int | float) else show(flops)
    raise ConfigError(
      f"--isoflop={said}: a budget is a number of FLOPs above 0, such as 1e13."
    )


def spend(config: Config, flops: float) -> None:
  """Sets the number of steps so that the run's FLOPs are within 1% of a budget.

  Args:
    config: changed in place.
    flops: C.

  Raises:
    ConfigError: no whole number of steps meets it; the message names the nearest budget.
  """
  per_step = _step_flops(config)
  most = int(RANGES[TOKENS_FIELD].high)
  steps = min(max(1, round(flops / per_step)), most)
  config_text.set_field(config, TOKENS_FIELD, steps)
  if not is_within(steps * per_step, flops):
    raise ConfigError(
      f"--isoflop={flops:g}: no number of steps spends it within 1%. The nearest "
      f"reachable budget is {steps * per_step:.4g} FLOPs, with --config.{TOKENS_FIELD}="
      f"{steps}. "
      + (
        "Give a smaller budget, a larger model or a larger --config.train.batch_size."
        if steps == most
        else "Give a larger budget, a smaller model or a smaller "
        "--config.train.batch_size."
      )
    )


def _step_flops(config: Config) -> float:
  return token_flops(config) * tokens_per_step(config)


def ladder(base: Config, flops: float) -> list[Size]:
  """Returns 5 to 7 sizes around the base config that can spend a budget.

  Each costs at least 1.3 times as much per token as the one before. Whole heads and whole
  repeats of the layer pattern allow only some widths and depths. Sizes with the base's
  ratio of width to depth come first, and others, with a ratio up to 2 times off, fill the
  gaps. Those nearest to the base are taken.

  Args:
    base: a config whose values are in range.
    flops: C.

  Raises:
    ConfigError: fewer than 5 sizes can; the message names the nearest budget for 5.
  """
  costs = {size: _step_flops(scaled(base, size)) for size in _sizes(base)}
  sizes: list[Size] = []
  for size in sorted(costs, key=lambda size: _off_shape(base, size)):
    if all(abs(math.log(costs[size] / costs[s])) >= math.log(_APART) for s in sizes):
      sizes.append(size)
  most = RANGES[TOKENS_FIELD].high
  fit = [s for s in sizes if _LEAST_STEPS <= flops / costs[s] <= most]
  if len(fit) < _LEAST_SIZES:
    ordered = sorted(costs[size] for size in sizes)
    least = _rounded_up(ordered[_LEAST_SIZES - 1] * _LEAST_STEPS)
    near = least if flops < least else _rounded_down(ordered[-_LEAST_SIZES] * most)
    remedy = f"The nearest reachable budget is {near:g} FLOPs"
    raise ConfigError(
      f"--isoflop={flops:g}: {len(fit)} of the sizes around the base config can spend "
      f"it, and a curve needs {_LEAST_SIZES}. {remedy}; or set the sizes yourself, by "
      "--sweep.model.width or --sweep.model.num_layers, or a smaller base config."
    )
  here = _step_flops(base)
  fit.sort(key=lambda size: abs(math.log(costs[size] / here)))
  return sorted(fit[:_MOST_SIZES], key=lambda size: costs[size])


def _rounded_up(flops: float) -> float:
  """Rounds upwards to two digits, for a flag that a person copies."""
  unit = 10.0 ** (math.floor(math.log10(flops)) - 1)
  return math.ceil(flops / unit) * unit


def _rounded_down(flops: float) -> float:
  """Rounds downwards to two digits."""
  unit = 10.0 ** (math.floor(math.log10(flops)) - 1)
  return math.floor(flops / unit) * unit


def _sizes(base: Config) -> list[Size]:
  """Returns sizes with up to 8 times the base's heads and depth, near its shape."""
  model, moe = base.model, base.moe
  group = _heads_per_group(base)
  prefix = min(moe.dense_prefix, model.num_layers - 1)
  repeats = max(1, (model.num_layers - prefix) // moe.every)
  found = []
  for heads in _around(model.num_heads // group):
    ratio = heads * group / model.num_heads
    width = round(model.width * ratio)
    if model.head_dim:
      width = _in_proportion(model.width, ratio)
    for count in _around(repeats):
      depth = prefix + count * moe.every
      size = Size(width=width, num_layers=depth, num_heads=heads * group)
      if _off_shape(base, size) <= math.log(_OFF_SHAPE) + 1e-9:
        found.append(size)
  # The base itself, even if its depth is not a whole number of repeats.
  here = Size(width=model.width, num_layers=model.num_layers, num_heads=model.num_heads)
  return list(dict.fromkeys([here, *found]))


def _around(count: int) -> list[int]:
  """Returns at most 25 numbers, from 1/8 to 8 times a count."""
  return sorted({max(1, round(count * 2 ** (k / 4))) for k in range(-12, 13)})


def _off_shape(base: Config, size: Size) -> float:
  """Returns how far the ratio of width to depth is from the base's, as a logarithm."""
  ratio = size.width / size.num_layers
  return abs(math.log(ratio * base.model.num_layers / base.model.width))


def _heads_per_group(base: Config) -> int:
  """Returns the number of query heads per key/value head."""
  kv_heads = base.model.num_kv_heads
  return base.model.num_heads // kv_heads if kv_heads else 1


def scaled(base: Config, size: Size) -> Config:
  """Returns a copy of a config at another size.

  The width of a head and the query heads per key/value head stay the same; hidden widths
  change in proportion to the width.
  """
  config = copy.deepcopy(base)
  model, moe = config.model, config.moe
  ratio = size.width / model.width
  if model.num_kv_heads:
    model.num_kv_heads = size.num_heads // _heads_per_group(base)
  model.width, model.num_layers = size.width, size.num_layers
  model.num_heads = size.num_heads
  model.hidden = _in_proportion(model.hidden, ratio)
  moe.hidden = _in_proportion(moe.hidden, ratio, moe.segments)
  if moe.shared_hidden:
    moe.shared_hidden = _in_proportion(moe.shared_hidden, ratio)
  return config


def _in_proportion(width: int, ratio: float, divisor: int = 1) -> int:
  """Returns a width times a ratio, rounded to a multiple of 8 and `divisor` if needed."""
  exact = width * ratio
  if exact == int(exact) and not int(exact) % divisor:
    return int(exact)
  unit = math.lcm(_WIDE, divisor)
  return max(1, round(exact / unit)) * unit


def refuse_scaled(varied: Iterable[str]) -> None:
  """Rejects axes of fields that the ladder sets.

  Raises:
    ConfigError: names the field and the remedy.
  """
  for field in sorted(set(varied) & set(SCALED_FIELDS)):
    raise ConfigError(
      f"--sweep.{field}: --isoflop makes a ladder of sizes, which sets this field. Give "
      "the sizes too, by --sweep.model.width or --sweep.model.num_layers, or drop the "
      "axis."
    )
