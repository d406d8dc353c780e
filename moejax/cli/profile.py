"""Profile a train step: where its time goes, part by part.

  python -m experiments.profile --config=configs/default.py [--workdir=RUN] [--steps=5]
    [--out=DIR] [--config.moe.num_experts=16]

Compiles the train step, takes a few steps on the real text and traces them with
jax.profiler. With --workdir the run's config and newest parameters are used, and nothing
of the run is changed. Prints a table for each device: milliseconds of a step in each
part, forward and backward, and waiting. --out (default RUN/profile; without --workdir
nothing is kept) gets profile.json and the trace, for Perfetto (trace.json.gz) or XProf
(xplane.pb). docs/profile.md says how it is counted. Several processes can step together,
started as for experiments.train; the first one profiles its own devices.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from moejax.cli import arguments
from moejax.cli import flags as cli
from moejax.config import Config
from moejax.errors import ConfigError

_STEPS = flags.DEFINE_integer(
  "steps", 5, "Steps to trace.", lower_bound=1, upper_bound=1000
)
_OUT = flags.DEFINE_string("out", None, "Directory of the results.")

_FILE = "profile.json"
_WIDTH = 100


def main() -> None:
  workdir = cli.run_directory() if flags.FLAGS["workdir"].value else None
  config = _config(workdir)
  # After the configuration, so that a mistake there does not cost the import of jax.
  from moejax.launch import distributed
  from moejax.run import provenance

  flags_given = {"--workdir": str(workdir), "--steps": _STEPS.value, "--out": _OUT.value}
  with distributed.joined(facts=provenance.facts(config) | flags_given):
    profile(config, workdir)


def profile(config: Config, workdir: pathlib.Path | None) -> None:
  """Profiles a step; called in every process of a job."""
  import jax

  from moejax.analysis import step_profile
  from moejax.launch import host_memory
  from moejax.run import progress, results

  host_memory.keep_freed_pages()
  index = jax.process_index()
  with _directory(workdir) as (out, kept):
    if index == 0:
      trace = arguments.writable(out) / step_profile.TRACE
      trace.mkdir(parents=True, exist_ok=True)
    reporter = progress.make_reporter(_STEPS.value, process_index=index)
    try:
      found = step_profile.profile(
        config,
        out,
        num_steps=_STEPS.value,
        reporter=reporter,
        workdir=workdir,
      )
    finally:
      reporter.close()
    if found is None:
      return
    if kept:
      results.write(out / _FILE, step_profile.as_json(found))
    show(found)
    if kept:
      print(f"{'numbers':<10}{out / _FILE}\n{'trace':<10}{found.trace.parent}")


def _config(workdir: pathlib.Path | None) -> Config:
  """Returns the config of the run, or of --config.

  Raises:
    ConfigError: both are given, and they describe different runs.
  """
  if workdir is None:
    return cli.get_config()
  from moejax.checkpoint.manager import peek
  from moejax.run import owner
  from moejax.run import workdir as workdir_lib

  _, trained, meta = peek(workdir)
  trained = owner.own_paths(trained, meta.get("owner"), cli.overrides(), workdir)
  given = flags.FLAGS["config"].present
  config = cli.get_config(base=None if given else trained)
  refused = workdir_lib.refused_changes(trained, config)
  changes = [row for row in refused if row[0] != "train.num_steps"]
  if changes:
    name, before, now = changes[0]
    more = f", and {len(changes) - 1} more fields" if len(changes) > 1 else ""
    raise ConfigError(
      f"--workdir={workdir} was trained with --config.{name}={before}, not {now}{more}. "
      "Leave --config out to profile the run, or --workdir to profile the config."
    )
  return config


@contextlib.contextmanager
def _directory(workdir: pathlib.Path | None) -> Iterator[tuple[pathlib.Path, bool]]:
  """Yields where the results go, and whether they are kept."""
  if _OUT.value or workdir:
    yield pathlib.Path(_OUT.value) if _OUT.value else workdir / "profile", True  # pyright: ignore[reportOptionalOperand]
    return
  with tempfile.TemporaryDirectory() as directory:
    yield pathlib.Path(directory), False


def show(found: Any) -> None:
  """Prints a table for each device, and what the host did."""
  console = Console()
  console = console if console.is_terminal else Console(width=_WIDTH)
  for device in found.devices:
    console.print(make_table(device, found.step_ms))
    if device.unattributed and device.unattributed_share > 0.01:
      longest = ", ".join(f"{name} {ms:.2f} ms" for name, ms in device.unattributed)
      console.print(f"Longest without a part: {longest}")
  host = found.host
  print(
    f"A step took {found.step_ms:.1f} ms in the trace ({found.num_steps} steps), "
    f"{found.untraced_ms:.1f} ms without the profiler.\n"
    f"Host, ms a step: {host.data:.1f} for the next batch, {host.placing:.1f} putting it "
    f"on the devices, {host.calling:.1f} starting the step, {host.waiting:.1f} waiting "
    "for it."
  )


def make_table(device: Any, step_ms: float) -> Table:
  """Returns the table of one device."""
  table = Table(box=box.SIMPLE_HEAD, title=f"device {device.index}", title_justify="left")
  for name in ("part", "forward ms", "backward ms", "total ms", "of the step"):
    table.add_column(name, justify="left" if name == "part" else "right")

  def add(name: str, *times: float | None, total: float) -> None:
    shown = ["" if time is None else f"{time:.2f}" for time in (*times, total)]
    table.add_row(name, *shown, f"{100 * total / step_ms:.1f}%")

  for part in device.parts:
    add(part.name, part.forward, part.backward, total=part.total)
  table.add_section()
  add("busy", None, None, total=device.busy)
  add("  in fusions of several parts", None, None, total=device.mixed)
  if device.collectives:
    add("  in transfers between devices", None, None, total=device.collectives)
  add("waiting", None, None, total=device.waiting)
  return table


def run() -> None:
  """Runs the program."""
  cli.define_config()
  cli.run(main)


if __name__ == "__main__":
  run()
