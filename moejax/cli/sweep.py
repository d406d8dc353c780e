r"""Run every combination of some settings, and report what they show.

  python -m experiments.sweep --config=default --workdir=runs/ec --seeds=3 \
    --sweep.moe.num_experts=8,16,32 --sweep.moe.capacity_factor=1,1.25,2,none [--dry_run]

Each --sweep.SECTION.FIELD=A,B,C is an axis, and all axes are multiplied; all flags
--zip.SECTION.FIELD=A,B,C together are one axis. An option of a router,
--sweep.moe.ROUTER.OPTION=..., multiplies only the points with that router. --config.X=V
changes the base config of all runs. Every point is checked as a single run is, before
anything starts. The same command, or --workdir alone, goes on with a stopped sweep.

--spec=FILE reads a Python file with a docstring and a function get_sweep() that returns
a moejax.sweep.spec.Spec: what flags say, and named variants and conditions. Flags beside
it win: --config replaces its base, --config.X changes it, --sweep.X replaces its axis of
X or adds one, --zip.X the same; --seeds, --match, --match_by and --isoflop replace its
own.

docs/sweeps.md has examples. Exit codes, also of --status: 0 if every run is done, 1 if
any is not, 2 invalid input.
"""

import dataclasses
import math
import os
import pathlib
import shutil
import sys

from absl import flags

from moejax import files
from moejax.cli import dotted, launch, python_file, sweep_axes
from moejax.cli import flags as cli
from moejax.errors import ConfigError, UserError
from moejax.routing.registry import ENV, ROUTERS
from moejax.run import compilation_cache
from moejax.sweep.execution import slurm_options
from moejax.sweep.execution.options import EXECUTORS
from moejax.sweep.points.axes import FIXED

_SPLITS = ("train", "validation", "test")
_SHOWN = 3
"""Number of differences that a message names."""


def define_flags() -> None:
  """Defines the program's flags."""
  _define_what()
  _define_how()
  for prefix, text in (
    ("sweep", "FIELD=A,B,C is an axis: all its values, times others."),
    ("zip", "FIELD=A,B,C: all such flags together are one axis."),
  ):
    dotted.define_prefix(prefix, text, without=FIXED)


def _define_what() -> None:
  flags.DEFINE_string("spec", None, "Python file that describes the sweep.")
  flags.DEFINE_string(
    "seeds", None, "N: seeds 0 to N-1 of each point; or a list, 0,1,5. Default: one seed."
  )
  flags.DEFINE_string(
    "match", None, "active_flops: every point costs as much per token as the base config."
  )
  flags.DEFINE_string(
    "match_by", None, "The field that --match solves for; default: moe.hidden."
  )
  flags.DEFINE_string(
    "isoflop", None, "Training budgets in FLOPs, such as 1e13,3e13; solves the steps."
  )
  flags.DEFINE_bool(
    "skip_impossible", False, "Leave out points that a single run would refuse."
  )
  flags.DEFINE_bool(
    "dry_run", False, "Print every run with its size, FLOPs, memory and time, and stop."
  )


def _define_how() -> None:
  flags.DEFINE_integer("jobs", 1, "Number of runs at once.", 1, 4096)
  flags.DEFINE_enum(
    "executor",
    "local",
    EXECUTORS,
    "Where runs are started; print only prints their commands.",
  )
  flags.DEFINE_integer(
    "devices_per_run",
    None,
    "GPUs per run, default: 1; without a GPU, simulated CPU devices.",
    1,
    65_536,
  )
  flags.DEFINE_bool("status", False, "Print the state of every run, and stop.")
  flags.DEFINE_bool("retry_failed", False, "Start failed runs again.")
  flags.DEFINE_bool(
    "allow_changes", False, "Go on although the sweep or the code has changed."
  )
  flags.DEFINE_bool("evaluate", False, "Evaluate finished runs instead of training.")
  flags.DEFINE_enum("split", "validation", _SPLITS, "With --evaluate: split to read.")
  flags.DEFINE_string(
    "eval_capacity_factor", None, "With --evaluate: capacity factors, e.g. 1,1.25,none."
  )
  flags.DEFINE_integer(
    "time_steps", 0, "Afterwards, time this many steps of each shape, alone.", 0, 100_000
  )
  slurm_options.define_flags()
  launch.define_flags()
  flags.adopt_module_key_flags(launch)


