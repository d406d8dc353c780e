"""The output of a finished run: eval.json, report.png and a printed summary."""

import math
from typing import Any

import jax

from moejax.alarms import history
from moejax.checkpoint import manager as checkpoint
from moejax.config import Config
from moejax.config.spans import target_length
from moejax.data import baselines
from moejax.errors import UserError
from moejax.evaluate import generation, groups, perplexity, report
from moejax.run import results, writers
from moejax.run.progress import Reporter, watched
from moejax.run.results import EVAL_FILE
from moejax.storage.paths import RunPath
from moejax.train.setup import Run

MAX_TOKENS = 4_000_000
"""Maximum validation tokens of the final evaluation, unless the config sets more."""

_TRAINED_SHARE = 4
"""Evaluating 1/4 of the tokens costs 1/12 of the training time (forward is 1/3)."""

_PROMPT_BYTES = 60
_SAMPLE_TOKENS = 160


def finish(run: Run, reporter: Reporter) -> dict[str, Any]:
  """Evaluates, samples, draws, writes eval.json and prints. Every process calls it.

  Returns:
    The content of eval.json plus `status` and `exit_code`.
  """
  step = int(run.state["step"])
  writes = jax.process_index() == 0
  result: dict[str, Any] = {"step": step}
  if run.dataset.num_tokens("validation"):
    result |= final_evaluation(run, reporter)
  if writes:
    # Before the sample, which needs the whole model on one device.
    results.write(run.workdir / EVAL_FILE, result)
  if run.config.train.sample and jax.process_count() == 1:
    # A sample is only for people to read and not worth a collective.
    result["sample"] = sample(run)
    results.write(run.workdir / EVAL_FILE, result)
  if writes:
    picture = _picture(run)
    reporter.close()
    reporter.message(summary(run, result, picture))
  return result | {"status": "done", "exit_code": 0}


def already_done(run: Run, reporter: Reporter) -> dict[str, Any]:
  """Reports that training is done; first redoes an interrupted final evaluation."""
  result = results.read(run.workdir / EVAL_FILE)
  if result.get("step") != run.start_step:
    reporter.message(
      f"{run.workdir} has taken its last step, but its final evaluation was not "
      "finished: compiling and evaluating now."
    )
    return finish(run, reporter)
  picture = _picture(run) if jax.process_index() == 0 else None
  reporter.close()
  reporter.message(
    f"Already done: {run.workdir} is at step {run.start_step} of "
    f"{run.config.train.num_steps}. A larger --config.train.num_steps continues from "
    "there."
  )
  reporter.message(summary(run, result, picture))
  return result | {"status": "already_done", "exit_code": 0}


def _picture(run: Run) -> RunPath | None:
  return report.draw(run.workdir) if run.config.train.report else None


def final_evaluation(run: Run, reporter: Reporter) -> dict[str, Any]:
  """Returns validation loss, total and by domain, and baselines on the same bytes."""
  config, factors = run.config, (run.config.moe.eval_capacity_factor,)
  batch_size = groups.batch_size(config, run.mesh, factors)
  per_batch = batch_size * target_length(config.data)
  num_tokens = run.dataset.num_tokens("validation")
  wanted = final_tokens(config, per_batch, num_tokens)
  # Rows of spans have padding: all rows are more than the tokens would fill.
  limit = 0 if wanted == num_tokens else -(-wanted // per_batch)
  covered = min(limit * per_batch or num_tokens, num_tokens)
  with watched(reporter, "final evaluation, tokens", covered) as progress:
    values = perplexity.evaluate(
      groups.make_model(config, run.dataset.tokenizer.vocab_size),
      run.state["params"],
      run.dataset,
      split="validation",
      mesh=run.mesh,
      batch_size=batch_size,
      capacity_factors=factors,
      limit=limit,
      progress=progress,
    )
  out = values | perplexity.headline(values, factors[0])
  # Over the bytes of all processes' rows, which process 0 reads again on its own.
  if jax.process_index() == 0 and values["bytes"]:
    limit = 0 if covered == num_tokens else limit
    out["baselines"] = measure_baselines(run, reporter, values, batch_size, limit)
  return out


def final_tokens(config: Config, per_batch: int, num_tokens: int) -> int:
  """Returns the number of validation tokens of the evaluation after the last step.

  Args:
    config: of the run.
    per_batch: tokens per evaluation batch.
    num_tokens: of the whole split.
  """
  train = config.train
  wanted = train.final_eval_tokens
  if wanted < 0:
    trained = train.num_steps * train.batch_size * target_length(config.data)
    # Never fewer than in evaluations during training.
    on_the_way = train.eval_batches * per_batch or num_tokens
    wanted = min(max(trained // _TRAINED_SHARE, on_the_way), MAX_TOKENS)
  return min(wanted or num_tokens, num_tokens)


def measure_baselines(
  run: Run, reporter: Reporter, values: dict[str, Any], batch_size: int, limit: int
) -> dict[str, dict[str, float]]:
  """Measures the baselines on the same bytes: byte-unigram entropy and xz.

  Args:
    run: whose dataset was evaluated.
    reporter: shows the progress of xz.
    values: of the evaluation, for its numbers of tokens and bytes.
    batch_size: of the evaluation.
    limit: of the evaluation.

  Returns:
    For each baseline, `bits_per_byte` and `loss`, the same in nats per token of this
    run's tokenizer, so that it can be plotted beside the loss.
  """
  with watched(reporter, "xz -9 of the same text, bytes", values["bytes"]) as progress:
    bits = baselines.baselines(run.dataset, "validation", batch_size, limit, progress)
  nats = math.log(2) * values["bytes"] / values["tokens"]
  return {
    name: {"bits_per_byte": bits[name], "loss": bits[name] * nats}
    for name in ("unigram", "xz")
  }


def sample(run: Run) -> dict[str, str] | None:
  """Continues the beginning of a held-out document; None if the model cannot."""
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
  except UserError:  # a non-causal router cannot generate
    return None
  return {"prompt": prompt, "continuation": generated.completions[0].text}


def summary(run: Run, result: dict[str, Any], picture: RunPath | None) -> str:
  """Returns the lines printed at the end of a run."""
  lines = [""]
  if "loss" in result:
    covered = results.coverage(result["tokens"], result.get("split_tokens"))
    lines.append(f"{_row('validation loss', result)}  ({covered})")
    for name, title in (("unigram", "byte entropy"), ("xz", "xz -9")):
      if name in result.get("baselines", {}):
        lines.append(_row(title, result["baselines"][name]))
  if result.get("sample"):
    text = result["sample"]["prompt"] + "|" + result["sample"]["continuation"]
    lines += ["", "sample (after the |):", *(f"  {t}" for t in text.splitlines())]
  workdir = run.workdir
  alarms = history.spans(writers.read(workdir / writers.METRICS_FILE))
  if alarms is not None:
    lines += ["", f"{'alarms':<18}{history.sentence(alarms)}"]
  # Not always the last step's, whose save may have failed, e.g. on a full disk.
  saved = run.checkpointer.latest()
  paths = {
    "checkpoint": None if saved is None else workdir / checkpoint.DIRECTORY / str(saved),
    "logs": writers.location(workdir),
    "evaluation": workdir / EVAL_FILE,
    "picture": picture,
  }
  lines += ["", *(f"{name:<12}{path}" for name, path in paths.items() if path)]
  return "\n".join(lines)


def _row(title: str, values: dict[str, Any]) -> str:
  row = f"{title:<18}{values['loss']:7.4f} nats/token"
  bits = values.get("bits_per_byte")
  return row if bits is None else row + f"  {bits:6.3f} bits/byte"
