"""Our answers against those of the harness's own `hf` model, on an imported model.

`make test-hf` runs these. They need torch, transformers and lm_eval (extra hf-test), in
this Python or in another one, MOEJAX_TRANSFORMERS_PYTHON.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from moejax.evaluate import harness
from moejax.evaluate.load import load_run
from moejax.interop import importing
from moejax.interop.published import open_folder
from tests.evaluate.test_harness import ask
from tests.interop import folders

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = os.environ.get("MOEJAX_TRANSFORMERS_PYTHON", sys.executable)

pytestmark = [pytest.mark.hf, pytest.mark.slow]

GREEDY = {"max_gen_toks": 8, "do_sample": False, "until": ["q"]}
REQUESTS = {
  "loglikelihood": [
    ("ab", " cd"),
    ("a question? ", "yes"),
    ("", "x y"),
    ("def f(self):\n ", " return 1"),
  ],
  "loglikelihood_rolling": [
    ("abc",),
    ("A text that is longer than the context of 64 ids, and so in two windows of it.",),
  ],
  "generate_until": [("a question", GREEDY), ("x", GREEDY), ("def main", GREEDY)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """OLMoE with a tokenizer of single printable characters."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

  folder = folders.copy("olmoe", tmp_path_factory.mktemp("olmoe") / "model")
  special = ["<pad>", "<s>", "</s>"]
  letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
  made = Tokenizer(
    models.BPE(vocab={t: i for i, t in enumerate(special + letters)}, merges=[])
  )
  made.add_special_tokens(special)
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  made.save(str(folder / "tokenizer.json"))
  names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
  settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


@pytest.fixture(scope="module")
def theirs(folder):
  check = "import lm_eval.models.huggingface"
  if subprocess.run([PYTHON, "-P", "-c", check], capture_output=True).returncode:
    pytest.fail(f"{PYTHON} lacks torch or lm_eval (extra hf-test)")
  offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
  done = subprocess.run(
    [PYTHON, "-m", "tests.evaluate.lm_eval_script", str(folder)],
    input=json.dumps(REQUESTS),
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, **offline},
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ours(folder, tmp_path_factory):
  run = tmp_path_factory.mktemp("run") / "run"
  published = open_folder(folder)
  importing.make_run(published, run, published.config)
  adapter = harness.Adapter(load_run(run), batch_size=2)
  return {
    kind: getattr(adapter, kind)([ask(*arguments) for arguments in asked])
    for kind, asked in REQUESTS.items()
  }


def test_log_likelihoods_are_those_of_transformers(ours, theirs):
  """With a space between context and continuation on either side, and no context."""
  kind = "loglikelihood"
  for (total, greedy), (wanted, is_best) in zip(ours[kind], theirs[kind], strict=True):
    assert total == pytest.approx(wanted, abs=1e-4) and greedy == is_best


def test_rolling_log_likelihoods_are_those_of_transformers(ours, theirs):
  """Of a short text, and of one cut into windows."""
  kind = "loglikelihood_rolling"
  np.testing.assert_allclose(ours[kind], theirs[kind], atol=1e-3, rtol=0)


def test_generations_are_those_of_transformers(ours, theirs):
  """Greedy, up to the stop text or eight tokens."""
  assert ours["generate_until"] == theirs["generate_until"]
  assert any(ours["generate_until"])
