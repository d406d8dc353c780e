"""One emulated bucket for all tests here, and one tiny run in it."""

import os
import pathlib

import pytest

from moejax.storage.paths import run_path
from tests.buckets import emulator
from tests.train.conftest import cache_dir, compilation_cache, states

__all__ = ["cache_dir", "compilation_cache", "states"]


HERE = pathlib.Path(__file__).parent


# Before pytest selects by markers.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:  # Of the whole suite.
    if HERE in item.path.parents:
      item.add_marker(pytest.mark.bucket)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> pathlib.Path:
  """Where the emulator keeps its objects, as files."""
  return tmp_path_factory.mktemp("buckets")


@pytest.fixture(scope="session", autouse=True)
def server(root):
  """URL of the emulator, which this process then reaches as Google Cloud Storage."""
  if emulator.binary() is None and not os.environ.get("CI"):
    pytest.skip(f"{emulator.PACKAGE} is not installed (extra test)")
  with emulator.started(root) as url:
    before = emulator.use(url)
    yield url
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


@pytest.fixture
def folder(request):
  """A folder of the bucket of this test's own."""
  name = "".join(c if c.isalnum() else "_" for c in request.node.name)
  return run_path(f"gs://{emulator.BUCKET}/{name}")
