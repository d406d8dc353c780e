"""How much sooner does the MoE model reach the dense model's final loss?

  python -m experiments.speedup.run --workdir=runs/speedup

Trains a config and its dense twin of equal active FLOPs (the same command with
--config.moe.dense_twin=true) on the same batches, and reports at which step, and
after how much training time, the MoE model first reaches the final validation loss of
the dense one. Switch Transformers (arXiv:2101.03961, section 3.1 and figure 5) reports
up to 7x; "not reached" is a result too. Finished runs are not repeated: the same command
resumes what was interrupted and redraws the picture.

Writes result.json and speedup.png to --output (default: this folder).
"""

import json
import pathlib
import statistics
import subprocess
from typing import Any

from absl import flags

from experiments.child import train_command
from moejax.cli import flags as cli
from moejax.errors import UserError

_HERE = pathlib.Path(__file__).parent
VARIANTS = {"moe": (), "dense": ("moe.dense_twin=true",)}


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string("output", str(_HERE), "Where the result is written.")
  flags.DEFINE_integer(
    "eval_every",
    50,
    "Steps between evaluations: the resolution.",
    lower_bound=1,
    upper_bound=2**31 - 1,
  )


def main() -> int:
  cli.get_config()  # Refuses a mistake before the first run starts.
  workdir = pathlib.Path(flags.FLAGS.workdir or "runs/speedup")
  for name, extra in VARIANTS.items():
    train(workdir / name, extra)
  curves = {name: read_curve(workdir / name / "metrics.jsonl") for name in VARIANTS}
  result = compare(curves)
  output = pathlib.Path(flags.FLAGS.output)
  output.mkdir(parents=True, exist_ok=True)
  (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
  draw(curves, result, output / "speedup.png")
  print(describe(result))
  print(f"result: {output / 'result.json'}\npicture: {output / 'speedup.png'}")
  return 0


def train(workdir: pathlib.Path, extra: tuple[str, ...]) -> None:
  """One run in its own process, so that neither warms the other's caches."""
  every = f"train.eval_every={flags.FLAGS.eval_every}"
  command = train_command(workdir, every, "train.eval_batches=0", *extra)
  if code := subprocess.run(command, check=False).returncode:
    raise UserError(f"The run in {workdir} ended with exit code {code}; see above.")


def read_curve(path: pathlib.Path) -> dict[str, Any]:
  """Validation loss by step, and seconds of training per step (their median)."""
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  evaluated = [line for line in lines if "validation_loss" in line]
  speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
  tokens = json.loads((path.parent / "config.json").read_text())
  per_step = tokens["train"]["batch_size"] * tokens["data"]["sequence_length"]
  return {
    "step": [line["step"] for line in evaluated],
    "loss": [line["validation_loss"] for line in evaluated],
    "seconds_per_step": per_step / statistics.median(speeds),
  }


def first_reached(steps: list[int], losses: list[float], target: float) -> float | None:
  """Step at which a falling curve first reaches the target loss, interpolated linearly
  between two evaluations; None if it never does.
  """
  for index, loss in enumerate(losses):
    if loss <= target:
      if index == 0:
        return float(steps[0])
      drop = losses[index - 1] - loss
      share = (losses[index - 1] - target) / drop if drop > 0 else 1.0
      return float(steps[index - 1] + share * (steps[index] - steps[index - 1]))
  return None


def compare(curves: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """The headline: steps and seconds, dense over MoE."""
  moe, dense = curves["moe"], curves["dense"]
  target = dense["loss"][-1]
  step = first_reached(moe["step"], moe["loss"], target)
  result: dict[str, Any] = {
    "dense_steps": dense["step"][-1],
    "dense_final_loss": target,
    "moe_final_loss": moe["loss"][-1],
    "moe_step_at_dense_loss": step,
    "dense_seconds_per_step": dense["seconds_per_step"],
    "moe_seconds_per_step": moe["seconds_per_step"],
    "speedup_steps": None,
    "speedup_seconds": None,
  }
  if step is not None:
    cost = moe["seconds_per_step"] / dense["seconds_per_step"]
    result["speedup_steps"] = dense["step"][-1] / step
    result["speedup_seconds"] = result["speedup_steps"] / cost
  return result


def describe(result: dict[str, Any]) -> str:
  """The result in two sentences."""
  if result["speedup_steps"] is None:
    return (
      f"Not reached: the MoE model ends at {result['moe_final_loss']:.4f} nats/token, "
      f"the dense one at {result['dense_final_loss']:.4f}."
    )
  return (
    f"The MoE model has the dense model's final loss ({result['dense_final_loss']:.4f} "
    f"nats/token after {result['dense_steps']} steps) at step "
    f"{result['moe_step_at_dense_loss']:.0f}: {result['speedup_steps']:.2f}x fewer "
    f"steps, in {1 / result['speedup_seconds']:.2f}x the dense model's training time. "
    f"It ends at {result['moe_final_loss']:.4f}."
  )


def draw(
  curves: dict[str, dict[str, Any]], result: dict[str, Any], path: pathlib.Path
) -> None:
  """Both curves against steps and against training time."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.5), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, 2, sharey=True)
  for name, curve in curves.items():
    axes[0].plot(curve["step"], curve["loss"], label=name)
    minutes = [s * curve["seconds_per_step"] / 60 for s in curve["step"]]
    axes[1].plot(minutes, curve["loss"], label=name)
  for axis, label in zip(axes, ("step", "minutes of training"), strict=True):
    axis.axhline(result["dense_final_loss"], color="grey", linewidth=0.8, linestyle="--")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("validation loss (nats/token)")
  axes[0].legend()
  if result["speedup_steps"] is not None:
    axes[0].set_title(f"{result['speedup_steps']:.2f}x fewer steps")
    axes[1].set_title(f"{result['speedup_seconds']:.2f}x less time")
  figure.savefig(path, dpi=110)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