def main() -> int:
  given = flags.FLAGS
  _refuse_unread()
  if given.status:
    return _status(_workdir())
  if given.target and given.executor != "print":
    raise UserError(f"--target={given.target} is only read with --executor=print.")
  if not given.target:
    launch.refuse_without_target()
  stray = [] if "slurm" in (given.executor, given.target) else slurm_options.given()
  if stray:
    raise UserError(
      f"--{stray[0]} is only read with --executor=slurm. Add that, or leave it out."
    )
  if given.executor == "slurm" and shutil.which("sbatch") is None:
    raise UserError(
      "--executor=slurm: there is no sbatch on the PATH. Start the sweep where Slurm is "
      "installed, or use --executor=local, or print for the commands alone."
    )
  if not given.dry_run:
    _workdir()  # Refused before the slow imports.
  points, skipped, values = _points()
  if added := ROUTERS.files():  # Runs read a stored config, not the file that added one.
    os.environ[ENV] = os.pathsep.join(added)
  if given.dry_run:
    _show(points, skipped)
    return 0
  return _run(points, values)


def _refuse_unread() -> None:
  given = flags.FLAGS
  for name in ("split", "eval_capacity_factor"):
    if given[name].present and not given.evaluate:
      raise UserError(
        f"--{name}={given[name].value} is only read with --evaluate. Add that, or leave "
        "it out."
      )


def _workdir() -> pathlib.Path:
  if not flags.FLAGS.workdir:
    raise UserError(
      "--workdir=DIR is missing: give the directory of the sweep, or --dry_run."
    )
  return pathlib.Path(flags.FLAGS.workdir)


def _is_described() -> bool:
  """Returns whether this command line describes what to run, not only where."""
  given = flags.FLAGS
  words = (given.spec, given.seeds, given.match, given.match_by, given.isoflop)
  return bool(
    any(word is not None for word in words)
    or given.skip_impossible
    or given["config"].present
    or cli.given()
    or cli.overrides()
  )


def _points() -> tuple[list, list, dict]:
  """Returns the points, those left out, and the content of spec.json."""
  if _is_described() or not flags.FLAGS.workdir:
    spec = get_spec()
    # Imported here, since it imports jax: a wrong flag should fail at once.
    from moejax.sweep.points import stored
    from moejax.sweep.points.expand import expand

    found = expand(spec, _devices_of_a_run())
    return found.points, found.skipped, stored.to_json(spec, found.points, found.skipped)
  from moejax.sweep.points import stored

  _, points = stored.read(_workdir())
  return points, [], _stored_values()


def _devices_of_a_run() -> int | None:
  """Returns how many devices a run here will see, if that was said."""
  given = flags.FLAGS
  if given.executor != "local":
    return None
  said = given.devices_per_run or os.environ.get("JAX_NUM_CPU_DEVICES", "")
  return int(said) if said and str(said).isdecimal() else None


def _stored_values() -> dict:
  """Returns spec.json as the current code would write it now."""
  from moejax.run import provenance
  from moejax.sweep.spec import SPEC_FILE

  values = files.read_json(_workdir() / SPEC_FILE)
  return values | {"revision": provenance.revision()}


# --------------------------------------------------------------------------------- spec


def get_spec():
  """Returns the specification of this command line; see the module's docstring.

  Raises:
    ConfigError: the file or a flag cannot be used.
  """
  from moejax.sweep.points import axes
  from moejax.sweep.spec import Spec

  given = flags.FLAGS
  varied = axes.parse([(flag.prefix, flag.name, flag.text) for flag in cli.given()])
  if given.spec is None:
    base = cli.get_unchecked_config()
    spec = Spec(base=base, seeds=(base.train.seed,))
  else:
    spec = _load_spec(given.spec)
    replaced = given["config"].present
    base = cli.get_unchecked_config(None if replaced else spec.base)
  typed = {flag.name: f"--{flag.prefix}.{flag.name}" for flag in cli.given()}
  changes: dict = {"base": base, "axes": sweep_axes.joined(spec.axes, varied, typed)}
  if given.seeds is not None:
    changes["seeds"] = sweep_axes.seeds(given.seeds)
  if given.match is not None:
    changes["match"] = given.match
  if given.match_by is not None:
    changes["match_by"] = given.match_by
  if given.isoflop is not None:
    changes["isoflop"] = _budgets(given.isoflop)
  if given.skip_impossible:
    changes["skip_impossible"] = True
  spec = dataclasses.replace(spec, **changes)
  sweep_axes.refuse_overridden(spec, cli.overrides())
  if given.match_by is not None and not spec.match:
    raise ConfigError(
      f"--match_by={given.match_by}: nothing is matched. Add --match=active_flops."
    )
  return spec


