"""Describes a checkpoint: its tree, a fingerprint per expert and two SHA-256 digests.

Needs neither the model nor the devices, so it also describes a checkpoint that no
longer fits any.
"""

import hashlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moejax.checkpoint import fingerprint
from moejax.checkpoint import params as checkpoint_params
from moejax.checkpoint import read as checkpoint_read
from moejax.errors import UserError
from moejax.run.files import list_steps
from moejax.storage.paths import RunPath

HASHED = ("params", "opt_state")
"""Covered by the SHA-256, unlike the step, the random key and the counts of bad steps."""


def inspect(workdir: RunPath | str, step: int | None = None) -> dict[str, Any]:
  """Reads a checkpoint onto the host and describes it.

  Args:
    workdir: of a run.
    step: None means the newest, damaged or not.

  Returns:
    `step`, `directory`, `meta` (without the table of arrays), `arrays` (name to
    shape, dtype, sharding, checksum), `experts` (layer to a list of fingerprints),
    `sha256` over parameters and optimizer state, `sha256_all` over every array,
    and `damage`: the differences from what was saved, empty if there are none.

  Raises:
    UserError: no such checkpoint, or one that cannot be read at all.
  """
  directory = checkpoint_params.checkpoint_directory(workdir)
  steps = list_steps(directory)
  if step is not None and step not in steps:
    raise UserError(f"--step={step} is not in {directory}, which has {steps}.")
  path = directory / str(steps[-1] if step is None else step)
  try:
    meta = checkpoint_read.read_meta(path)
    state, shardings = _read_arrays(path)
  except checkpoint_read.DamagedCheckpointError as e:
    raise UserError(f"{path} is damaged: {e}. Choose another --step.") from e
  saved = meta.pop("leaves")
  axes = checkpoint_read.saved_expert_axes(saved)
  found = fingerprint.checksums(fingerprint.snapshot(state, axes))
  for name, entry in found.items():
    # Without a target, a typed key is read as the integers that it is made of.
    if name in saved and saved[name]["dtype"].startswith("key<"):
      entry |= {key: saved[name][key] for key in ("shape", "dtype")}
  damage = fingerprint.differences(saved, found)
  damage += [f"{name} is missing" for name in saved if name not in found]
  return {
    "step": meta["step"],
    "directory": str(path),
    "meta": meta,
    "arrays": {
      name: {**entry, "sharding": shardings.get(name, "")}
      for name, entry in found.items()
    },
    "experts": expert_fingerprints(found),
    "sha256": fingerprint.sha256({key: state[key] for key in HASHED if key in state}),
    "sha256_all": fingerprint.sha256(state),
    "damage": damage,
  }


def expert_fingerprints(arrays: dict[str, Any]) -> dict[str, list[str]]:
  """Returns one fingerprint per expert over all of its matrices, by layer.

  Args:
    arrays: checksums by name; those of parameters that stack experts are used.
  """
  matrices: dict[str, list[np.ndarray]] = {}
  for name, entry in arrays.items():
    if name.startswith("params.") and "experts" in entry:
      group = name.rpartition(".")[0]
      matrices.setdefault(group, []).append(np.array(entry["experts"], object))
  out: dict[str, list[str]] = {}
  for group, sums in matrices.items():
    for layer in np.ndindex(*sums[0].shape[:-1]):
      name = ".".join([group, *(str(i) for i in layer)])
      out[name] = [
        hashlib.sha256("".join(s[(*layer, e)] for s in sums).encode()).hexdigest()[:16]
        for e in range(sums[0].shape[-1])
      ]
  return out


def _read_arrays(path: RunPath) -> tuple[dict[str, Any], dict[str, str]]:
  """Reads all arrays as numpy, for any devices that saved them, and their shardings."""
  checkpoint_read.quiet()
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.metadata(path / "state").item_metadata.tree
      as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      args = ocp.args.PyTreeRestore(restore_args=as_numpy)
      state = reader.restore(path / "state", args=args)
  except Exception as e:
    reason = " ".join(str(e).split())[:200]
    raise checkpoint_read.DamagedCheckpointError(
      f"its arrays cannot be read: {reason}"
    ) from e
  shardings = {n: _sharding(m) for n, m in fingerprint.named_leaves(tree).items()}
  return state, shardings


def _sharding(metadata: Any) -> str:
  """Returns `(mesh axes of each array axis) on mesh`, as saved."""
  sharding = getattr(metadata, "sharding", None)
  spec = getattr(sharding, "partition_spec", None)
  if spec is None:
    return "one device"
  sizes = zip(getattr(sharding, "axis_names", ()), getattr(sharding, "shape", ()))
  mesh = ",".join(f"{name}={size}" for name, size in sizes if size > 1)
  axes = ", ".join("-" if axis is None else str(axis) for axis in spec)
  return f"({axes}) on {mesh or '1'}".replace("'", "")


def render(report: dict[str, Any]) -> str:
  """Returns the report as text; the last line is `sha256 <hex>`."""
  meta = report["meta"]
  versions = meta.get("versions", {})
  lines = [
    f"checkpoint {report['directory']}",
    f"step {report['step']}  metric {meta.get('metric')}  "
    f"data {meta.get('position')}  moejax {versions.get('moejax')}  "
    f"jax {versions.get('jax')}  revision {meta.get('revision')}",
    "",
  ]
  rows = [
    (name, f"{entry['dtype']}{entry['shape']}", entry["sum"], entry["sharding"])
    for name, entry in report["arrays"].items()
  ]
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  lines += ["  ".join(c.ljust(w) for c, w in zip(r, (*widths, 0))).rstrip() for r in rows]
  if report["experts"]:
    lines.append("")
  for layer, prints in report["experts"].items():
    lines.append(f"experts of {layer}")
    lines += [f"  expert {number}  {value}" for number, value in enumerate(prints)]
  lines.append("")
  lines += [f"damaged: {problem}" for problem in report["damage"]]
  lines.append(f"sha256 {report['sha256']}")
  return "\n".join(lines)
