"""Prints a config, resolved: one sorted `name = value` line per field.

  python -m tools.dump_config --config=configs/default.py [--config.moe.every=1] [--json]
  python -m tools.dump_config --update_goldens

The second form rewrites tests/golden/configs, where a dump of every shipped config
is kept, so that a changed default shows in review under each config it reaches.
"""

import json
import pathlib

from absl import flags

from moejax.cli import flags as cli
from moejax.cli.listing import shipped_configs
from moejax.config import text as config_text

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "configs"


def define_flags() -> None:
  flags.DEFINE_bool("json", False, "Print JSON, as in a run's config.json.")
  flags.DEFINE_bool("update_goldens", False, "Rewrite tests/golden/configs.")
  cli.define_config()


def goldens() -> dict[pathlib.Path, str]:
  """The dump of every shipped config, by the file it belongs in."""
  return {
    (GOLDENS / name).with_suffix(".txt"): config_text.dump(cli.load_config(str(path)))
    for name, path in shipped_configs().items()
  }


def update_goldens() -> None:
  """Writes every dump, and removes those of configs that are gone."""
  wanted = goldens()
  for stale in set(GOLDENS.rglob("*.txt")) - set(wanted):
    stale.unlink()
  for path, text in wanted.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
  print(f"{GOLDENS}: {len(wanted)} configs")


def main() -> None:
  if flags.FLAGS["update_goldens"].value:
    update_goldens()
    return
  config = cli.get_config()
  if flags.FLAGS["json"].value:
    print(json.dumps(config_text.to_dict(config), indent=2))
  else:
    print(config_text.dump(config), end="")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