def _load_spec(path: str):
  from moejax.sweep.spec import Spec

  file = pathlib.Path(path)
  if not file.is_file():
    what = "is a directory" if file.is_dir() else "no such file"
    raise ConfigError(f"--spec={path}: {what}. Give a Python file with get_sweep().")
  spec, module = python_file.load(
    f"--spec={path}", file, "get_sweep", Spec, "docs/sweeps.md"
  )
  notes = spec.notes or (module.__doc__ or "").strip()
  title = spec.title or notes.partition("\n")[0].rstrip(".")
  return dataclasses.replace(spec, notes=notes, title=title)


def _budgets(text: str) -> tuple[float, ...]:
  from moejax.sweep.points.budget import check_budget

  found = []
  for word in text.split(","):
    try:
      found.append(float(word))
    except ValueError:
      found.append(math.nan)
    if math.isnan(found[-1]):
      raise ConfigError(
        f"--isoflop={text}: expected numbers of FLOPs, such as --isoflop=1e13,3e13."
      )
    check_budget(found[-1])
  return tuple(found)


# ---------------------------------------------------------------------------- what to do


def _show(points: list, skipped: list) -> None:
  from moejax.cli import sweep_table
  from moejax.sweep.execution import local
  from moejax.sweep.points import predict

  given = flags.FLAGS
  if given.executor != "slurm":
    local.make_slots(given.jobs, given.devices_per_run)  # Same checks as for the sweep.
  workdir = pathlib.Path(given.workdir) if given.workdir else None
  rate = predict.choose_rate(workdir, points)
  found = predict.predict(points, rate, devices_per_run=given.devices_per_run or 1)
  seconds = predict.sweep_seconds(found, rate, predict.slots(rate, given.jobs))
  sweep_table.show(found, skipped, rate=rate, seconds=seconds, jobs=given.jobs)


def _status(workdir: pathlib.Path) -> int:
  from moejax.sweep.execution import directory, schedule

  if _is_described() and (before := directory.read_spec(workdir)) is not None:
    from moejax.sweep.points import stored

    _, _, now = _points()
    # The status describes what is there, whatever code runs now.
    same_code = {"revision": before.get("revision")}
    if changes := stored.differences(before, now | same_code):
      raise ConfigError(
        f"--status: --workdir={workdir} holds a different sweep from these flags: "
        f"{'; '.join(changes[:_SHOWN])}. Leave them out, or give those of the sweep."
      )
  return schedule.status(workdir, num_jobs=flags.FLAGS.jobs)


def _run(points: list, values: dict) -> int:
  from moejax.cli import sweep_print
  from moejax.sweep.execution import schedule
  from moejax.sweep.points import stored

  given = flags.FLAGS
  options = schedule.Options(
    jobs=given.jobs,
    executor=given.executor,
    **({"text_of": sweep_print.renderer(points)} if given.target else {}),
    slurm=slurm_options.from_flags(),
    retry_failed=given.retry_failed,
    devices_per_run=given.devices_per_run,
    allow_changes=given.allow_changes,
    compilation_cache=given[compilation_cache.FLAG].value,
    evaluate=given.evaluate,
    split=given.split,
    eval_capacity_factor=given.eval_capacity_factor,
    time_steps=given.time_steps,
  )
  code = schedule.run(
    _workdir(), points, options=options, spec=values, differences=stored.differences
  )
  if given.executor == "print" or code > 1:  # Nothing ran, or it was stopped.
    return code
  _report(points, values)
  return code


def _report(points: list, values: dict) -> None:
  """Writes the results and the page, and prints the page's sentences."""
  from moejax.run.files import CONFIG_FILE
  from moejax.sweep.execution import states, timing, view
  from moejax.sweep.points import stored
  from moejax.sweep.report import page as report
  from moejax.sweep.report import records
  from moejax.sweep.spec import RUNS

  workdir = _workdir()
  runs = [workdir / RUNS / point.directory for point in points]
  begun = [path for path in runs if (path / CONFIG_FILE).exists()]
  if not begun:
    return
  try:
    said = report.write(
      workdir,
      begun,
      values.get("title") or workdir.name,
      values.get("notes", ""),
      timing=timing.read(workdir),
      states={path.name: view.state(states.examine(path)) for path in begun},
      variants=stored.variant_names(points),
      axes=list(dict.fromkeys(name for point in points for name in point.settings)),
      base=cli.load_config(cli.DEFAULT_CONFIG),
    )
  except report.MissingExtraError as error:  # The runs are still done.
    print(f"Note: {error}", file=sys.stderr)
    return
  said.show()
  for name in (records.CSV_FILE, report.PAGE_FILE):
    print(workdir / name)


def run() -> None:
  """Runs the program."""
  cli.define_config()
  compilation_cache.define_flag()
  define_flags()
  cli.run(main)


if __name__ == "__main__":
  run()
