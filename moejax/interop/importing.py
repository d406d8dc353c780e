"""Makes a run's directory from a published model.

The small files are written first. The checkpoint is last, and gets its final name only
when it is complete: a conversion that was killed leaves a directory without a run, and
the same command starts it again. run.json is the first file and names the source, so that
no other model can take the directory over. A conversion that fails removes its files.
"""

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax

from moejax import files
from moejax.checkpoint import lazy
from moejax.checkpoint.manager import Checkpointer
from moejax.checkpoint.read import DamagedCheckpointError, read_meta
from moejax.config import Config
from moejax.config import text as config_text
from moejax.data.tokenizer import FILE as TOKENIZER_FILE
from moejax.errors import ConfigError, UserError
from moejax.interop.published import TAKEN_ALONG, Published
from moejax.options import show
from moejax.run import provenance
from moejax.run import workdir as workdir_lib
from moejax.run.files import CONFIG_FILE, DIRECTORY, list_steps
from moejax.types import Params

STEP = 0
"""Step of the checkpoint of a converted run."""

SOURCE = "converted_from"
"""Key in run.json and a checkpoint's meta: the folder, a digest of its headers, and keys
of config.json that only Transformers reads."""

_KEPT = (
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "decoder_start_token_id",
  "initializer_range",
  "router_aux_loss_coef",
)


def make_run(
  published: Published,
  workdir: Path | str,
  config: Config,
  shardings: Params | None = None,
) -> dict[str, str]:
  """Writes a run's directory, with one checkpoint.

  Args:
    published: the model.
    workdir: new, empty, or left by a conversion of the same model that was killed.
    config: the model's, with any other fields changed.
    shardings: tree like the parameters, of the mesh to read them into first; None reads
      and writes one parameter after the other.

  Returns:
    The fingerprint of each parameter, by dotted name.

  Raises:
    UserError: the directory is in use, holds something else, or is inside the model's
      folder or contains it; a tensor is unreadable, or the disk is full.
    ConfigError: it holds this conversion with another config.
  """
  path, origin = Path(workdir), source_digest(published)
  _refuse_nested(path, published.folder)
  if (found := converted(path)) is not None:
    _refuse_other_source(path, found[SOURCE], origin)
    _refuse_other_config(path, config)
    return sums(found["leaves"])
  if list_steps(path / DIRECTORY):
    raise UserError(f"--workdir={path} already holds a run. Choose another directory.")
  _refuse_other_source(path, _begun(path), origin)
  _refuse_foreign(path)
  is_new = not path.exists()
  workdir_lib.prepare(path, config)
  try:
    _write_small_files(published, path, config, origin)
    return _write_checkpoint(published, path, config, origin, shardings)
  except Exception:
    _remove(path, is_new)
    raise
  finally:
    workdir_lib.release(path)


def _refuse_nested(path: Path, source: Path) -> None:
  """Rejects a run inside its source, which is only read, or containing it."""
  run, model = path.resolve(), source.resolve()
  if run.is_relative_to(model):
    where = "is" if run == model else "is inside"
  elif model.is_relative_to(run):
    where = "contains"
  else:
    return
  raise UserError(
    f"--workdir={path} {where} --from_hf={source}, which is only read. Choose a "
    "directory outside it."
  )


def _refuse_foreign(path: Path) -> None:
  """Rejects folders named like ours that no conversion created, since a conversion that
  fails would remove them."""
  # `workdir_lib.prepare` checks whose config.json it is; run.json is the first we write.
  if any((path / name).exists() for name in (CONFIG_FILE, workdir_lib.RUN_FILE)):
    return
  for folder in (path / DIRECTORY, (path / TOKENIZER_FILE).parent):
    if folder.is_dir() and any(folder.iterdir()):
      raise UserError(
        f"--workdir={path} has no {CONFIG_FILE}, and the files in {folder.name}/ are not "
        "a run's. Choose a new directory."
      )


def _begun(path: Path) -> dict[str, Any] | None:
  """Returns the source recorded by a killed conversion; None if there was none."""
  try:
    found = files.read_json(path / workdir_lib.RUN_FILE)[SOURCE]
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return found if isinstance(found, dict) else None


def _refuse_other_source(
  path: Path, found: dict[str, Any] | None, origin: dict[str, Any]
) -> None:
  if found is not None and found.get("digest") != origin["digest"]:
    raise UserError(
      f"--workdir={path} holds a conversion of {found.get('folder')}, which is another "
      "model or has changed since. Choose another directory, or remove this one."
    )


