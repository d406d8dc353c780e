"""The real lm-evaluation-harness on a tiny model and local tasks; `make test-lm-eval`."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from moejax.cli import harness as cli
from moejax.errors import UserError
from moejax.evaluate import harness
from tests.evaluate.test_harness import ask, run
from tests.experiments.test_command_lines import TINY

pytestmark = [
  pytest.mark.lm_eval,
  # Of the harness and its libraries, not ours.
  pytest.mark.filterwarnings("ignore"),
]
TASKS = pathlib.Path(__file__).parent / "tasks"
ROOT = pathlib.Path(__file__).parents[2]


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


def test_two_processes_have_the_results_of_one(tmp_path):
  """Each real process answers every second document; process 0 writes the same file."""
  pytest.importorskip("torch", reason="lm_eval needs it for several processes")
  run, flags = tmp_path / "run", [f"--config.{setting}" for setting in TINY]
  cache = f"--config.data.cache_dir={tmp_path / 'cache'}"

  def call(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

  call("experiments.train", f"--workdir={run}", cache, *flags)
  names = ("choice", "perplexity", "generation")
  asked = [f"--workdir={run}", "--batch_size=2", "--truncate"]
  asked += ["--tasks=" + ",".join(f"tests/evaluate/tasks/{name}.yaml" for name in names)]
  found, files = [], set()
  for launcher in (
    [],
    ["tools.launch_local", "--processes=2", "--", sys.executable, "-m"],
  ):
    module, *rest = [*launcher, "experiments.evaluate"]
    output = tmp_path / str(len(found))
    output.mkdir()
    call(module, *rest, *asked, f"--output={output}")
    [file] = output.glob("tasks_4_choice_perplexity_generation_truncate_*.json")
    files.add(file.name)
    found.append(json.loads(file.read_text()))
  one, two = found
  assert len(files) == 1
  assert one["n-samples"] == two["n-samples"]
  assert one["results"].keys() == two["results"].keys() and len(one["results"]) == 3
  for name, values in one["results"].items():
    for metric, value in values.items():
      if isinstance(value, float):
        assert two["results"][name][metric] == pytest.approx(value, rel=1e-6), metric
