"""Merge: groups of similar experts become one each, an average of their weights.

M-SMoE (arXiv:2310.01334, section 3): the most used experts stay; every other expert joins
the most similar of them, by router logits; its hidden neurons are permuted to match those
of that expert; weights are averaged in proportion to use. Each step has its option:

  group_by   logits: cosine of two experts' router logits over a text; outputs: of their
             mean outputs; weights: of their weights; order: neighbours, as clone puts
             copies
  weigh      load: in proportion to tokens; even
  rows       dominant: the router row of the most used expert; mean; or alias: every row
             stays, and all rows of a group lead to equal experts

Under alias E stays the same, and each member of a group holds the merged weights: the
function of one expert under several names, without saving memory. M-SMoE's code routes
in this way; it shows the cost of merging the weights alone.

Letters: E experts, D width, F expert hidden width.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int, Shaped

from moejax.config import Config
from moejax.errors import UserError
from moejax.options import count, option
from moejax.surgery.gates import Gates
from moejax.surgery.join import tied
from moejax.surgery.operation import (
  DROP,
  EQUAL,
  EXPERTS,
  OUTPUTS,
  Choice,
  Kind,
  Layer,
  Operation,
  Source,
  flat,
  is_close,
)
from moejax.surgery.prune import refuse_count
from moejax.surgery.scores import best, equal_groups, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Operation):
  """Averages groups of similar experts."""

  name = "merge"
  summary = "fewer experts: similar ones become their average"

  experts: int = option(
    0, "E afterwards, counting segments", count(1, 2**20, "fewer than there are")
  )
  group_by: Literal["logits", "outputs", "weights", "order"] = option(
    "logits", "similarity: of router logits, of mean outputs, of weights; or neighbours"
  )
  weigh: Literal["load", "even"] = option("load", "weights of the mean: use, or even")
  align: bool = option(True, "permute hidden neurons to match before averaging")
  rows: Literal["dominant", "mean", "alias"] = option(
    "dominant", "router row: of the expert used most, the mean, or all kept as aliases"
  )

  @property
  def reads_text(self) -> bool:
    return self.weigh == "load" or self.group_by in ("logits", "outputs")

  def check(self, old: Config) -> None:
    refuse_count(old, self.experts, self.name)
    flag = f"--experts={self.experts}"
    equal_groups(old.moe, self.experts, flag)
    if self.group_by == "order" and old.moe.fine_experts % self.experts:
      raise UserError(
        f"{flag} with --group_by=order: {old.moe.fine_experts} experts do not make "
        "equal groups of neighbours. Give a divisor."
      )

  def new_config(self, old: Config, asked: Config) -> Config:
    new = copy.deepcopy(asked)
    if self.rows != "alias":
      new.moe = flat(new.moe)
      new.moe.num_experts = self.experts
    return new

  def choose(self, source: Source) -> dict[int, Choice]:
    groups: dict[int, list[tuple[int, ...]]] = {}
    loads = {n: self._load(source, n) for n in source.layers}
    if source.same_in_all:
      loads = summed(loads)
      likeness = {n: self._likeness(source, n) for n in source.layers}
      total = summed(likeness)
      groups = {
        n: self._groups(la, loads[n], total[n]) for n, la in source.layers.items()
      }
    else:
      for number, layer in source.layers.items():
        likeness = self._likeness(source, number)
        groups[number] = self._groups(layer, loads[number], likeness)
    return {
      n: self._choice(layer, groups[n], loads[n]) for n, layer in source.layers.items()
    }

  def _load(self, source: Source, number: int) -> Float[np.ndarray, "E"]:
    if self.reads_text:
      return source.measured.sums[number]["load"]
    return np.ones(source.layers[number].old.fine_experts)

  def _likeness(self, source: Source, number: int) -> Float[np.ndarray, "E E"]:
    layer = source.layers[number]
    if self.group_by == "logits":
      gram = source.measured.sums[number]["logits"]
      size = np.sqrt(np.maximum(np.diag(gram), 1e-30))
      return gram / size[:, None] / size[None, :]
    if self.group_by == "outputs":
      return cosine(source.measured.sums[number]["outputs"])
    if self.group_by == "weights":
      rows = [
        np.asarray(layer.arrays[name], np.float64).reshape(layer.old.fine_experts, -1)
        for name in sorted(layer.arrays)
        if name.startswith(EXPERTS)
      ]
      return cosine(np.concatenate(rows, axis=1))
    return np.zeros((layer.old.fine_experts,) * 2)

  def _groups(
    self, layer: Layer, load: Float[np.ndarray, "E"], likeness: Float[np.ndarray, "E E"]
  ) -> list[tuple[int, ...]]:
    """Returns the groups, each with the most used expert first."""
    experts = len(load)
    if self.group_by == "order":
      size = experts // self.experts
      found = [list(range(e, e + size)) for e in range(0, experts, size)]
    else:
      flag = f"--experts={self.experts}"
      num_groups = equal_groups(layer.old, self.experts, flag)
      heads = best(load, self.experts, num_groups)
      found = join_nearest(heads, likeness, experts // num_groups)
    return [tuple(sorted(group, key=lambda e: (-load[e], e))) for group in found]

  def _choice(
    self, layer: Layer, groups: list[tuple[int, ...]], load: Float[np.ndarray, "E"]
  ) -> Choice:
    orders: dict[int, np.ndarray] = {}
    exact = True
    for group in groups:
      own, same = aligned(layer, group, self.align)
      orders |= own
      exact = exact and same
    weights = {group: self._weights(group, load) for group in groups}
    parents = groups
    if self.rows == "alias":
      of = {e: group for group in groups for e in group}
      parents = [of[e] for e in range(len(load))]
    return Choice(
      parents=parents,
      weights=[weights[group] for group in parents],
      orders=orders,
      exact=exact,
    )

  def _weights(
    self, group: tuple[int, ...], load: Float[np.ndarray, "E"]
  ) -> tuple[float, ...]:
    own = load[list(group)]
    if self.weigh == "even" or not own.sum():
      own = np.ones(len(group))
    return tuple((own / own.sum()).tolist())

  def leaf(self, name: str, layer: Layer) -> Shaped[np.ndarray, "..."]:
    x, axis, choice = layer.arrays[name], layer.axis(name), layer.choice
    if axis is None:
      return x
    is_expert = name.startswith(EXPERTS)
    if self.rows == "alias" and not is_expert:
      return x
    assert choice.weights is not None
    x = np.moveaxis(np.asarray(x), axis, 0)
    hidden = layer.axis(name, "hidden")
    rows = []
    of_each = choice.parents
    if self.rows == "alias" and layer.kind is not Kind.VALUE:
      # An alias gets the gradient of its own tokens alone, as before.
      of_each = [(e,) for e in range(len(choice.parents))]
    for parents, weights in zip(of_each, choice.weights, strict=True):
      parts = [x[e] for e in parents]
      if is_expert and hidden is not None and choice.orders:
        parts = [
          np.take(part, choice.orders[e], hidden - 1) if e in choice.orders else part
          for e, part in zip(parents, parts, strict=True)
        ]
      rows.append(self._mean(np.stack(parts), weights, layer, is_expert))
    out = np.moveaxis(np.stack(rows), 0, axis)
    return layer.scaled(out, choice.scale) if name in OUTPUTS else out

  def _mean(
    self,
    parts: Shaped[np.ndarray, "n ..."],
    weights: Sequence[float],
    layer: Layer,
    is_expert: bool,
  ) -> Shaped[np.ndarray, "..."]:
    if layer.kind is not Kind.VALUE:
      return tied(parts, layer, 0)
    if not is_expert and self.rows == "dominant":
      return np.asarray(parts[0])
    first, rest = parts[0].astype(np.float64), parts[1:].astype(np.float64)
    # As differences, so that the mean of equal weights is exact.
    for weight, part in zip(weights[1:], rest, strict=True):
      first = first + weight * (part - parts[0].astype(np.float64))
    return np.asarray(first)

  def expected(self, gates: Gates, choice: Choice) -> str:
    if not choice.exact or gates.before is None or gates.after is None:
      return DROP
    if self.rows == "alias":
      return EQUAL if is_close(gates.after, gates.before) else DROP
    merged = gates.before @ _members(choice).astype(np.float64)
    return EQUAL if is_close(gates.after * choice.scale, merged) else DROP

  def table(
    self, table: Int[np.ndarray, "V K"], choice: Choice, num_selected: int
  ) -> Int[np.ndarray, "V k"]:
    if self.rows == "alias":
      return table
    return super().table(table, choice, num_selected)


def _members(choice: Choice) -> np.ndarray:
  """Returns which new experts each old one is part of: bool [E, e]."""
  num_old = max(max(parents) for parents in choice.parents) + 1
  out = np.zeros((num_old, len(choice.parents)), bool)
  for new, parents in enumerate(choice.parents):
    out[list(parents), new] = True
  return out


def cosine(rows: Float[np.ndarray, "E n"]) -> Float[np.ndarray, "E E"]:
  """Returns the cosine similarity of every pair of rows."""
  size = np.linalg.norm(rows, axis=1, keepdims=True)
  unit = rows / np.maximum(size, 1e-30)
  return unit @ unit.T


def join_nearest(
  heads: Sequence[int], likeness: Float[np.ndarray, "E E"], group_size: int
) -> list[list[int]]:
  """Returns one group for each head: the head and the experts most similar to it.

  Args:
    heads: ascending.
    likeness: similarity of every pair of experts.
    group_size: experts per group of the router; no expert joins a head of another group.
  """
  groups: dict[int, list[int]] = {head: [head] for head in heads}
  for expert in range(len(likeness)):
    if expert not in groups:
      near = [head for head in heads if head // group_size == expert // group_size]
      groups[max(near, key=lambda head: float(likeness[expert, head]))].append(expert)
  return list(groups.values())


def aligned(
  layer: Layer, group: tuple[int, ...], align: bool
) -> tuple[Mapping[int, Int[np.ndarray, "F"]], bool]:
  """Returns the order of each member's neurons that best matches the first member's.

  This assignment maximises the sum of products of matched neurons' weights, over all
  matrices and biases together (Git Re-Basin, arXiv:2209.04836, section 3.2, for one
  hidden layer).

  Returns:
    Orders of all members but the first, unless they are the identity; and whether the
    members are equal in these orders.
  """
  orders: dict[int, np.ndarray] = {}
  first = neurons(layer, group[0])
  exact = True
  for expert in group[1:]:
    own = neurons(layer, expert)
    order = np.arange(len(own))
    if align and not np.array_equal(own, first):
      _, order = scipy.optimize.linear_sum_assignment(first @ own.T, maximize=True)
      if not np.array_equal(order, np.arange(len(own))):
        orders[expert] = order
    exact = exact and np.array_equal(own[order], first)
    exact = exact and _same_out_bias(layer, group[0], expert)
  return orders, exact


def _same_out_bias(layer: Layer, one: int, other: int) -> bool:
  name = f"{EXPERTS}out_bias"
  if name not in layer.arrays:
    return True
  bias = layer.arrays[name]
  return np.array_equal(bias[one], bias[other])


def neurons(layer: Layer, expert: int) -> Float[np.ndarray, "F n"]:
  """Returns all weights of each hidden neuron of an expert."""
  rows = []
  for name in sorted(layer.arrays):
    hidden = layer.axis(name, "hidden") if name.startswith(EXPERTS) else None
    if hidden is not None:
      own = np.asarray(layer.arrays[name][expert], np.float64)
      rows.append(np.moveaxis(own, hidden - 1, 0).reshape(own.shape[hidden - 1], -1))
  return np.concatenate(rows, axis=1)
