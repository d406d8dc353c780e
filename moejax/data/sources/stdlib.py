"""python_stdlib: the source text of the running interpreter's standard library.

About 12 MB of Python that every machine running this code has, under a free license
and without a download. The text varies with the Python version, so its
fingerprint goes into every run's metadata.
"""

import sysconfig
from pathlib import Path, PurePath

from moejax.data.sources.corpus import Corpus, find_files
from moejax.errors import UserError

_SKIPPED_FOLDERS = frozenset(
  ("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled")
)

MODULES = "(modules)"
"""The domain of modules outside packages."""


def stdlib_corpus() -> Corpus:
  """Returns the standard library's sources, without tests and third-party packages.

  Raises:
    UserError: the interpreter has no sources on disk (it is zipped or stripped).
  """
  root = Path(sysconfig.get_paths()["stdlib"])
  found, _ = find_files(root, _SKIPPED_FOLDERS)
  files = tuple(f for f in found if _is_wanted(f))
  if len(files) < 100:
    raise UserError(
      f"--config.data.name=python_stdlib: found {len(files)} sources of the standard"
      f" library in {root}. Use an interpreter installed with its sources, or"
      " --config.data.name=text --config.data.path=DIR."
    )
  return Corpus(root=root, files=files, domain_of=_domain)


def _is_wanted(file: PurePath) -> bool:
  # config-* and _sysconfigdata are written at build time and name the build machine.
  built = file.parts[0].startswith(("config-", "_sysconfigdata", "__phello__"))
  return file.suffix == ".py" and not built


def _domain(file: PurePath) -> str:
  return file.parts[0] if len(file.parts) > 1 else MODULES
