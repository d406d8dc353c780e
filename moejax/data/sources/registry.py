"""Selects the source named by a `DataConfig`."""

from collections.abc import Callable
from pathlib import Path

from moejax.config import DataConfig
from moejax.data.sources.corpus import Corpus, local_corpus
from moejax.data.sources.local import LocalSource
from moejax.data.sources.packages import packages_corpus
from moejax.data.sources.stdlib import stdlib_corpus
from moejax.data.types import LOCAL, Source
from moejax.errors import ConfigError

_EMBEDDED: dict[str, Callable[[], Corpus]] = {
  "python_stdlib": stdlib_corpus,
  "python_packages": packages_corpus,
}


def make_source(config: DataConfig, root: Path) -> Source:
  """Returns the source of `config.name`; reads only what its fingerprint needs."""
  if config.name not in LOCAL:
    from moejax.data.sources.catalogue import TfdsSource

    return TfdsSource.find(config)
  if config.name in _EMBEDDED:
    if config.path:
      raise ConfigError(
        f"--config.data.path={config.path!r} is not read by {config.name}. For your"
        " own text add --config.data.name=text."
      )
    corpus, flag = _EMBEDDED[config.name](), f"--config.data.name={config.name}"
  else:
    corpus = local_corpus(config.path, config.text_field)
    flag = f"--config.data.path={config.path!r}"
  if config.domains:
    corpus = corpus.select(config.domains)
  return LocalSource(
    name=config.name,
    corpus=corpus,
    flag=flag,
    root=root,
    validation=config.validation_fraction,
    test=config.test_fraction,
    max_documents=config.max_documents,
  )
