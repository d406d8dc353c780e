"""Tokenizers lose nothing, count bytes exactly, and come back from a run's directory."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config import DataConfig
from moejax.data import cache, load
from moejax.data.tokenizer import (
  FILE,
  BPETokenizer,
  ByteTokenizer,
  Tokenizer,
  from_json,
  load_tokenizer,
)
from moejax.errors import ConfigError, UserError
from tests.data.conftest import CORPUS, many, small_config

TEXTS = [p.read_bytes() for p in sorted(CORPUS.rglob("*.*"))]
BYTES = ByteTokenizer()
BPE = BPETokenizer.train(TEXTS, 400)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


@BOTH
@settings(max_examples=150, deadline=None)
@given(text=st.text() | st.sampled_from(["<|endoftext|>", "a\r\n\tb", " ", "e\u0301"]))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str):
  """Encoding is lossless, never makes a separator, and counts its bytes exactly."""
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.separator not in ids
  assert all(0 <= i < tokenizer.vocab_size for i in ids)
  assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())


@BOTH
@settings(max_examples=150, deadline=None)
@given(data=st.binary() | st.sampled_from([b"\xff ab\xc3", "é".encode()[:1] + b" the"]))
def test_any_bytes_come_back(tokenizer: Tokenizer, data: bytes):
  """Also what is no UTF-8, such as a prompt cut inside a character."""
  ids = tokenizer.encode(data)
  assert tokenizer.decode_bytes(ids) == data
  assert tokenizer.decode_bytes(np.array([tokenizer.separator, *ids])) == data


@BOTH
def test_a_batch_encodes_like_its_texts_alone(tokenizer: Tokenizer):
  """Batching is for speed only; one text that is no UTF-8 changes no other."""
  for texts in (TEXTS, [*TEXTS, b"\xff"]):
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
      assert ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text)


def test_every_byte_has_an_id_under_bpe():
  """So no text is unknown, whatever it was trained on."""
  for byte in range(256):
    assert BPE.decode_bytes(BPE.encode(bytes([byte]))) == bytes([byte])


def test_bpe_compresses_what_it_was_trained_on():
  """400 ids must save at least half of the tokens on this regular text."""
  text = b"".join(TEXTS)
  assert len(BPE.encode(text)) < len(text) / 2


def test_bpe_training_is_deterministic():
  """The same texts give the same merges, and so the same fingerprint."""
  again = BPETokenizer.train(TEXTS, 400)
  assert again.to_json() == BPE.to_json() and again.fingerprint == BPE.fingerprint


@BOTH
def test_a_tokenizer_survives_its_json(tokenizer: Tokenizer):
  """Equal ids, equal fingerprint."""
  copy = from_json(tokenizer.to_json())
  assert copy.fingerprint == tokenizer.fingerprint
  assert copy.encode("Grüße 🦊") == tokenizer.encode("Grüße 🦊")


def test_the_byte_vocabulary_divides_among_eight_devices():
  """256 bytes and a separator, padded."""
  assert BYTES.vocab_size % 8 == 0 and BYTES.separator == 256


def test_the_shape_of_a_bpe_model_depends_on_the_config_alone():
  """Little text finds few merges, and the vocabulary keeps its size."""
  tiny = BPETokenizer.train([b"ab"], 4096)
  assert tiny.vocab_size == 4096 and tiny.separator == 4095
  assert len(tiny.bytes_per_token) == 4096


def test_too_small_a_bpe_vocabulary_is_refused(corpus_of):
  """It must hold all bytes and the separator."""
  with pytest.raises(ConfigError, match=r"vocab_size=256.*257"):
    load(corpus_of(many(12), tokenizer="bpe", vocab_size=256))


def bpe_config(cache: Path, **changes) -> DataConfig:
  """The committed corpus under bpe."""
  return small_config(cache, tokenizer="bpe", vocab_size=400, **changes)


def test_a_run_keeps_its_tokenizer(session_cache, corpus_of, tmp_path):
  """Other text in a run that has begun is read with the run's own tokenizer."""
  run = tmp_path / "run"
  first = load(bpe_config(session_cache), workdir=run).tokenizer
  assert load_tokenizer(run).fingerprint == first.fingerprint
  (run / "config.json").write_text("{}")
  other = corpus_of(many(30), tokenizer="bpe", vocab_size=400)
  assert load(other, workdir=run).tokenizer.fingerprint == first.fingerprint
  assert load(other).tokenizer.fingerprint != first.fingerprint


