"""Folders of text that came from anywhere: nothing hangs, floods or ends the program."""

import gzip
import os
import socket
from pathlib import Path

import pytest
import zstandard

from moejax.data import load
from moejax.data.sources import corpus
from moejax.errors import ConfigError
from tests.data.conftest import many, small_config


def reasons(dataset) -> dict[str, str]:
  return {item.document: item.reason for item in dataset.skipped}


def test_what_is_no_file_is_left_out_and_named(corpus_of, tmp_path):
  """Pipes would be waited at for ever; a socket, a device, and links to all of them."""
  config = corpus_of(many(20))
  root = Path(config.path)
  os.mkfifo(root / "pipe.txt")
  (root / "to_pipe.txt").symlink_to("pipe.txt")
  (root / "zero.txt").symlink_to("/dev/zero")
  (root / "gone.txt").symlink_to("nowhere")
  (root / "loop.txt").symlink_to("loop.txt")
  (root / "again").symlink_to(root, target_is_directory=True)
  with socket.socket(socket.AF_UNIX) as opened:
    opened.bind(str(root / "s.txt"))
    found = reasons(load(config))
  assert found.pop("gone.txt").startswith("cannot be read")
  assert found.pop("loop.txt").startswith("cannot be read")
  assert found == {
    "pipe.txt": "is a pipe, not a file",
    "to_pipe.txt": "is a link to a pipe, not a file",
    "zero.txt": "is a link to a device, not a file",
    "s.txt": "is a socket, not a file",
    "again": "is a link to a folder, which is not followed",
  }


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
  """Between looking and reading: opening does not trust what was seen."""
  (tmp_path / "a.txt").write_text("x")
  found = corpus.local_corpus(str(tmp_path), "text")
  (tmp_path / "a.txt").unlink()
  os.mkfifo(tmp_path / "a.txt")
  before = found.fingerprint()
  (item,) = found.documents()
  assert "a pipe, not a file" in str(item) and before == found.fingerprint()


def test_what_is_left_out_does_not_change_the_fingerprint(corpus_of):
  """A run goes on when a socket or a link to a folder appears among its text."""
  config = corpus_of(many(20))
  before = load(config).fingerprint
  os.mkfifo(Path(config.path) / "pipe.txt")
  (Path(config.path) / "link").symlink_to("/", target_is_directory=True)
  assert load(config).fingerprint == before


def test_links_are_read_and_those_that_lead_out_are_told(corpus_of, tmp_path, caplog):
  """Inside the folder without a word; outside with a line that names where to."""
  config = corpus_of(many(20) | {"real/a.txt": "the real one"})
  (Path(config.path) / "inside.txt").symlink_to("real/a.txt")
  load(config)
  assert "lead out of it" not in caplog.text
  (tmp_path / "elsewhere.txt").write_text("text that lies elsewhere")
  (Path(config.path) / "outside.txt").symlink_to("../elsewhere.txt")
  dataset = load(config)
  documents = [d for s in ("train", "validation", "test") for d in dataset.raw_bytes(s)]
  assert b"text that lies elsewhere" in documents
  assert f"are read: 1, such as outside.txt -> {tmp_path}" in caplog.text


@pytest.mark.parametrize("path", ["/dev/null", "pipe"])
def test_a_path_that_is_no_folder_or_file_is_refused(path, tmp_path):
  """By what it is."""
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(ConfigError, match="path=.* is a (device|pipe). Give a folder"):
    load(small_config(tmp_path / "cache", path=str(tmp_path / path)))


def test_lines_that_nest_or_never_end_are_left_out(corpus_of, monkeypatch):
  """100,000 brackets, huge numbers, long field names: each costs its own line only."""
  monkeypatch.setattr(corpus, "_MAX_DOCUMENT_BYTES", 200_000)
  lines = [
    b"[" * 100_000,
    b'{"text": ' + b"[" * 50_000,
    b'{"text": ' + b"9" * 5000 + b"}",
    b'{"' + b"k" * 5000 + b'\\u001b[2J": 1}',
    b'{"text": "' + b"x" * 300_000 + b'"}',
    b'{"text": "the last one"}',
  ]
  dataset = load(corpus_of(many(20) | {"a.jsonl": b"\n".join(lines)}))
  found = reasons(dataset)
  assert sorted(found) == [f"a.jsonl:{i}" for i in range(1, 6)]
  assert "nests too deep" in found["a.jsonl:1"] and "not JSON" in found["a.jsonl:2"]
  assert "longer than 1 GiB" in found["a.jsonl:5"]
  assert all(len(r) < 300 and r.isprintable() for r in found.values())
  documents = [d for s in ("train", "validation", "test") for d in dataset.raw_bytes(s)]
  assert b"the last one" in documents


def test_a_small_file_does_not_become_a_large_document(corpus_of, monkeypatch):
  """Decompression stops at the limit; at most 256 MiB are made at once from a .zst."""
  monkeypatch.setattr(corpus, "_MAX_DOCUMENT_BYTES", 1 << 20)
  large = b"a line of text\n" * 500_000
  files = {"b.txt.gz": gzip.compress(large)}
  files["b.txt.zst"] = zstandard.ZstdCompressor().compress(large)
  found = reasons(load(corpus_of(many(20) | files)))
  assert set(found) == set(files)
  assert all("longer than 1 GiB" in reason for reason in found.values())
  bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 28))
  assert len(bomb) < 4 * corpus._ZSTD_BYTES


def test_deflate_streams_that_break_in_the_middle_are_left_out(corpus_of):
  """The error of zlib is none of the operating system's."""
  packed = bytearray(gzip.compress(os.urandom(5000)))
  packed[40:60] = bytes(20)
  packed[10] = 0x07
  found = reasons(load(corpus_of(many(20) | {"a.txt.gz": bytes(packed)})))
  assert "cannot be read" in found["a.txt.gz"]


def test_names_may_hold_any_bytes(corpus_of):
  """File names that are not UTF-8, or that would clear the terminal."""
  config = corpus_of(many(20))
  root = os.fsencode(config.path)
  for name in (b"caf\xe9", b"\x1b[2J"):
    os.mkdir(root + b"/" + name)
    with open(root + b"/" + name + b"/a.txt", "wb") as file:
      file.write(b"a document in " + name.hex().encode())
  dataset = load(config)
  assert {"caf\N{REPLACEMENT CHARACTER}", "?[2J"} <= set(dataset.domains)
  assert not dataset.skipped