def _refuse_other_config(path: Path, config: Config) -> None:
  try:
    stored = config_text.from_dict(files.read_json(path / CONFIG_FILE))
  except (OSError, ValueError) as e:
    raise UserError(
      f"{path / CONFIG_FILE} cannot be read ({e}). Remove the folder and convert again."
    ) from e
  changed = config_text.difference(stored, config)
  if changed:
    name, old, new = changed[0]
    raise ConfigError(
      f"--config.{name}={show(new)}: --workdir={path} holds the finished conversion with "
      f"{show(old)}. Give the value to the program that uses the run, or choose another "
      "directory."
    )


def _remove(path: Path, is_new: bool) -> None:
  """Removes what a failed conversion wrote, and the directory if it made it."""
  if jax.process_index() != 0:
    return
  for folder in (path / DIRECTORY, (path / TOKENIZER_FILE).parent):
    if folder != path:
      shutil.rmtree(folder, ignore_errors=True)
  for name in (CONFIG_FILE, workdir_lib.RUN_FILE):
    (path / name).unlink(missing_ok=True)
  if is_new:
    with contextlib.suppress(OSError):
      path.rmdir()


def converted(path: Path) -> dict[str, Any] | None:
  """Returns the meta of a finished conversion in a directory; None if there is none."""
  if list_steps(path / DIRECTORY) != [STEP]:
    return None
  try:
    meta = read_meta(path / DIRECTORY / str(STEP))
  except (DamagedCheckpointError, UserError):
    return None
  return meta if isinstance(meta.get(SOURCE), dict) else None


def source_digest(published: Published) -> dict[str, Any]:
  """Returns the value of the key `SOURCE`."""
  digest = hashlib.sha256()
  digest.update(config_text.dump(published.config).encode())
  for name, tensor in published.loader.source.tensors.items():
    stamps = [
      (p.file.name, p.file.stat().st_size, p.file.stat().st_mtime_ns, p.offset)
      for p in tensor.parts
    ]
    digest.update(repr((name, tensor.dtype, tensor.shape, stamps)).encode())
  return {
    "folder": str(published.folder.resolve()),
    "model_type": published.architecture.name,
    "digest": digest.hexdigest()[:16],
    "kept": {k: published.values[k] for k in _KEPT if k in published.values},
  }


def sums(leaves: dict[str, Any]) -> dict[str, str]:
  """Returns the fingerprint of each parameter, from a checkpoint's meta."""
  return {
    name.removeprefix("params."): leaf["sum"]
    for name, leaf in leaves.items()
    if name.startswith("params.")
  }


def _write_small_files(
  published: Published, path: Path, config: Config, origin: dict[str, Any]
) -> None:
  if jax.process_index() != 0:
    return
  files.write_json(
    path / workdir_lib.RUN_FILE,
    {
      SOURCE: origin,
      "dataset_fingerprint": None,
      "corpus_fingerprint": None,
      "mesh": None,
      "versions": provenance.versions(),
      "revision": provenance.revision(),
    },
  )
  folder = (path / TOKENIZER_FILE).parent
  shutil.rmtree(folder, ignore_errors=True)  # Left by a conversion that was killed.
  if published.tokenizer is not None:
    published.tokenizer.save(path)
  for name in TAKEN_ALONG:
    if (published.folder / name).is_file():
      folder.mkdir(exist_ok=True)
      with files.replacing(folder / name) as temporary:
        shutil.copyfile(published.folder / name, temporary)
  files.write_json(path / CONFIG_FILE, config_text.to_dict(config))


def _write_checkpoint(
  published: Published,
  path: Path,
  config: Config,
  origin: dict[str, Any],
  shardings: Params | None,
) -> dict[str, str]:
  if shardings is None:
    leaves = lazy.save(
      path / DIRECTORY,
      STEP,
      published.loader.lazy_params(),
      config=config,
      metadata={"dataset_fingerprint": None, SOURCE: origin},
      logical_axes=published.model.logical_axes(),
    )
    return sums(leaves)
  checkpointer = Checkpointer(
    path / DIRECTORY,
    keep_last=1,
    keep_best=0,
    config=config,
    metadata={"dataset_fingerprint": None, SOURCE: origin},
    logical_axes=published.model.logical_axes(),
    warn=lambda text: None,
  )
  params = published.loader.params(shardings)
  checkpointer.save(STEP, {"params": params}, position={})
  checkpointer.close()
  if checkpointer.failures:
    raise UserError(
      f"--workdir={path}: the checkpoint could not be written "
      f"({checkpointer.failures[-1][1]}). Make room, and give the same command again."
    )
  return sums(read_meta(path / DIRECTORY / str(STEP))["leaves"])
