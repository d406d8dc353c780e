"""Which names are folders of buckets, and which programs take them."""

import pathlib

import pytest
from absl import flags

from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.storage import paths


def test_a_local_path_stays_a_pathlib_path():
  """Nothing of a run on a disk changes."""
  assert type(paths.run_path("runs/a")) is type(pathlib.Path())
  assert paths.run_path(pathlib.Path("/x")) == pathlib.Path("/x")
  assert not paths.in_bucket("runs/a")


def test_a_bucket_keeps_its_name_through_paths(folder):
  """The text of a path below a bucket is a URL again, and not a local name."""
  path = paths.run_path("gs://bucket/runs/a/") / "checkpoints" / "5"
  assert str(path) == "gs://bucket/runs/a/checkpoints/5"
  assert paths.split(path) == ("bucket", "runs/a/checkpoints/5")
  assert paths.in_bucket(path) and paths.resolved(path) == path
  assert str(paths.run_path(path).parent.parent) == "gs://bucket/runs/a"


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ("gs:/bucket/run", "names no folder"),
    ("gs://bucket", "names no folder"),
    ("gs://bucket/", "names no folder"),
    ("gs:///run", "names no folder"),
    ("gs://UPPER/run", "'UPPER' is not valid. .*lowercase"),
    ("gs://b/run", "'b' is too short. The name of a bucket has 3"),
    ("gs://bucket/run*", "may not have"),
    ("gs://bucket/a/../b", "may not have"),
    ("gs://bucket//b", "may not have"),
    ("s3://bucket/run", "only gs://"),
    ("https://x/run", "only gs://"),
  ],
)
def test_other_names_are_refused_in_one_line(given, words):
  """Also a misspelt one, which would otherwise become a directory `gs:`."""
  with pytest.raises(UserError, match=f"(?s)^--init_from=.*{words}") as error:
    paths.run_path(given, "--init_from")
  assert "\n" not in str(error.value)


def test_a_missing_extra_is_named(monkeypatch):
  """The one line says what to install."""
  monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"gs://bucket/run needs the extra gcs: pip"):
    paths.run_path("gs://bucket/run")


def test_a_program_without_buckets_refuses_them_by_name(monkeypatch):
  """Else it would work in a local directory of that name."""
  parser = cli.Parser("x")
  parser.add_argument("--workdir")
  with pytest.raises(UserError, match="^--workdir=gs://bucket/run: this must be a path"):
    parser.parse_args(["--workdir=gs://bucket/run"])
  assert parser.parse_args(["--workdir=runs/a"]).workdir == "runs/a"


@pytest.mark.parametrize(
  ("name", "sweeps", "remedy"),
  [
    ("workdir", False, "Copy it first"),
    ("workdir", True, "Give a local directory"),
    ("output", False, "Give a local directory"),
    ("compilation_cache", False, "Give a local directory"),
  ],
)
def test_what_is_written_need_not_be_copied_first(name, sweeps, remedy, monkeypatch):
  """A sweep makes its --workdir; others that take no bucket read it."""
  values = flags.FlagValues()
  flags.DEFINE_string(name, None, "", flag_values=values)
  if sweeps:
    flags.DEFINE_string("spec", None, "", flag_values=values)
  values(["x", f"--{name}=gs://bucket/x"])
  monkeypatch.setattr(cli.flags, "FLAGS", values)
  with pytest.raises(UserError, match=f"^--{name}=gs://bucket/x: .*{remedy}") as error:
    cli._refuse_buckets(())
  assert ("gcloud" in str(error.value)) == (remedy == "Copy it first")
