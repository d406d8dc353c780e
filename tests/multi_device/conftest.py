"""What the processes that these tests start have in common."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
  """A directory of compiled programs: one program is started again and again here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    yield
