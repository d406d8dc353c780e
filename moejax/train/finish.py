"""What a finished run leaves behind: eval.json, report.png, and a few lines to read."""

import json
import math
import os
import pathlib
from typing import Any

import jax

from moejax.data import baselines
from moejax.errors import UserError
from moejax.evaluate import generation, perplexity, report
from moejax.train import checkpoint, writers
from moejax.train.progress import Reporter
from moejax.train.setup import Run

EVAL_FILE = "eval.json"

MAX_TOKENS = 4_000_000
"""The final evaluation reads at most so many validation tokens."""

_PROMPT_BYTES = 60
_SAMPLE_TOKENS = 160


def finish(run: Run, reporter: Reporter) -> dict[str, Any]:
  """Evaluates, samples, draws, writes and tells. Every process calls it.

  Returns:
    The content of eval.json with `status` and `exit_code`.
  """
  step = int(run.state["step"])
  result: dict[str, Any] = {"step": step}
  if run.dataset.num_tokens("validation"):
    result |= final_evaluation(run)
  if jax.process_count() == 1:
    # A sample is for a person to look at, and not worth a collective.
    result["sample"] = sample(run)
  if jax.process_index() == 0:
    write_json(run.workdir / EVAL_FILE, result)
    picture = report.draw(run.workdir)
    reporter.close()
    reporter.message(summary(run, result, picture))
  return result | {"status": "done", "exit_code": 0}


def already_done(run: Run, reporter: Reporter) -> dict[str, Any]:
  """Says that nothing is left to do, after making up what a kill prevented."""
  path = run.workdir / EVAL_FILE
  result = _read(path)
  if result.get("step") != run.start_step:
    return finish(run, reporter)
  picture = report.draw(run.workdir) if jax.process_index() == 0 else None
  reporter.close()
  reporter.message(
    f"Already done: {run.workdir} is at step {run.start_step} of "
    f"{run.config.train.num_steps}. A larger --config.train.num_steps goes on from there."
  )
  reporter.message(summary(run, result, picture))
  return result | {"status": "already_done", "exit_code": 0}


def final_evaluation(run: Run) -> dict[str, Any]:
  """Validation loss, by domain too, and the baselines on the same bytes."""
  config = run.config
  batch_size = perplexity.divisible_batch(
    config.train.batch_size // config.train.accumulation, run.mesh
  )
  num_tokens = run.dataset.num_tokens("validation")
  limit = 0
  if num_tokens > MAX_TOKENS:
    limit = MAX_TOKENS // (batch_size * config.data.sequence_length)
  values = perplexity.evaluate(
    perplexity.make_model(config, run.dataset.tokenizer.vocab_size),
    run.state["params"],
    run.dataset,
    split="validation",
    mesh=run.mesh,
    batch_size=batch_size,
    capacity_factors=(config.moe.eval_capacity_factor,),
    limit=limit,
  )
  out = values | perplexity.headline(values, config.moe.eval_capacity_factor)
  # The bytes of all processes' rows: process 0 reads them again by itself.
  if jax.process_index() == 0:
    out["baselines"] = measure_baselines(run.dataset, values, batch_size, limit)
  return out


def measure_baselines(
  dataset: Any, values: dict[str, Any], batch_size: int, limit: int
) -> dict[str, dict[str, float]]:
  """What knowing nothing but byte frequencies, and what xz, make of the same bytes.

  Args:
    dataset: the run's.
    values: of the evaluation, for its numbers of tokens and bytes.
    batch_size: of the evaluation.
    limit: of the evaluation.

  Returns:
    For each, bits_per_byte and `loss`, the same in nats per token of this run's
    tokenizer, so that it can be drawn beside the loss.
  """
  bits = baselines.baselines(dataset, "validation", batch_size, limit)
  nats = math.log(2) * values["bytes"] / values["tokens"]
  return {
    name: {"bits_per_byte": bits[name], "loss": bits[name] * nats}
    for name in ("unigram", "xz")
  }


def sample(run: Run) -> dict[str, str] | None:
  """Continues the beginning of a held-out document; None where that is refused."""
  split = "validation" if run.dataset.num_tokens("validation") else "train"
  document = next(iter(run.dataset.raw_bytes(split)), b"")
  prompt = document[:_PROMPT_BYTES].decode("utf-8", "ignore")
  room = generation.context_length(run.config) // 2
  tokenizer = run.dataset.tokenizer
  prompt = tokenizer.decode(tokenizer.encode(prompt)[:room])
  try:
    generated = generation.generate(
      run.model,
      jax.device_put(run.state["params"], jax.devices()[0]),
      tokenizer,
      [prompt],
      max_length=generation.context_length(run.config),
      max_tokens=_SAMPLE_TOKENS,
      seed=run.config.train.seed,
    )
  except UserError:  # a router that looks ahead cannot generate
    return None
  return {"prompt": prompt, "continuation": generated.completions[0].text}


def summary(run: Run, result: dict[str, Any], picture: pathlib.Path | None) -> str:
  """The lines a run ends with."""
  lines = [""]
  if "loss" in result:
    lines.append(_row("validation loss", result))
    for name, title in (("unigram", "unigram entropy"), ("xz", "xz -9")):
      if name in result.get("baselines", {}):
        lines.append(_row(title, result["baselines"][name]))
  if result.get("sample"):
    text = result["sample"]["prompt"] + "|" + result["sample"]["continuation"]
    lines += ["", "sample (after the |):", *(f"  {t}" for t in text.splitlines())]
  workdir = run.workdir
  # Not simply the last step's: a full disk may have kept that one from being saved.
  saved = run.checkpointer.latest()
  paths = {
    "checkpoint": None if saved is None else workdir / checkpoint.DIRECTORY / str(saved),
    "logs": workdir / writers.METRICS_FILE,
    "evaluation": workdir / EVAL_FILE,
    "picture": picture,
  }
  lines += ["", *(f"{name:<12}{path}" for name, path in paths.items() if path)]
  return "\n".join(lines)


def _row(title: str, values: dict[str, Any]) -> str:
  row = f"{title:<18}{values['loss']:7.4f} nats/token"
  bits = values.get("bits_per_byte")
  return row if bits is None else row + f"  {bits:6.3f} bits/byte"


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  """Replaces a JSON file whole, or not at all; NaN becomes null."""
  temporary = path.with_name(path.name + ".tmp")
  text = json.dumps(writers.finite(value), indent=2, ensure_ascii=False)
  temporary.write_text(text + "\n", encoding="utf-8")
  os.replace(temporary, path)


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, json.JSONDecodeError):
    return {}
