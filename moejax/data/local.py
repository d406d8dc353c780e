"""A TFDS dataset of local text, written as ArrayRecord without TensorFlow."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from moejax.data import cache
from moejax.data.corpus import Corpus, assign_splits, content_hash, cut
from moejax.data.types import SPLITS, Document, Skipped
from moejax.errors import ConfigError

_FORMAT = 1
"""Raised when the same text would be prepared differently."""

_MAX_NAMED = 1000
"""So many skipped documents are kept by name; all are counted."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a first reading of the corpus found."""

  splits: dict[bytes, str]
  """Split by content hash; one entry per distinct document."""
  is_cut: bool
  """The corpus is one document, cut into pieces."""
  skipped: list[Skipped]
  num_duplicates: int


def _documents(corpus: Corpus, is_cut: bool) -> Iterator[Document | Skipped]:
  for item in corpus.documents():
    if is_cut and isinstance(item, Document):
      yield from cut(item)
    else:
      yield item


def make_plan(corpus: Corpus, validation: float, test: float) -> Plan:
  """Reads the corpus once: which documents, which split, what to leave out."""

  def scan(is_cut: bool) -> tuple[dict[bytes, None], list[Skipped], int]:
    contents: dict[bytes, None] = {}
    skipped, duplicates = [], 0
    for item in _documents(corpus, is_cut):
      if isinstance(item, Skipped):
        skipped.append(item)
        continue
      content = content_hash(item.text)
      duplicates += content in contents
      contents[content] = None
    return contents, skipped, duplicates

  contents, skipped, duplicates = scan(is_cut=False)
  is_cut = len(contents) == 1
  if is_cut:
    contents, skipped, duplicates = scan(is_cut=True)
  splits = assign_splits(list(contents), validation, test)
  return Plan(splits, is_cut, skipped, duplicates)


class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents with their path and domain, deduplicated, in three splits."""

  name = "moejax_text"
  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, corpus: Corpus, plan: Plan, **kwargs: Any):
    """See `tfds.core.GeneratorBasedBuilder` for the rest."""
    self._corpus = corpus
    self._plan = plan
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    names = ("text", "path", "domain")
    features = tfds.features.FeaturesDict({n: tfds.features.Text() for n in names})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    present = set(self._plan.splits.values())
    return {s: self._generate_examples(s) for s in SPLITS if s in present}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:  # pyright: ignore[reportIncompatibleMethodOverride]
    seen: set[bytes] = set()
    for item in _documents(self._corpus, self._plan.is_cut):
      if isinstance(item, Skipped):
        continue
      content = content_hash(item.text)
      if content in seen or self._plan.splits.get(content) != split:
        continue
      seen.add(content)
      example = {"text": item.text, "path": item.name, "domain": item.domain}
      yield content.hex(), example


@dataclasses.dataclass(kw_only=True)
class LocalSource:
  """A `Source` over a local corpus: prepared once per content and options."""

  name: str
  corpus: Corpus
  flag: str
  """What the user would change: the flag and value that named this corpus."""
  root: Path
  """The cache directory."""
  validation: float
  test: float
  max_documents: int = 0

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes with any byte, name or option, and never otherwise."""
    return cache.digest(_FORMAT, self.corpus.fingerprint(), *self._options())

  def _options(self) -> tuple[Any, ...]:
    return self.corpus.text_field, self.validation, self.test, self.max_documents

  def documents(self, split: str) -> Iterator[Document | Skipped]:
    """Documents in the order of their hashes, which is as good as shuffled."""
    if split == "train":
      yield from self._report().skipped
    builder = tfds.builder_from_directory(str(self._directory / "dataset"))
    if split not in builder.info.splits:
      return
    source: Any = builder.as_data_source(split=split)
    count = min(len(source), self.max_documents or len(source))
    for example in itertools.islice(source, count):
      path, domain = example["path"].decode(), example["domain"].decode()
      yield Document(example["text"], path, domain)

  def num_duplicates(self) -> int:
    """Documents left out because an equal one is in."""
    return self._report().num_duplicates

  @functools.cached_property
  def _directory(self) -> Path:
    # Not keyed by max_documents, which only limits the reading.
    key = cache.digest(_FORMAT, self.corpus.fingerprint(), *self._options()[:-1])
    return cache.build_once(
      self.root / "datasets" / key, self._build, what=f"dataset {self.name}"
    )

  def _report(self) -> Plan:
    report = json.loads((self._directory / "report.json").read_text("utf-8"))
    skipped = [Skipped(**s) for s in report["skipped"]]
    return Plan({}, report["is_cut"], skipped, report["num_duplicates"])

  def _build(self, directory: Path) -> None:
    plan = make_plan(self.corpus, self.validation, self.test)
    self._check(plan)
    tfds.disable_progress_bar()
    builder = LocalText(
      corpus=self.corpus,
      plan=plan,
      data_dir=str(directory / "work"),
      file_format="array_record",
    )
    builder.download_and_prepare()
    Path(builder.data_dir).rename(directory / "dataset")
    report = {
      "source": self.flag,
      "is_cut": plan.is_cut,
      "num_duplicates": plan.num_duplicates,
      "num_skipped": len(plan.skipped),
      "skipped": [dataclasses.asdict(s) for s in plan.skipped[:_MAX_NAMED]],
    }
    (directory / "report.json").write_text(json.dumps(report, indent=1), "utf-8")
    logging.info(
      "%s: %d documents, %d duplicates left out, %d skipped.",
      self.name,
      len(plan.splits),
      plan.num_duplicates,
      len(plan.skipped),
    )

  def _check(self, plan: Plan) -> None:
    if not plan.splits:
      first = plan.skipped[0]
      fields = all("no text field" in s.reason for s in plan.skipped)
      remedy = "Name the field with --config.data.text_field." if fields else ""
      raise ConfigError(
        f"{self.flag} holds no text: {len(plan.skipped)} documents skipped, the first"
        f" is {first.document}: {first.reason}. {remedy}".rstrip()
      )
    wanted = 1 + bool(self.validation) + bool(self.test)
    if len(plan.splits) < wanted:
      raise ConfigError(
        f"{self.flag} holds {len(plan.splits)} distinct document(s), too few for"
        f" {wanted} splits. Add text, or set --config.data.test_fraction=0."
      )
