"""A row says what its run's directory says, and nothing else."""

import csv
import json
import pathlib
from typing import Any

import pytest

from moejax.cost import flops, parameters
from moejax.errors import UserError
from moejax.sweep.report import columns, records, summary
from tests.sweep.report import report_cases as cases

DOCS = pathlib.Path(__file__).parents[3] / "docs"


def rows(path: pathlib.Path) -> list[dict[str, str]]:
  with (path / records.CSV_FILE).open(newline="") as file:
    return list(csv.DictReader(file))


def test_a_row_holds_what_was_logged_and_evaluated(tmp_path):
  """Each number by hand, from a log whose entries are known."""
  config = cases.make_config()
  run = records.read([cases.write_run(tmp_path / "a", config)]).runs[0]
  found = run.values
  assert found["state"] == "done" and found["steps"] == 20
  assert found["loss"] == 3.0 and found["bits_per_byte"] == 1.5
  assert found["eval_tokens"] == 400 and found["dead_experts"] == 3
  # Mean of 0.01 to 0.20; the tail is the last 2 of 20 lines.
  assert found["dropped"] == pytest.approx(0.105)
  assert found["dropped_tail"] == pytest.approx(0.195)
  assert (found["tail_begin"], found["tail_end"]) == (0.95, 1.0)
  assert found["train_loss"] == pytest.approx(3.05)
  assert found["max_load"] == 2.0 and found["router_entropy"] == pytest.approx(0.6)
  # 40 tokens at 4000/s are 10 ms (9 lines), at 2000/s 20 ms (10 lines); the first line,
  # 40 s, is left out.
  assert found["step_ms_p50"] == pytest.approx(20.0)
  assert found["step_ms_p90"] == pytest.approx(20.0)
  assert found["tokens_per_second"] == pytest.approx(2000.0)
  assert found["step_time_source"] == "logged"
  assert found["tokens"] == 20 * 4 * 10
  vocab = parameters.resolve_vocab_size(config)
  total, active = parameters.count_parameters(config, vocab)
  assert found["parameters"] == total["total"]
  assert found["active_parameters"] == active["total"]
  per_token = flops.flops_per_token(config, vocab)["total"]
  assert found["training_flops"] == per_token * 800
  assert found["all_to_all_bytes"] == 0 and found["devices"] == 1
  assert run.evaluations == {"validation@dropless": (3.0, 0.25)}
  # What nobody measured is absent.
  assert not {"wall_seconds", "compile_seconds", "peak_memory_bytes"} & found.keys()


def test_tokens_of_an_encoder_decoder_are_its_decoders(tmp_path):
  """20 steps of 4 rows of 7 targets are 560 tokens; the encoder's 40 are no targets.

  A rate of 2000 targets/s is 14 ms for the 28 of a step.
  """
  config = cases.make_config(
    model__kind="encoder_decoder",
    model__encoder_layers=2,
    data__objective="span_corruption",
    data__sequence_length=40,
    data__decoder_length=7,
  )
  found = records.read([cases.write_run(tmp_path / "a", config)]).runs[0].values
  assert found["tokens"] == 560
  assert found["training_flops"] == 560 * found["flops_per_token"]
  assert found["step_ms_p50"] == pytest.approx(14.0)


def test_an_unfinished_run_is_a_row_without_a_result(tmp_path):
  """Also if it has an evaluation of an earlier end: it was given more steps since."""
  path = cases.write_run(tmp_path / "a", logged=5, done=False)
  (path / "eval.json").write_text(json.dumps(cases.evaluation(5, {"dropless": 4.0})))
  values = records.read([path]).runs[0].values
  assert values["state"] == "unfinished" and values["steps"] == 5
  assert values["tail_end"] == 0.25 and "loss" not in values
  states = {"a": "failed"}
  assert records.read([path], states=states).runs[0].values["state"] == "failed"


def test_a_finished_run_is_done_whatever_the_scheduler_says(tmp_path):
  """The directory is the truth; a scheduler may have died before it noticed."""
  path = cases.write_run(tmp_path / "a")
  assert records.read([path], states={"a": "running"}).runs[0].done


def test_timed_steps_replace_logged_ones(tmp_path):
  """With compile time and memory, for the runs that the entry names and no others."""
  paths = [cases.write_run(tmp_path / name) for name in "ab"]
  entry = {"runs": ["a"], "step_ms": [4.0, 5.0, 9.0], "compile_seconds": 7.0}
  a, b = records.read(paths, timing={"d1": entry}).runs
  assert a.values["step_ms_p50"] == 5.0 and a.values["compile_seconds"] == 7.0
  assert a.values["tokens_per_second"] == pytest.approx(40 / 0.005)
  assert a.values["step_time_source"] == "timed"
  assert b.values["step_time_source"] == "logged"


def test_wall_clock_is_that_of_all_attempts(tmp_path):
  """An attempt without an end, killed with its scheduler, leaves it unknown."""
  path = cases.write_run(tmp_path / "a")
  attempts = [{"start": 10.0, "end": 25.0}, {"start": 100.0, "end": 101.0}]
  (path / ".sweep.json").write_text(json.dumps({"attempts": attempts}))
  assert records.read([path]).runs[0].values["wall_seconds"] == 16.0
  back = [*attempts, {"start": 3700.0, "end": 100.0}]  # The clock was set back.
  (path / ".sweep.json").write_text(json.dumps({"attempts": back}))
  assert "wall_seconds" not in records.read([path]).runs[0].values
  (path / ".sweep.json").write_text(json.dumps({"attempts": [{"start": 1.0}]}))
  assert "wall_seconds" not in records.read([path]).runs[0].values