def test_a_run_refuses_another_tokenizer(session_cache, tmp_path):
  """Of another kind or size, named by flag; a run that never began does not mind."""
  run = tmp_path / "run"
  load(bpe_config(session_cache), workdir=run)
  load(small_config(session_cache), workdir=run)
  assert load_tokenizer(run).kind == "bytes"
  (run / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"tokenizer='bpe'.*'bytes'.*--workdir"):
    load(bpe_config(session_cache), workdir=run)


def test_bpe_is_trained_on_the_train_split_only(corpus_of):
  """Held-out text decides nothing: a word found only there is not in the vocabulary."""
  config = corpus_of(many(40), tokenizer="bpe", vocab_size=400, test_fraction=0.5)
  dataset = load(config)
  assert dataset.num_documents("test")
  expected = BPETokenizer.train(dataset.raw_bytes("train"), 400)
  assert dataset.tokenizer.fingerprint == expected.fingerprint


def test_bpe_evaluation_covers_the_same_bytes(session_cache, small):
  """Tokens differ, the text does not."""
  dataset = load(bpe_config(session_cache))
  for split in ("train", "validation", "test"):
    assert list(dataset.raw_bytes(split)) == list(small.raw_bytes(split))
    assert dataset.num_bytes(split) == small.num_bytes(split)
    assert dataset.num_tokens(split) < small.num_tokens(split)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
  """As is a damaged one."""
  with pytest.raises(UserError, match="holds no readable tokenizer"):
    load_tokenizer(tmp_path)
  path = tmp_path / FILE
  path.parent.mkdir()
  path.write_text(json.dumps({"kind": "bpe"}))
  with pytest.raises(UserError, match="damaged"):
    load_tokenizer(tmp_path)


def forged(**changes) -> str:
  """A tokenizer file with a right fingerprint, as anyone can write one."""
  fields = {"kind": "bpe", "vocab_size": 300, "model": "{}"} | changes
  parts = (fields["kind"], fields["vocab_size"], fields["model"])
  return json.dumps(fields | {"fingerprint": cache.digest(*parts)})


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace("byte", "bite"),
    lambda text: "[" * 100_000,
    lambda text: "[]",
    lambda text: forged(),
    lambda text: forged(model="[" * 9000),
    lambda text: forged(model=3),
    lambda text: forged(vocab_size=10**12),
    lambda text: forged(vocab_size="300"),
    lambda text: forged(kind=["bpe"]),
    lambda text: forged(model=json.loads(text)["model"], vocab_size=257),
    lambda text: forged(model=json.loads(text)["model"].replace('"a"', '"zz"')),
  ],
)
def test_a_damaged_tokenizer_is_one_line_with_its_file_and_a_remedy(
  session_cache, tmp_path, damage
):
  """Cut, changed, nested, forged: what the library raises never gets out."""
  load(bpe_config(session_cache), workdir=tmp_path)
  path = tmp_path / FILE
  path.write_text(damage(path.read_text()))
  with pytest.raises(UserError, match="is damaged: .* Copy it from a backup") as error:
    load_tokenizer(tmp_path)
  assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_tokenizer_in_the_cache_is_to_be_deleted(tmp_path):
  """The way out is another than for a run's: it is made again."""
  config = bpe_config(tmp_path)
  load(config)
  (path,) = tmp_path.glob(f"tokenizers/[!.]*/{FILE}")
  path.write_text("{")
  with pytest.raises(UserError, match=f"{path.parents[1]}, in the cache, .* Delete it"):
    load(config)
  shutil.rmtree(path.parents[1])
  load(config)
