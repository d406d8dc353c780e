"""--init_from: refused by its own name, in plain words, before anything is written."""

import json
import pathlib

import jax
import pytest

from moejax.checkpoint import fingerprint, init_from
from moejax.checkpoint import read as checkpoint_read
from moejax.config import Config
from moejax.config import text as config_text
from moejax.data.tokenizer import ByteTokenizer
from moejax.errors import UserError
from moejax.models.decoder import Decoder
from moejax.train import loop
from tests.train.conftest import VOCAB, tiny_config


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  """What a run of `tiny_config` leaves that is looked at here: no arrays."""
  root, config = tmp_path / "source", tiny_config()
  model = Decoder(config.model, config.moe, vocab_size=VOCAB)
  leaves = fingerprint.named_leaves({"params": model.shapes()})
  meta = {
    "step": 7,
    "format": checkpoint_read.FORMAT,
    "config": config_text.to_dict(config),
    "leaves": {
      name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sum": "0"}
      for name, leaf in leaves.items()
    },
  }
  (root / "checkpoints" / "7" / "meta").mkdir(parents=True)
  file = root / "checkpoints" / "7" / "meta" / "metadata"
  file.write_text(checkpoint_read.pack_meta(meta))
  (root / "config.json").write_text(json.dumps(config_text.to_dict(config)))
  ByteTokenizer().save(root)
  return root


def changed(**fields) -> Config:
  config = tiny_config()
  for name, value in fields.items():
    config_text.set_field(config, name.replace("__", "."), value)
  return config


def refusal(source, config: Config, tmp_path) -> str:
  """What a new run is told, of which nothing is left."""
  with pytest.raises(UserError) as caught:
    loop.train(config, tmp_path / "new", init_from=str(source), devices=jax.devices()[:1])
  assert not (tmp_path / "new").exists()
  message = str(caught.value)
  assert message.count("--init_from") >= 1 and "--workdir=" not in message
  assert "\n" not in message and f"--init_from={source}" in message
  return message


def test_the_same_model_passes(source):
  """Also with another seed, rate, batch and mesh: they are no part of the parameters."""
  config = changed(
    train__seed=9, train__batch_size=32, optimizer__learning_rate=0.5, mesh__data=-1
  )
  init_from.check(str(source), config)
  init_from.check(str(source / "checkpoints"), config)


@pytest.mark.parametrize(
  ("fields", "parts"),
  [
    (
      {"moe__num_experts": 8},
      [
        "--config.moe.num_experts was 4 there and is 8 here",
        "tools.surgery adds experts",
      ],
    ),
    ({"moe__every": 1}, ["--config.moe.every was 2", "tools.surgery adds experts"]),
    ({"model__width": 64}, ["--config.model.width was 32 there and is 64 here"]),
    ({"model__num_layers": 4}, ["--config.model.num_layers was 2 there and is 4"]),
    ({"model__vocab_size": 512}, ["--config.model.vocab_size was 0 there and is 512"]),
    (
      {"data__tokenizer": "bpe", "data__vocab_size": 300},
      ["tokenizer bytes of 264 ids", "give --config.data.tokenizer=bytes"],
    ),
  ],
  ids=str,
)
def test_other_shapes_are_told_by_the_fields_that_differ(source, tmp_path, fields, parts):
  """Old and new value of each, and of no field that changes no shape."""
  message = refusal(source, changed(train__seed=9, **fields), tmp_path)
  for part in parts:
    assert part in message
  assert "seed" not in message
  assert ("experts" in message) == any(name.startswith("moe") for name in fields)


@pytest.mark.parametrize(
  ("make", "part"),
  [
    (lambda path: None, "does not exist"),
    (lambda path: path.write_text(""), "is a file"),
    (lambda path: path.mkdir(), "has no checkpoint: it is empty"),
    (
      lambda path: (path / "notes").mkdir(parents=True),
      "has no checkpoint: it holds notes",
    ),
    (
      lambda path: (path / "checkpoints" / "3").mkdir(parents=True),
      "has no intact checkpoint",
    ),
  ],
  ids=["missing", "file", "empty", "other", "damaged"],
)
def test_what_is_no_run_is_named(tmp_path, make, part):
  make(tmp_path / "source")
  assert part in refusal(tmp_path / "source", tiny_config(), tmp_path)


def test_a_run_without_its_tokenizer_is_refused(source, tmp_path):
  """Its parameters know no other ids."""
  for file in source.glob("tokenizer*"):
    file.rename(tmp_path / "elsewhere")
  assert "no readable tokenizer" in refusal(source, tiny_config(), tmp_path)


def test_parameters_alone_are_no_run_to_go_on_with():
  """A whole state asked of them is refused with the flags that start a new run."""
  leaf = jax.ShapeDtypeStruct((2,), "float32")
  meta = {"leaves": {"params.w": {"shape": [2], "dtype": "float32"}}}
  step = pathlib.Path("/runs/a/checkpoints/0")
  words = "only parameters, .* --init_from=/runs/a --workdir=NEXT"
  with pytest.raises(UserError, match=words):
    checkpoint_read.read_state(step, meta, {"params": {"w": leaf}, "step": leaf})
  with pytest.raises(UserError, match="another model"):
    checkpoint_read.read_state(step, meta, {"params": {"v": leaf}})
