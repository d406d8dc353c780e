"""Any TFDS text dataset by name, if it is prepared on this machine.

It is read directly from its directory, so neither the dataset's own code nor
TensorFlow is needed. Preparation is a separate command: it may download hundreds of
gigabytes and need Beam.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moejax.config import DataConfig
from moejax.data import cache
from moejax.data.sources.corpus import check_text
from moejax.data.sources.scan import content_hash, split_of
from moejax.data.types import LOCAL, Document, Skipped
from moejax.errors import ConfigError, did_you_mean, nearest

_FORMAT = 1

_NAME = re.compile(r"(?P<name>\w+)(?P<config>(/[\w\-][\w.\-]*)+)?(:(?P<version>[\d.]+))?")
"""No folder may begin with a dot: `..` would lead out of the directory of datasets."""

_OWN_SPLITS = {
  "train": ("train",),
  "validation": ("validation", "valid", "val", "dev"),
  "test": ("test",),
}
"""Names that datasets use for their splits."""


def data_dir(path: str = "") -> Path:
  """Returns the datasets' directory: `path`, $TFDS_DATA_DIR or ~/tensorflow_datasets."""
  chosen = path or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets"
  return Path(chosen).expanduser().absolute()


def prepared(root: Path) -> list[str]:
  """Returns the names of datasets prepared below `root`, as name or name/config."""
  found = {i.parent.parent for i in root.glob("*/*/dataset_info.json")}
  found |= {i.parent.parent for i in root.glob("*/*/*/dataset_info.json")}
  return sorted(d.relative_to(root).as_posix() for d in found)


def known() -> list[str]:
  """Returns the names in the TFDS catalogue that are available without TensorFlow."""
  # Text datasets such as wiki40b and c4 are registered only by this import.
  import tensorflow_datasets.text  # noqa: F401
  from tensorflow_datasets.core import registered

  return registered.list_imported_builders()


def find_directory(name: str, root: Path) -> Path | None:
  """Returns the newest prepared version of NAME[/CONFIG][:VERSION], or None.

  Raises:
    ConfigError: the name is malformed, or several configs are prepared and none named.
  """
  match = _NAME.fullmatch(name)
  if match is None:
    raise ConfigError(
      f"--config.data.name={name!r} is not a dataset name: write NAME, NAME/CONFIG or"
      " NAME/CONFIG:VERSION."
    )
  base = root / match["name"] / (match["config"] or "").lstrip("/")
  infos = list(base.glob("*/dataset_info.json"))
  if not infos and not match["config"]:
    infos = list(base.glob("*/*/dataset_info.json"))
    configs = sorted({i.parent.parent.name for i in infos})
    if len(configs) > 1:
      raise ConfigError(
        f"--config.data.name={name!r} is prepared in several configs. Choose one of"
        f" {', '.join(f'{name}/{c}' for c in configs)}."
      )
  wanted = [i.parent for i in infos if match["version"] in (None, i.parent.name)]
  return max(wanted, key=_version, default=None)


def _version(directory: Path) -> tuple[int, ...]:
  return tuple(int(n) for n in re.findall(r"\d+", directory.name))


def _refuse(config: DataConfig, root: Path) -> ConfigError:
  """Returns the error for an unknown, or known but unprepared, dataset."""
  name = config.name
  base = re.split("[/:]", name)[0]
  here = prepared(root)
  if base not in (names := known()):
    near = nearest(base, [*LOCAL, *here, *names])
    hint = f"Did you mean {near}? " if near else ""
    return ConfigError(
      f"--config.data.name={name!r} is unknown. {hint}There are {', '.join(LOCAL)},"
      f" and TFDS datasets; prepared in {root}: {', '.join(here) or 'none'}."
    )
  flag = f" --data_dir={config.path}" if config.path else ""
  return ConfigError(
    f"--config.data.name={name!r} is not prepared in {root}. Prepare it once:"
    f" pip install 'moejax[tfds]' && python -m moejax.cli.prepare --name={name}{flag}"
    " (--config.data.path names another TFDS directory)."
  )


