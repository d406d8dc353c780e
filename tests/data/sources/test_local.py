"""Local text: what is read, what is left out, who is in which split."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from moejax.config import DataConfig
from moejax.data import Dataset, cache, load
from moejax.data.sources.local import LocalSource
from moejax.data.sources.registry import make_source
from moejax.data.sources.scan import assign_splits, content_hash, cut
from moejax.data.types import Document
from moejax.errors import ConfigError
from tests.data import make_corpus
from tests.data.conftest import CORPUS, many, small_config

COMPRESS = {
  "": bytes,
  ".gz": gzip.compress,
  ".xz": lzma.compress,
  ".zst": zstandard.ZstdCompressor().compress,
}


def make_config(tmp_path: Path, path: Path, **changes) -> DataConfig:
  """Reads `path`."""
  return small_config(tmp_path / "cache", path=str(path), **changes)


def texts(dataset: Dataset) -> dict[str, list[bytes]]:
  """All documents by split."""
  return {
    s: list(dataset.raw_bytes(s))
    for s in ("train", "validation", "test")
    if dataset.num_documents(s)
  }


def everything(dataset: Dataset) -> list[bytes]:
  """All documents, sorted."""
  return sorted(t for s in texts(dataset).values() for t in s)


def jsonl(items: list[str], field: str = "text") -> bytes:
  """One record per item."""
  return "".join(json.dumps({field: t, "n": 1}) + "\n" for t in items).encode()


def test_every_suffix_and_compression_is_read(corpus_of):
  """Four kinds of file, each plain and three times compressed: no byte is lost."""
  files, expected = {}, []
  for suffix, compress in COMPRESS.items():
    for kind in (".txt", ".md", ".py", ""):
      text = f"This is {kind or 'bare'} under {suffix or 'nothing'}: é, 雪.\n" * 3
      files[f"a/file{kind}{suffix}"] = compress(text.encode())
      expected.append(text.encode())
    lines = [f"line {i} of {suffix or 'plain'}" for i in range(3)]
    files[f"b/lines.jsonl{suffix}"] = compress(jsonl(lines))
    expected += [t.encode() for t in lines]
  dataset = load(corpus_of(files))
  assert everything(dataset) == sorted(expected)
  assert dataset.domains == ("a", "b") and not dataset.skipped


@pytest.mark.parametrize("is_cut", [False, True])
def test_bytes_of_duplicates_are_counted(corpus_of, is_cut):
  """What is read and what is left out are the whole text."""
  if is_cut:
    lines = [b"line number %03d\n" % i for i in range(9)]  # Two equal pieces of each.
    files = {"book.txt": b"".join(line * 64 for line in lines)}
  else:
    files = many(20) | {"again.txt": many(20)["003.txt"]}
  config = corpus_of(files)
  dataset = load(config)
  source = make_source(config, cache.cache_root(config.cache_dir))
  assert isinstance(source, LocalSource)
  own = source.left_out()
  size = sum(len(text) for text in files.values())
  read = sum(map(len, everything(dataset)))
  assert own["is_cut"] == is_cut and own["duplicates"] == dataset.num_duplicates > 0
  assert own["duplicate_bytes"] == size - read and own["skipped"] == 0


def test_files_of_several_frames_are_read_whole(corpus_of):
  """What `cat a.zst b.zst` makes is legal, as for gzip and xz."""
  files = many(20)
  for suffix, compress in COMPRESS.items():
    parts = [f"{suffix} part {i}\n".encode() * 9000 for i in range(3)]
    files[f"whole.txt{suffix}"] = b"".join(map(compress, parts))
    files[f"lines.jsonl{suffix}"] = b"".join(
      compress(jsonl([f"{suffix} {i} " + "x" * 300_000])) for i in range(3)
    )
  dataset = load(corpus_of(files))
  assert not dataset.skipped and len(everything(dataset)) == 20 + 4 * 4
  assert all(
    b"".join([f"{s} part 2\n".encode() * 9000]) in b"".join(everything(dataset))
    for s in COMPRESS
  )


def test_equal_documents_are_kept_once(corpus_of):
  """Across files, folders, formats and compressions."""
  text = "the same text everywhere"
  copies = {"x/a.txt": text, "y/b.md.gz": gzip.compress(text.encode())}
  copies["z.jsonl"] = jsonl([text, text, "another"])
  dataset = load(corpus_of(many(20) | copies))
  assert everything(dataset).count(text.encode()) == 1
  assert dataset.num_duplicates == 3


def test_no_document_is_in_two_splits(small: Dataset):
  """The three splits are disjoint and make up the corpus."""
  splits = texts(small)
  assert len(splits) == 3
  found = everything(small)
  assert len(found) == len(set(found)) == 101


def test_a_document_keeps_its_split_when_others_come(corpus_of):
  """The split is of the content alone."""
  before = texts(load(corpus_of(many(60))))
  after = texts(load(corpus_of(many(60) | many(60, prefix="more/") | {"n.txt": "new"})))
  for split, documents in before.items():
    assert set(documents) <= set(after[split])


def test_splits_have_about_the_fractions_asked_for():
  """10% and 20% of 5,000 hashes, within four standard deviations."""
  contents = [content_hash(str(i).encode()) for i in range(5000)]
  splits = list(assign_splits(contents, 0.1, 0.2).values())
  assert abs(splits.count("validation") - 500) < 4 * (5000 * 0.1 * 0.9) ** 0.5
  assert abs(splits.count("test") - 1000) < 4 * (5000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_few_documents_still_fill_every_split(count):
  """No wanted split is empty, and each document is in one."""
  contents = [content_hash(str(i).encode()) for i in range(count)]
  splits = assign_splits(contents, 0.05, 0.05)
  assert set(splits.values()) == {"train", "validation", "test"}
  assert len(splits) == count


def test_more_skipped_documents_than_a_report_names_are_counted(corpus_of, monkeypatch):
  """Only the first ones are named; the number is that of all."""
  from moejax.data.sources import local

  monkeypatch.setattr(local, "_MAX_NAMED", 3)
  dataset = load(corpus_of(many(20) | {f"{i}.bin": b"a\0" for i in range(8)}))
  assert dataset.num_skipped == 8
  assert sum(bool(s.document) for s in dataset.skipped) == 3


def test_what_cannot_be_decoded_is_left_out_and_named(corpus_of, caplog):
  """Binary, Latin-1, empty, broken compression, bad JSON: the rest is used."""
  bad = {
    "zero.bin": b"ab\0cd",
    "latin.txt": "Grüße".encode("latin-1"),
    "empty.txt": "",
    "broken.txt.gz": gzip.compress(b"x" * 1000)[:20],
    "broken.txt.xz": lzma.compress(b"x" * 1000)[:40],
    "cut.jsonl.zst": COMPRESS[".zst"](jsonl([str(i) for i in range(9)]))[:-9],
    "not.txt.zst": b"this is no zstandard frame",
    "lines.jsonl": b'{"text": 3}\n{"no": "x"}\nnot json\n\n{"text": "fine"}\n[1]\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
  }
  dataset = load(corpus_of(many(20) | bad))
  reasons = {s.document: s.reason for s in dataset.skipped}
  assert dataset.num_skipped == len(reasons) == 12
  assert "zero byte" in reasons["zero.bin"]
  assert "not UTF-8 (byte 2)" in reasons["latin.txt"]
  assert reasons["empty.txt"] == "empty"
  for name in ("broken.txt.gz", "broken.txt.xz", "cut.jsonl.zst", "not.txt.zst"):
    assert "cannot be read" in reasons[name]
  for line in (1, 2, 6):
    assert "no text field 'text'" in reasons[f"lines.jsonl:{line}"]
  assert "not JSON" in reasons["lines.jsonl:3"]
  assert b"fine" in everything(dataset)
  [line] = [m for m in caplog.messages if "12 documents skipped (" in m]
  assert sum(f"{name}: {reason}" in line for name, reason in reasons.items()) == 5


def test_hidden_files_and_byte_code_are_not_looked_at(corpus_of):
  """Nor counted as skipped."""
  hidden = {".git/config": "x", "__pycache__/a.pyc": b"\0", "a/.DS_Store": b"\0"}
  dataset = load(corpus_of(many(10) | hidden))
  assert dataset.num_documents("train") + 2 >= 8 and not dataset.skipped


def test_domains_are_folders_stems_and_the_root(corpus_of):
  """Folder at the top, else the stem of a .jsonl, else the name of the folder given."""
  files = (
    many(6) | many(6, "poems/deep/") | {"chat.jsonl.gz": gzip.compress(jsonl(["q"]))}
  )
  assert load(corpus_of(files)).domains == ("chat", "corpus", "poems")


def test_prepared_again_only_when_the_content_changes(corpus_of, monkeypatch):
  """A second load reads the cache; one more byte, or another fraction, does not."""
  config = corpus_of(many(12))
  first = load(config).fingerprint

  def refuse(*args, **kwargs):
    raise AssertionError("prepared again")

  with monkeypatch.context() as patch:
    patch.setattr("moejax.data.sources.builder.prepare", refuse)
    patch.setattr("moejax.data.tokens.write_tokens", refuse)
    Path(config.path, "000.txt").touch()
    assert load(config).fingerprint == first
  Path(config.path, "000.txt").write_text("changed")
  second = load(config).fingerprint
  config.test_fraction = 0.2
  third = load(config).fingerprint
  assert len({first, second, third}) == 3


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(corpus_of, tmp_path):
  """The same folder elsewhere, under another cache, gives the same batches."""
  here = load(corpus_of(many(12)))
  expected, moved = texts(here), tmp_path / "elsewhere" / "corpus"
  moved.parent.mkdir()
  Path(here.config.path).rename(moved)
  there = load(make_config(tmp_path / "other", moved))
  assert there.fingerprint == here.fingerprint
  assert texts(there) == expected


def test_max_documents_limits_every_split(corpus_of):
  """And prepares nothing anew."""
  config = corpus_of(many(60), validation_fraction=0.3, test_fraction=0.3)
  whole = load(config)
  config.max_documents = 5
  part = load(config)
  assert part.fingerprint != whole.fingerprint
  assert [part.num_documents(s) for s in ("train", "validation", "test")] == [5] * 3
  assert len(list(Path(config.cache_dir, "datasets").glob("[!.]*"))) == 1


def test_one_long_document_is_cut_so_that_it_can_be_split(tmp_path):
  """A book as one file: pieces are disjoint, in three splits, and lose nothing."""
  book = "".join(f"Paragraph {i}: é {'word ' * (i % 37)}end.\n\n" for i in range(600))
  path = tmp_path / "book.txt.gz"
  path.write_bytes(gzip.compress(book.encode()))
  config = make_config(tmp_path, path)
  dataset = load(config)
  assert dataset.domains == ("book",)
  assert sum(map(len, everything(dataset))) == len(book.encode())
  assert all(texts(dataset).values()) and len(texts(dataset)) == 3


@pytest.mark.parametrize("text", ["word " * 5000, "雪" * 5000, "a\n\nb" * 5000, "short"])
def test_cutting_loses_nothing_and_cuts_no_character(text):
  """The pieces end to end are the document, and each is UTF-8."""
  pieces = list(cut(Document(text.encode(), "d", "x")))
  assert "".join(p.text.decode() for p in pieces) == text
  assert len({p.name for p in pieces}) == len(pieces)


BAD_PATHS = {
  "missing": ("nowhere", {}, "does not exist"),
  "empty": ("empty", {"empty/": None}, "holds no files"),
  "binary": ("bin", {"bin/a.bin": b"\0\1"}, "holds no text.*a.bin.*zero byte"),
  "no field": (
    "f",
    {"f/a.jsonl": jsonl(["x"], "body")},
    "no text field .text. .it has: body, n.*text_field",
  ),
  "few": ("few", {"few/a.txt": "a", "few/b.txt": "b"}, "too few.*test_fraction=0"),
  "unset": ("", {}, "needs --config.data.path"),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_bad_paths_are_one_clear_error(case, tmp_path):
  """Named by flag and value, and nothing is left half-built."""
  name, files, message = BAD_PATHS[case]
  for file, content in files.items():
    target = tmp_path / file
    if content is None:
      target.mkdir(parents=True)
      continue
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content if isinstance(content, bytes) else content.encode())
  config = make_config(tmp_path, tmp_path / name)
  if not name:
    config.path = ""
  with pytest.raises(ConfigError, match=message) as error:
    load(config)
  assert "--config.data." in str(error.value)
  left = [p for p in (tmp_path / "cache").rglob("*") if ".locks" not in p.parts]
  assert not [p for p in left if p.is_file()]


def test_an_unreadable_path_is_refused(corpus_of, monkeypatch):
  """By its permissions (faked: the superuser may read everything)."""
  config = corpus_of(many(3))
  monkeypatch.setattr("os.access", lambda *a, **k: False)
  with pytest.raises(ConfigError, match="cannot be read"):
    load(config)


BAD_FIELDS = [
  ("tokenizer", "bytse", "Did you mean bytes"),
  ("sequence_length", 0, "sequence_length=0"),
  ("validation_fraction", 1.0, "validation_fraction=1.0"),
  ("test_fraction", -0.1, "test_fraction=-0.1"),
  ("num_workers", -1, "num_workers=-1"),
  ("max_documents", -1, "max_documents=-1"),
  ("name", "python_stdlib", "is not read by python_stdlib"),
]


@pytest.mark.parametrize("field,value,message", BAD_FIELDS)
def test_bad_fields_are_refused_before_anything_is_read(field, value, message, corpus_of):
  """Named by flag, value and remedy."""
  with pytest.raises(ConfigError, match=message):
    load(corpus_of(many(3), **{field: value}))


def test_an_unwritable_cache_is_refused(corpus_of, tmp_path, monkeypatch):
  """Given by flag or by environment; here a file stands in the way."""
  (tmp_path / "file").write_text("x")
  config = corpus_of(many(3))
  config.cache_dir = str(tmp_path / "file" / "cache")
  with pytest.raises(ConfigError, match=r"cache_dir=.*not writable"):
    load(config)
  config.cache_dir = ""
  monkeypatch.setenv(cache.ENV, str(tmp_path / "file" / "cache"))
  with pytest.raises(ConfigError, match=cache.ENV):
    load(config)


def test_the_committed_corpus_is_what_the_script_writes():
  """So the golden loss curve's text has a source that can be read."""
  have = {
    p.relative_to(CORPUS).as_posix(): p.read_text("utf-8")
    for p in CORPUS.rglob("*")
    if p.is_file()
  }
  assert have == make_corpus.contents()
  assert sum(len(t.encode()) for t in have.values()) < 100_000


def test_no_domain_table_grows_without_bound(corpus_of):
  """Beyond 64, the smallest domains are one; every document still has an index."""
  files = {f"d{i:03}/a.txt": f"{i} " * (200 - i) for i in range(80)}
  dataset = load(corpus_of(files))
  assert len(dataset.domains) == 64 and dataset.domains[-1] == "(other)"
  assert "d000" in dataset.domains and "d079" not in dataset.domains


def test_the_standard_library_is_the_default(session_cache):
  """About 12 MB, without tests, by package; loads without any other flag."""
  dataset = load(DataConfig(cache_dir=str(session_cache)))
  total = sum(dataset.num_bytes(s) for s in ("train", "validation", "test"))
  assert 9e6 < total < 16e6
  assert {"asyncio", "json", "(modules)"} <= set(dataset.domains)
  assert not any("test/" in s.document for s in dataset.skipped)
  # Splits of 5% by documents; sizes of documents vary, so the bounds are wide.
  assert 0.01 < dataset.num_bytes("validation") / total < 0.15
  assert len(dataset.fingerprint) == 20
