"""What is refused says what would do instead, and that is then accepted."""

import copy

import pytest

from moejax.config.check import validate
from moejax.errors import UserError
from moejax.options import options_of
from moejax.surgery import program, registry
from moejax.surgery.reroute import Reroute
from moejax.surgery.scores import refuse_below
from moejax.surgery.share import Share
from tests.surgery.common import config


def test_a_router_of_learned_slots_gets_the_group_that_it_needs():
  """Reroute to soft takes the flags that its config check asks for; experts keep F."""
  old = config(data__sequence_length=16)
  asked = copy.deepcopy(old)
  asked.moe.router, asked.moe.group_size = "soft", 8
  asked.moe.capacity_factor = asked.moe.eval_capacity_factor = 1.0
  new = Reroute().new_config(old, asked)
  validate(new)
  fields = ("router", "group_size", "capacity_factor", "eval_capacity_factor")
  given = tuple(f"moe.{name}" for name in fields)
  program.refuse_shapes(Reroute(), old, new, given)
  new.moe.hidden = 6
  with pytest.raises(UserError, match="moe.hidden=6 changes the shapes"):
    program.refuse_shapes(Reroute(), old, new, (*given, "moe.hidden"))


def test_sharing_all_but_one_choice_names_both_remedies():
  """Renormalised gates of one choice are 1; with either remedy the config is made."""
  old = config(renormalize="before_drop")
  with pytest.raises(
    UserError, match=r"--selected=same, or --config.moe.renormalize=none"
  ):
    Share().new_config(old, old)
  for operation, asked in ((Share(selected="same"), old), (Share(), config())):
    validate(operation.new_config(old, asked))


@pytest.mark.parametrize(
  ("name", "option"),
  [
    ("select", "num_selected"),
    ("prune", "experts"),
    ("merge", "experts"),
    ("add", "number"),
  ],
)
def test_a_number_that_is_given_is_not_missing(name, option):
  """Zero on the command line is out of range; without the flag it is missing."""
  cls = registry.operation(name)
  with pytest.raises(UserError, match=f"--{option}=0 must be at least 1"):
    options_of(cls)[option].check(f"--{option}", 0)
  with pytest.raises(UserError, match=f"--{option}=[A-Z] is missing"):
    cls().check(config())


@pytest.mark.parametrize(("k", "words"), [(1, "1 expert,"), (2, "2 experts,")])
def test_one_expert_is_in_the_singular(k, words):
  with pytest.raises(UserError, match=f"a token chooses {words}"):
    refuse_below(k, 0, "--number=4")