def test_evaluations_of_the_last_step_and_the_same_text_count(tmp_path):
  """Each under its split and factor; another step, text or part of the text does not."""
  path = cases.write_run(tmp_path / "a")
  found = cases.evaluation(20, {1.25: 3.5, "dropless": 3.0})
  (path / "eval_20_validation_capacity.json").write_text(json.dumps(found))
  test = cases.evaluation(20, {1.0: 3.7}, split="test")
  (path / "eval_20_test.json").write_text(json.dumps(test))
  old = cases.evaluation(10, {2.0: 9.0})
  (path / "eval_10_validation.json").write_text(json.dumps(old))
  other = cases.evaluation(20, {4.0: 9.0}) | {"changed": {"data.name": "text"}}
  (path / "eval_20_validation_x.json").write_text(json.dumps(other))
  part = cases.evaluation(20, {8.0: 9.0}) | {"tokens": 10}
  (path / "eval_20_validation_first_10.json").write_text(json.dumps(part))
  read = records.read([path])
  assert {k: loss for k, (loss, _) in read.runs[0].evaluations.items()} == {
    "test@1": 3.7,
    "validation@1.25": 3.5,
    "validation@dropless": 3.0,
  }
  names = [column.name for column in read.columns if column.name.startswith("loss_")]
  assert names == ["loss_test@1", "loss_validation@1.25", "loss_validation@dropless"]


def test_settings_are_the_fields_that_differ(tmp_path):
  """Not the seed, nor what is logged; a router's option only for runs of that router."""
  configs = [
    cases.make_config(moe__capacity_factor=None, train__seed=1),
    cases.make_config(train__log_every=3, moe__router="noisy_top_k"),
    cases.make_config(moe__router="noisy_top_k", moe__noisy_top_k__noise_std=0.5),
  ]
  runs = [cases.write_run(tmp_path / str(i), c) for i, c in enumerate(configs)]
  found = records.read(runs)
  assert found.fields == (
    "moe.router",
    "moe.capacity_factor",
    "moe.noisy_top_k.noise_std",
  )
  records.write(tmp_path, found)
  cells = [[row[field] for field in found.fields] for row in rows(tmp_path)]
  # `none` is a value, and an empty cell an option that the run does not have.
  assert cells[0] == ["switch", "none", ""]
  assert cells[2] == ["noisy_top_k", "1.25", "0.5"]


def test_equal_runs_are_told_apart(tmp_path):
  """The same config and seed twice, such as before and after a change of the code."""
  runs = [cases.write_run(tmp_path / name) for name in "ab"]
  found = records.read(runs)
  assert found.fields == (records.COPY,)
  assert [run.settings[records.COPY] for run in found.runs] == [1, 2]


def test_csv_and_json_hold_the_same_rows(tmp_path):
  """Every column of one is in the other, units and meanings in the second."""
  runs = [cases.write_run(tmp_path / n, loss=x) for n, x in (("a", 3.25), ("b", 4.5))]
  found = records.read(runs)
  records.write(tmp_path, found)
  sheet, content = rows(tmp_path), json.loads((tmp_path / "results.json").read_text())
  assert [float(row["loss"]) for row in sheet] == [3.25, 4.5]
  for row, other in zip(sheet, content["rows"], strict=True):
    assert row.keys() == other.keys()
    assert row["dropped"] == str(other["dropped"])
  described = {column["name"] for column in content["columns"]}
  assert described == set(sheet[0]) - set(content["fields"])


@pytest.mark.parametrize(
  ("name", "content", "says"),
  [
    ("eval.json", "{", "eval.json cannot be read"),
    ("eval.json", "[]", "does not contain a JSON object"),
    ("eval.json", '{"step": 20, "loss": "low"}', "loss is 'low'"),
    ("eval_20_test.json", "nonsense", "eval_20_test.json cannot be read"),
    ("config.json", "{", "config.json cannot be read"),
    ("run.json", "{", "run.json cannot be read"),
    ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl:2"),
  ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, content, says):
  """And no result is made of the rest, which would look complete."""
  path = cases.write_run(tmp_path / "a")
  (path / name).write_text(content)
  with pytest.raises(UserError) as caught:
    records.read([path])
  assert says in str(caught.value) and "\n" not in str(caught.value)
  assert str(path) in str(caught.value)


def test_a_torn_last_line_is_no_damage(tmp_path):
  """A crash leaves one, and a run that goes on drops it."""
  path = cases.write_run(tmp_path / "a", logged=5, done=False)
  with (path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "lo')
  assert records.read([path]).runs[0].values["steps"] == 5


def test_the_docs_list_every_column():
  """The table in the docs is the one that the files are written from."""
  pages = [page.read_text("utf-8") for page in DOCS.glob("sweeps*.md")]
  assert any(columns.markdown() in page for page in pages)


def test_a_variants_name_stands_for_the_fields_that_it_decides():
  """Two variants of three fields, over an axis: two fields remain, and four settings."""
  dense: dict[str, Any] = {"moe__dense_twin": True}
  top: dict[str, Any] = {"moe__router": "top_k", "moe__num_selected": 2}
  runs = [
    cases.record(seed=seed, moe__num_experts=e, **fields)
    for fields in (dense, top)
    for e in (4, 8)
    for seed in (0, 1)
  ]
  names = {run.path.name: "dense" if run.config.moe.dense_twin else "two" for run in runs}
  found = records.with_settings(runs, names)
  assert found.fields == ("variant", "moe.num_experts")
  labels = [setting.label for setting in summary.settings(found)]
  assert labels[0] == "variant=dense, num_experts=4" and len(labels) == 4
