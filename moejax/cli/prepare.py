"""Prepares a TFDS dataset as ArrayRecord: python -m moejax.cli.prepare --name=lm1b

The download may be large, and needs the extra `tfds` (pip install 'moejax[tfds]'). The
prepared dataset is read without it: --config.data.name=lm1b.
"""

from absl import flags

from moejax.cli import flags as cli
from moejax.data.sources import catalogue
from moejax.errors import UserError, did_you_mean

_NAME = flags.DEFINE_string("name", None, "NAME or NAME/CONFIG of the TFDS catalogue.")
_DATA_DIR = flags.DEFINE_string(
  "data_dir",
  "",
  "Directory to write to; default: $TFDS_DATA_DIR or ~/tensorflow_datasets.",
)


def main() -> None:
  """Downloads and prepares the dataset, unless already done."""
  import tensorflow_datasets as tfds

  name = _NAME.value
  if not name:
    raise UserError("--name is missing: NAME or NAME/CONFIG of the TFDS catalogue.")
  names = catalogue.known()
  base = name.split("/")[0].split(":")[0]
  if base not in names:
    raise UserError(f"--name={name!r} is unknown. {did_you_mean(base, names)[:200]}")
  root = catalogue.data_dir(_DATA_DIR.value)
  try:
    builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
  except ImportError as e:
    raise UserError(
      f"Preparing --name={name} needs {e.name or e}: pip install 'moejax[tfds]'."
    ) from e
  print(f"{name} is in {builder.data_dir}")


if __name__ == "__main__":
  cli.run(main)
