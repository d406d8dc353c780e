"""What the loss is expected to do, from the experts that tokens choose."""

import copy

import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.surgery.gates import Gates
from moejax.surgery.operation import CLOSE, DROP, EQUAL, Choice
from moejax.surgery.prune import Prune
from moejax.surgery.reroute import Reroute
from moejax.surgery.select import Select
from tests.surgery.common import config, draw, operate

BEFORE = np.array([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0]])
ALL = Choice(parents=[(e,) for e in range(4)])


def gates(after, before=BEFORE):
  return Gates(moe=MoEConfig(), before=before, after=np.array(after))


@pytest.mark.parametrize("operation", [Select(), Reroute()])
def test_it_is_close_only_if_every_token_chooses_the_same_experts(operation):
  """Gates that still sum to 1 say nothing of which experts are left."""
  cases = [
    (BEFORE, EQUAL),
    ([[0.6, 0.4, 0, 0], [0, 0.3, 0.7, 0]], CLOSE),
    ([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], DROP),
    ([[0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]], DROP),
    ([[0.4, 0.3, 0.3, 0], [0, 0.5, 0.5, 0]], DROP),
  ]
  for after, wanted in cases:
    assert operation.expected(gates(after), ALL) == wanted


def test_other_choices_after_a_prune_are_no_close_ones():
  """Nobody used the pruned expert, but a token chooses another one than before."""
  choice = Choice(parents=[(0,), (1,), (2,)], exact=True)
  same, other = [[0.6, 0.4, 0], [0, 0.4, 0.6]], [[0.5, 0, 0.5], [0, 0.5, 0.5]]
  assert Prune().expected(gates(same), choice) == CLOSE
  assert Prune().expected(gates(other), choice) == DROP


def test_half_of_the_choices_of_a_table_are_missed():
  """A hash table with K = 2 cut to K = 1: each gate sums to 1, and half is gone."""
  old = config(router="hash")
  assert operate(Select(num_selected=1), old, draw(old)).expected == DROP


def test_a_table_in_place_of_a_learned_router_drops():
  """Choices by token id are not those by logits."""
  old = config(renormalize="before_drop")
  asked = copy.deepcopy(old)
  asked.moe.router, asked.moe.renormalize = "hash", "none"
  assert operate(Reroute(), old, draw(old), asked=asked).expected == DROP
