"""The recipes of docs/launching.md by hand: their flags are moejax's.

Those that a command renders are in tests/deploy.
"""

import pathlib
import re

from moejax.cli import flags as cli
from moejax.config import text as config_text
from moejax.config.check import validate

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PROGRAM_FLAGS = {
  "config",
  "workdir",
  "coordinator_address",
  "num_processes",
  "process_id",
}


def config_of(words: list[str]):
  """The config of a command line, checked as the program checks it."""
  config = cli.load_config("default")
  for word in words:
    name, _, value = word.removeprefix("--").partition("=")
    if name.startswith("config."):
      dotted = name.removeprefix("config.")
      config_text.set_field(config, dotted, config_text.parse_value(dotted, value))
    else:
      assert name in PROGRAM_FLAGS, word
  validate(config)
  return config


def flags_in(text: str) -> list[str]:
  return re.findall(r"--[a-z_.]+=[^\s\"']+", text)


def test_every_command_of_the_page_has_flags_that_exist():
  """Each command line that calls the training program."""
  text = (DOCS / "launching.md").read_text()
  blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
  commands = [
    part.split("\ngcloud")[0]
    for block in blocks
    for part in block.split("experiments.train")[1:]
    if "--config=" in part
  ]
  assert len(commands) == 4
  for command in commands:
    config_of(flags_in(command))


def test_files_that_the_page_names_are_there():
  """Links into the repository."""
  text = (DOCS / "launching.md").read_text()
  for link in re.findall(r"\]\((launching/[^)]+)\)", text):
    assert (DOCS / link).is_file(), link
