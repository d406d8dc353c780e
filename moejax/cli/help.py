"""The text of --help."""

import re
import sys
import textwrap

from absl import flags

from moejax.cli import dotted, main
from moejax.config import text as config_text
from moejax.errors import program as name_of


def describe(name: str, program: str) -> str:
  """Returns the program's docstring, its flags, and the names of all config fields."""
  doc = as_called_here(sys.modules[program].__doc__ or "")
  # absl knows flags of the main module by the program's name.
  owner = name if program == "__main__" else program
  lines = [doc.strip(), "", "Flags:"]
  for flag in flags.FLAGS.get_key_flags_for_module(owner):
    default = "" if flag.default is None else f" (default: {flag.default})"
    lines.append(f"  --{flag.name}: {flag.help}{default}")
  if "config" in flags.FLAGS:
    lines.append("")
    lines += [f"--{p}.SECTION.{text}" for p, text in dotted.prefixes().items()]
    lines.append("--config.SECTION.FIELD=VALUE overrides one field of the config:")
    sections: dict[str, list[str]] = {}
    for field in config_text.field_types():
      section, _, leaf = field.rpartition(".")
      sections.setdefault(section, []).append(leaf)
    for section, leaves in sections.items():
      if section:
        text = f"{section}: " + " ".join(leaves)
        lines.append(
          textwrap.indent(textwrap.fill(text, 84, subsequent_indent="  "), "  ")
        )
    lines += [
      "moejax/config/schema.py says what each does. --list=routers shows each router's",
      "own options, --config.moe.ROUTER.OPTION=VALUE.",
    ]
  return "\n".join(lines)


def as_called_here(text: str) -> str:
  """Returns a docstring with the commands of this process: a clone's, or those of the
  wheel, which has no `experiments` and `tools`."""

  def called(found: re.Match[str]) -> str:
    name = found[2].replace("_", "-")
    return name_of(name, f"{found[1]}.{found[2]}") if name in main.PROGRAMS else found[0]

  return re.sub(r"python -m (experiments|tools)\.(\w+)", called, text)
