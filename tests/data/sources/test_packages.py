"""The text of installed packages: which distributions and files, in which splits."""

import json
from pathlib import Path

import pytest

from moejax.config import DataConfig
from moejax.config.check import validate
from moejax.data import load
from moejax.data.sources import packages, registry
from moejax.data.sources.packages import packages_corpus
from moejax.data.types import Document, Skipped
from moejax.errors import ConfigError, UserError


def install(
  site: Path,
  name: str,
  files: dict[str, str],
  *,
  version: str = "1.0",
  unlisted: tuple[str, ...] = (),
  origin: dict | None = None,
  record: bool = True,
  requires: tuple[str, ...] = (),
) -> None:
  """Writes a distribution into `site` as pip does; `unlisted` files miss in RECORD."""
  for file, text in files.items():
    path = site / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  info = site / f"{name}-{version}.dist-info"
  info.mkdir(parents=True)
  (info / "METADATA").write_text(
    f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    + "".join(f"Requires-Dist: {line}\n" for line in requires)
  )
  if record:
    lines = [f"{file},,\n" for file in files if file not in unlisted]
    (info / "RECORD").write_text("".join(reversed(lines)))
  if origin:
    (info / "direct_url.json").write_text(json.dumps(origin))


def sources(package: str, count: int = 60) -> dict[str, str]:
  """Different short modules of one package."""
  return {f"{package}/m{i:03}.py": f"# {package} {i}\nx = {i}\n" for i in range(count)}


@pytest.fixture
def site(tmp_path: Path) -> Path:
  """Two distributions of 60 modules each."""
  install(tmp_path / "site", "Two.Words", sources("words"), version="2.1")
  install(tmp_path / "site", "alpha", sources("alpha"))
  return tmp_path / "site"


def names(site: Path) -> list[str]:
  return [f.as_posix() for f in packages_corpus([str(site)]).files]


def test_documents_are_the_listed_modules_by_distribution(site):
  """Sorted by distribution and path, in whatever order RECORD lists them."""
  corpus = packages_corpus([str(site)])
  documents = list(corpus.documents())
  expected = sorted(sources("alpha")) + sorted(sources("words"))
  assert [d.name for d in documents if isinstance(d, Document)] == expected
  assert {d.domain for d in documents if isinstance(d, Document)} == {
    "alpha",
    "two-words",
  }
  assert corpus.versions == ("alpha==1.0", "two-words==2.1")


def test_stray_and_unusual_files_are_left_out(site):
  """What RECORD does not list, tests, vendored copies, generated and huge files."""
  before = names(site)
  odd = {
    "odd/stray.py": "stray = 1\n",
    "odd/data.txt": "no code\n",
    "odd/__init__.py": "",
    "odd/tests/test_x.py": "def test(): pass\n",
    "odd/_vendor/six.py": "six = 6\n",
    "odd/schema_pb2.py": "generated = 1\n",
    "odd/table.py": "t = '" + "x" * packages._MAX_BYTES + "'\n",
    "../bin/script.py": "print()\n",
    "odd/kept.py": "kept = 1\n",
  }
  install(site, "odd", odd, unlisted=("odd/stray.py",))
  assert set(names(site)) - set(before) == {"odd/kept.py"}


def test_moejax_and_editable_distributions_are_left_out(site):
  """A change of the code under study must not change the text that it learns."""
  before = names(site)
  needs = ("alpha", "two-words", "mine", "theirs")
  install(site, "moejax", sources("moejax"), requires=needs)
  editable = {"url": "file:///x", "dir_info": {"editable": True}}
  install(site, "mine", sources("mine"), origin=editable)
  assert names(site) == before
  local = {"url": "file:///x", "dir_info": {}}
  install(site, "theirs", sources("theirs", 2), origin=local)
  assert len(names(site)) == len(before) + 2


def test_a_distribution_without_record_is_named(site):
  """Its files are unknown; guessing them would read those of others."""
  install(site, "old", sources("old"), record=False)
  corpus = packages_corpus([str(site)])
  assert corpus.left_out == (Skipped("old", "has no RECORD of its files"),)
  assert not [f for f in corpus.files if f.parts[0] == "old"]


