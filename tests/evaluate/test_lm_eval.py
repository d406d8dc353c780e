"""The real lm-evaluation-harness on a tiny model and local tasks; `make test-lm-eval`."""

import os
import pathlib

import pytest

from moejax.cli import harness as cli
from moejax.errors import UserError
from moejax.evaluate import harness
from tests.evaluate.test_harness import ask, run

pytestmark = [
  pytest.mark.lm_eval,
  # Of the harness and its libraries, not ours.
  pytest.mark.filterwarnings("ignore"),
]
TASKS = pathlib.Path(__file__).parent / "tasks"


@pytest.fixture(scope="module")
def results():
  pytest.importorskip("lm_eval")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
  from lm_eval import evaluator  # pyright: ignore[reportMissingImports]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(harness, "load_run", lambda workdir, step: run())
    patch.chdir(pathlib.Path(__file__).parents[2])
    model = harness.language_model()("nowhere", batch_size=4)
    names = ("choice", "perplexity", "generation")
    found = cli._load(",".join(str(TASKS / f"{name}.yaml") for name in names))
    return evaluator.evaluate(model, found, log_samples=True)


def test_the_perplexity_is_that_of_the_sums(results):
  """Bits per byte: minus the sum of the texts' log-probabilities, over their bytes."""
  samples = results["samples"]["moejax_perplexity"]
  texts = [sample["doc"]["text"] for sample in samples]
  adapter = harness.Adapter(run(), batch_size=4)
  total = sum(adapter.loglikelihood_rolling([ask(text) for text in texts]))
  wanted = -total / sum(len(text.encode()) for text in texts) / 0.6931471805599453
  got = results["results"]["moejax_perplexity"]["bits_per_byte,none"]
  assert got == pytest.approx(wanted, rel=1e-6)


def test_the_choice_is_the_likeliest_answer(results):
  """Accuracy: how often the answer has the largest sum, by the adapter's own sums."""
  adapter, right = harness.Adapter(run(), batch_size=4), []
  for sample in results["samples"]["moejax_choice"]:
    doc = sample["doc"]
    pairs = [ask(doc["question"], choice) for choice in doc["choices"]]
    sums = [total for total, _ in adapter.loglikelihood(pairs)]
    right.append(max(range(len(sums)), key=lambda i, s=sums: s[i]) == doc["answer"])
  wanted = sum(right) / len(right)
  assert results["results"]["moejax_choice"]["acc,none"] == pytest.approx(wanted)


def test_generations_are_the_adapters(results):
  adapter = harness.Adapter(run(), batch_size=4)
  for sample in results["samples"]["moejax_generation"]:
    asked = ask(*sample["arguments"][0])
    answer = adapter.generate_until([asked])[0]
    assert sample["resps"][0][0] == answer


@pytest.mark.parametrize(
  ("tasks", "part"),
  [
    ("nowhere.yaml", "no such file"),
    ("no_such_task", "no such task"),
    ("hellaswag", "HF_HUB_OFFLINE"),
  ],
)
def test_a_task_that_is_not_here_is_refused(results, tasks, part):
  """A file, a name, and a task whose data are on the network."""
  del results  # Sets the offline switches.
  with pytest.raises(UserError, match=part):
    cli._load(tasks)
