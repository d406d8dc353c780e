"""Runs a Dockerfile's steps without docker: a directory is the image, a venv its Python.

Reads the instructions that docs/launching/Dockerfile has, and refuses others. What this
cannot show: that the base image exists, and has all the libraries that the packages need.
"""

import dataclasses
import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


def instructions(text: str) -> list[tuple[str, str]]:
  """Returns each instruction and its arguments, without comments."""
  lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
  whole = "\n".join(lines).replace("\\\n", " ").splitlines()
  pairs = [line.strip().partition(" ") for line in whole if line.strip()]
  return [(name.upper(), rest.strip()) for name, _, rest in pairs]


@dataclasses.dataclass
class Image:
  """What the steps have made so far."""

  root: pathlib.Path
  """The directory that stands for the image's /."""
  environment: dict[str, str]
  directory: str = "/"
  entrypoint: tuple[str, ...] = ()

  @property
  def cwd(self) -> pathlib.Path:
    return self.root / self.directory.strip("/")

  def run(self, *words: str, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command in the image's directory, with its environment alone."""
    return subprocess.run(
      words, cwd=self.cwd, env=self.environment, capture_output=True, text=True, **options
    )


def build(
  file: pathlib.Path, context: pathlib.Path, image: Image, given: Mapping[str, str]
) -> None:
  """Takes a Dockerfile's steps.

  Args:
    file: the Dockerfile.
    context: the directory that is copied from; its .dockerignore is heeded.
    image: empty; its environment has the venv first on its PATH.
    given: by --build-arg.

  Raises:
    ValueError: an instruction that is not known here.
    CalledProcessError: a command failed.
  """
  arguments: dict[str, str] = {}
  for name, rest in instructions(file.read_text(encoding="utf-8")):
    # Docker does not look into commands: their shell does.
    words = rest if name in ("RUN", "ENTRYPOINT") else _fill(rest, image, arguments)
    if name == "FROM":
      continue
    elif name == "ARG":
      key, _, default = words.partition("=")
      arguments[key] = given.get(key, default)
    elif name == "ENV":
      image.environment |= dict(word.split("=", 1) for word in shlex.split(words))
    elif name == "WORKDIR":
      image.directory = os.path.join(image.directory, words)
      image.cwd.mkdir(parents=True, exist_ok=True)
    elif name == "COPY":
      source, target = words.split()
      _copy(context, source, image.cwd / target)
    elif name == "RUN":
      env = image.environment | arguments
      subprocess.run(["sh", "-c", words], cwd=image.cwd, env=env, check=True)
    elif name == "ENTRYPOINT":
      image.entrypoint = tuple(json.loads(words))
    else:
      raise ValueError(f"{file}: {name} is not known to {__file__}.")


def _fill(text: str, image: Image, arguments: Mapping[str, str]) -> str:
  known = {**image.environment, **arguments}
  return _VARIABLE.sub(lambda match: known.get(match[1] or match[2], ""), text)


def _copy(context: pathlib.Path, source: str, target: pathlib.Path) -> None:
  patterns = (context / ".dockerignore").read_text(encoding="utf-8").splitlines()
  patterns = [line for line in patterns if line and not line.startswith("#")]

  def ignored(directory: str, names: list[str]) -> set[str]:
    place = pathlib.Path(directory).relative_to(context)
    return {
      name
      for name in names
      for pattern in patterns
      if fnmatch.fnmatch(name, pattern.removeprefix("**/"))
      and (pattern.startswith("**/") or place == pathlib.Path())
    }

  shutil.copytree(context / source, target, ignore=ignored, dirs_exist_ok=True)
