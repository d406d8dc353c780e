"""TFDS sets by name: read where they lie, split as they are, refused with a remedy."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from moejax.config import DataConfig
from moejax.data import load
from moejax.data.sources import catalogue
from moejax.data.sources.registry import make_source
from moejax.errors import ConfigError


class TinyReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Stands for a set of the catalogue, with splits as given."""

  name = "tiny_reviews"
  VERSION = tfds.core.Version("1.2.0")

  def __init__(self, splits: dict[str, int], **kwargs: Any):
    self._splits = splits
    super().__init__(**kwargs)

  def _info(self):
    features = {
      "text": tfds.features.Text(),
      "summary": tfds.features.Text(),
      "label": tfds.features.ClassLabel(num_classes=2),
    }
    return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {s: self._generate_examples(s, n) for s, n in self._splits.items()}

  def _generate_examples(self, split, count):  # pyright: ignore[reportIncompatibleMethodOverride]
    for i in range(count):
      text = f"{split} review {i}: " + "good " * (i % 5)
      yield i, {"text": text, "summary": f"short {split} {i}", "label": i % 2}
    if split == "train":
      yield "bad", {"text": b"\xff\xfe", "summary": "bad bytes", "label": 0}


def write(root: Path, splits: dict[str, int], file_format: str = "array_record") -> Path:
  """Prepares the tiny set below `root`."""
  tfds.disable_progress_bar()
  builder = TinyReviews(splits=splits, data_dir=str(root), file_format=file_format)
  builder.download_and_prepare()
  return Path(builder.data_dir)


def config_of(tmp_path: Path, name: str = "tiny_reviews", **changes) -> DataConfig:
  """Reads below tmp_path/tfds."""
  config = DataConfig(name=name, path=str(tmp_path / "tfds"), sequence_length=32)
  return dataclasses.replace(config, cache_dir=str(tmp_path / "cache"), **changes)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
  """A folder with tfds/tiny_reviews, its three splits its own."""
  root = tmp_path_factory.mktemp("catalogue")
  write(root / "tfds", {"train": 40, "valid": 6, "test": 5})
  return root


def test_own_splits_are_used_as_they_are(prepared):
  """Found under their usual names; what is no UTF-8 is skipped and named."""
  dataset = load(config_of(prepared))
  counts = {s: dataset.num_documents(s) for s in ("train", "validation", "test")}
  assert counts == {"train": 40, "validation": 6, "test": 5}
  assert all(t.startswith(b"valid review") for t in dataset.raw_bytes("validation"))
  assert [s.reason for s in dataset.skipped] == ["not UTF-8 (byte 0)"]
  assert dataset.domains == ("tiny_reviews",)
  assert next(dataset.train_batches(4, 0))["inputs"].shape == (4, 32)


def test_a_missing_split_is_carved_by_content(tmp_path):
  """Without a validation split, training documents become one, each in one split."""
  write(tmp_path / "tfds", {"train": 200, "test": 5})
  dataset = load(config_of(tmp_path, validation_fraction=0.2, test_fraction=0.2))
  train, held = (set(dataset.raw_bytes(s)) for s in ("train", "validation"))
  assert len(train) + len(held) == 200 and not train & held
  assert 20 < len(held) < 60
  assert dataset.num_documents("test") == 5


def test_text_field_version_and_environment(prepared, monkeypatch):
  """Another field, a version by name, and TFDS's own variable for the directory."""
  config = config_of(prepared, "tiny_reviews:1.2.0", text_field="summary")
  config.path = ""
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared / "tfds"))
  assert next(load(config).raw_bytes("test")).startswith(b"short test")


def test_max_documents_stops_reading(prepared):
  """And gives another fingerprint."""
  dataset = load(config_of(prepared, max_documents=3))
  assert dataset.num_documents("train") in (2, 3)
  assert dataset.fingerprint != load(config_of(prepared)).fingerprint


REFUSED = [
  ({"name": "tiny_revews"}, "Did you mean tiny_reviews"),
  ({"name": "python-stdlib"}, "not a dataset name|Did you mean python_stdlib"),
  ({"name": "lm1b"}, r"not prepared in .*moejax\[tfds\].*prepare --name=lm1b"),
  ({"name": "wiki40b/en"}, "not prepared in .*prepare --name=wiki40b/en"),
  ({"name": "tiny_reviews:9.9.9"}, "unknown|not prepared"),
  ({"name": "tiny_reviews", "text_field": "body"}, "text_field='body'.*summary, text"),
  ({"name": "tiny_reviews", "text_field": "summry"}, "Did you mean summary"),
  ({"name": "tiny_reviews", "text_field": "label"}, "text_field='label'"),
]


@pytest.mark.parametrize("changes,message", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_remedy(prepared, changes, message):
  """Unknown, unprepared, without the field: each names the flag and the way out."""
  with pytest.raises(ConfigError, match=message) as error:
    load(config_of(prepared, **changes))
  assert "--config.data." in str(error.value)


def test_a_set_without_random_access_is_refused(tmp_path):
  """tfrecord, TFDS's usual format, needs TensorFlow; the error says what to do."""
  info = write(tmp_path / "tfds", {"train": 30}) / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(ConfigError, match=r"prepared as tfrecord.*moejax\.cli\.prepare"):
    load(config_of(tmp_path))


def test_a_set_without_a_train_split_is_refused(tmp_path):
  """Naming the splits it has."""
  write(tmp_path / "tfds", {"test": 30})
  with pytest.raises(ConfigError, match="no train split; it has: test"):
    load(config_of(tmp_path))


def test_several_configs_need_a_choice(tmp_path):
  """And one of them is found by name."""
  for name in ("de", "en"):
    made = write(tmp_path / name, {"train": 30})
    target = tmp_path / "tfds" / "wiki" / name / "1.0.0"
    target.parent.mkdir(parents=True)
    made.rename(target)
  with pytest.raises(ConfigError, match="wiki/de, wiki/en"):
    load(config_of(tmp_path, "wiki"))
  directory = catalogue.find_directory("wiki/en", tmp_path / "tfds")
  assert directory is not None and directory.parts[-2:] == ("en", "1.0.0")
  assert catalogue.prepared(tmp_path / "tfds") == ["wiki/de", "wiki/en"]


def test_the_newest_version_is_taken(tmp_path):
  """By number, not by spelling: 1.10.0 is after 1.9.0."""
  for version in ("1.9.0", "1.10.0"):
    (tmp_path / "x" / version).mkdir(parents=True)
    (tmp_path / "x" / version / "dataset_info.json").touch()
  found = catalogue.find_directory("x", tmp_path)
  assert found is not None and found.name == "1.10.0"


def test_reading_imports_no_tensorflow(prepared):
  """Neither for a prepared set nor to name the unknown."""
  import sys

  make_source(config_of(prepared), prepared)
  with pytest.raises(ConfigError):
    make_source(config_of(prepared, "c5"), prepared)
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["x/../../y", "x/..", "x//etc", "x/.hidden", "../x"])
def test_a_name_does_not_lead_out_of_the_directory(name, tmp_path):
  """A run's config is a file that anyone can have written."""
  with pytest.raises(ConfigError, match="is not a dataset name"):
    catalogue.find_directory(name, tmp_path)
