"""Datasets that the tests of this folder share."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from moejax.config import DataConfig
from moejax.data import Dataset, load

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """One cache directory for the session."""
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small(session_cache: Path) -> Dataset:
  """The committed corpus under the byte tokenizer, sequences of 64."""
  return load(small_config(session_cache))


def small_config(cache: Path, **changes) -> DataConfig:
  """The config of `small`, with changes."""
  config = DataConfig(name="text", path=str(CORPUS), sequence_length=64)
  return dataclasses.replace(config, cache_dir=str(cache), **changes)


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[..., DataConfig]:
  """Writes files (name to text or bytes) and returns a config that reads them."""

  def make(files: dict[str, str | bytes], **changes) -> DataConfig:
    root = tmp_path / "corpus"
    for name, text in files.items():
      path = root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(text.encode() if isinstance(text, str) else text)
    return small_config(tmp_path / "cache", path=str(root), **changes)

  return make


def many(count: int, prefix: str = "") -> dict[str, str | bytes]:
  """`count` different short files, enough that no split is empty."""
  return {f"{prefix}{i:03}.txt": f"text number {i} {prefix}. " * 5 for i in range(count)}
