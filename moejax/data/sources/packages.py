"""python_packages: the source text of the packages that moejax requires.

The standard library is too small for many experts; moejax's users have more Python on
disk anyway, under free licenses and without a download. The source reads the
distributions that moejax requires without extras, and their requirements, from the
site-packages of the running interpreter. It ignores other packages, which come and go.
RECORD files list the sources, so neither stray files nor the order of a file system
matter. The text varies with the versions: the fingerprint covers every name, version and
byte.

Source of RECORD and direct_url.json: packaging.python.org/specifications,
"Recording installed projects" and "Recording the Direct URL Origin".
"""

import dataclasses
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath

from packaging.requirements import Requirement

from moejax.data import cache
from moejax.data.sources.corpus import Corpus
from moejax.data.types import Skipped
from moejax.errors import UserError

_OWN = "moejax"

_SKIPPED_FOLDERS = frozenset(("test", "tests", "_vendor", "vendor", "vendored"))
"""Vendored copies differ from their originals in a few imports, so, unlike equal
documents, they could be in different splits."""

_GENERATED = ("_ops_gen.py", "_enum_gen.py", "_generated.py", "_pb2.py")

_MAX_BYTES = 1_000_000
"""Longer files are tables and generated code; the longest handwritten one has 0.7 MB."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagesCorpus(Corpus):
  """Files of several folders, with the versions of their distributions."""

  places: Mapping[PurePath, Path]
  """The folder of each file: pure and compiled packages can be in different folders."""
  versions: tuple[str, ...]
  """NAME==VERSION of every distribution that is read, sorted."""

  def locate(self, file: PurePath) -> Path:
    return self.places[file]

  def select(self, domains: str) -> "PackagesCorpus":
    files = super().select(domains).files
    names = {self.domain_of(file) for file in files}
    versions = tuple(v for v in self.versions if v.partition("==")[0] in names)
    return dataclasses.replace(self, files=files, versions=versions)

  def fingerprint(self) -> str:
    return cache.digest(super().fingerprint(), self.versions)


def packages_corpus(
  folders: Iterable[str] | None = None, required_by: str = _OWN
) -> PackagesCorpus:
  """Returns the sources of a distribution's requirements, except editable ones.

  A document's domain is its distribution. Tests, vendored copies, generated code, empty
  files and files of more than 1 MB are left out.

  Args:
    folders: where distributions are installed; None means the site-packages of the
      running interpreter.
    required_by: the distribution, which is not itself read. If it is not installed, as in
      a bare checkout, every distribution is read.

  Raises:
    UserError: fewer than a hundred sources are installed.
  """
  paths = sysconfig.get_paths()
  where = list(dict.fromkeys(folders or (paths["purelib"], paths["platlib"])))
  domains: dict[PurePath, str] = {}
  places: dict[PurePath, Path] = {}
  versions: list[str] = []
  left_out: list[Skipped] = []
  # If a broken update left two versions of a distribution, the path decides.
  found = list(importlib.metadata.distributions(path=where))
  wanted = requirements(required_by, {_canonical(d.name): d for d in reversed(found)})
  for name, version, distribution in sorted(
    ((_canonical(d.name), d.version, d) for d in found), key=lambda item: item[:2]
  ):
    if name not in wanted or name == _OWN or _is_editable(distribution):
      continue
    if distribution.read_text("RECORD") is None:
      left_out.append(Skipped(name, "has no RECORD of its files"))
      continue
    num_before = len(places)
    for listed in distribution.files or ():
      file, path = PurePath(listed), Path(str(distribution.locate_file(listed)))
      # The first distribution that lists a file owns it.
      if file not in places and _is_wanted(file) and _has_usual_size(path):
        places[file], domains[file] = path, name
    if len(places) > num_before:
      versions.append(f"{name}=={version}")
  if len(places) < 100:
    raise UserError(
      f"--config.data.name=python_packages: found {len(places)} sources of installed"
      f" packages in {', '.join(where)}. Install moejax with its requirements by pip, or"
      " use --config.data.name=text --config.data.path=DIR."
    )
  return PackagesCorpus(
    root=Path(where[0]),
    files=tuple(sorted(places, key=lambda f: (domains[f], f.as_posix()))),
    domain_of=domains.__getitem__,
    left_out=tuple(left_out),
    places=places,
    versions=tuple(versions),
  )


def requirements(
  name: str, installed: Mapping[str, importlib.metadata.Distribution]
) -> Collection[str]:
  """Returns what a distribution needs, directly or not: canonical names.

  Args:
    name: of the distribution, without an extra.
    installed: distributions by canonical name. If `name` is not among them, all are
      returned.
  """
  if name not in installed:
    return installed.keys()
  found: set[tuple[str, str]] = set()
  """(distribution, extra or "")."""
  todo = [(name, "")]
  while todo:
    item = todo.pop()
    if item in found or item[0] not in installed:
      continue
    found.add(item)
    for line in installed[item[0]].requires or ():
      needed = Requirement(line)
      if needed.marker is None or needed.marker.evaluate({"extra": item[1]}):
        todo += [(_canonical(needed.name), extra) for extra in ("", *needed.extras)]
  return {needed for needed, _ in found} - {name}


def _canonical(name: str) -> str:
  """Returns a distribution's name as PEP 503 normalises it."""
  return re.sub(r"[-_.]+", "-", name).lower()


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
  text = distribution.read_text("direct_url.json")
  try:
    origin = json.loads(text or "{}")
  except ValueError:
    return False
  info = origin.get("dir_info") if isinstance(origin, dict) else None
  return isinstance(info, dict) and bool(info.get("editable"))


def _is_wanted(file: PurePath) -> bool:
  outside = file.is_absolute() or ".." in file.parts
  skipped = _SKIPPED_FOLDERS.intersection(file.parts[:-1])
  generated = file.name.endswith(_GENERATED)
  return file.suffix == ".py" and not (outside or skipped or generated)


def _has_usual_size(path: Path) -> bool:
  try:
    return 0 < path.stat().st_size <= _MAX_BYTES
  except OSError:
    return True  # A missing file, reported when it is read.
