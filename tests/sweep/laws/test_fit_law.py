"""`moejax fit-law`: from a results.csv to constants, and one line for what is wrong."""

import csv
import json

import numpy as np
import pytest

from moejax.cli import fit_law
from moejax.errors import UserError
from moejax.sweep.laws import published as laws

HEADER = ("name", "N_active", "N_total", "tokens", "C", "num_experts", "loss")


@pytest.fixture
def results(tmp_path):
  """Exact losses of Ludziejewski's law at 4 x 3 x 4 settings, and a failed run."""
  path = tmp_path / "results.csv"
  law = laws.Ludziejewski()
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(HEADER)
    for e in (1.0, 2.0, 8.0, 32.0):
      for n in (1e7, 1e8, 1e9):
        for d in (1e9, 4e9, 1.6e10, 6.4e10):
          loss = float(law.formula(N=n, D=d, E=e))
          writer.writerow(["run", n, n * e, d, 6 * n * d, e, loss])
    writer.writerow(["failed", 1e7, 1e7, 1e9, 6e16, 1, ""])
  return path


ARGUMENTS = ["--law=ludziejewski", "--fix=e_start=2.0732,e_max=290.4521", "--draws=0"]


def test_a_results_file_gives_back_the_constants_and_counts_what_it_left_out(
  results, capsys
):
  fit_law.main([str(results), *ARGUMENTS, "--json"])
  found = json.loads(capsys.readouterr().out)
  for name, value in laws.Ludziejewski().constants.items():
    assert found["constants"][name] == pytest.approx(value, rel=1e-2), name
  assert found["fixed"] == ["e_start", "e_max"]
  assert found["points"] == 48
  assert found["rows_left_out"] == 1
  assert [h["points"] for h in found["held_out"]] == [48, 4]


def test_the_table_names_each_letter_and_its_column(results, capsys):
  fit_law.main([str(results), *ARGUMENTS, "--columns=N=N_total"])
  shown = " ".join(capsys.readouterr().out.split())
  assert "N is N_total, 1e+07 to 3.2e+10; the law's is active parameters" in shown
  assert "Rows left out for lack of a number: 1." in shown


def test_a_power_law_is_tagged_with_its_evaluation(tmp_path, capsys):
  path = tmp_path / "results.csv"
  compute = np.logspace(13, 17, 8)
  losses = laws.PowerLaw(l_inf=1.2, a=60.0, alpha=0.12).formula(C=compute)
  lines = ["C,loss", *(f"{c},{y}" for c, y in zip(compute, losses))]
  path.write_text("\n".join(lines))
  fit_law.main([str(path), "--draws=20", "--json"])
  found = json.loads(capsys.readouterr().out)
  assert found["constants"]["l_inf"] == pytest.approx(1.2, rel=1e-3)
  low, high = found["intervals"]["alpha"]
  assert low <= 0.12 * (1 + 1e-6) and high >= 0.12 * (1 - 1e-6)


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--law=krajewski"], "has no column granularity"),
    (["--loss=los"], "Did you mean loss?"),
    (["--loss=name"], "no row with numbers"),
    (["--fix=l_inf"], "--fix=l_inf: write name=value"),
    (["--fix=l_inf=low"], "--fix=l_inf=...: it needs a number"),
    (["--fix=alfa=0.1"], "Did you mean alpha?"),
    (["--columns=N=N_total"], "power has no such letter"),
    (["--level=2"], "level=2"),
    (["--draws=-1"], "--draws"),
  ],
)
def test_a_mistake_is_one_line(results, arguments, words):
  with pytest.raises(UserError) as raised:
    fit_law.main([str(results), *arguments])
  assert words in str(raised.value)
  assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match="nothing.csv cannot be read"):
    fit_law.main([str(tmp_path / "nothing.csv")])
