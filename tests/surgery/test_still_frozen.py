"""What stays frozen after an operation."""

import dataclasses

import pytest

from moejax.surgery.btx import Btx
from moejax.surgery.clone import Clone
from moejax.surgery.source import open_run
from moejax.surgery.still_frozen import still_frozen
from moejax.surgery.upcycle import Upcycle
from tests.surgery.common import config, make_change
from tests.surgery.conftest import make_run, run_config
from tests.surgery.test_program import operate


def kept(text, operation=None, **fields):
  old = config(model__num_layers=4, every=2, offset=1, train__frozen=text, **fields)
  return still_frozen(make_change(operation or Clone(), old))


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ("", ""),
    ("embedding.*", "embedding.*"),
    ("embedding.*,*.moe.experts.*[0:2]", "embedding.*"),
    ("*.router.weight,*.attention.*", "*.attention.*"),
    # Block 0 holds the dense layers, block 1 the MoE layers.
    ("unit.0.feed_forward.*", "unit.0.feed_forward.*"),
    ("unit.1.*", ""),
    ("*.attention.*,!unit.1.*", "*.attention.*,!unit.1.*"),
    ("*.attention.*,!*.moe.experts.*[2]", "*.attention.*"),
    # Without what comes before it, it would freeze all else.
    ("*,!embedding.*", ""),
    ("!*.moe.experts.*", ""),
  ],
)
def test_selectors_stay_that_name_nothing_the_operation_makes(before, after):
  """And nothing is frozen afterwards that was not."""
  assert kept(before) == after


def test_names_of_layers_go_where_layers_are_stacked_otherwise():
  """A name may then be that of another layer."""
  dense = {"dense_twin": True, "num_selected": 1}
  old = config(model__num_layers=4, train__frozen="embedding.*,*.attention.*", **dense)
  asked = config(model__num_layers=4, every=2, offset=1)
  assert still_frozen(make_change(Upcycle(), old, asked)) == "embedding.*"


def test_the_new_run_says_what_is_still_frozen(tmp_path):
  """It is printed and written; the flag, if it is given, decides alone."""
  old = run_config()
  old.train.frozen = "embedding.*,*.moe.experts.*[0:2]"
  run, said = make_run(tmp_path / "run", old), []
  operate(Clone(), run, tmp_path / "new", said)
  assert open_run(tmp_path / "new").config.train.frozen == "embedding.*"
  assert any("--config.train.frozen: " in line for line in said)
  operate(Clone(), run, tmp_path / "none", given=("train.frozen",))
  assert open_run(tmp_path / "none").config.train.frozen == ""


def test_averages_of_several_runs_are_not_frozen():
  """After btx no parameter is what it was in the run that froze it."""
  change = make_change(Clone(), config(train__frozen="embedding.*"))
  assert still_frozen(change) == "embedding.*"
  assert still_frozen(dataclasses.replace(change, operation=Btx())) == ""
