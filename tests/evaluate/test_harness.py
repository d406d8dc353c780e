"""The harness's three kinds of requests, against sums made by hand."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest

from moejax.cli import harness as cli
from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import UserError
from moejax.evaluate import harness
from moejax.evaluate.load import LoadedRun
from moejax.models.make import make_model
from tests.evaluate import tiny
from tests.models.test_encoder_decoder import small

TOKENIZER = ByteTokenizer()


def run(**changes) -> LoadedRun:
  model, params = tiny.model_and_params()
  made = LoadedRun(
    config=tiny.config(), model=model, params=params, tokenizer=TOKENIZER, step=0
  )
  return dataclasses.replace(made, **changes)


def ask(*args):
  return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def adapter() -> harness.Adapter:
  return harness.Adapter(run(), batch_size=4)


@pytest.fixture(scope="module")
def log_probs():
  """Ids -> log-probabilities of the next id at every place, unpadded and alone."""
  model, params = tiny.model_and_params()
  logits = jax.jit(lambda ids: model(params, ids, capacity_factor=None).logits)

  def of(ids):
    out = np.asarray(logits(np.asarray([ids], np.int32)))[0].astype(np.float64)
    return out - np.log(np.exp(out).sum(-1, keepdims=True))

  return of


def by_hand(log_probs, context: bytes, continuation: bytes) -> tuple[float, bool]:
  ids = [TOKENIZER.separator, *context, *continuation]
  out = log_probs(ids[:-1])
  places = range(len(ids) - 1 - len(continuation), len(ids) - 1)
  total = sum(out[place, ids[place + 1]] for place in places)
  return total, all(out[place].argmax() == ids[place + 1] for place in places)


PAIRS = [("ab", "cd"), ("", "x"), ("a longer text,", " it"), ("ab", "ce"), ("q ", "r")]


def test_loglikelihood_is_the_sum_by_hand(adapter, log_probs):
  """Several lengths in one batch, an empty context, and a space that changes sides."""
  found = adapter.loglikelihood([ask(*pair) for pair in PAIRS])
  for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
    whole, stripped = context + continuation, context.rstrip()
    rest = whole[len(stripped) :].encode()
    wanted, is_best = by_hand(log_probs, stripped.encode(), rest)
    assert total == pytest.approx(wanted, abs=1e-4)
    assert greedy == is_best


def test_the_greedy_continuation_is_known_as_such(adapter, log_probs):
  """The most probable byte after a context is greedy, the second is not."""
  order = np.argsort(-log_probs([TOKENIZER.separator, *b"ab"])[-1, :128])
  texts = [chr(index) for index in order if chr(index).strip()][:2]
  found = adapter.loglikelihood([ask("ab", text) for text in texts])
  best = log_probs([TOKENIZER.separator, *b"ab"])[-1].argmax()
  assert found[0][1] == (best == ord(texts[0])) and not found[1][1]
  assert found[0][0] > found[1][0]


def test_a_score_is_the_same_alone_and_in_a_batch(adapter):
  """Bit for bit, since rows are padded to the same compiled shape."""
  together = adapter.loglikelihood([ask(*pair) for pair in PAIRS])
  alone = [adapter.loglikelihood([ask(*pair)])[0] for pair in PAIRS]
  assert together == alone


def test_another_batch_size_changes_only_rounding(adapter):
  one = harness.Adapter(run(), batch_size=1)
  requests = [ask(*pair) for pair in PAIRS[:2]]
  for (ours, _), (theirs, _) in zip(
    one.loglikelihood(requests), adapter.loglikelihood(requests), strict=True
  ):
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_windows_are_those_of_the_harness():
  """The example of its documentation: context 4, tokens 0 to 9, start 99."""
  found = harness.windows(list(range(10)), 99, 4)
  assert found == [
    ([99, 0, 1, 2, 3], 4),
    ([3, 4, 5, 6, 7], 4),
    ([5, 6, 7, 8, 9], 2),
  ]


def test_rolling_is_the_sum_over_windows(adapter, log_probs):
  """A text longer than the context, and a short one beside it."""
  long = bytes(range(97, 123)) * 2
  ids, wanted = [TOKENIZER.separator, *long], 0.0
  for start, first, end in [(0, 0, 32), (20, 32, 52)]:
    out = log_probs(ids[start:end])
    wanted += sum(out[place - start, ids[place + 1]] for place in range(first, end))
  short, _ = by_hand(log_probs, b"", b"abc")
  found = adapter.loglikelihood_rolling([ask(long.decode()), ask("abc"), ask("")])
  assert found == pytest.approx([wanted, short, 0.0], abs=1e-4)


def test_generation_stops_at_a_text(adapter):
  """With one of the letters that follow as stop text, what is before it."""
  free = adapter.generate_until([ask("ab", {"max_gen_toks": 12, "do_sample": False})])[0]
  middle = free[len(free) // 2]
  settings = {"max_gen_toks": 12, "until": [middle], "do_sample": False}
  stopped = adapter.generate_until([ask("ab", settings), ask("abcd", settings)])
  assert stopped[0] == free.split(middle)[0]
  assert middle not in stopped[1]


def test_what_cannot_be_asked_is_refused(adapter):
  """Each error names what to do: too long, an unknown setting, no tokenizer."""
  with pytest.raises(UserError, match=r"--truncate"):
    adapter.loglikelihood([ask("a" * 40, "b")])
  with pytest.raises(UserError, match="best_of"):
    adapter.generate_until([ask("a", {"best_of": 3})])
  with pytest.raises(UserError, match=r"tokenizer\.json"):
    harness.Adapter(run(tokenizer=None))
  config = small()
  model = make_model(config.model, config.moe, vocab_size=264)
  with pytest.raises(UserError, match="an encoder-decoder restores spans"):
    harness.Adapter(run(model=model))


def test_truncation_keeps_the_end(log_probs):
  """The last 32 ids are read, and the score is of the continuation alone."""
  short = harness.Adapter(run(), batch_size=4, truncate=True)
  context = bytes(range(65, 105))
  found = short.loglikelihood([ask(context.decode(), "b")])[0][0]
  out = log_probs([*context[-32:]])
  assert found == pytest.approx(out[-1, ord("b")], abs=1e-4)


def test_several_processes_without_torch_are_refused(monkeypatch):
  """The harness would fail only after the model is loaded; one process needs no torch."""
  monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
  harness.check_torch(1)
  with pytest.raises(UserError, match="--tasks in 2 processes.*pip install torch"):
    harness.check_torch(2)


def test_results_of_other_tasks_have_another_file():
  """A name of the harness or a file, several, some documents only, and a long list."""
  names = ("arc_easy", "a/b/choice.yaml", "arc_easy,choice.yaml")
  found = [cli._file_name(4, name, None) for name in names]
  assert found == ["tasks_4_arc_easy", "tasks_4_choice", "tasks_4_arc_easy_choice"]
  assert cli._file_name(4, "arc_easy", 5) == "tasks_4_arc_easy_first_5"
  assert len(cli._file_name(4, ",".join(["mmlu"] * 60), None)) < 30
  assert cli._file_name(4, "arc_easy", 5, True, "1f") == (
    "tasks_4_arc_easy_first_5_truncate_1f"
  )


def _results(text="doc", metric="acc", function=None):
  sample = {"doc_id": 0, "doc_hash": text, "prompt_hash": "b", "target_hash": "c"}
  config = {"metric_list": [metric], "process_docs": function}
  return {"samples": {"x": [sample, {**sample, "doc_id": 1}]}, "configs": {"x": config}}


def test_equal_names_of_task_files_mean_equal_tasks(tmp_path):
  """A digest of what a file describes and of its texts, whatever process makes it."""
  file = tmp_path / "x.yaml"
  file.write_text("")
  assert cli._digest("arc_easy", {}) == ""
  plain = cli._digest(str(file), _results())
  assert len(plain) == 8
  others = [_results("other"), _results(metric="f1")]
  assert len({plain, *(cli._digest(str(file), found) for found in others)}) == 3
  turned = _results()
  turned["samples"]["x"].reverse()
  assert cli._digest(f" arc_easy, {file} ", turned) == plain
  one, two = (cli._digest(str(file), _results(function=object())) for _ in range(2))
  assert one == two


def test_a_task_file_that_is_not_there_is_said_without_the_harness(tmp_path, monkeypatch):
  """The mistake that can be mended at once comes before the missing library."""
  for name in ("lm_eval", "lm_eval.api.model"):
    monkeypatch.setitem(sys.modules, name, None)
  # Unlike the cached one.
  monkeypatch.setattr(harness, "language_model", harness.language_model.__wrapped__)
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  asked = {"step": None, "batch_size": 1, "truncate": False, "limit": None}
  for name, words in (("nosuch.yaml", "no such file"), ("arc_easy", "lm-eval")):
    with pytest.raises(UserError, match=words):
      cli.evaluate(tmp_path, tmp_path, name, **asked)
