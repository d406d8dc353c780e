"""Refuses directories whose config.json is not a run's.

Published models and many other projects also have a file of that name, and a run would
overwrite it.
"""

from moejax import files
from moejax.errors import UserError
from moejax.run.files import CONFIG_FILE
from moejax.storage.paths import RunPath


def refuse(path: RunPath) -> None:
  """Refuses a directory with a config.json not written by a run, or with model weights.

  Args:
    path: --workdir, with a config.json.

  Raises:
    UserError: it is a published model, or the file is another project's or unreadable.
  """
  try:
    values = files.read_json(path / CONFIG_FILE)
  except FileNotFoundError:  # Another process of the job has removed it.
    return
  except (OSError, ValueError) as e:
    raise UserError(
      f"--workdir={path}: its {CONFIG_FILE} cannot be read ({e}) and would be "
      "overwritten. Choose a new directory, or move the file away."
    ) from e
  is_object = isinstance(values, dict)
  weights = any(p.name.endswith(".safetensors") for p in path.iterdir())
  if weights or (is_object and "model_type" in values):
    raise UserError(
      f"--workdir={path} holds a published model, whose {CONFIG_FILE} would be "
      "overwritten. Choose a new directory."
    )
  if not is_object or "schema_version" not in values:
    raise UserError(
      f"--workdir={path}: its {CONFIG_FILE} is not a run's and would be overwritten. "
      "Choose a new directory."
    )