def test_the_fingerprint_is_of_versions_names_and_bytes_and_not_of_the_place(
  site, tmp_path
):
  """A new version with the same files, or one byte, is another text; a move is not."""
  first = packages_corpus([str(site)]).fingerprint()
  site = site.rename(tmp_path / "elsewhere")
  assert packages_corpus([str(site)]).fingerprint() == first
  info = site / "alpha-1.0.dist-info" / "METADATA"
  info.write_text(info.read_text().replace("1.0", "1.1"))
  second = packages_corpus([str(site)]).fingerprint()
  (site / "alpha" / "m000.py").write_text("x = -1\n")
  third = packages_corpus([str(site)]).fingerprint()
  assert len({first, second, third}) == 3


def test_pure_and_compiled_packages_may_be_in_two_folders(site, tmp_path):
  """As on Pythons with lib and lib64: both are read, each from its own folder."""
  install(tmp_path / "lib64", "fast", sources("fast", 3))
  corpus = packages_corpus([str(site), str(tmp_path / "lib64")])
  texts = [d.text for d in corpus.documents() if isinstance(d, Document)]
  assert len(texts) == 123 and b"# fast 2\nx = 2\n" in texts


def test_copies_in_two_packages_are_one_document_in_one_split(
  site, tmp_path, monkeypatch
):
  """Sixty modules copied into another distribution: no byte of them is held out twice,
  and the copies change no split."""
  copies = {f"copy/{i}.py": t for i, t in enumerate(sources("alpha").values())}
  config = DataConfig(name="python_packages", cache_dir=str(tmp_path / "cache"))

  def splits() -> list[set[bytes]]:
    dataset = load(config)
    found = [list(dataset.raw_bytes(s)) for s in ("train", "validation", "test")]
    assert sum(map(len, found)) == 120 == len({t for s in found for t in s})
    return [set(s) for s in found]

  corpus = lambda: packages_corpus([str(site)])  # noqa: E731
  monkeypatch.setitem(registry._EMBEDDED, "python_packages", corpus)
  before = splits()
  install(site, "copy", copies)
  assert splits() == before
  assert load(config).num_duplicates == 60


def test_only_what_is_required_is_read(tmp_path):
  """Requirements of requirements and of named extras, in a circle too; not the rest."""
  needs = {
    "moejax": (
      "Base.One>=1; python_version>'3'",
      "dev-tool; extra == 'dev'",
      "no; python_version<'3'",
    ),
    "base-one": ("with-extra[fast]",),
    "with-extra": ("base_one", "speed; extra=='fast'", "slow; extra=='other'"),
    "speed": (),
    "slow": (),
    "dev-tool": (),
    "no": (),
    "stray": (),
  }
  for name, lines in needs.items():
    install(tmp_path, name, sources(name.replace("-", "_"), 50), requires=lines)
  corpus = packages_corpus([str(tmp_path)])
  found = {corpus.domain_of(file) for file in corpus.files}
  assert found == {"base-one", "with-extra", "speed"}


def test_the_running_environment_has_the_packages_that_moejax_needs():
  """Listed, not prepared: jax and numpy by name, more text than the standard library."""
  corpus = packages_corpus()
  domains = {corpus.domain_of(f) for f in corpus.files}
  assert {"jax", "numpy", "optax"} <= domains
  assert not {"moejax", "pytest", "pip"} & domains
  assert sum(corpus.locate(f).stat().st_size for f in corpus.files) > 20e6


def test_an_environment_without_sources_is_refused(tmp_path):
  """As where packages are zipped: one line that says where was looked."""
  install(tmp_path, "few", sources("few", 99))
  with pytest.raises(UserError, match=f"found 99 sources.*{tmp_path}.*data.name=text"):
    packages_corpus([str(tmp_path)])


def test_a_path_means_nothing_to_it():
  """Refused by the check of a config, before anything is read."""
  from moejax.config import Config

  config = Config(data=DataConfig(name="python_packages", path="/x"))
  with pytest.raises(ConfigError, match="path=/x is not read by python_packages"):
    validate(config)


def test_domains_are_a_part_of_the_corpus(site):
  """Selected are the files of one distribution, its version alone is in the fingerprint,
  and a name that is not there is refused with the nearest."""
  corpus = packages_corpus([str(site)])
  part = corpus.select("alpha")
  assert [f.as_posix() for f in part.files] == sorted(sources("alpha"))
  assert part.versions == ("alpha==1.0",)
  assert part.fingerprint() != corpus.fingerprint()
  assert corpus.select("two-words, alpha").files == corpus.files
  with pytest.raises(ConfigError, match=r"no domain 'alhpa'\. Did you mean alpha\?"):
    corpus.select("alhpa")
