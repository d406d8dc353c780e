"""Which router learns best for the same work? Causal ones, several seeds each.

  python -m experiments.routers.run --workdir=runs/routers [--seeds=3] [--only=TEXT]

Trains the config under every entry of `VARIANTS`: all have the same active FLOPs
outside the router and, except for the dense twin, the same number of expert parameters,
since K > 1 cuts each expert into K parts (`moe.segments`). Every causal router is there
but `dense`, which cannot have the same FLOPs. Reports the validation loss (mean and
standard deviation over seeds), the drop rate over the whole run, the time of a step, and
for the last logged steps the drop rate, the largest load and the entropy of the router.
Finished runs are not repeated: the same command resumes, and --seeds=5 adds two.

Committed result: 200 steps of 8 sequences, on one core of a machine that was busy with
other work, so its times are not comparable (those of tools.benchmark_layer --routers
are):
  --config=configs/default.py --config.train.num_steps=200 --config.train.batch_size=8

To study a router of your own, register it and add a line to `VARIANTS` in spec.py.
Writes result.json, table.md and routers.png to --output (default: this folder).
"""

import json
import math
import os
import pathlib
import statistics
import subprocess
from typing import Any

from absl import flags

from experiments.child import train_command
from experiments.routers import spec
from moejax.cli import flags as cli
from moejax.errors import UserError
from moejax.options import show

_HERE = pathlib.Path(__file__).parent
_LAST = 10
"""Log lines at the end of a run that are averaged."""

VARIANTS: dict[str, tuple[str, ...]] = {
  name: tuple(f"{field}={show(value)}" for field, value in fields.items())
  for name, fields in spec.VARIANTS.items()
}
"""What spec.py says, as flags."""


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string("output", str(_HERE), "Where the result is written.")
  flags.DEFINE_integer(
    "seeds", 3, "Runs of each router.", lower_bound=1, upper_bound=1000
  )
  flags.DEFINE_string("only", "", "Variants whose name contains this.")


def main() -> int:
  cli.get_config()  # Refuses a mistake before the first run starts.
  workdir = pathlib.Path(flags.FLAGS.workdir or "runs/routers")
  variants = {n: v for n, v in VARIANTS.items() if flags.FLAGS.only in n}
  if not variants:
    raise UserError(f"--only={flags.FLAGS.only}: none of {', '.join(VARIANTS)}.")
  rows = []
  for name, extra in variants.items():
    runs = []
    for seed in range(flags.FLAGS.seeds):
      directory = workdir / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
      train(directory, workdir / "compiled", (*extra, f"train.seed={seed}"))
      runs.append(read_run(directory))
    rows.append({"router": name} | summarise(runs))
    print(describe(rows[-1]), flush=True)
  output = pathlib.Path(flags.FLAGS.output)
  output.mkdir(parents=True, exist_ok=True)
  (output / "result.json").write_text(json.dumps(rows, indent=1) + "\n")
  (output / "table.md").write_text(table(rows))
  draw(rows, output / "routers.png")
  print(table(rows))
  print(f"result: {output / 'result.json'}\npicture: {output / 'routers.png'}")
  return 0


def train(workdir: pathlib.Path, cache: pathlib.Path, extra: tuple[str, ...]) -> None:
  """One run in its own process; seeds of one router share compiled programs."""
  # The loss that is compared is that of the whole validation split.
  whole = "train.final_eval_tokens=0"
  settings = ("train.eval_every=0", "train.checkpoint_every=0", whole, *extra)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache.resolve())}
  log = workdir.with_suffix(".log")
  log.parent.mkdir(parents=True, exist_ok=True)
  with open(log, "w", encoding="utf-8") as out:
    code = subprocess.run(
      train_command(workdir, *settings),
      check=False,
      stdout=out,
      stderr=subprocess.STDOUT,
      env=environment,
    ).returncode
  if code:
    raise UserError(f"The run in {workdir} ended with exit code {code}; see {log}.")


def read_run(workdir: pathlib.Path) -> dict[str, float]:
  """The numbers of one finished run."""
  loss = json.loads((workdir / "eval.json").read_text())["loss"]
  lines = [json.loads(s) for s in (workdir / "metrics.jsonl").read_text().splitlines()]
  config = json.loads((workdir / "config.json").read_text())
  per_step = config["train"]["batch_size"] * config["data"]["sequence_length"]
  speed = statistics.median(s["tokens_per_second"] for s in lines)
  run = {"loss": loss, "milliseconds_per_step": 1e3 * per_step / speed}
  last = [line for line in lines[-_LAST:] if "moe" in line]
  if last:
    run["dropped_in_all"] = statistics.mean(line["dropped_fraction"] for line in lines)
    run["dropped"] = statistics.mean(line["dropped_fraction"] for line in last)
    for name in ("max_load_ratio", "entropy_fraction"):
      values = [v for line in last for v in line["moe"][name]]
      run[name] = statistics.mean(values)
  return run


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
  """Means over seeds; for the loss also every value and the standard deviation."""
  losses = [run["loss"] for run in runs]
  means = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
  spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
  return means | {"losses": losses, "loss_std": None if math.isnan(spread) else spread}


def describe(row: dict[str, Any]) -> str:
  return (
    f"{row['router']:22} {row['loss']:.4f}  {row['milliseconds_per_step']:.0f} ms/step"
  )


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown, best loss first."""
  head = "| router | loss | +- | dropped, all | dropped, end | max load | entropy "
  lines = [head + "| ms/step |", "|" + " --- |" * 8]
  for row in sorted(rows, key=lambda row: row["loss"]):
    spread = "" if row["loss_std"] is None else f"{row['loss_std']:.4f}"
    routing = [""] * 4
    if "dropped" in row:
      routing = [f"{100 * row[name]:.1f}%" for name in ("dropped_in_all", "dropped")]
      routing.append(f"{row['max_load_ratio']:.2f}")
      routing.append(f"{100 * row['entropy_fraction']:.0f}%")
    cells = [row["router"], f"{row['loss']:.4f}", spread, *routing]
    lines.append(f"| {' | '.join(cells)} | {row['milliseconds_per_step']:.0f} |")
  return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Loss of every seed, best router on top."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = sorted(rows, key=lambda row: -row["loss"])
  figure = Figure(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
  FigureCanvasAgg(figure)
  axis = figure.subplots()
  for height, row in enumerate(rows):
    axis.plot(row["losses"], [height] * len(row["losses"]), "o", color="C0", alpha=0.6)
    axis.plot([row["loss"]], [height], "|", color="black", markersize=14)
  axis.set_yticks(range(len(rows)), [row["router"] for row in rows])
  axis.set_xlabel("validation loss (nats/token); dots are seeds, bars their mean")
  axis.grid(axis="x", alpha=0.3)
  figure.savefig(path, dpi=110)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