@dataclasses.dataclass(kw_only=True)
class TfdsSource:
  """A `Source` over a prepared TFDS dataset.

  Its own validation and test splits are used as they are; missing ones are carved
  from train by a hash of the content.
  """

  name: str
  directory: Path
  config: DataConfig
  fingerprint: str = dataclasses.field(init=False)
  """Hash of description, file sizes and options: reading all files would take hours."""

  def __post_init__(self):
    total = hashlib.sha256()
    for file in sorted(self.directory.iterdir()):
      total.update(f"{file.name} {file.stat().st_size}\n".encode())
      if file.suffix == ".json":
        total.update(file.read_bytes())
    c = self.config
    options = (c.text_field, c.validation_fraction, c.test_fraction, c.max_documents)
    self.fingerprint = cache.digest(_FORMAT, self.name, total.hexdigest(), *options)

  @classmethod
  def find(cls, config: DataConfig) -> "TfdsSource":
    """Returns the source of `config.name`, after `check`.

    Raises:
      ConfigError: unknown or unprepared dataset, wrong format, no train split or no
        such field.
    """
    root = data_dir(config.path)
    directory = find_directory(config.name, root)
    if directory is None:
      raise _refuse(config, root)
    source = cls(name=config.name, directory=directory, config=config)
    source.check()
    return source

  @functools.cached_property
  def _builder(self) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(self.directory))

  @functools.cached_property
  def _own(self) -> dict[str, str]:
    """Maps our name of each existing split to the dataset's own name."""
    have = self._builder.info.splits
    return {
      ours: next(n for n in names if n in have)
      for ours, names in _OWN_SPLITS.items()
      if any(n in have for n in names)
    }

  def check(self) -> None:
    """Rejects a dataset that cannot be read, before reading it."""
    import tensorflow_datasets as tfds

    field, flag = self.config.text_field, f"--config.data.name={self.name}"
    features = self._builder.info.features
    texts = sorted(k for k, f in features.items() if isinstance(f, tfds.features.Text))
    if field not in texts:
      raise ConfigError(
        f"--config.data.text_field={field!r} is not a text feature of {flag}."
        f" {did_you_mean(field, texts) if texts else 'It has none.'}"
      )
    if "train" not in self._own:
      have = ", ".join(self._builder.info.splits)
      raise ConfigError(f"{flag} has no train split; it has: {have}. Choose another.")
    if self._builder.info.file_format.value != "array_record":
      raise ConfigError(
        f"{flag} was prepared as {self._builder.info.file_format.value}, which gives no"
        f" random access without TensorFlow. Prepare it again as array_record:"
        f" python -m moejax.cli.prepare --name={self.name} --data_dir=DIR, then"
        " --config.data.path=DIR."
      )

  def documents(self, split: str) -> Iterator[Document | Skipped]:
    """Yields at most `max_documents` of the split, skipped ones too, in stored order."""
    limit = self.config.max_documents or None
    return itertools.islice(self._documents(split), limit)

  def _documents(self, split: str) -> Iterator[Document | Skipped]:
    if split in self._own and split != "train":
      yield from self._read(split)
      return
    # The fractions apply only to splits that must be carved.
    carve = {
      "validation": self.config.validation_fraction,
      "test": self.config.test_fraction,
    }
    carve |= dict.fromkeys(carve.keys() & self._own.keys(), 0.0)
    if split != "train" and not carve[split]:
      return
    for item in self._read("train"):
      if isinstance(item, Skipped):
        if split == "train":
          yield item
      elif split_of(content_hash(item.text), carve["validation"], carve["test"]) == split:
        yield item

  def _read(self, split: str) -> Iterator[Document | Skipped]:
    import tensorflow_datasets as tfds

    field = self.config.text_field
    domain_feature = dict(self._builder.info.features).get("domain")
    has_domain = isinstance(domain_feature, tfds.features.Text)
    source = self._builder.as_data_source(split=self._own[split])
    for index, example in enumerate(source):
      domain = example["domain"].decode() if has_domain else self.name
      yield check_text(example[field], f"{self.name}/{split}#{index}", domain)

  def num_duplicates(self) -> int:
    """Returns 0: the dataset is used as published, without deduplication."""
    return 0
