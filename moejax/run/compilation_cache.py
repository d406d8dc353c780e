"""JAX's persistent compilation cache, on by default, so that later starts are faster.

    <data cache>/xla/jax-VERSION-MACHINE/    programs that took over a second to compile

JAX keys an entry by the program, the compiler and its options, and the kind of device.
XLA's CPU code fits only the CPU model it was compiled for, which the key does not
include, so the directory's name does. An entry is code: keep the directory private.

The cache only makes starts faster, so any problem with it is a warning.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import tempfile
import warnings
from typing import Any

from absl import flags, logging

from moejax.errors import UserError

flags.disclaim_key_flags()

FLAG = "compilation_cache"
NONE = "none"
_VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
_ROOM = 256 << 20
"""Bytes that must be free: JAX would leave a partial entry on a full disk."""
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_CPU_LINES = ("model name", "flags", "Features", "CPU implementer", "CPU part")
_DAMAGED = "Error reading persistent compilation cache entry for "


def define_flag() -> None:
  """Defines --compilation_cache, once per program."""
  if FLAG not in flags.FLAGS:
    flags.DEFINE_string(
      FLAG,
      None,
      "Directory of compiled programs, or none. Default: with the prepared data; with "
      "several processes, none.",
    )


def enable(data_cache_dir: str) -> pathlib.Path | None:
  """Turns the cache on, unless the flag is none or, without it, JAX's variables are set.

  Call it after the processes of a job have joined and before the first compilation.
  Several processes use only a directory given by the flag: if just some of them see the
  cache, only the others compile, and GPU compilers may wait for each other.

  Args:
    data_cache_dir: --config.data.cache_dir.

  Returns:
    The directory; None if this call did not turn the cache on.
  """
  import jax

  given = flags.FLAGS[FLAG].value if FLAG in flags.FLAGS else NONE
  if given == NONE:
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  if given is None and any(name in os.environ for name in _VARIABLES):
    return None
  if given is None and jax.process_count() > 1:
    return None
  try:
    directory = _root(given, data_cache_dir) / f"jax-{jax.__version__}-{machine()}"
    _check(directory)
  except (OSError, UserError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    logging.warning(
      "Compiled programs are not kept (%s). --%s=DIR chooses another directory; none "
      "turns this warning off.",
      reason,
      FLAG,
    )
    return None
  jax.config.update("jax_compilation_cache_dir", str(directory))
  _mend(directory)
  return directory


def machine() -> str:
  """Returns a short name of the processor that compiled code is for."""
  try:
    text = _CPUINFO.read_text()
  except OSError:
    text = ""
  first = text.split("\n\n")[0].splitlines()
  lines = [line for line in first if line.split("\t")[0].strip() in _CPU_LINES]
  described = "\n".join(lines) or platform.processor()
  return f"{platform.machine()}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"


def _root(given: str | None, data_cache_dir: str) -> pathlib.Path:
  if given:
    return pathlib.Path(given).expanduser().absolute()
  from moejax.data.cache import cache_root

  return cache_root(data_cache_dir) / "xla"


def _check(directory: pathlib.Path) -> None:
  """Raises OSError or UserError if nothing can be stored there."""
  try:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      pass
  except OSError as error:
    raise UserError(f"{directory} is not writable: {error.strerror}") from error
  free = shutil.disk_usage(directory).free
  if free < _ROOM:
    raise UserError(f"{directory} has only {free >> 20} MB left")


def _mend(directory: pathlib.Path) -> None:
  """Removes unreadable entries, which JAX would otherwise warn of at every start."""
  show = warnings.showwarning

  def tell(message: Any, *rest: Any, **more: Any) -> None:
    text = str(message)
    if not text.startswith(_DAMAGED):
      show(message, *rest, **more)
      return
    # The quoted program name is the prefix of its entries' names.
    name = text.removeprefix(_DAMAGED).split("'")[1]
    for entry in directory.glob(f"{name}-*"):
      entry.unlink(missing_ok=True)
    logging.warning("A damaged entry of %s was removed: %s.", directory, name)

  warnings.showwarning = tell
