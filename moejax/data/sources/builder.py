"""A TFDS builder for local text: ArrayRecord files, written without TensorFlow."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from moejax.data.sources.corpus import Corpus
from moejax.data.sources.scan import Scan, content_hash, documents_of
from moejax.data.types import SPLITS, Skipped


class LocalText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents with their path and domain, deduplicated, in three splits."""

  name = "moejax_text"
  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, corpus: Corpus, scan: Scan, **kwargs: Any):
    """Takes the corpus and its scan; see the base class for the other arguments."""
    self._corpus = corpus
    self._scan = scan
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    names = ("text", "path", "domain")
    features = tfds.features.FeaturesDict({n: tfds.features.Text() for n in names})
    return self.dataset_info_from_configs(features=features)

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    present = set(self._scan.splits.values())
    return {s: self._generate_examples(s) for s in SPLITS if s in present}

  def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:  # pyright: ignore[reportIncompatibleMethodOverride]
    seen: set[bytes] = set()
    for item in documents_of(self._corpus, self._scan.is_cut):
      if isinstance(item, Skipped):
        continue
      content = content_hash(item.text)
      if content in seen or self._scan.splits.get(content) != split:
        continue
      seen.add(content)
      example = {"text": item.text, "path": item.name, "domain": item.domain}
      yield content.hex(), example


def prepare(corpus: Corpus, scan: Scan, directory: Path) -> Path:
  """Writes the dataset below `directory`; returns its own directory."""
  builder = LocalText(
    corpus=corpus, scan=scan, data_dir=str(directory), file_format="array_record"
  )
  tfds.disable_progress_bar()
  # The builder prints two lines about downloads of unknown size.
  with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
    builder.download_and_prepare()
  return Path(builder.data_dir)


def read(directory: Path, split: str) -> Any:
  """Returns a split's examples, with random access; None if there is no such split."""
  builder: Any = tfds.builder_from_directory(str(directory))
  return builder.as_data_source(split=split) if split in builder.info.splits else None
